"""A small GPT-2 in llm.c's files, made by hand, number by number, for the tests of what reads them."""

from __future__ import annotations

import struct
from typing import Any

import numpy as np
from modelfiles import Params, random_params

from anellm.config import ModelConfig

SHAPE: dict[str, Any] = {
    "arch": "gpt2", "dim": 8, "n_layers": 2, "n_heads": 2, "vocab_size": 11, "max_seq_len": 6, "bias": True,
}  # fmt: skip
KINDS = [f"{part}.{kind}" for part in ("ln_1", "attn.c_attn", "attn.c_proj", "ln_2", "mlp.c_fc", "mlp.c_proj")
         for kind in ("weight", "bias")]  # fmt: skip


def gpt2_params(config: ModelConfig, seed: int = 0) -> Params:
    """Return normal parameters, with zeros in the rows that pad the vocabulary."""
    params = random_params(config, seed)
    params["transformer.wte.weight"][config.vocab_size :] = 0
    return params


def ints(*values: int, **at: int) -> bytes:
    """Return a header of 256 int32: the first ones, and those at i<place>."""
    header = np.zeros(256, "<i4")
    header[: len(values)] = values
    for place, value in at.items():
        header[int(place[1:])] = value
    return header.tobytes()


def run_of(config: ModelConfig, params: Params, rows: int) -> np.ndarray:
    """Return all tensors in llm.c's order, fp32 (n,), with so many rows of the token table."""
    wte = np.zeros((rows, config.dim), np.float32)
    wte[: config.vocab_size] = params["transformer.wte.weight"][: config.vocab_size]
    layers = [params[f"transformer.h.{i}.{kind}"] for kind in KINDS for i in range(config.n_layers)]
    last = [params["transformer.ln_f.weight"], params["transformer.ln_f.bias"]]
    parts = [wte, params["transformer.wpe.weight"], *layers, *last]
    return np.concatenate([part.reshape(-1) for part in parts]).astype("<f4")


def bf16(values: np.ndarray) -> np.ndarray:
    """Return the upper halves of fp32 numbers that have nothing in their lower halves."""
    bits = values.view("<u4")
    assert not (bits & 0xFFFF).any()
    return (bits >> 16).astype("<u2")


def llmc_bytes(config: ModelConfig, params: Params, version: int, rows: int | None = None) -> bytes:
    """Return an llm.c model file."""
    rows = config.vocab_size if version == 1 else rows or 128
    head = [20240326, version, config.max_seq_len, config.vocab_size, config.n_layers, config.n_heads, config.dim]
    values = run_of(config, params, rows)
    return ints(*head, *([] if version == 1 else [rows])) + (bf16(values) if version == 5 else values).tobytes()


def rough(params: Params) -> Params:
    """Return parameters that bfloat16 holds exactly."""
    return {name: (a.view(np.uint32) & 0xFFFF0000).view(np.float32) for name, a in params.items()}


def state_bytes(config: ModelConfig, seed: int, version: int = 2, rows: int | None = None) -> bytes:
    """Return a debug state of B = 2, T = 3 with random numbers."""
    rng = np.random.default_rng(seed)
    ids = rng.integers(0, config.vocab_size, (2, 2, 3)).astype("<i4")
    logits = rng.standard_normal((2, 3, config.vocab_size)).astype("<f4")
    rows = config.vocab_size if version == 1 else rows or 128
    grads = run_of(config, gpt2_params(config, seed), rows)
    head = ints(20240327, version, 2, 3)
    return head + ids.tobytes() + logits.tobytes() + struct.pack("<f", 2.5) + grads.tobytes()


def optimizer_bytes(config: ModelConfig, *, master: bool = True, shuffle: bool = False, processes: int = 1) -> bytes:
    """Return an optimizer state: m, v, master weights of seeds 1, 2 (absolute), 3."""
    m, v, w = (gpt2_params(config, seed) for seed in (1, 2, 3))
    v = {name: np.abs(array) for name, array in v.items()}
    head = ints(20240527, 1, processes, 0, int(master), int(shuffle), i10=40, i20=-2, i21=1, i22=7, i30=3, i32=9)
    parts = [run_of(config, tensors, 128).tobytes() for tensors in ([m, v, w] if master else [m, v])]
    tables = [struct.pack("<Q2i", 2, 1, 0), struct.pack("<Q3i", 3, 2, 0, 1), bytes(2520)] if shuffle else []
    return head + b"".join([*parts, *tables])
