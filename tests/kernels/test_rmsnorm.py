"""RMSNorm against float64, finite differences, its portable kernel, and its contract."""

from __future__ import annotations

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


def reference(x: np.ndarray, w: np.ndarray, eps: float = EPS) -> tuple[np.ndarray, np.ndarray]:
    x, w = x.astype(np.float64), w.astype(np.float64)
    rstd = 1 / np.sqrt((x * x).mean(axis=1) + eps)
    return x * rstd[:, None] * w, rstd


def reference_backward(dout: np.ndarray, x: np.ndarray, w: np.ndarray) -> tuple[np.ndarray, ...]:
    """Return dx, dw and the magnitudes of what is added up in them (rounding errors scale with those)."""
    dout, x, w = (a.astype(np.float64) for a in (dout, x, w))
    r = reference(x, w)[1][:, None]
    dot = (w * dout * x).sum(axis=1, keepdims=True)
    absdot = np.abs(w * dout * x).sum(axis=1, keepdims=True)
    dim = x.shape[1]
    dx = r * (w * dout - x * dot * r * r / dim)
    size = r * (np.abs(w * dout) + np.abs(x) * absdot * r * r / dim)
    return dx, (dout * x * r).sum(axis=0), size, np.abs(dout * x * r).sum(axis=0)


def forward(x: np.ndarray, w: np.ndarray, dim: int | None = None, eps: float = EPS) -> tuple[np.ndarray, np.ndarray]:
    """Run the kernel; the rows of x and of the result may be longer than dim."""
    dim = dim if dim is not None else x.shape[1]
    out, rstd = filled(*x.shape), filled(len(x))
    check(
        lib.anellm_rmsnorm_forward(
            pointer(out), x.shape[1], pointer(rstd), pointer(x), x.shape[1], pointer(w), len(x), dim, eps
        )
    )
    return out, rstd


def backward(
    dout: np.ndarray, x: np.ndarray, w: np.ndarray, dim: int | None = None, start: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Run the kernel on dw = 0; dx is added to `start` if given."""
    dim = dim if dim is not None else x.shape[1]
    rstd = reference(x[:, :dim], w)[1].astype(np.float32)
    dx = filled(*x.shape) if start is None else start.copy()
    dw = np.zeros(dim, dtype=np.float32)
    check(
        lib.anellm_rmsnorm_backward(
            pointer(dx),
            x.shape[1],
            pointer(dw),
            pointer(dout),
            x.shape[1],
            pointer(x),
            x.shape[1],
            pointer(w),
            pointer(rstd),
            len(x),
            dim,
            int(start is not None),
        )
    )
    return dx, dw


def inputs(n: int, dim: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return x, w (far from 1) and dout."""
    return normal(seed, n, dim), 0.5 + np.abs(normal(seed + 1, dim)), normal(seed + 2, n, dim)


@given(n=st.integers(1, 9), dim=st.integers(1, 130), gap=st.integers(0, 5), seed=st.integers(0, 99))
def test_forward_is_the_reference(variant: str, n: int, dim: int, gap: int, seed: int) -> None:
    x, w, _ = inputs(n, dim, seed)
    out, rstd = forward(strided(x, dim + gap), w, dim)
    expected, expected_rstd = reference(x, w)
    assert_within(out[:, :dim], expected, 2e-6 * np.abs(expected))
    assert_within(rstd, expected_rstd, 1e-6 * expected_rstd)
    assert_gaps_untouched(out, dim)


@given(n=st.integers(1, 4), dim=st.integers(1, 21), gap=st.integers(0, 3), seed=st.integers(0, 99))
def test_backward_is_the_derivative(variant: str, n: int, dim: int, gap: int, seed: int) -> None:
    x, w, dout = inputs(n, dim, seed)
    dx, dw = backward(strided(dout, dim + gap), strided(x, dim + gap), w, dim)
    by_x = finite_differences(lambda v: float((reference(v, w)[0] * dout).sum()), x)
    by_w = finite_differences(lambda v: float((reference(x, v)[0] * dout).sum()), w)
    *_, size_x, size_w = reference_backward(dout, x, w)
    assert_within(dx[:, :dim], by_x, 1e-5 * size_x + 1e-6)
    assert_within(dw, by_w, 1e-5 * size_w + 1e-6)
    assert_gaps_untouched(dx, dim)


@pytest.mark.parametrize(("n", "dim"), [(1, 1), (300, 64), (3, 4099), (129, 97)])
def test_backward_is_the_reference(variant: str, n: int, dim: int) -> None:
    x, w, dout = inputs(n, dim)
    dx, dw = backward(dout, x, w)
    expected_dx, expected_dw, size_x, size_w = reference_backward(dout, x, w)
    assert_within(dx, expected_dx, 3e-6 * size_x)
    assert_within(dw, expected_dw, 3e-6 * size_w)


def test_accumulation_adds(variant: str) -> None:
    x, w, dout = inputs(5, 77)
    start = normal(9, 5, 77)
    fresh, dw = backward(dout, x, w)
    added, _ = backward(dout, x, w, start=start)
    assert_within(added, start.astype(np.float64) + fresh, 3e-7 * (np.abs(start) + np.abs(fresh)))
    # dw is always added to
    rstd = reference(x, w)[1].astype(np.float32)
    twice, dx = dw.copy(), filled(5, 77)
    args = (pointer(dout), 77, pointer(x), 77, pointer(w), pointer(rstd), 5, 77, 0)
    check(lib.anellm_rmsnorm_backward(pointer(dx), 77, pointer(twice), *args))
    assert_within(twice, 2.0 * dw, 1e-6 * np.abs(dw))
    # and may be left out
    without = filled(5, 77)
    check(lib.anellm_rmsnorm_backward(pointer(without), 77, NULL, *args))
    assert np.array_equal(without, dx)


@pytest.mark.parametrize("dim", range(1, 41))
def test_every_tail_matches_portable(variant: str, dim: int) -> None:
    x, w, dout = (unaligned(a) for a in inputs(3, dim))
    out, rstd = forward(x, w)
    dx, dw = backward(dout, x, w)
    out_p, rstd_p = portable(lambda: forward(x, w))
    dx_p, dw_p = portable(lambda: backward(dout, x, w))
    *_, size_x, size_w = reference_backward(dout, x, w)
    assert_within(out, out_p, 1e-6 * np.abs(out_p))
    assert_within(rstd, rstd_p, 5e-7 * rstd_p)
    assert_within(dx, dx_p, 1e-6 * size_x)
    assert_within(dw, dw_p, 1e-6 * size_w)


def test_heads_of_a_longer_row(variant: str) -> None:
    """Normalise the second of three heads in place, as q/k-norm does."""
    head_dim, heads, n = 20, 3, 7
    x, w, _ = inputs(n, head_dim * heads)
    w = w[:head_dim].copy()
    ld = head_dim * heads
    buffer = x.copy()
    head = pointer(buffer) + head_dim
    check(lib.anellm_rmsnorm_forward(head, ld, NULL, head, ld, pointer(w), n, head_dim, EPS))
    expected = x.copy()
    expected[:, head_dim : 2 * head_dim] = forward(np.ascontiguousarray(x[:, head_dim : 2 * head_dim]), w)[0]
    assert np.array_equal(buffer, expected)


def test_in_place_gives_the_same_bytes(variant: str) -> None:
    x, w, dout = inputs(37, 83)
    out, rstd = forward(x, w)
    dx, dw = backward(dout, x, w)
    in_place = x.copy()
    check(lib.anellm_rmsnorm_forward(pointer(in_place), 83, NULL, pointer(in_place), 83, pointer(w), 37, 83, EPS))
    assert np.array_equal(in_place, out)
    rstd = reference(x, w)[1].astype(np.float32)
    in_place, dw_in_place = dout.copy(), np.zeros(83, dtype=np.float32)
    check(
        lib.anellm_rmsnorm_backward(
            pointer(in_place),
            83,
            pointer(dw_in_place),
            pointer(in_place),
            83,
            pointer(x),
            83,
            pointer(w),
            pointer(rstd),
            37,
            83,
            0,
        )
    )
    assert np.array_equal(in_place, dx)
    assert np.array_equal(dw_in_place, dw)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("at", [0, 33, 40])
def test_non_finite_stays_in_its_row(variant: str, value: float, at: int) -> None:
    x, w, dout = inputs(3, 41)
    clean, _ = forward(x, w)
    clean_dx, _ = backward(dout, x, w)
    x[1, at] = value
    out, rstd = forward(x, w)
    assert np.isnan(out[1, at])
    assert np.isnan(rstd[1]) if np.isnan(value) else rstd[1] == 0
    assert np.array_equal(out[[0, 2]], clean[[0, 2]])
    x, w, dout = inputs(3, 41)
    dout[1, at] = value
    dx, dw = backward(dout, x, w)
    assert not np.isfinite(dx[1]).any()
    assert not np.isfinite(dw[at])
    assert np.isfinite(np.delete(dw, at)).all()
    assert np.array_equal(dx[[0, 2]], clean_dx[[0, 2]])


def test_threads_do_not_change_bytes(variant: str) -> None:
    x, w, dout = inputs(301, 200)
    assert_same_bytes_for_any_threads(lambda: (*forward(x, w), *backward(dout, x, w)))


def test_zero_sizes_do_nothing() -> None:
    check(lib.anellm_rmsnorm_forward(NULL, 0, NULL, NULL, 0, NULL, 0, 8, EPS))
    check(lib.anellm_rmsnorm_forward(NULL, 0, NULL, NULL, 0, NULL, 8, 0, EPS))
    check(lib.anellm_rmsnorm_backward(NULL, 0, NULL, NULL, 0, NULL, 0, NULL, NULL, 0, 8, 0))


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"out": NULL}, "out is NULL"),
        ({"x": NULL}, "x is NULL"),
        ({"w": NULL}, "w is NULL"),
        ({"n": -1}, "N is -1"),
        ({"dim": -3}, "dim is -3"),
        ({"ld_out": 7}, "ld_out is 7"),
        ({"ld_x": 7}, "ld_x is 7"),
        ({"eps": -1.0}, "eps is -1"),
        ({"eps": float("nan")}, "eps is"),
    ],
)
def test_forward_refuses(change: dict[str, object], word: str) -> None:
    x, w, _ = inputs(2, 8)
    out, rstd = filled(2, 8), filled(2)
    a = {"out": pointer(out), "ld_out": 8, "x": pointer(x), "ld_x": 8, "w": pointer(w), "n": 2, "dim": 8, "eps": EPS}
    a |= change
    status = lib.anellm_rmsnorm_forward(
        a["out"], a["ld_out"], pointer(rstd), a["x"], a["ld_x"], a["w"], a["n"], a["dim"], a["eps"]
    )
    assert_refused(status, lib.ANELLM_INVALID, "anellm_rmsnorm_forward", word, untouched=(out, rstd))


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"dx": NULL}, "dx is NULL"),
        ({"dout": NULL}, "dout is NULL"),
        ({"x": NULL}, "x is NULL"),
        ({"w": NULL}, "w is NULL"),
        ({"rstd": NULL}, "rstd is NULL"),
        ({"n": -1}, "N is -1"),
        ({"dim": -1}, "dim is -1"),
        ({"ld_dx": 7}, "ld_dx is 7"),
        ({"ld_dout": 7}, "ld_dout is 7"),
        ({"ld_x": 0}, "ld_x is 0"),
    ],
)
def test_backward_refuses(change: dict[str, object], word: str) -> None:
    x, w, dout = inputs(2, 8)
    dx, dw, rstd = filled(2, 8), filled(8), np.ones(2, dtype=np.float32)
    a = {"dx": pointer(dx), "ld_dx": 8, "dout": pointer(dout), "ld_dout": 8, "x": pointer(x), "ld_x": 8}
    a |= {"w": pointer(w), "rstd": pointer(rstd), "n": 2, "dim": 8} | change
    status = lib.anellm_rmsnorm_backward(
        a["dx"],
        a["ld_dx"],
        pointer(dw),
        a["dout"],
        a["ld_dout"],
        a["x"],
        a["ld_x"],
        a["w"],
        a["rstd"],
        a["n"],
        a["dim"],
        0,
    )
    assert_refused(status, lib.ANELLM_INVALID, "anellm_rmsnorm_backward", word, untouched=(dx, dw))


def test_aliases_outside_the_contract_are_refused() -> None:
    x, w, _ = inputs(2, 8)
    rstd, dw, both = np.ones(2, dtype=np.float32), filled(8), filled(2, 9)
    rest = (pointer(x), 8, pointer(w), pointer(rstd), 2, 8)
    status = lib.anellm_rmsnorm_backward(pointer(both), 9, pointer(dw), pointer(both), 9, *rest, 1)
    assert_refused(status, lib.ANELLM_INVALID, "accumulate_dx", untouched=(both, dw))
    status = lib.anellm_rmsnorm_backward(pointer(both), 9, pointer(dw), pointer(both), 8, *rest, 0)
    assert_refused(status, lib.ANELLM_INVALID, "ld_dx is 9", untouched=(both, dw))
    status = lib.anellm_rmsnorm_forward(pointer(both), 9, NULL, pointer(both), 8, pointer(w), 2, 8, EPS)
    assert_refused(status, lib.ANELLM_INVALID, "ld_out is 9", untouched=(both,))
