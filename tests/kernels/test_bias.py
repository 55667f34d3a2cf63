"""The bias: a row added to all rows, and column sums, against NumPy, and their contract."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from reference import (
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

NULL = ffi.NULL


def forward(x: np.ndarray, bias: np.ndarray, gap: int = 0) -> np.ndarray:
    n, dim = x.shape
    out, x_in = unaligned(filled(n, dim + gap)), unaligned(strided(x, dim + gap))
    check(lib.anellm_bias_forward(pointer(out), dim + gap, pointer(x_in), dim + gap, pointer(bias), n, dim))
    assert_gaps_untouched(out, dim)
    return out[:, :dim]


def backward(start: np.ndarray, dout: np.ndarray, gap: int = 0) -> np.ndarray:
    n, dim = dout.shape
    dbias, rows = unaligned(start), unaligned(strided(dout, dim + gap))
    check(lib.anellm_bias_backward(pointer(dbias), pointer(rows), dim + gap, n, dim))
    return dbias


@given(n=st.integers(1, 300), dim=st.integers(1, 140), seed=st.integers(0, 99), gap=st.integers(0, 3))
def test_both_directions_are_numpys(variant: str, n: int, dim: int, seed: int, gap: int) -> None:
    x, bias = normal(seed, n, dim), normal(seed + 1, dim)
    assert np.array_equal(forward(x, bias, gap), x + bias)
    expected = bias.astype(np.float64) + x.astype(np.float64).sum(axis=0)
    assert_within(backward(bias, x, gap), expected, 1e-6 * (np.abs(bias) + np.abs(x).sum(axis=0)))


@pytest.mark.parametrize("dim", [16384, 16385, 40000])
def test_long_rows_are_split(variant: str, dim: int) -> None:
    x, bias = normal(0, 3, dim), normal(1, dim)
    assert np.array_equal(forward(x, bias, 1), x + bias)
    assert_within(backward(bias, x), bias + x.sum(axis=0), 1e-5)


def test_backward_is_the_derivative(variant: str) -> None:
    x, bias, dout = normal(0, 9, 7), normal(1, 7), normal(2, 9, 7)
    slope = finite_differences(lambda v: float(((x + v) * dout).sum()), bias)
    assert_within(backward(np.zeros(7, np.float32), dout), slope, 2e-6)


@pytest.mark.parametrize("dim", range(1, 81))
def test_every_tail_matches_portable(variant: str, dim: int) -> None:
    x, bias = unaligned(normal(0, 5, dim)), unaligned(normal(1, dim))
    assert np.array_equal(forward(x, bias), portable(lambda: forward(x, bias)))
    # Within a block each column is added up in the order of the rows: nothing is rounded differently.
    assert np.array_equal(backward(bias, x), portable(lambda: backward(bias, x)))


def test_in_place_gives_the_same_bytes(variant: str) -> None:
    x, bias = normal(0, 31, 77), normal(1, 77)
    expected = forward(x, bias)
    check(lib.anellm_bias_forward(pointer(x), 77, pointer(x), 77, pointer(bias), 31, 77))
    assert np.array_equal(x, expected)


def test_non_finite_stays_where_it_is(variant: str) -> None:
    x, bias = normal(0, 3, 19), normal(1, 19)
    x[1, 18], x[2, 0], bias[5] = np.nan, np.inf, -np.inf
    assert np.array_equal(forward(x, bias), x + bias, equal_nan=True)
    sums = backward(np.zeros(19, np.float32), x)
    assert np.isnan(sums[18])
    assert sums[0] == np.inf
    assert np.isfinite(sums[1:18]).all()


def test_threads_do_not_change_bytes(variant: str) -> None:
    x, bias = normal(0, 301, 301), normal(1, 301)
    assert_same_bytes_for_any_threads(lambda: (forward(x, bias), backward(bias, x)))
    wide, row = normal(2, 3, 50000), normal(3, 50000)
    assert_same_bytes_for_any_threads(lambda: (forward(wide, row), backward(row, wide)))


def test_bad_arguments_are_refused() -> None:
    x, bias, out, dbias = normal(0, 2, 8), normal(1, 8), filled(2, 8), filled(8)
    good: dict[str, Any] = {"out": pointer(out), "ld_out": 8, "x": pointer(x), "ld_x": 8, "bias": pointer(bias)}
    good |= {"N": 2, "dim": 8}
    for name, value, word in [
        ("out", NULL, "out is NULL"),
        ("x", NULL, "x is NULL"),
        ("bias", NULL, "bias is NULL"),
        ("N", -1, "N is -1"),
        ("dim", -1, "dim is -1"),
        ("ld_out", 7, "ld_out is 7"),
        ("ld_x", 7, "ld_x is 7"),
    ]:
        status = lib.anellm_bias_forward(*{**good, name: value}.values())
        assert_refused(status, lib.ANELLM_INVALID, "anellm_bias_forward", word, untouched=(out,))
    both = filled(2, 9)
    status = lib.anellm_bias_forward(pointer(both), 9, pointer(both), 8, pointer(bias), 2, 8)
    assert_refused(status, lib.ANELLM_INVALID, "ld_out is 9 and ld_x is 8", untouched=(both,))
    for args, word in [
        ((NULL, pointer(x), 8, 2, 8), "dbias is NULL"),
        ((pointer(dbias), NULL, 8, 2, 8), "dout is NULL"),
        ((pointer(dbias), pointer(x), 7, 2, 8), "ld_dout is 7"),
        ((pointer(dbias), pointer(x), 8, -2, 8), "N is -2"),
        ((pointer(dbias), pointer(x), 8, 2, -8), "dim is -8"),
    ]:
        assert_refused(
            lib.anellm_bias_backward(*args), lib.ANELLM_INVALID, "anellm_bias_backward", word, untouched=(dbias,)
        )
    check(lib.anellm_bias_forward(NULL, 0, NULL, 0, NULL, 0, 8))
    check(lib.anellm_bias_backward(NULL, NULL, 0, 2, 0))
