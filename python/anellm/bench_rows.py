"""The operations on rows of tokens, apart from attention, for `bench kernels`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from anellm._ffi import check, lib
from anellm.bench_kernels import Case, _f, _random
from anellm.config import ModelConfig

_Make = Callable[..., Case]


def row_cases(shape: ModelConfig, B: int, T: int) -> Iterator[Case]:
    """Yield what a step of the model does to rows of tokens."""
    N, dim, V = B * T, shape.dim, shape.vocab_size

    def case(kernel: str, width: int, n_floats: int, *arguments: Any) -> Case:
        call = getattr(lib, f"anellm_{kernel}")

        def run() -> None:
            check(call(*(_f(a) if isinstance(a, np.ndarray) else a for a in arguments)))

        return Case(kernel, f"{N}x{width}", run, N, 0, 4 * n_floats)

    tokens = np.random.default_rng(0).integers(0, V, N).astype(np.int32)
    embedding, x, out = _random(V, dim), _random(N, dim), _random(N, dim)
    yield case("embedding_forward", dim, 2 * N * dim, out, embedding, tokens, N, dim, V)
    yield case("embedding_backward", dim, 3 * N * dim, embedding, x, tokens, N, dim, V)
    yield from (_gpt2_cases if shape.arch == "gpt2" else _llama_cases)(case, shape, B, T)
    n, logits, dlogits, losses, lse = N * V, _random(N, V), _random(N, V), _random(N), _random(N)
    yield case("cross_entropy_forward", V, n, losses, lse, logits, V, tokens, N, V)
    yield case("cross_entropy_backward", V, 2 * n, dlogits, V, logits, V, lse, tokens, N, V, 1.0)


def _llama_cases(case: _Make, shape: ModelConfig, B: int, T: int) -> Iterator[Case]:
    N, dim, hidden, half = B * T, shape.dim, shape.hidden_dim, shape.head_dim // 2
    x, out, w, dw, rstd = _random(N, dim), _random(N, dim), _random(dim), _random(dim), _random(N)
    n = N * dim
    yield case("rmsnorm_forward", dim, 2 * n, out, dim, rstd, x, dim, w, N, dim, 1e-5)
    yield case("rmsnorm_backward", dim, 3 * n, out, dim, dw, x, dim, x, dim, w, rstd, N, dim, 0)
    cos, sin, q = _random(T, half), _random(T, half), _random(N, shape.q_dim)
    for kernel in ("rope_forward", "rope_backward"):
        size = 2 * N * shape.q_dim
        yield case(kernel, shape.q_dim, size, q, shape.q_dim, cos, sin, B, T, shape.n_heads, shape.head_dim)
    gate_up, wide, dgate_up = _random(N, 2 * hidden), _random(N, hidden), _random(N, 2 * hidden)
    n = N * hidden
    yield case("swiglu_forward", hidden, 3 * n, wide, gate_up, N, hidden)
    yield case("swiglu_backward", hidden, 5 * n, dgate_up, wide, gate_up, N, hidden)


def _gpt2_cases(case: _Make, shape: ModelConfig, B: int, T: int) -> Iterator[Case]:
    N, dim, hidden = B * T, shape.dim, shape.hidden_dim
    x, out, w, b, dw, db = _random(N, dim), _random(N, dim), *(_random(dim) for _ in range(4))
    mean, rstd, n = _random(N), _random(N), N * dim
    yield case("layernorm_forward", dim, 2 * n, out, dim, mean, rstd, x, dim, w, b, N, dim, 1e-5)
    yield case("layernorm_backward", dim, 3 * n, out, dim, dw, db, x, dim, x, dim, w, mean, rstd, N, dim, 0)
    yield case("bias_forward", dim, 2 * n, out, dim, x, dim, b, N, dim)
    yield case("bias_backward", dim, n, db, x, dim, N, dim)
    kind = lib.ANELLM_GELU_ERF if shape.gelu == "erf" else lib.ANELLM_GELU_TANH
    pre, act, dpre, bias, n = _random(N, hidden), _random(N, hidden), _random(N, hidden), _random(hidden), N * hidden
    yield case("gelu_forward", hidden, 2 * n, act, pre, bias, N, hidden, kind)
    yield case("gelu_backward", hidden, 3 * n, dpre, act, pre, bias, N, hidden, kind)
