"""Sum of squares and count of non-finite values against float64, and their contract."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from reference import assert_refused, assert_same_bytes_for_any_threads, normal, pointer, portable, rng, unaligned

from anellm._ffi import check, ffi, lib

NULL = ffi.NULL


def run(g: np.ndarray) -> tuple[float, int]:
    total, bad = np.full(1, -1.0), np.full(1, -1, dtype=np.int64)
    check(lib.anellm_grad_norm(pointer(total), pointer(bad), pointer(g), g.size))
    return float(total[0]), int(bad[0])


def exact(g: np.ndarray) -> float:
    """Return the sum of squares, each exact in float64, rounded once."""
    return math.fsum(float(x) * float(x) for x in g)


@given(n=st.integers(1, 300), seed=st.integers(0, 99), scale=st.sampled_from([1e-30, 1.0, 1e30]))
def test_is_the_reference(variant: str, n: int, seed: int, scale: float) -> None:
    g = unaligned(normal(seed, n, scale=scale))
    total, bad = run(g)
    assert bad == 0
    assert abs(total - exact(g)) <= 1e-14 * exact(g)  # squares of fp32 beyond fp32's own range included


@pytest.mark.parametrize("n", [16_384, 16_385, 100_003, 5_000_011])
def test_large_arrays(variant: str, n: int) -> None:
    g = normal(n, n)
    total, bad = run(g)
    expected = float(np.square(g.astype(np.float64)).sum())
    assert abs(total - expected) <= 1e-13 * expected
    assert bad == 0
    at = rng(1).choice(n, 7, replace=False)
    g[at] = [np.nan, np.inf, -np.inf, np.nan, np.inf, np.nan, -np.inf]
    assert run(g)[1] == 7


@pytest.mark.parametrize("n", range(1, 41))
def test_every_tail_and_every_place(variant: str, n: int) -> None:
    g = unaligned(normal(n, n))
    total, bad = run(g)
    total_p, bad_p = portable(lambda: run(g))
    assert abs(total - total_p) <= 1e-14 * total_p
    assert bad == bad_p == 0
    for at in range(n):
        kept = g[at]
        g[at] = np.nan
        total, bad = run(g)
        assert math.isnan(total)
        assert bad == 1
        g[at] = -np.inf
        total, bad = run(g)
        assert total == math.inf
        assert bad == 1
        g[at] = kept


def test_non_finite_by_bit_pattern(variant: str) -> None:
    bits = [0x7F800000, 0xFF800000, 0x7F800001, 0xFFC00000, 0x7FFFFFFF, 0xFFFFFFFF, 0x7F7FFFFF, 0xFF7FFFFF, 0x00000001]
    g = np.array(bits * 3, dtype=np.uint32).view(np.float32)
    assert run(g)[1] == 6 * 3
    g = np.full(100, np.nan, dtype=np.float32)
    assert run(g)[1] == 100


def test_subnormals_count(variant: str) -> None:
    g = np.full(50, 1e-45, dtype=np.float32)
    assert run(g) == (50 * float(g[0]) ** 2, 0)


def test_nothing_is_zero() -> None:
    assert run(np.empty(0, dtype=np.float32)) == (0.0, 0)


def test_threads_do_not_change_bytes(variant: str) -> None:
    g = normal(0, 1_000_003)
    assert_same_bytes_for_any_threads(lambda: tuple(np.array(x) for x in run(g)))


def test_bad_arguments_are_refused() -> None:
    total, bad, g = np.full(1, -1.0), np.full(1, -1, dtype=np.int64), normal(0, 4)
    t, b, p = pointer(total), pointer(bad), pointer(g)
    for args, word in [
        ((NULL, b, p, 4), "sum_squares is NULL"),
        ((t, NULL, p, 4), "n_nonfinite is NULL"),
        ((t, b, NULL, 4), "g is NULL"),
        ((t, b, p, -4), "n is -4"),
    ]:
        status = lib.anellm_grad_norm(*args)
        assert_refused(status, lib.ANELLM_INVALID, "anellm_grad_norm", word, untouched=(total, bad), fill=-1)
