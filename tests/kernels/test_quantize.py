"""Weights as 8-bit integers with a scale for each group: error bounds, edge values, every tier."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst
from reference import (
    assert_refused,
    assert_same_bytes_for_any_threads,
    assert_within,
    filled,
    normal,
    pointer,
    portable,
    strided,
    unaligned,
)

from anellm._ffi import check, ffi, lib

NULL = ffi.NULL
GROUP: int = lib.ANELLM_QUANTIZE_GROUP
TINY = np.float32(2.0**-126)  # FLT_MIN


def groups(k: int) -> int:
    return -(-k // GROUP)


def quantize(w: np.ndarray, extra: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Return q (N, K) and scales (N, groups), from rows with NaN in the gaps between them."""
    n, k = w.shape
    wide = strided(w, k + extra)
    wide[:, k:] = np.nan
    wide = unaligned(wide)
    q, scales = np.full((n, k), 99, np.int8), filled(n, groups(k))
    check(lib.anellm_quantize_int8(pointer(q), pointer(scales), pointer(wide), k + extra, n, k))
    return q, scales


def dequantize(q: np.ndarray, scales: np.ndarray) -> np.ndarray:
    out = filled(*q.shape)
    check(lib.anellm_dequantize_int8(pointer(out), pointer(q), pointer(scales), *q.shape))
    return out


def per_value(scales: np.ndarray, k: int) -> np.ndarray:
    """Return each value's scale, in float64."""
    return np.repeat(scales.astype(np.float64), GROUP, axis=1)[:, :k]


def expected_scales(w: np.ndarray) -> np.ndarray:
    n, k = w.shape
    padded = np.zeros((n, groups(k) * GROUP), np.float32)
    padded[:, :k] = np.abs(w)
    top = padded.reshape(n, -1, GROUP).max(axis=2)
    return np.where(top == 0, np.float32(0), np.maximum(top / np.float32(127), TINY))


@settings(max_examples=60)
@given(
    n=st.integers(1, 9),
    k=st.integers(1, 300),
    extra=st.integers(0, 9),
    exponent=st.integers(-140, 120),
    seed=st.integers(0, 1 << 20),
)
def test_error_is_half_a_step(variant: str, n: int, k: int, extra: int, exponent: int, seed: int) -> None:
    w = (normal(seed, n, k).astype(np.float64) * 2.0**exponent).astype(np.float32)
    q, scales = quantize(w, extra)
    assert np.array_equal(scales, expected_scales(w))
    assert np.abs(q.astype(int)).max() <= 127
    step = per_value(scales, k)
    assert_within(q * step, w.astype(np.float64), step * (0.5 + 2.0**-16))
    out = dequantize(q, scales)
    assert np.array_equal(out, np.repeat(scales, GROUP, axis=1)[:, :k] * q)


@given(npst.arrays(np.float32, st.tuples(st.integers(1, 3), st.integers(1, 130)), elements=st.floats(width=32)))
def test_any_values(variant: str, w: np.ndarray) -> None:
    q, scales = quantize(w)
    for row in range(w.shape[0]):
        for g in range(groups(w.shape[1])):
            group = w[row, g * GROUP : (g + 1) * GROUP].astype(np.float64)
            found, scale = q[row, g * GROUP : (g + 1) * GROUP], float(scales[row, g])
            if not np.isfinite(group).all():
                assert np.isnan(scale)  # whatever is computed with it is NaN too
                assert (found == 0).all()
            elif not group.any():
                assert (scale, found.any()) == (0, False)
            else:
                assert np.abs(found * scale - group).max() <= (0.5 + 2.0**-16) * scale
                assert np.abs(found.astype(int)).max() <= 127


def test_ties_round_to_even(variant: str) -> None:
    w = np.array([[127, 0.5, 1.5, 2.5, -0.5, -1.5, -2.5, 126.5, -127]], np.float32)  # the scale is 1
    q, scales = quantize(w)
    assert scales.tolist() == [[1]]
    assert q.tolist() == [[127, 0, 2, 2, 0, -2, -2, 126, -127]]


def test_whole_numbers_of_steps_are_exact(variant: str) -> None:
    q = np.random.default_rng(0).integers(-127, 128, (4, 200)).astype(np.int8)
    q[:, ::GROUP] = 127  # every group has its largest
    scales = np.array([[1, 2.0**-20, 2.0**30, 0.25]] * 4, np.float32)
    w = dequantize(q, scales)
    again, found = quantize(w)
    assert np.array_equal(again, q)
    assert np.array_equal(found, scales)


@pytest.mark.parametrize("k", [*range(1, 18), 63, 64, 65, 127, 128, 129, 1000])
def test_every_tail_gives_the_portable_bytes(variant: str, k: int) -> None:
    w = normal(k, 3, k)
    q, scales = quantize(w)
    expected_q, expected = portable(lambda: quantize(w))
    assert np.array_equal(q, expected_q)
    assert np.array_equal(scales, expected)


def test_threads_do_not_change_bytes(variant: str) -> None:
    w = normal(0, 500, 333)
    assert_same_bytes_for_any_threads(lambda: (*quantize(w), dequantize(*quantize(w))))


def test_bad_arguments_are_refused() -> None:
    w, q, scales, out = normal(0, 2, 70), np.full((2, 70), 5, np.int8), filled(2, 2), filled(2, 70)
    bad = lib.ANELLM_INVALID
    good = (pointer(q), pointer(scales), pointer(w), 70, 2, 70)
    for at, value, word in [
        (0, NULL, "q is NULL"),
        (1, NULL, "scales is NULL"),
        (2, NULL, "w is NULL"),
        (3, 69, "ld_w is 69"),
        (4, -2, "N is -2"),
        (5, -70, "K is -70"),
    ]:
        args = (*good[:at], value, *good[at + 1 :])
        assert_refused(lib.anellm_quantize_int8(*args), bad, "anellm_quantize_int8", word, untouched=(scales,))
    assert (q == 5).all()
    check(lib.anellm_quantize_int8(*good))
    good = (pointer(out), pointer(q), pointer(scales), 2, 70)
    for at, value, word in [
        (0, NULL, "out is NULL"),
        (1, NULL, "q is NULL"),
        (2, NULL, "scales is NULL"),
        (3, -1, "N is -1"),
        (4, -1, "K is -1"),
    ]:
        args = (*good[:at], value, *good[at + 1 :])
        assert_refused(lib.anellm_dequantize_int8(*args), bad, "anellm_dequantize_int8", word, untouched=(out,))
    for sizes in ((0, 5), (5, 0)):
        check(lib.anellm_quantize_int8(NULL, NULL, NULL, 5, *sizes))
        check(lib.anellm_dequantize_int8(NULL, NULL, NULL, *sizes))
