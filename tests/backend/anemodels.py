"""Small models on the CPU and on a simulated Neural Engine, side by side."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

from anellm._ffi import check, ffi, lib, text
from anellm.config import ModelConfig
from anellm.device import AneOptions
from anellm.model import Model
from anellm.sim_device import Simulator

MHA = ModelConfig(
    dim=64,
    hidden_dim=160,
    n_layers=2,
    n_heads=4,
    n_kv_heads=4,
    head_dim=16,
    vocab_size=97,
    max_seq_len=128,
    tie_embeddings=False,
)
GQA = ModelConfig(
    dim=48, hidden_dim=100, n_layers=3, n_heads=6, n_kv_heads=2, head_dim=10, vocab_size=97, max_seq_len=128
)
QK_NORM = ModelConfig(
    dim=32,
    hidden_dim=50,
    n_layers=2,
    n_heads=4,
    n_kv_heads=2,
    head_dim=12,
    vocab_size=61,
    max_seq_len=128,
    tie_embeddings=False,
    qk_norm=True,
)
GPT2 = ModelConfig(
    arch="gpt2",
    dim=48,
    hidden_dim=110,
    n_layers=2,
    n_heads=4,
    n_kv_heads=4,
    head_dim=12,
    vocab_size=97,
    padded_vocab_size=128,
    max_seq_len=128,
    bias=True,
    gelu="tanh",
)
GPT2_PLAIN = GPT2.replace(hidden_dim=192, padded_vocab_size=97, bias=False, gelu="erf")
CONFIGS = {"mha": MHA, "gqa": GQA, "qk_norm": QK_NORM, "gpt2": GPT2, "gpt2_plain": GPT2_PLAIN}
# Evaluations of a layer, in order; those of backward go through the layers from the last to the first.
FORWARD = {"ane": ["attn_fwd", "ffn_fwd"], "cpu": ["attn_scores", "attn_values", "wo_fwd", "ffn_fwd"]}
BACKWARD = {
    "ane": ["ffn_bwd_w2", "ffn_bwd_w13", "wo_bwd", "sdpa_bwd1", "sdpa_bwd2", "qkv_bwd"],
    "cpu": ["ffn_bwd_w2", "ffn_bwd_w13", "wo_bwd", "sdpa_bwd1_given", "sdpa_bwd2_given", "qkv_bwd"],
}


def batch(config: ModelConfig, B: int, T: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Return tokens and targets (B, T), random."""
    ids = np.random.default_rng(seed).integers(0, config.vocab_size, (B, T + 1)).astype(np.int32)
    return np.ascontiguousarray(ids[:, :-1]), np.ascontiguousarray(ids[:, 1:])


def set_weights(model: Model) -> Model:
    """Give a model weights as after some training: larger matrices, norms that are not 1, biases."""
    rng = np.random.default_rng(3)
    for tensor in model.tensors:
        if tensor.name.endswith(".bias"):
            model.params[tensor.name][...] = rng.normal(0.0, 0.1, tensor.shape)
        elif tensor.kind == "vector":
            model.params[tensor.name][...] = rng.uniform(0.5, 1.5, tensor.shape)
        else:
            model.params[tensor.name][...] *= 4
    model.weights_changed()
    return model


def cpu_model(config: ModelConfig) -> Model:
    """Return a model on the CPU."""
    return set_weights(Model(config, "cpu", seed=1))


def sim_model(config: ModelConfig, **options: Any) -> Model:
    """Return the same model on the simulator, exact; ``options`` are fields of AneOptions."""
    return set_weights(Model(config, "ane-sim", seed=1, ane=AneOptions(**{"numerics": "exact"} | options)))


def simulator(model: Model) -> Simulator:
    """Return the simulator that a model is on."""
    assert model.ane is not None and model.ane.device.simulator is not None
    return model.ane.device.simulator


def attach(
    model: Model, device: Simulator, *, scaling: int = 1, softmax_cpu: int = 0, async_dw: int = 1, fallback: int = 0
) -> None:
    """Put a model of the CPU on a simulator, with options that the Python API does not show."""
    options = ffi.new("anellm_ane_options *")
    options.scaling, options.softmax_cpu, options.async_dw = scaling, softmax_cpu, async_dw
    options.fallback = fallback
    check(lib.anellm_model_attach_ane(model._pointer, device.pointer, options))


def gradients(model: Model) -> dict[str, np.ndarray]:
    """Return copies of all gradients."""
    return {name: gradient.copy() for name, gradient in model.grads.items()}


def cosine(a: np.ndarray, b: np.ndarray) -> float:
    """Return the cosine of two tensors; 0 when one is zero."""
    x, y = a.astype(np.float64).ravel(), b.astype(np.float64).ravel()
    size = float(np.sqrt(x @ x) * np.sqrt(y @ y))
    return float(x @ y) / size if size > 0 else 0.0


@contextmanager
def threads(n: int) -> Iterator[None]:
    """Compute on n threads in the block."""
    before = lib.anellm_get_threads()
    check(lib.anellm_set_threads(n))
    try:
        yield
    finally:
        check(lib.anellm_set_threads(before))


def take_trace() -> list[tuple[str, int, int, int, int]]:
    """Return what the core recorded: (name, row, layer, start_ns, end_ns), oldest first."""
    room = 4096
    events, n, lost = ffi.new(f"anellm_trace_event[{room}]"), ffi.new("int64_t *"), ffi.new("int64_t *")
    check(lib.anellm_trace_take(events, room, n, lost))
    assert lost[0] == 0
    return [(text(e.name), e.row, e.layer, e.start_ns, e.end_ns) for e in events[0 : n[0]]]
