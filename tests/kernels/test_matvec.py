"""Few rows times weights against NumPy in float64: every format, every tail, strides, threads."""

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
    normal,
    pointer,
    rng,
    strided,
    unaligned,
)

from anellm._ffi import check, ffi, lib

NULL = ffi.NULL
EPS = 2.0**-24
GROUP: int = lib.ANELLM_QUANTIZE_GROUP
FORMATS = ("f32", "bf16", "int8")


@dataclass
class Packed:
    """A matrix (N, K) in one of the formats: what is stored, and what it stands for in float64."""

    kind: str
    stored: np.ndarray
    scales: np.ndarray | None
    value: np.ndarray


def pack(kind: str, w: np.ndarray) -> Packed:
    n, k = w.shape
    if kind == "f32":
        return Packed(kind, np.ascontiguousarray(w), None, w.astype(np.float64))
    if kind == "bf16":
        stored = np.zeros((n, k), np.uint16)
        check(lib.anellm_convert_f32_to_bf16(pointer(stored), pointer(np.ascontiguousarray(w)), w.size))
        return Packed(kind, stored, None, (stored.astype(np.uint32) << 16).view(np.float32).astype(np.float64))
    stored, scales = np.zeros((n, k), np.int8), np.zeros((n, -(-k // GROUP)), np.float32)
    check(lib.anellm_quantize_int8(pointer(stored), pointer(scales), pointer(np.ascontiguousarray(w)), k, n, k))
    with np.errstate(invalid="ignore"):
        return Packed(kind, stored, scales, np.repeat(scales.astype(np.float64), GROUP, axis=1)[:, :k] * stored)


def call(y: np.ndarray, ld_y: int, x: np.ndarray, ld_x: int, w: Packed, ld_w: int, m: int, accumulate: bool) -> None:
    n, k = w.value.shape
    function = getattr(lib, f"anellm_matvec_{w.kind}")
    scales = () if w.scales is None else (pointer(w.scales),)
    check(function(pointer(y), ld_y, pointer(x), ld_x, pointer(w.stored), ld_w, *scales, m, n, k, accumulate))


def matvec(x: np.ndarray, w: Packed, y: np.ndarray | None = None) -> np.ndarray:
    """Return x · Wᵀ, or y + x · Wᵀ."""
    m, k = x.shape
    n = w.value.shape[0]
    out = np.full((m, n), np.nan, np.float32) if y is None else y.copy()
    call(out, n, np.ascontiguousarray(x), k, w, k, m, y is not None)
    return out


def bound(x: np.ndarray, w: Packed, y: np.ndarray | None = None) -> np.ndarray:
    """Bound the rounding of sums of K products in any order, and of their scaling (Higham 2002, 3.1)."""
    size = np.abs(x).astype(np.float64) @ np.abs(w.value).T
    if y is not None:
        size = size + np.abs(y)
    return (x.shape[1] + 4) * EPS * size * 1.01 + 1e-40


@pytest.mark.parametrize("kind", FORMATS)
@settings(max_examples=60)
@given(
    m=st.integers(1, 11),
    n=st.integers(1, 130),
    k=st.integers(1, 400),
    accumulate=st.booleans(),
    extra=st.tuples(st.integers(0, 9), st.integers(0, 9), st.integers(0, 9)),
    seed=st.integers(0, 1 << 20),
)
def test_matches_float64(
    variant: str, kind: str, m: int, n: int, k: int, accumulate: bool, extra: tuple[int, ...], seed: int
) -> None:
    x, y, w = normal(seed, m, k), normal(seed + 2, m, n), pack(kind, normal(seed + 1, n, k))
    # Rows longer than needed, with NaN (and the largest values) in the gaps, and addresses off by one element.
    ld_x, ld_w, ld_y = k + extra[0], k + extra[1], n + extra[2]
    wide_x = strided(x, ld_x)
    wide_x[:, k:] = np.nan
    wide_w = np.full((n, ld_w), {"f32": np.nan, "bf16": 0x7FC0, "int8": 127}[kind], w.stored.dtype)
    wide_w[:, :k] = w.stored
    wide_y = unaligned(strided(y if accumulate else np.full_like(y, np.nan), ld_y))
    scales = None if w.scales is None else unaligned(w.scales)
    call(wide_y, ld_y, unaligned(wide_x), ld_x, Packed(kind, unaligned(wide_w), scales, w.value), ld_w, m, accumulate)
    expected = x.astype(np.float64) @ w.value.T + (y if accumulate else 0)
    assert_within(wide_y[:, :n], expected, bound(x, w, y if accumulate else None))
    assert_gaps_untouched(wide_y, n)


def whole_numbers(kind: str, seed: int, n: int, k: int) -> Packed:
    """Return a matrix of small whole numbers, whose products with such numbers sum up exactly in any order."""
    w = rng(seed).integers(-3, 4, (n, k))
    if kind != "int8":
        return pack(kind, w.astype(np.float32))
    scales = np.float32(2) ** rng(seed + 1).integers(-2, 3, (n, -(-k // GROUP))).astype(np.float32)
    return Packed(kind, w.astype(np.int8), scales, np.repeat(scales, GROUP, axis=1)[:, :k] * w.astype(np.float64))


@pytest.mark.parametrize("kind", FORMATS)
def test_every_tail(variant: str, kind: str) -> None:
    for k in (*range(1, 34), 63, 64, 65, 80, 127, 128, 129):
        for m in range(1, 6):
            for n in (1, 2, 3, 4, 5, 7, 8, 9):
                w = whole_numbers(kind, n, n, k)
                x, y = (rng(m + i).integers(-3, 4, s).astype(np.float32) for i, s in enumerate(((m, k), (m, n))))
                assert np.array_equal(matvec(x, w), x @ w.value.T), (m, n, k)
                assert np.array_equal(matvec(x, w, y), y + x @ w.value.T), (m, n, k)


@pytest.mark.parametrize("kind", FORMATS)
def test_a_row_does_not_depend_on_its_neighbours(variant: str, kind: str) -> None:
    """Reading a prompt at once or token by token gives the same bytes."""
    x, w = normal(0, 11, 333), pack(kind, normal(1, 77, 333))
    whole = matvec(x, w)
    for rows in (1, 2, 3, 4, 5, 6):
        for start in range(0, 11, rows):
            assert np.array_equal(matvec(x[start : start + rows], w), whole[start : start + rows])


@pytest.mark.parametrize("kind", FORMATS)
def test_non_finite_values_reach_their_rows_and_columns_only(variant: str, kind: str) -> None:
    m, n, k = 5, 30, 150
    for value in (np.nan, np.inf, -np.inf):
        x, w = normal(1, m, k), pack(kind, np.abs(normal(2, n, k)) + 1)
        x[m - 1, k - 1] = value
        out = matvec(x, w)
        assert np.isfinite(out[: m - 1]).all()
        assert np.array_equal(out[m - 1], np.full(n, value, np.float32), equal_nan=True)
        raw = normal(2, n, k)
        raw[n - 1, 0] = value
        out = matvec(np.abs(normal(1, m, k)) + 1, pack(kind, raw))
        assert np.isfinite(out[:, : n - 1]).all()
        # An int8 group that held inf or NaN is NaN as a whole.
        expected = np.nan if kind == "int8" else value
        assert np.array_equal(out[:, n - 1], np.full(m, expected, np.float32), equal_nan=True)
    infinite = Packed("bf16", np.full((n, k), 0x7F80, np.uint16), None, np.full((n, k), np.inf))
    assert np.isnan(matvec(np.zeros((m, k), np.float32), infinite)).all()  # 0 * inf is not skipped


def test_subnormals_are_kept(variant: str) -> None:
    x = np.full((2, 1), 2.0**-100, np.float32)
    for kind in ("f32", "bf16"):
        assert (matvec(x, pack(kind, np.full((20, 1), 2.0**-40, np.float32))) == np.float32(2.0**-140)).all()
    scaled = Packed("int8", np.ones((20, 1), np.int8), np.full((20, 1), 2.0**-40, np.float32), np.zeros((20, 1)))
    assert (matvec(x, scaled) == np.float32(2.0**-140)).all()


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("shape", [(1, 3000, 100), (3, 700, 300), (9, 130, 2000)])
def test_same_bytes_for_any_threads(variant: str, kind: str, shape: tuple[int, int, int]) -> None:
    m, n, k = shape
    x, y, w = normal(1, m, k), normal(3, m, n), pack(kind, normal(2, n, k))
    assert_same_bytes_for_any_threads(lambda: (matvec(x, w), matvec(x, w, y)))


def test_concurrent_calls(variant: str) -> None:
    check(lib.anellm_set_threads(3))
    cases = [whole_numbers(kind, i, 700 + i, 300) for i in range(3) for kind in FORMATS]
    x = rng(5).integers(-3, 4, (2, 300)).astype(np.float32)

    def run(i: int) -> bool:
        w = cases[i % len(cases)]
        return np.array_equal(matvec(x, w), x @ w.value.T)

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(run, range(200)))


@pytest.mark.parametrize("kind", FORMATS)
def test_bad_arguments(kind: str) -> None:
    y, x, w = filled(3, 5), normal(1, 3, 70), pack(kind, normal(2, 5, 70))
    function = getattr(lib, f"anellm_matvec_{kind}")
    good: dict[str, Any] = {"y": pointer(y), "ld_y": 5, "x": pointer(x), "ld_x": 70, "w": pointer(w.stored), "ld_w": 70}
    good |= {"scales": pointer(w.scales)} if kind == "int8" else {}
    good |= {"M": 3, "N": 5, "K": 70, "accumulate": 0}
    bad: list[tuple[str, Any]] = [(name, NULL) for name in ("y", "x", "w", "scales") if name in good]
    bad += [("M", -1), ("N", -2), ("K", -3), ("ld_y", 4), ("ld_x", 69), ("ld_w", 69)]
    for name, value in bad:
        words = (name, "NULL") if value == NULL else (name, str(value))
        status = function(*{**good, name: value}.values())
        assert_refused(status, lib.ANELLM_INVALID, f"anellm_matvec_{kind}", *words, untouched=(y,))
    for name in ("M", "N"):
        check(function(*{**good, name: 0}.values()))
    assert (y == SENTINEL).all()
    # No products: the sum is zero, and without accumulate y becomes it.
    check(function(*{**good, "K": 0, "accumulate": 1, "x": NULL, "w": NULL}.values()))
    assert (y == SENTINEL).all()
    check(function(*{**good, "K": 0, "x": NULL, "w": NULL}.values()))
    assert (y == 0).all()
    check(function(*good.values()))
    assert y.all()
