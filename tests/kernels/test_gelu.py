"""GELU, exact and with tanh, against float64, finite differences, its portable kernel, and its contract."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from reference import (
    assert_refused,
    assert_same_bytes_for_any_threads,
    assert_within,
    filled,
    finite_differences,
    normal,
    pointer,
    portable,
    unaligned,
)

from anellm._ffi import check, ffi, lib

NULL = ffi.NULL
TINY = 1e-37
KINDS = {"tanh": lib.ANELLM_GELU_TANH, "erf": lib.ANELLM_GELU_ERF}
C = 2 * math.sqrt(2 / math.pi)

kinds = pytest.mark.parametrize("kind", KINDS)


def gate(v: np.ndarray, kind: str) -> tuple[np.ndarray, np.ndarray]:
    """Return s with gelu(v) = v s, and its derivative, in float64."""
    if kind == "erf":
        s = 0.5 * np.vectorize(math.erfc, otypes=[float])(-v * math.sqrt(0.5))
        return s, np.exp(-v * v / 2) / math.sqrt(2 * math.pi)
    with np.errstate(over="ignore"):
        u = C * (v + 0.044715 * v**3)
        return 1 / (1 + np.exp(-u)), C * (1 + 3 * 0.044715 * v * v) / (1 + np.exp(-u)) / (1 + np.exp(u))


def reference(v: np.ndarray, kind: str) -> np.ndarray:
    return v * gate(v, kind)[0]


def bounds(v: np.ndarray, kind: str) -> tuple[np.ndarray, np.ndarray]:
    """Return how far gelu(v) and its derivative may be off: a rounding of the exponential's argument scales both."""
    s, slope = gate(v, kind)
    scale = 1e-6 if kind == "erf" else 1e-6 * (1 + np.abs(C * (v + 0.044715 * v**3)))
    return scale * np.abs(v) * s + TINY, scale * (s + np.abs(v) * slope) + TINY


def forward(x: np.ndarray, bias: np.ndarray | None, kind: str) -> np.ndarray:
    out = unaligned(filled(*x.shape))
    check(lib.anellm_gelu_forward(pointer(out), pointer(x), pointer(bias), *x.shape, KINDS[kind]))
    return out


def backward(dout: np.ndarray, x: np.ndarray, bias: np.ndarray | None, kind: str) -> np.ndarray:
    out = unaligned(filled(*x.shape))
    check(lib.anellm_gelu_backward(pointer(out), pointer(dout), pointer(x), pointer(bias), *x.shape, KINDS[kind]))
    return out


@kinds
@given(
    n=st.integers(1, 5),
    dim=st.integers(1, 70),
    seed=st.integers(0, 99),
    scale=st.sampled_from([1e-3, 1.0, 4.0, 30.0]),
    biased=st.booleans(),
)
def test_forward_and_backward_are_the_reference(
    variant: str, kind: str, n: int, dim: int, seed: int, scale: float, biased: bool
) -> None:
    x, dout = normal(seed, n, dim, scale=scale), normal(seed + 1, n, dim)
    bias = normal(seed + 2, dim, scale=scale) if biased else None
    v = (x if bias is None else x + bias).astype(np.float64)  # the sum is rounded to fp32
    s, slope = gate(v, kind)
    bound, bound_slope = bounds(v, kind)
    assert_within(forward(x, bias, kind), v * s, bound)
    assert_within(backward(dout, x, bias, kind), dout * (s + v * slope), np.abs(dout) * bound_slope + TINY)


@kinds
def test_both_tails(variant: str, kind: str) -> None:
    """Every fp32 digit is right down to where the result is a subnormal number, and 0 and x behind that."""
    x = np.linspace(-15, 15, 30001, dtype=np.float32)[None]
    v = x.astype(np.float64)
    s, slope = gate(v, kind)
    bound, bound_slope = bounds(v, kind)
    assert_within(forward(x, None, kind), v * s, bound)
    assert_within(backward(np.ones_like(x), x, None, kind), s + v * slope, bound_slope)


@kinds
@given(n=st.integers(1, 3), dim=st.integers(1, 19), seed=st.integers(0, 99))
def test_backward_is_the_derivative(variant: str, kind: str, n: int, dim: int, seed: int) -> None:
    x, dout = normal(seed, n, dim, scale=2.0), normal(seed + 1, n, dim)
    slope = finite_differences(lambda v: float((reference(v, kind) * dout).sum()), x)
    assert_within(backward(dout, x, None, kind), slope, 1e-6 * np.abs(dout) * (1 + x * x) + 1e-7)


@kinds
@pytest.mark.parametrize("dim", range(1, 41))
def test_every_tail_matches_portable(variant: str, kind: str, dim: int) -> None:
    x, dout, bias = (unaligned(a) for a in (normal(dim, 3, dim, scale=3.0), normal(99, 3, dim), normal(98, dim)))
    bound, bound_slope = bounds((x + bias).astype(np.float64), kind)
    out, dx = forward(x, bias, kind), backward(dout, x, bias, kind)
    out_p, dx_p = portable(lambda: (forward(x, bias, kind), backward(dout, x, bias, kind)))
    assert_within(out, out_p, bound)
    assert_within(dx, dx_p, np.abs(dout) * bound_slope + TINY)


@kinds
def test_in_place_gives_the_same_bytes(variant: str, kind: str) -> None:
    x, dout, bias = normal(0, 31, 77), normal(1, 31, 77), normal(2, 77)
    expected, code = backward(dout, x, bias, kind), KINDS[kind]
    for over in (x.copy(), dout.copy()):
        ins = (pointer(over if np.array_equal(over, dout) else dout), pointer(over if np.array_equal(over, x) else x))
        check(lib.anellm_gelu_backward(pointer(over), *ins, pointer(bias), 31, 77, code))
        assert np.array_equal(over, expected)
    place = x.copy()
    check(lib.anellm_gelu_forward(pointer(place), pointer(place), pointer(bias), 31, 77, code))
    assert np.array_equal(place, forward(x, bias, kind))


@kinds
@pytest.mark.parametrize("at", [0, 17])
def test_non_finite_and_extreme_values(variant: str, kind: str, at: int) -> None:
    """Follow IEEE 754: at both ends the gate is exactly 0 or 1."""
    x, dout = np.ones((1, 18), np.float32), np.ones((1, 18), np.float32)
    clean, clean_slope = forward(x, None, kind), backward(dout, x, None, kind)
    for value, expected, slope in [
        (np.nan, np.nan, np.nan),
        (np.inf, np.inf, 1.0),
        (-np.inf, np.nan, 0.0),
        (3e38, 3e38, 1.0),
        (-3e38, 0.0, 0.0),
        (-0.0, 0.0, 0.5),
    ]:
        x[0, at] = value
        out, dx = forward(x, None, kind), backward(dout, x, None, kind)
        assert np.array_equal(out[0, at], np.float32(expected), equal_nan=True), value
        if slope == 0.5:
            assert abs(dx[0, at] - slope) < 1e-7
        else:
            assert np.array_equal(dx[0, at], np.float32(slope), equal_nan=True), value
        assert np.array_equal(np.delete(out, at), np.delete(clean, at))
        assert np.array_equal(np.delete(dx, at), np.delete(clean_slope, at))


@kinds
def test_threads_do_not_change_bytes(variant: str, kind: str) -> None:
    x, dout, bias = normal(0, 301, 301), normal(1, 301, 301), normal(2, 301)
    assert_same_bytes_for_any_threads(lambda: (forward(x, bias, kind), backward(dout, x, bias, kind)))


def test_bad_arguments_are_refused() -> None:
    x, dout, out = normal(0, 2, 8), normal(1, 2, 8), filled(2, 8)
    o, i, d = pointer(out), pointer(x), pointer(dout)
    bad = lib.ANELLM_INVALID
    for args, word in [
        ((NULL, i, NULL, 2, 8, 0), "out is NULL"),
        ((o, NULL, NULL, 2, 8, 0), "x is NULL"),
        ((o, i, NULL, -2, 8, 0), "N is -2"),
        ((o, i, NULL, 2, -8, 0), "dim is -8"),
        ((o, i, NULL, 2, 8, 2), "kind is 2"),
        ((o, i, NULL, 2, 8, -1), "kind is -1"),
    ]:
        assert_refused(lib.anellm_gelu_forward(*args), bad, "anellm_gelu_forward", word, untouched=(out,))
    for args, word in [
        ((NULL, d, i, NULL, 2, 8, 0), "dx is NULL"),
        ((o, NULL, i, NULL, 2, 8, 0), "dout is NULL"),
        ((o, d, NULL, NULL, 2, 8, 0), "x is NULL"),
        ((o, d, i, NULL, -1, 8, 0), "N is -1"),
        ((o, d, i, NULL, 2, -1, 0), "dim is -1"),
        ((o, d, i, NULL, 2, 8, 7), "kind is 7"),
    ]:
        assert_refused(lib.anellm_gelu_backward(*args), bad, "anellm_gelu_backward", word, untouched=(out,))
    check(lib.anellm_gelu_forward(NULL, NULL, NULL, 0, 8, 0))
    check(lib.anellm_gelu_backward(NULL, NULL, NULL, NULL, 2, 0, 1))
