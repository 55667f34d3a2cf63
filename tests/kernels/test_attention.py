"""Attention against float64: forward, its saved lse, and the gradients against finite differences."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import (
    SENTINEL,
    assert_gaps_untouched,
    assert_refused,
    assert_same_bytes_for_any_threads,
    assert_within,
    filled,
    finite_differences,
    normal,
    pointer,
    portable,
    strided,
    unaligned,
)

from anellm._ffi import check, ffi, lib


@dataclass(frozen=True)
class Shape:
    B: int
    Tq: int
    Tk: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    pad: int = 0  # row strides are longer than the rows by this many floats, and more for k, v and out

    @property
    def scale(self) -> float:
        return float(np.float32(1 / np.sqrt(self.head_dim)))

    def struct(self, **changes: Any) -> Any:
        q, kv = self.n_heads * self.head_dim, self.n_kv_heads * self.head_dim
        pad = self.pad
        fields = {
            "B": self.B, "Tq": self.Tq, "Tk": self.Tk, "n_heads": self.n_heads, "n_kv_heads": self.n_kv_heads,
            "head_dim": self.head_dim, "ld_q": q + pad, "ld_k": kv + 2 * pad, "ld_v": kv + 3 * pad,
            "ld_out": q + 4 * pad, "scale": self.scale,
        }  # fmt: skip
        return ffi.new("anellm_attention_shape *", {**fields, **changes})

    def inputs(self, seed: int, scale: float = 1.0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return q (B, Tq, n_heads, head_dim) and k, v (B, Tk, n_kv_heads, head_dim)."""
        kv = (self.B, self.Tk, self.n_kv_heads, self.head_dim)
        q = normal(seed, self.B, self.Tq, self.n_heads, self.head_dim, scale=scale)
        return q, normal(seed + 1, *kv, scale=scale), normal(seed + 2, *kv)


shapes = st.builds(
    lambda b, tq, more, kv, group, hd, pad: Shape(b, tq, tq + more, kv * group, kv, hd, pad),
    st.integers(1, 2),
    st.integers(1, 6),
    st.integers(0, 4),
    st.integers(1, 2),
    st.integers(1, 3),
    st.integers(1, 9),
    st.integers(0, 3),
)


def probabilities(q: np.ndarray, k: np.ndarray, scale: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return p (B, H, Tq, Tk), lse (B, H, Tq) and k repeated for each query head, in float64."""
    q, k = q.astype(np.float64), k.astype(np.float64)
    k = np.repeat(k, q.shape[2] // k.shape[2], axis=2)
    s = np.einsum("bihd,bjhd->bhij", q, k) * scale
    tq, tk = s.shape[2:]
    s = np.where(np.arange(tk)[None, :] <= np.arange(tq)[:, None] + tk - tq, s, -np.inf)
    top = s.max(axis=-1, keepdims=True)
    e = np.exp(s - top)
    total = e.sum(axis=-1, keepdims=True)
    return e / total, (top + np.log(total))[..., 0], k


def forward64(q: np.ndarray, k: np.ndarray, v: np.ndarray, scale: float) -> np.ndarray:
    p, _, _ = probabilities(q, k, scale)
    return np.einsum("bhij,bjhd->bihd", p, np.repeat(v.astype(np.float64), q.shape[2] // v.shape[2], axis=2))


def backward64(dout: np.ndarray, q: np.ndarray, k: np.ndarray, v: np.ndarray, scale: float) -> tuple[np.ndarray, ...]:
    """Return dq, dk, dv in float64 (checked against finite differences below)."""
    b, tk, n_kv, hd = k.shape
    p, _, kr = probabilities(q, k, scale)
    vr = np.repeat(v.astype(np.float64), q.shape[2] // n_kv, axis=2)
    dout = dout.astype(np.float64)
    dp = np.einsum("bihd,bjhd->bhij", dout, vr)
    ds = p * (dp - (p * dp).sum(axis=-1, keepdims=True)) * scale
    dq = np.einsum("bhij,bjhd->bihd", ds, kr)
    dk = np.einsum("bhij,bihd->bjhd", ds, q.astype(np.float64)).reshape(b, tk, n_kv, -1, hd).sum(axis=3)
    dv = np.einsum("bhij,bihd->bjhd", p, dout).reshape(b, tk, n_kv, -1, hd).sum(axis=3)
    return dq, dk, dv


def rows(x: np.ndarray, stride: int) -> np.ndarray:
    """Return x (B, T, H, D) as an unaligned (B * T, stride) array with gaps."""
    return unaligned(strided(x.reshape(x.shape[0] * x.shape[1], -1), stride))


def run_forward(shape: Shape, q: np.ndarray, k: np.ndarray, v: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    s = shape.struct()
    out = rows(np.full(q.shape, np.nan, np.float32), s.ld_out)
    lse = np.full((shape.B, shape.n_heads, shape.Tq), np.nan, np.float32)
    rq, rk, rv = rows(q, s.ld_q), rows(k, s.ld_k), rows(v, s.ld_v)
    check(lib.anellm_attention_forward(pointer(out), pointer(lse), pointer(rq), pointer(rk), pointer(rv), s))
    width = shape.n_heads * shape.head_dim
    assert_gaps_untouched(out, width)
    return np.ascontiguousarray(out[:, :width]).reshape(q.shape), lse


def run_backward(
    shape: Shape, dout: np.ndarray, out: np.ndarray, lse: np.ndarray, q: np.ndarray, k: np.ndarray, v: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    s = shape.struct()
    strides = (s.ld_q, s.ld_k, s.ld_v)
    grads = [rows(np.full(x.shape, np.nan, np.float32), ld) for x, ld in zip((q, k, v), strides, strict=True)]
    saved = [rows(dout, s.ld_out), rows(out, s.ld_out), lse]
    saved += [rows(x, ld) for x, ld in zip((q, k, v), strides, strict=True)]
    check(lib.anellm_attention_backward(*map(pointer, grads), *map(pointer, saved), s))
    results = []
    for grad, x in zip(grads, (q, k, v), strict=True):
        width = x.shape[2] * x.shape[3]
        assert_gaps_untouched(grad, width)
        results.append(np.ascontiguousarray(grad[:, :width]).reshape(x.shape))
    return tuple(results)  # type: ignore[return-value]


def check_forward(shape: Shape, seed: int, scale: float = 1.0) -> tuple[np.ndarray, ...]:
    q, k, v = shape.inputs(seed, scale)
    out, lse = run_forward(shape, q, k, v)
    _, expected_lse, _ = probabilities(q, k, shape.scale)
    # A score is a sum of head_dim products: its rounding error grows with |q| |k|, and moves p by as much.
    size = np.abs(q).max() * np.abs(k).max() * shape.head_dim * shape.scale
    error = 2.0**-22 * (8 + size)
    assert_within(lse, expected_lse, error * (1 + np.abs(expected_lse)))
    assert_within(out, forward64(q, k, v, shape.scale), error * np.abs(v).max() * 2)
    return q, k, v, out, lse


@settings(max_examples=50)
@given(shape=shapes, seed=st.integers(0, 1 << 20))
def test_forward_small(variant: str, shape: Shape, seed: int) -> None:
    check_forward(shape, seed)


LARGE = [
    Shape(1, 65, 65, 2, 1, 16),
    Shape(2, 130, 130, 3, 3, 33, 5),
    Shape(1, 300, 300, 2, 2, 64),  # more than one block of keys
    Shape(1, 70, 330, 4, 2, 20, 1),  # a block of queries that ends inside a block of keys
    Shape(2, 1, 600, 6, 2, 48, 2),  # decoding, several blocks of keys
    Shape(1, 1, 40, 70, 1, 8),  # decoding with more query heads than a block has rows
    Shape(1, 1, 1, 1, 1, 1),
    Shape(1, 3, 700, 5, 5, 7),
]


@pytest.mark.parametrize("shape", LARGE, ids=str)
def test_forward_large(variant: str, shape: Shape) -> None:
    check_forward(shape, 7)


def test_large_scores(variant: str) -> None:
    """Scores of thousands, rising and falling from block to block, so that exp must not see them as they are."""
    shape = Shape(1, 600, 600, 2, 1, 8)
    q, k, v = shape.inputs(3, scale=30.0)
    for ramp in (np.linspace(-20, 20, 600), np.linspace(20, -20, 600)):
        k2 = (k + ramp[None, :, None, None]).astype(np.float32)
        out, lse = run_forward(shape, q, k2, v)
        _, expected_lse, _ = probabilities(q, k2, shape.scale)
        assert np.abs(expected_lse).max() > 1000
        assert np.isfinite(out).all()
        assert_within(lse, expected_lse, 3e-6 * np.abs(expected_lse).max())


@settings(max_examples=25)
@given(shape=shapes, seed=st.integers(0, 1 << 20))
def test_backward_finite_differences(variant: str, shape: Shape, seed: int) -> None:
    q, k, v, out, lse = check_forward(shape, seed)
    dout = normal(seed + 3, *out.shape)
    grads = run_backward(shape, dout, out, lse, q, k, v)
    inputs = [q, k, v]
    for i, grad in enumerate(grads):

        def loss(x: np.ndarray, i: int = i) -> float:
            changed = [*inputs]
            changed[i] = x
            return float((forward64(*changed, shape.scale) * dout).sum())

        expected = finite_differences(loss, inputs[i])
        assert_within(grad, expected, 2e-5 * (1 + np.abs(expected).max()))
        assert_within(backward64(dout, q, k, v, shape.scale)[i].astype(np.float32), expected, 1e-6 * 30)


@pytest.mark.parametrize("shape", LARGE, ids=str)
def test_backward_large(variant: str, shape: Shape) -> None:
    q, k, v, out, lse = check_forward(shape, 11)
    dout = normal(14, *out.shape)
    for grad, expected in zip(
        run_backward(shape, dout, out, lse, q, k, v), backward64(dout, q, k, v, shape.scale), strict=True
    ):
        assert_within(grad, expected, 5e-6 * (1 + np.abs(expected).max()))


@pytest.mark.parametrize("shape", [Shape(1, 130, 130, 4, 2, 24, 3), Shape(1, 1, 300, 4, 2, 24)], ids=str)
def test_matches_portable(variant: str, shape: Shape) -> None:
    q, k, v = shape.inputs(5)
    out, lse = run_forward(shape, q, k, v)
    out_p, lse_p = portable(lambda: run_forward(shape, q, k, v))
    assert_within(out, out_p, 3e-6)
    assert_within(lse, lse_p, 3e-6)
    dout = normal(6, *out.shape)
    expected = portable(lambda: run_backward(shape, dout, out, lse, q, k, v))
    for grad, grad_p in zip(run_backward(shape, dout, out, lse, q, k, v), expected, strict=True):
        assert_within(grad, grad_p, 1e-5)


def test_decoding_equals_the_last_row(variant: str) -> None:
    whole = Shape(2, 290, 290, 4, 2, 32)
    q, k, v = whole.inputs(1)
    out, lse = run_forward(whole, q, k, v)
    last = Shape(2, 1, 290, 4, 2, 32)
    out1, lse1 = run_forward(last, np.ascontiguousarray(q[:, -1:]), k, v)
    assert_within(out1, out[:, -1:], 2e-6)
    assert_within(lse1, lse[:, :, -1:], 2e-6)


def test_later_keys_do_not_matter(variant: str) -> None:
    shape = Shape(1, 150, 150, 2, 1, 16)
    q, k, v = shape.inputs(1)
    out, lse = run_forward(shape, q, k, v)
    k2, v2 = k.copy(), v.copy()
    k2[:, 100:] += 1
    v2[:, 100:] -= 5
    out2, lse2 = run_forward(shape, q, k2, v2)
    assert np.array_equal(out[:, :100], out2[:, :100])
    assert np.array_equal(lse[:, :, :100], lse2[:, :, :100])
    assert not np.isclose(out[:, 100:], out2[:, 100:]).any()


def test_non_finite_values_are_not_hidden(variant: str) -> None:
    shape = Shape(1, 20, 20, 2, 2, 8)
    q, k, v = shape.inputs(1)
    for value in (np.nan, np.inf):
        bad = q.copy()
        bad[0, 7, 1, 3] = value
        out, lse = run_forward(shape, bad, k, v)
        assert np.isnan(out[0, 7, 1]).all()
        finite = np.ones((20, 2), bool)
        finite[7, 1] = False
        assert np.isfinite(out[0][finite]).all()
        assert np.isfinite(lse[0].T[finite]).all()
        assert not np.isfinite(lse[0, 1, 7])
        bad = v.copy()
        bad[0, 0, 0, 2] = value
        out, _ = run_forward(shape, q, k, bad)
        assert not np.isfinite(out[0, :, 0, 2]).any()
        assert np.isfinite(out[0, :, 1]).all()


def test_minus_infinity_scores_are_masked(variant: str) -> None:
    """Keys at score -inf get no weight, even when they fill the first block of keys."""
    shape = Shape(1, 4, 400, 1, 1, 2)
    q, k, v = shape.inputs(1)
    q[...] = np.abs(q)
    k[:, :300, :, 0] = -np.inf
    out, lse = run_forward(shape, q, k, v)
    _, expected_lse, _ = probabilities(q, k, shape.scale)
    assert_within(lse, expected_lse, 1e-5)
    assert_within(out, forward64(q, k, v, shape.scale), 1e-5)


def test_lse_may_be_left_out(variant: str) -> None:
    shape = Shape(1, 5, 5, 2, 1, 8)
    q, k, v = shape.inputs(1)
    out = np.full_like(q, np.nan)
    args = [pointer(x) for x in (q, k, v)]
    check(lib.anellm_attention_forward(pointer(out), ffi.NULL, *args, shape.struct()))
    assert np.array_equal(out, run_forward(shape, q, k, v)[0])


def test_zero_sizes(variant: str) -> None:
    out, some = filled(4, 4), normal(1, 4, 4)
    p = pointer(some)
    for empty in (Shape(0, 2, 2, 1, 1, 4), Shape(1, 0, 0, 1, 1, 4)):
        check(lib.anellm_attention_forward(pointer(out), pointer(out), p, p, p, empty.struct()))
        check(lib.anellm_attention_backward(*[pointer(out)] * 3, *[p] * 6, empty.struct()))
        check(lib.anellm_attention_forward(*[ffi.NULL] * 5, empty.struct()))
        check(lib.anellm_attention_backward(*[ffi.NULL] * 9, empty.struct()))
    check(lib.anellm_attention_forward(pointer(out), ffi.NULL, p, p, p, Shape(1, 0, 3, 1, 1, 4).struct()))
    assert (out == SENTINEL).all()
    # Without queries the keys and values have no influence on anything.
    dk, dv = filled(3, 4), filled(3, 4)
    check(
        lib.anellm_attention_backward(
            pointer(out), pointer(dk), pointer(dv), *[p] * 6, Shape(1, 0, 3, 1, 1, 4).struct()
        )
    )
    assert (dk == 0).all() and (dv == 0).all() and (out == SENTINEL).all()


def test_bad_arguments() -> None:
    shape = Shape(2, 3, 4, 4, 2, 5)
    q, k, v = shape.inputs(1)
    grads = [np.full_like(x, SENTINEL) for x in (q, k, v)]
    out, lse = np.full_like(q, SENTINEL), filled(2, 4, 3)
    forward = [pointer(x) for x in (out, lse, q, k, v)]
    backward = [pointer(x) for x in (*grads, q, q, lse, q, k, v)]
    bad: list[tuple[str, int]] = [
        ("B", -1), ("Tq", -1), ("Tk", 2), ("n_heads", 0), ("n_heads", 5), ("n_kv_heads", 0), ("head_dim", 0),
        ("ld_q", 19), ("ld_k", 9), ("ld_v", 8), ("ld_out", 7),
    ]  # fmt: skip
    untouched = (out, lse, *grads)
    for name, value in bad:
        changed = shape.struct(**{name: value})
        for function, call, arguments in (
            ("anellm_attention_forward", lib.anellm_attention_forward, forward),
            ("anellm_attention_backward", lib.anellm_attention_backward, backward),
        ):
            status = call(*arguments, changed)
            assert_refused(status, lib.ANELLM_INVALID, function, f"shape.{name} is {value}", untouched=untouched)
    for call, arguments, names in (
        (lib.anellm_attention_forward, forward, ("out", None, "q", "k", "v", "shape")),
        (
            lib.anellm_attention_backward,
            backward,
            ("dq", "dk", "dv", "dout", "out", "lse", "q", "k", "v", "shape"),
        ),
    ):
        for i, name in enumerate(names):
            if name is not None:
                changed = [*arguments, shape.struct()]
                changed[i] = ffi.NULL
                assert_refused(call(*changed), lib.ANELLM_INVALID, f": {name} is NULL", untouched=untouched)


@pytest.mark.parametrize("shape", [Shape(2, 140, 150, 4, 2, 24, 1), Shape(3, 1, 90, 4, 2, 24)], ids=str)
def test_same_bytes_for_any_threads(variant: str, shape: Shape) -> None:
    q, k, v = shape.inputs(1)
    dout = normal(4, *q.shape)

    def run() -> tuple[np.ndarray, ...]:
        out, lse = run_forward(shape, q, k, v)
        return (out, lse, *run_backward(shape, dout, out, lse, q, k, v))

    assert_same_bytes_for_any_threads(run)


def test_concurrent_calls(variant: str) -> None:
    check(lib.anellm_set_threads(3))
    cases = [Shape(1, 20 + i, 30 + 2 * i, 4, 2, 8 + i) for i in range(5)]
    alone = [run_forward(s, *s.inputs(1)) for s in cases]

    def run(i: int) -> bool:
        s = cases[i % len(cases)]
        out, lse = run_forward(s, *s.inputs(1))
        expected = alone[i % len(cases)]
        return np.array_equal(out, expected[0]) and np.array_equal(lse, expected[1])

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(run, range(60)))
