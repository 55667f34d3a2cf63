"""Both matrix products against NumPy: every layout, every tail, strides, blocks, threads."""

from __future__ import annotations

import itertools
from concurrent.futures import ThreadPoolExecutor
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
    normal,
    pointer,
    rng,
    strided,
    unaligned,
)

from anellm._ffi import check, ffi, lib, text

LAYOUTS = list(itertools.product((0, 1), (0, 1)))  # (trans_a, trans_b)
EPS = 2.0**-24
FUNCTIONS = {"fp32": lib.anellm_matmul, "bf16": lib.anellm_matmul_bf16}


def stored(matrix: np.ndarray, transposed: int) -> np.ndarray:
    return np.ascontiguousarray(matrix.T if transposed else matrix)


def matmul(
    product: str, a: np.ndarray, b: np.ndarray, trans_a: int = 0, trans_b: int = 0, c: np.ndarray | None = None
) -> np.ndarray:
    """Return a @ b, or c + a @ b, computed by the C core from the stored forms of a and b."""
    m, k = a.shape
    n = b.shape[1]
    out = np.full((m, n), np.nan, np.float32) if c is None else c.copy()
    a, b = stored(a, trans_a), stored(b, trans_b)
    check(
        FUNCTIONS[product](
            pointer(out), n, pointer(a), a.shape[1], trans_a, pointer(b), b.shape[1], trans_b, m, n, k, c is not None
        )
    )
    return out


def integers(seed: int, *shape: int) -> np.ndarray:
    """Return small whole numbers: their products and sums are exact in fp32, in any order."""
    return rng(seed).integers(-3, 4, shape).astype(np.float32)


def bound(a: np.ndarray, b: np.ndarray, c: np.ndarray | None = None) -> np.ndarray:
    """Bound the rounding of sums of K products in any order: (K + 2) eps sum |a b| (Higham 2002, 3.1)."""
    size = np.abs(a).astype(np.float64) @ np.abs(b).astype(np.float64)
    if c is not None:
        size = size + np.abs(c)
    return (a.shape[1] + 2) * EPS * size * 1.01 + 1e-40


def rounded(x: np.ndarray) -> np.ndarray:
    """Return x rounded to bf16, as fp32."""
    half, wide = np.empty(x.shape, np.uint16), np.empty(x.shape, np.float32)
    check(lib.anellm_convert_f32_to_bf16(pointer(half), pointer(np.ascontiguousarray(x)), x.size))
    check(lib.anellm_convert_bf16_to_f32(pointer(wide), pointer(half), x.size))
    return wide


def bf16_bound(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    """Bound the product of inputs that are each off by 2^-8 of their size, on top of the sums' rounding."""
    return bound(a, b, c) + 2.0**-7 * 1.01 * (np.abs(a).astype(np.float64) @ np.abs(b))


@settings(max_examples=60)
@given(
    m=st.integers(1, 130),
    n=st.integers(1, 130),
    k=st.integers(1, 300),
    layout=st.sampled_from(LAYOUTS),
    accumulate=st.booleans(),
    extra=st.tuples(st.integers(0, 9), st.integers(0, 9), st.integers(0, 9)),
    seed=st.integers(0, 1 << 20),
)
def test_matches_float64(
    product: str, m: int, n: int, k: int, layout: tuple[int, int], accumulate: bool, extra: tuple[int, ...], seed: int
) -> None:
    trans_a, trans_b = layout
    a, b, c = normal(seed, m, k), normal(seed + 1, k, n), normal(seed + 2, m, n)
    sa, sb = stored(a, trans_a), stored(b, trans_b)
    # Rows longer than needed, with NaN in the gaps of the inputs, and addresses off by one float.
    ld_a, ld_b, ld_c = sa.shape[1] + extra[0], sb.shape[1] + extra[1], n + extra[2]
    wide_a, wide_b = strided(sa, ld_a), strided(sb, ld_b)
    wide_a[:, sa.shape[1] :] = np.nan
    wide_b[:, sb.shape[1] :] = np.nan
    wide_a, wide_b = unaligned(wide_a), unaligned(wide_b)
    wide_c = unaligned(strided(c if accumulate else np.full_like(c, np.nan), ld_c))
    check(
        FUNCTIONS[product](
            pointer(wide_c), ld_c, pointer(wide_a), ld_a, trans_a, pointer(wide_b), ld_b, trans_b, m, n, k, accumulate
        )
    )
    if product == "bf16" and (m > 4 or trans_a):  # few rows are multiplied in fp32
        assert_within(wide_c[:, :n], a.astype(np.float64) @ b + (c if accumulate else 0), bf16_bound(a, b, c))
        a, b = rounded(a), rounded(b)
    expected = a.astype(np.float64) @ b + (c if accumulate else 0)
    assert_within(wide_c[:, :n], expected, bound(a, b, c if accumulate else None))
    assert_gaps_untouched(wide_c, n)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_tail(product: str, layout: tuple[int, int]) -> None:
    for k in (1, 2, 7, 8, 9, 17):
        for m in range(1, 14):
            for n in (*range(1, 19), 31, 32, 33):
                a, b, c = integers(m, m, k), integers(n, k, n), integers(k, m, n)
                assert np.array_equal(matmul(product, a, b, *layout), a @ b), (m, n, k)
                assert np.array_equal(matmul(product, a, b, *layout, c=c), c + a @ b), (m, n, k)


@pytest.mark.parametrize(
    "shape",
    [
        (1100, 130, 70),  # more rows than columns, tiles down
        (70, 1100, 130),  # tiles across
        (40, 50, 5000),  # many blocks of k, tiles both ways
        (1050, 1060, 2100),  # more than one packed block along every dimension
        (4, 1000, 1000),  # few rows
        (5, 1000, 600),
        (1000, 4, 600),
    ],
)
def test_blocks(product: str, shape: tuple[int, int, int]) -> None:
    m, n, k = shape
    if text(lib.anellm_cpu_variant()) == "naive" and m * n * k > 1e8:
        pytest.skip("plain loops have no blocks, and take seconds for this")
    a, b, c = integers(1, m, k), integers(2, k, n), integers(3, m, n)
    expected = a @ b
    for trans_a, trans_b in LAYOUTS if m * n * k < 1e8 else [(0, 1), (1, 0)]:
        assert np.array_equal(matmul(product, a, b, trans_a, trans_b), expected)
        assert np.array_equal(matmul(product, a, b, trans_a, trans_b, c=c), c + expected)


@pytest.mark.parametrize("shape", [(3, 40, 20), (60, 50, 300)])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_non_finite_values_reach_their_rows_and_columns_only(
    product: str, shape: tuple[int, int, int], layout: tuple[int, int]
) -> None:
    m, n, k = shape
    for value in (np.nan, np.inf, -np.inf):
        a, b = normal(1, m, k), normal(2, k, n)
        a[m - 1, k - 1] = value
        b[k - 1, 0] = abs(b[k - 1, 0]) + 1
        expected = matmul(product, a, b, *layout)
        with np.errstate(invalid="ignore"):
            wanted = a.astype(np.float64) @ b
        assert np.array_equal(np.isnan(expected), np.isnan(wanted))
        assert np.array_equal(np.isposinf(expected), np.isposinf(wanted))
        assert np.array_equal(np.isneginf(expected), np.isneginf(wanted))
        assert np.isfinite(expected[: m - 1]).all()
        a, b = normal(1, m, k), normal(2, k, n)
        b[0, n - 1] = value
        out = matmul(product, a, b, *layout)
        assert np.isfinite(out[:, : n - 1]).all()
        assert not np.isfinite(out[:, n - 1]).any()
    zero, inf = np.zeros((m, k), np.float32), np.full((k, n), np.inf, np.float32)
    assert np.isnan(matmul(product, zero, inf, *layout)).all()  # 0 * inf is not skipped


def test_rounding_to_bf16_goes_to_nearest_even(product: str) -> None:
    values = np.array([1 + 2**-8, 1 + 3 * 2**-8, 1 + 2**-8 + 2**-20, -1 - 2**-8, 3e38, 1.0], np.float32)
    a = np.zeros((32, 6), np.float32)
    np.fill_diagonal(a, 1)
    wanted = rounded(values) if product == "bf16" else values
    for layout in LAYOUTS:
        out = matmul(product, a, values[:, None] * np.ones((1, 5), np.float32), *layout)
        assert np.array_equal(out[:6], np.repeat(wanted[:, None], 5, 1))
        out = matmul(product, values[:, None] * np.ones((1, 6), np.float32), a[:6, :6], *layout)
        assert np.array_equal(out, np.repeat(wanted[:, None], 6, 1))


def test_subnormals_are_kept(variant: str) -> None:
    for m in (1, 30):
        a = np.full((m, 1), 2.0**-100, np.float32)
        b = np.full((1, 20), 2.0**-40, np.float32)
        assert (matmul("fp32", a, b) == np.float32(2.0**-140)).all()


def test_zero_sizes(product: str) -> None:
    function = FUNCTIONS[product]
    out = filled(3, 5)
    some = normal(1, 3, 5)
    check(function(pointer(out), 5, pointer(some), 5, 0, pointer(some), 5, 0, 0, 5, 3, 0))
    check(function(pointer(out), 5, pointer(some), 5, 0, pointer(some), 5, 0, 3, 0, 5, 0))
    check(function(ffi.NULL, 0, ffi.NULL, 0, 0, ffi.NULL, 0, 0, 0, 0, 0, 0))
    assert (out == SENTINEL).all()
    # No products: the sum is zero, and without accumulate C becomes it.
    check(function(pointer(out), 5, ffi.NULL, 0, 0, ffi.NULL, 5, 0, 3, 5, 0, 1))
    assert (out == SENTINEL).all()
    check(function(pointer(out), 5, ffi.NULL, 0, 0, ffi.NULL, 5, 0, 3, 5, 0, 0))
    assert (out == 0).all()


@pytest.mark.parametrize("name", ["anellm_matmul", "anellm_matmul_bf16"])
def test_bad_arguments(name: str) -> None:
    function = getattr(lib, name)
    out, a, b = filled(3, 5), normal(1, 3, 4), normal(2, 4, 5)
    good: dict[str, Any] = {
        "C": pointer(out), "ld_c": 5, "A": pointer(a), "ld_a": 4, "trans_a": 0, "B": pointer(b), "ld_b": 5,
        "trans_b": 0, "M": 3, "N": 5, "K": 4, "accumulate": 0,
    }  # fmt: skip
    bad: list[tuple[str, Any, dict[str, Any]]] = [
        ("C", ffi.NULL, {}),
        ("A", ffi.NULL, {}),
        ("B", ffi.NULL, {}),
        ("M", -1, {}),
        ("N", -2, {}),
        ("K", -3, {}),
        ("ld_c", 4, {}),
        ("ld_a", 3, {}),
        ("ld_a", 2, {"trans_a": 1}),
        ("ld_b", 4, {}),
        ("ld_b", 3, {"trans_b": 1}),
    ]
    for argument, value, others in bad:
        arguments = {**good, **others, argument: value}
        words = (argument, "NULL") if value == ffi.NULL else (argument, str(value))
        status = function(*arguments.values())
        assert_refused(status, lib.ANELLM_INVALID, name + ":", *words, untouched=(out,))
    check(function(*good.values()))


@pytest.mark.parametrize("shape", [(3, 700, 300), (100, 90, 80), (300, 40, 500), (40, 300, 500), (64, 64, 3000)])
def test_same_bytes_for_any_threads(product: str, shape: tuple[int, int, int]) -> None:
    m, n, k = shape
    a, b, c = normal(1, m, k), normal(2, k, n), normal(3, m, n)

    def run() -> tuple[np.ndarray, ...]:
        return tuple(matmul(product, a, b, *layout, c=c) for layout in LAYOUTS)

    assert_same_bytes_for_any_threads(run)


def test_concurrent_calls(product: str) -> None:
    check(lib.anellm_set_threads(3))
    cases = [(integers(i, 50 + 9 * i, 70), integers(i + 9, 70, 90 - 7 * i)) for i in range(6)]

    def run(i: int) -> bool:
        a, b = cases[i % len(cases)]
        return np.array_equal(matmul(product, a, b, i % 2, i // 2 % 2), a @ b)

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(run, range(200)))
