"""Small models, and their programs on the simulator beside what they compute in float64 (anellm.ane_reference)."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from anellm.ane_reference import (
    Arrays,
    Batch,
    attention_backward,
    attention_forward,
    attention_values,
    ffn_forward,
    make_values,
    mlp_forward,
    pack,
    scores,
    softmax,
    unpack,
)
from anellm.config import ModelConfig
from anellm.mil import AneProgram
from anellm.sim import Program, Simulator

__all__ = [
    "Arrays",
    "Batch",
    "attention_backward",
    "attention_forward",
    "attention_values",
    "evaluate",
    "ffn_forward",
    "gpt2",
    "make_values",
    "mlp_forward",
    "model",
    "pack",
    "scores",
    "softmax",
    "unpack",
]


def model(dim: int, hidden: int, n_heads: int, n_kv_heads: int, head_dim: int, *, qk_norm: bool = False) -> ModelConfig:
    return ModelConfig(
        dim=dim, hidden_dim=hidden, n_layers=1, n_heads=n_heads, n_kv_heads=n_kv_heads, head_dim=head_dim,
        vocab_size=32, max_seq_len=4096, qk_norm=qk_norm, norm_eps=1e-6 if qk_norm else 1e-5,
    )  # fmt: skip


def gpt2(dim: int, hidden: int, n_heads: int, *, bias: bool, gelu: str) -> ModelConfig:
    return ModelConfig(
        arch="gpt2", dim=dim, hidden_dim=hidden, n_layers=1, n_heads=n_heads, n_kv_heads=n_heads,
        head_dim=dim // n_heads, vocab_size=32, max_seq_len=4096, bias=bias, gelu=gelu,
    )  # fmt: skip


def evaluate(
    sim: Simulator, program: AneProgram, values: Mapping[str, np.ndarray], batch: Batch
) -> tuple[Arrays, Program]:
    """Compile and run a program on arrays; return its fields, and the compiled program with its findings."""
    compiled = sim.compile(program.mil, program.files)
    output = compiled.run({"a_input0": pack(program, values, batch)})["z_output0"]
    return unpack(program, output, batch), compiled
