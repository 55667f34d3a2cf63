"""SwiGLU against float64, finite differences, its portable kernel, and its contract."""

from __future__ import annotations

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
TINY = 1e-33  # exp(-gate) overflows below -88: the result is then 0 instead of some 1e-38 * gate * up


def reference(gate_up: np.ndarray) -> np.ndarray:
    gate, up = np.split(gate_up.astype(np.float64), 2, axis=1)
    return gate / (1 + np.exp(-gate)) * up


def reference_backward(dout: np.ndarray, gate_up: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the gradient and the magnitude of what is added up in it."""
    gate, up = np.split(gate_up.astype(np.float64), 2, axis=1)
    s = 1 / (1 + np.exp(-gate))
    dgate, dup = dout * up * s * (1 + gate * (1 - s)), dout * gate * s
    size = np.abs(dout * up * s) * (1 + np.abs(gate))
    return np.hstack([dgate, dup]), np.hstack([size, np.abs(dup)])


def forward(gate_up: np.ndarray) -> np.ndarray:
    n, width = gate_up.shape
    out = unaligned(filled(n, width // 2))
    check(lib.anellm_swiglu_forward(pointer(out), pointer(gate_up), n, width // 2))
    return out


def backward(dout: np.ndarray, gate_up: np.ndarray) -> np.ndarray:
    out = unaligned(filled(*gate_up.shape))
    check(lib.anellm_swiglu_backward(pointer(out), pointer(dout), pointer(gate_up), *dout.shape))
    return out


@given(n=st.integers(1, 9), h=st.integers(1, 70), seed=st.integers(0, 99), scale=st.sampled_from([1.0, 10.0, 60.0]))
def test_forward_and_backward_are_the_reference(variant: str, n: int, h: int, seed: int, scale: float) -> None:
    gate_up, dout = normal(seed, n, 2 * h, scale=scale), normal(seed + 1, n, h)
    expected = reference(gate_up)
    assert_within(forward(gate_up), expected, 1e-6 * np.abs(expected) + TINY)
    expected, size = reference_backward(dout, gate_up)
    assert_within(backward(dout, gate_up), expected, 1e-6 * size + TINY)


@given(n=st.integers(1, 3), h=st.integers(1, 19), seed=st.integers(0, 99))
def test_backward_is_the_derivative(variant: str, n: int, h: int, seed: int) -> None:
    gate_up, dout = normal(seed, n, 2 * h, scale=3.0), normal(seed + 1, n, h)
    slope = finite_differences(lambda v: float((reference(v) * dout).sum()), gate_up)
    assert_within(backward(dout, gate_up), slope, 1e-6 * reference_backward(dout, gate_up)[1] + 1e-7)


@pytest.mark.parametrize("h", range(1, 41))
def test_every_tail_matches_portable(variant: str, h: int) -> None:
    gate_up, dout = unaligned(normal(h, 3, 2 * h, scale=4.0)), unaligned(normal(99, 3, h))
    out, dgate_up = forward(gate_up), backward(dout, gate_up)
    out_p, dgate_up_p = portable(lambda: (forward(gate_up), backward(dout, gate_up)))
    assert_within(out, out_p, 1e-6 * np.abs(out_p))
    assert_within(dgate_up, dgate_up_p, 1e-6 * reference_backward(dout, gate_up)[1])


def test_in_place_gives_the_same_bytes(variant: str) -> None:
    gate_up, dout = normal(0, 31, 2 * 77), normal(1, 31, 77)
    expected = backward(dout, gate_up)
    check(lib.anellm_swiglu_backward(pointer(gate_up), pointer(dout), pointer(gate_up), 31, 77))
    assert np.array_equal(gate_up, expected)


@pytest.mark.parametrize("at", [0, 17])
def test_non_finite_and_extreme_values(variant: str, at: int) -> None:
    """Follow IEEE 754: at both ends the sigmoid is exactly 0 or 1."""
    gate_up, dout = np.ones((1, 36), dtype=np.float32), np.ones((1, 18), dtype=np.float32)
    clean = forward(gate_up)
    for gate, expected in [(np.nan, np.nan), (np.inf, np.inf), (-np.inf, np.nan), (3e38, 3e38), (-3e38, 0.0)]:
        gate_up[0, at] = gate
        out = forward(gate_up)
        assert np.array_equal(out[0, at], np.float32(expected), equal_nan=True), gate
        assert np.array_equal(np.delete(out, at), np.delete(clean, at))
        assert np.isfinite(np.delete(backward(dout, gate_up)[0], [at, at + 18])).all()
    gate_up[0, at] = np.nan
    dgate_up = backward(dout, gate_up)
    assert np.isnan(dgate_up[0, [at, at + 18]]).all()


def test_threads_do_not_change_bytes(variant: str) -> None:
    gate_up, dout = normal(0, 301, 2 * 301), normal(1, 301, 301)
    assert_same_bytes_for_any_threads(lambda: (forward(gate_up), backward(dout, gate_up)))


def test_bad_arguments_are_refused() -> None:
    gate_up, dout, out, dgate_up = normal(0, 2, 8), normal(1, 2, 4), filled(2, 4), filled(2, 8)
    o, g, d, dg = pointer(out), pointer(gate_up), pointer(dout), pointer(dgate_up)
    bad = lib.ANELLM_INVALID
    for args, word in [
        ((NULL, g, 2, 4), "out is NULL"),
        ((o, NULL, 2, 4), "gate_up is NULL"),
        ((o, g, -2, 4), "N is -2"),
        ((o, g, 2, -4), "hidden_dim is -4"),
    ]:
        assert_refused(lib.anellm_swiglu_forward(*args), bad, "anellm_swiglu_forward", word, untouched=(out,))
    for args, word in [
        ((NULL, d, g, 2, 4), "dgate_up is NULL"),
        ((dg, NULL, g, 2, 4), "dout is NULL"),
        ((dg, d, NULL, 2, 4), "gate_up is NULL"),
        ((dg, d, g, -1, 4), "N is -1"),
        ((dg, d, g, 2, -1), "hidden_dim is -1"),
    ]:
        assert_refused(lib.anellm_swiglu_backward(*args), bad, "anellm_swiglu_backward", word, untouched=(dgate_up,))
    check(lib.anellm_swiglu_forward(NULL, NULL, 0, 4))
    check(lib.anellm_swiglu_backward(NULL, NULL, NULL, 2, 0))
