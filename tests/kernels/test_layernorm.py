"""LayerNorm against float64, finite differences, its portable kernel, and its contract."""

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

EPS = 1e-5
NULL = ffi.NULL


def statistics(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    x = x.astype(np.float64)
    return x.mean(axis=1, keepdims=True), 1 / np.sqrt(x.var(axis=1, keepdims=True) + EPS)


def reference(x: np.ndarray, w: np.ndarray, b: np.ndarray | float) -> np.ndarray:
    mean, rstd = statistics(x)
    return (x.astype(np.float64) - mean) * rstd * w + b


def reference_backward(dout: np.ndarray, x: np.ndarray, w: np.ndarray) -> tuple[np.ndarray, ...]:
    """Return dx, dw, db and the magnitudes of what is added up in them (rounding errors scale with those)."""
    dout, w = dout.astype(np.float64), w.astype(np.float64)
    mean, rstd = statistics(x)
    z, g = (x.astype(np.float64) - mean) * rstd, dout * w
    # z itself is off by what the mean is off by: a rounding of the largest x.
    off = np.abs(x).max(axis=1, keepdims=True) * rstd
    terms = np.abs(g) + np.abs(g).mean(axis=1, keepdims=True)
    size = rstd * (terms + (np.abs(z) + off) * (np.abs(g) * (np.abs(z) + off)).mean(axis=1, keepdims=True))
    dx = rstd * (g - g.mean(axis=1, keepdims=True) - z * (g * z).mean(axis=1, keepdims=True))
    size_w = (np.abs(dout) * (np.abs(z) + off)).sum(axis=0)
    return dx, (dout * z).sum(axis=0), dout.sum(axis=0), size, size_w, np.abs(dout).sum(axis=0)


def forward(x: np.ndarray, w: np.ndarray, b: np.ndarray | None, *, gap: int = 0) -> tuple[np.ndarray, ...]:
    n, dim = x.shape
    ld = dim + gap
    out, mean, rstd = unaligned(filled(n, ld)), filled(n), filled(n)
    x_in = unaligned(strided(x, ld))
    statistics_out = (pointer(mean), pointer(rstd))
    check(
        lib.anellm_layernorm_forward(
            pointer(out), ld, *statistics_out, pointer(x_in), ld, pointer(w), pointer(b), n, dim, EPS
        )
    )
    assert_gaps_untouched(out, dim)
    return out[:, :dim], mean, rstd


def backward(dout: np.ndarray, x: np.ndarray, w: np.ndarray, *, gap: int = 0, start: Any = None) -> tuple[Any, ...]:
    n, dim = x.shape
    ld = dim + gap
    mean, rstd = (np.ascontiguousarray(a[:, 0], dtype=np.float32) for a in statistics(x))
    dx = unaligned(filled(n, ld) if start is None else strided(start, ld))
    dw, db = unaligned(np.zeros(dim, np.float32)), unaligned(np.zeros(dim, np.float32))
    dout_in, x_in = unaligned(strided(dout, ld)), unaligned(strided(x, ld))
    ins = (pointer(dout_in), ld, pointer(x_in), ld)
    check(
        lib.anellm_layernorm_backward(
            pointer(dx), ld, pointer(dw), pointer(db), *ins, pointer(w), pointer(mean), pointer(rstd), n, dim,
            int(start is not None),
        )
    )  # fmt: skip
    assert_gaps_untouched(dx, dim)
    return dx[:, :dim], dw, db


def inputs(seed: int, n: int, dim: int, shift: float = 0.0) -> tuple[np.ndarray, ...]:
    x = normal(seed, n, dim) + np.float32(shift)
    return x, 1 + normal(seed + 1, dim), normal(seed + 2, dim), normal(seed + 3, n, dim)


@given(
    n=st.integers(1, 9),
    dim=st.integers(1, 150),
    seed=st.integers(0, 99),
    shift=st.sampled_from([0.0, 3.0, -100.0]),
    bias=st.booleans(),
    gap=st.integers(0, 3),
)
def test_forward_and_backward_are_the_reference(
    variant: str, n: int, dim: int, seed: int, shift: float, bias: bool, gap: int
) -> None:
    x, w, b, dout = inputs(seed, n, dim, shift)
    out, mean, rstd = forward(x, w, b if bias else None, gap=gap)
    m, r = statistics(x)
    off = np.abs(x).max(axis=1, keepdims=True)  # a rounding of the mean shifts the whole row
    assert_within(mean, m[:, 0], 2e-7 * off[:, 0])
    assert_within(rstd, r[:, 0], r[:, 0] * (1e-6 + 2e-7 * off[:, 0] * r[:, 0]))
    expected = reference(x, w, b if bias else 0.0)
    assert_within(out, expected, 1e-6 * (np.abs(w) * r * (off + np.abs(x - m)) + np.abs(b)))
    dx, dw, db, size, size_w, size_b = reference_backward(dout, x, w)
    found = backward(dout, x, w, gap=gap)
    for actual, wanted, bound in zip(found, (dx, dw, db), (size, size_w, size_b), strict=True):
        assert_within(actual, wanted, 2e-6 * bound)


@given(n=st.integers(1, 3), dim=st.integers(2, 19), seed=st.integers(0, 99))
def test_backward_is_the_derivative(variant: str, n: int, dim: int, seed: int) -> None:
    x, w, b, dout = inputs(seed, n, dim)
    dx, dw, db = backward(dout, x, w)
    sizes = reference_backward(dout, x, w)[3:]
    slopes = (
        finite_differences(lambda v: float((reference(v, w, b) * dout).sum()), x, 1e-6),
        finite_differences(lambda v: float((reference(x, v, b) * dout).sum()), w),
        finite_differences(lambda v: float((reference(x, w, v) * dout).sum()), b),
    )
    for actual, slope, size in zip((dx, dw, db), slopes, sizes, strict=True):
        assert_within(actual, slope, 3e-6 * size + 1e-6)


@pytest.mark.parametrize("dim", range(1, 41))
def test_every_tail_matches_portable(variant: str, dim: int) -> None:
    x, w, b, dout = (unaligned(a) for a in inputs(dim, 3, dim))
    start = normal(7, 3, dim)
    got = (*forward(x, w, b), *backward(dout, x, w, start=start))
    want = portable(lambda: (*forward(x, w, b), *backward(dout, x, w, start=start)))
    size, size_w, size_b = reference_backward(dout, x, w)[3:]
    rstd = want[2]
    bounds = (4 + np.abs(b), 1 + rstd * 0, rstd, size + np.abs(start), size_w, size_b)
    for actual, expected, bound in zip(got, want, bounds, strict=True):
        assert_within(actual, expected, 1e-6 * bound)


def test_what_may_be_left_out(variant: str) -> None:
    x, w, b, dout = inputs(0, 5, 37)
    out, mean, rstd = forward(x, w, b)
    place = x.copy()
    check(
        lib.anellm_layernorm_forward(
            pointer(place), 37, NULL, NULL, pointer(place), 37, pointer(w), pointer(b), 5, 37, EPS
        )
    )
    assert np.array_equal(place, out)  # in place as well
    dx, dw, db = backward(dout, x, w)
    mean, rstd = (np.ascontiguousarray(a[:, 0], dtype=np.float32) for a in statistics(x))
    rest = (pointer(x), 37, pointer(w), pointer(mean), pointer(rstd), 5, 37, 0)
    for which in range(4):
        got_w, got_b = np.zeros(37, np.float32), np.zeros(37, np.float32)
        place = dout.copy()
        given_w, given_b = (pointer(got_w) if which & 1 else NULL), (pointer(got_b) if which & 2 else NULL)
        check(lib.anellm_layernorm_backward(pointer(place), 37, given_w, given_b, pointer(place), 37, *rest))
        assert np.array_equal(place, dx)
        assert np.array_equal(got_w, dw if which & 1 else np.zeros(37))
        assert np.array_equal(got_b, db if which & 2 else np.zeros(37))


def test_weight_gradients_are_added_to(variant: str) -> None:
    x, w, _, dout = inputs(0, 300, 33)  # more rows than a block
    _, dw, db, _, size_w, size_b = reference_backward(dout, x, w)
    mean, rstd = (np.ascontiguousarray(a[:, 0], dtype=np.float32) for a in statistics(x))
    dx, got_w, got_b = filled(300, 33), np.ones(33, np.float32), np.full(33, 2, np.float32)
    ins = (pointer(dout), 33, pointer(x), 33, pointer(w), pointer(mean), pointer(rstd), 300, 33, 0)
    check(lib.anellm_layernorm_backward(pointer(dx), 33, pointer(got_w), pointer(got_b), *ins))
    assert_within(got_w, 1 + dw, 2e-6 * size_w)
    assert_within(got_b, 2 + db, 2e-6 * size_b)


@pytest.mark.parametrize("at", [0, 18])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_non_finite_stays_in_its_row(variant: str, at: int, value: float) -> None:
    x, w, b, dout = inputs(0, 3, 19)
    clean = forward(x, w, b)[0]
    x[1, at] = value
    out = forward(x, w, b)[0]
    assert np.isnan(out[1, at])
    assert not np.isfinite(out[1]).any()
    assert np.array_equal(out[[0, 2]], clean[[0, 2]])
    x, w, b, dout = inputs(0, 3, 19)
    clean_x, clean_w, clean_b = backward(dout, x, w)
    dout[1, at] = value
    dx, dw, db = backward(dout, x, w)
    assert np.isnan(dx[1]).any()
    assert np.array_equal(dx[[0, 2]], clean_x[[0, 2]])
    others = np.arange(19) != at
    assert not np.isfinite(dw[at])
    assert not np.isfinite(db[at])
    assert np.array_equal(dw[others], clean_w[others])
    assert np.array_equal(db[others], clean_b[others])


def test_equal_values_give_the_bias(variant: str) -> None:
    """A row without variance is divided by sqrt(eps), not by 0."""
    w, b = normal(1, 30), normal(2, 30)
    out, mean, rstd = forward(np.full((2, 30), 4, np.float32), w, b)
    assert np.array_equal(out, np.stack([b, b]))
    assert np.array_equal(mean, np.full(2, 4, np.float32))
    assert_within(rstd, np.full(2, EPS**-0.5), 1e-4)


def test_threads_do_not_change_bytes(variant: str) -> None:
    x, w, b, dout = inputs(0, 301, 203)
    assert_same_bytes_for_any_threads(lambda: (*forward(x, w, b), *backward(dout, x, w)))


def test_bad_arguments_are_refused() -> None:
    x, w, b, dout = inputs(0, 2, 8)
    out, ones, dw, db = filled(2, 8), np.ones(2, np.float32), filled(8), filled(8)
    good: dict[str, Any] = {
        "out": pointer(out), "ld_out": 8, "mean": NULL, "rstd": NULL, "x": pointer(x), "ld_x": 8, "w": pointer(w),
        "b": pointer(b), "N": 2, "dim": 8, "eps": EPS,
    }  # fmt: skip
    for name, value, word in [
        ("out", NULL, "out is NULL"), ("x", NULL, "x is NULL"), ("w", NULL, "w is NULL"), ("N", -1, "N is -1"),
        ("dim", -1, "dim is -1"), ("ld_out", 7, "ld_out is 7"), ("ld_x", 7, "ld_x is 7"), ("eps", -1.0, "eps is -1"),
        ("eps", float("nan"), "eps is nan"), ("eps", float("inf"), "eps is inf"),
    ]:  # fmt: skip
        status = lib.anellm_layernorm_forward(*{**good, name: value}.values())
        assert_refused(status, lib.ANELLM_INVALID, "anellm_layernorm_forward", word, untouched=(out,))
    both = filled(2, 9)
    status = lib.anellm_layernorm_forward(*{**good, "out": pointer(both), "ld_out": 9, "x": pointer(both)}.values())
    assert_refused(status, lib.ANELLM_INVALID, "ld_out is 9", untouched=(both,))
    good = {
        "dx": pointer(out), "ld_dx": 8, "dw": pointer(dw), "db": pointer(db), "dout": pointer(dout), "ld_dout": 8,
        "x": pointer(x), "ld_x": 8, "w": pointer(w), "mean": pointer(ones), "rstd": pointer(ones), "N": 2, "dim": 8,
        "accumulate_dx": 0,
    }  # fmt: skip
    for name, value, word in [
        ("dx", NULL, "dx is NULL"), ("dout", NULL, "dout is NULL"), ("x", NULL, "x is NULL"), ("w", NULL, "w is NULL"),
        ("mean", NULL, "mean is NULL"), ("rstd", NULL, "rstd is NULL"), ("N", -1, "N is -1"), ("dim", -1, "dim is -1"),
        ("ld_dx", 7, "ld_dx is 7"), ("ld_dout", 7, "ld_dout is 7"), ("ld_x", 7, "ld_x is 7"),
    ]:  # fmt: skip
        status = lib.anellm_layernorm_backward(*{**good, name: value}.values())
        assert_refused(status, lib.ANELLM_INVALID, "anellm_layernorm_backward", word, untouched=(out, dw, db))
    alias = {**good, "dx": pointer(both), "ld_dx": 9, "dout": pointer(both)}
    status = lib.anellm_layernorm_backward(*alias.values())
    assert_refused(status, lib.ANELLM_INVALID, "ld_dx is 9 and ld_dout is 8", untouched=(both, dw, db))
    status = lib.anellm_layernorm_backward(*{**alias, "ld_dout": 9, "accumulate_dx": 1}.values())
    assert_refused(status, lib.ANELLM_INVALID, "accumulate_dx", untouched=(both, dw, db))
    check(lib.anellm_layernorm_forward(NULL, 0, NULL, NULL, NULL, 0, NULL, NULL, 0, 8, EPS))
    check(lib.anellm_layernorm_backward(NULL, 0, NULL, NULL, NULL, 0, NULL, 0, NULL, NULL, NULL, 2, 0, 0))
