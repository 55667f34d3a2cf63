"""Between the model's arrays and the planes of a surface: every byte against NumPy, on each CPU tier."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from anellm._ffi import check, ffi, lib, ptr, text
from anellm.errors import InvalidError

TIERS = [name for name in text(lib.anellm_cpu_variants()).split(",") if name in {"portable", "avx2"}]
GUARD = 0x5AA5  # what stands where nothing may be written


@pytest.fixture(params=[(tier, threads) for tier in TIERS for threads in (1, 3)], ids=lambda p: f"{p[0]}-{p[1]}")
def machine(request: pytest.FixtureRequest) -> Iterator[None]:
    """Force a tier and a number of threads."""
    tier, threads = request.param
    before = text(lib.anellm_cpu_variant()), lib.anellm_get_threads()
    check(lib.anellm_cpu_set_variant(tier.encode()))
    check(lib.anellm_set_threads(threads))
    yield
    check(lib.anellm_cpu_set_variant(before[0].encode()))
    check(lib.anellm_set_threads(before[1]))


def at(array: np.ndarray, offset: int) -> Any:
    """Return the pointer to an element, which need not be aligned to anything but its size."""
    return ffi.cast("float *" if array.dtype == np.float32 else "uint16_t *", array.ctypes.data) + offset


def halves(x: np.ndarray, exponent: int) -> np.ndarray:
    """Return the bits of fp16(x * 2^exponent), with the product in fp32."""
    with np.errstate(over="ignore", under="ignore", invalid="ignore"):
        return (x.astype(np.float32) * np.float32(2.0**exponent)).astype(np.float16).view(np.uint16)


def largest(x: np.ndarray) -> float:
    return float(np.abs(x).max(initial=0.0)) if np.isfinite(x).all() else float("inf")


def floats(shape: tuple[int, ...], seed: int, *, wild: bool = True) -> np.ndarray:
    """Return numbers of all sizes: normal and subnormal halves, what becomes 0, what becomes inf."""
    g = np.random.default_rng(seed)
    x = g.standard_normal(shape) * (2.0 ** g.integers(-30, 20, shape) if wild else 1.0)
    return x.astype(np.float32)


class Rows:
    """A field inside of a larger plane, and rows inside of a larger matrix."""

    def __init__(self, B: int, T: int, channels: int, *, seed: int = 0, wild: bool = True, pad: int = 32) -> None:
        self.B, self.T, self.C = B, T, channels
        self.Tp = -(-T // pad) * pad
        self.S, self.ld, self.width = B * self.Tp, channels + 3, B * self.Tp + 5
        self.x = floats((B * T, self.ld), seed, wild=wild)
        self.plane = np.full((channels + 1, self.width), GUARD, np.uint16)

    def write(self, exponent: int = 0) -> float:
        absmax = ffi.new("float *")
        shape = self.B, self.T, self.Tp, self.C
        check(lib.anellm_ane_pack_rows(at(self.plane, 3), self.width, absmax, at(self.x, 1), self.ld, *shape, exponent))
        return float(absmax[0])

    def expected(self, exponent: int) -> np.ndarray:
        """Return the plane as it should be, guards included."""
        plane = np.full_like(self.plane, GUARD)
        field = np.zeros((self.C, self.B, self.Tp), np.uint16)
        given = self.x.reshape(-1)[1:][: self.B * self.T * self.ld - 1]
        given = np.append(given, np.float32(0)).reshape(self.B, self.T, self.ld)[:, :, : self.C]
        field[:, :, : self.T] = halves(given, exponent).transpose(2, 0, 1)
        flat = plane.reshape(-1)
        for c in range(self.C):
            flat[3 + c * self.width : 3 + c * self.width + self.S] = field[c].reshape(-1)
        return plane

    @property
    def given(self) -> np.ndarray:
        flat = np.append(self.x.reshape(-1)[1:], np.float32(0))
        return flat.reshape(-1, self.ld)[:, : self.C]


SHAPES = [(1, 32, 8), (1, 1, 1), (3, 41, 70), (2, 100, 65), (1, 300, 129), (5, 16, 7), (2, 33, 16), (1, 15, 200)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("exponent", [0, 7, -9, 40])
@pytest.mark.usefixtures("machine")
def test_rows_are_written_channel_first(shape: tuple[int, int, int], exponent: int) -> None:
    r = Rows(*shape)
    absmax = r.write(exponent)
    np.testing.assert_array_equal(r.plane, r.expected(exponent))
    assert absmax == largest(r.given)


@pytest.mark.usefixtures("machine")
@given(st.integers(1, 3), st.integers(1, 70), st.integers(1, 40), st.integers(-30, 40), st.integers(0, 99))
def test_any_rows(B: int, T: int, channels: int, exponent: int, seed: int) -> None:
    r = Rows(B, T, channels, seed=seed)
    absmax = r.write(exponent)
    np.testing.assert_array_equal(r.plane, r.expected(exponent))
    assert absmax == largest(r.given)


def read(r: Rows, exponent: int, *, accumulate: bool) -> tuple[float, int]:
    absmax, n_inf = ffi.new("float *"), ffi.new("int64_t *", 7)
    shape = r.B, r.T, r.Tp, r.C
    check(
        lib.anellm_ane_unpack_rows(
            at(r.x, 1), r.ld, absmax, n_inf, at(r.plane, 3), r.width, *shape, exponent, accumulate
        )
    )
    return float(absmax[0]), int(n_inf[0])


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("accumulate", [False, True])
@pytest.mark.parametrize("exponent", [0, -12, 20])
@pytest.mark.usefixtures("machine")
def test_rows_are_read_back(shape: tuple[int, int, int], accumulate: bool, exponent: int) -> None:
    r = Rows(*shape, wild=False)
    g = np.random.default_rng(1)
    r.plane[:] = g.integers(0, 0x7C00, r.plane.shape).astype(np.uint16) | (
        g.integers(0, 2, r.plane.shape) << 15
    ).astype(np.uint16)
    plane = r.plane.copy()
    before = r.x.copy()
    old = r.given.copy()
    field = np.stack([plane.reshape(-1)[3 + c * r.width :][: r.S] for c in range(r.C)])
    value = field.view(np.float16).reshape(r.C, r.B, r.Tp)[:, :, : r.T].transpose(1, 2, 0).reshape(-1, r.C)
    absmax, n_inf = read(r, exponent, accumulate=accumulate)
    wide = value.astype(np.float32) * np.float32(2.0**exponent)
    np.testing.assert_array_equal(r.given, old + wide if accumulate else wide)
    assert (absmax, n_inf) == (largest(value), 0)
    np.testing.assert_array_equal(r.plane, plane)
    flat, old_flat = r.x.reshape(-1), before.reshape(-1)
    np.testing.assert_array_equal(flat[:1], old_flat[:1])
    between = np.append(flat[1:], np.float32(0)).reshape(-1, r.ld)[:-1, r.C :]
    np.testing.assert_array_equal(between, np.append(old_flat[1:], np.float32(0)).reshape(-1, r.ld)[:-1, r.C :])


@pytest.mark.usefixtures("machine")
def test_what_is_written_comes_back() -> None:
    """A scale by a power of two changes nothing, as long as nothing is subnormal or too large."""
    r = Rows(2, 41, 33, wild=False)
    r.x[:] = r.x.astype(np.float16)
    r.x[np.abs(r.x) < 2.0**-6] = 1.0
    before = r.given.copy()
    for exponent in (0, 6, -6):
        r.write(exponent)
        r.x.reshape(-1)[1:] = 0
        assert read(r, -exponent, accumulate=False)[1] == 0
        np.testing.assert_array_equal(r.given, before)


@pytest.mark.usefixtures("machine")
def test_inf_and_nan_are_counted_and_come_through() -> None:
    r = Rows(2, 40, 19, wild=False)
    for place, value in ((5, np.inf), (77, -np.inf), (300, np.nan), (301, 65520.0), (302, 65519.0)):
        r.x.reshape(-1)[1 + place // r.C * r.ld + place % r.C] = value
    assert r.write() == float("inf")
    np.testing.assert_array_equal(r.plane, r.expected(0))
    given = halves(r.given, 0).view(np.float16)
    assert int((~np.isfinite(given)).sum()) == 4
    r.plane[:, 3 + r.T :][:, : r.Tp - r.T] = 0x7C00  # padding is not looked at
    absmax, n_inf = read(r, 3, accumulate=False)
    assert (absmax, n_inf) == (float("inf"), 4)
    np.testing.assert_array_equal(r.given, given.astype(np.float32) * 8)


@pytest.mark.usefixtures("machine")
def test_a_value_out_of_range_shows_in_absmax() -> None:
    r = Rows(1, 32, 8, wild=False)
    r.x.reshape(-1)[1 + 4] = 70000.0
    assert r.write() == 70000.0
    assert read(r, 0, accumulate=False) == (float("inf"), 1)


@pytest.mark.parametrize("shape", [(1, 1), (7, 5), (64, 64), (33, 130), (130, 33), (200, 16), (16, 200)], ids=str)
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.usefixtures("machine")
def test_weights(shape: tuple[int, int], transposed: bool) -> None:
    n_rows, n_columns = shape
    w = floats((n_rows, n_columns + 2), 3)
    channels, columns = (n_columns, n_rows) if transposed else shape
    plane, absmax = np.full((channels + 1, columns + 9), GUARD, np.uint16), ffi.new("float *")
    width = plane.shape[1]
    check(
        lib.anellm_ane_pack_weights(at(plane, 5), width, absmax, at(w, 0), w.shape[1], n_rows, n_columns, transposed, 4)
    )
    expected = np.full_like(plane, GUARD)
    given = halves(w[:, :n_columns], 4)
    for c, line in enumerate(given.T if transposed else given):
        expected.reshape(-1)[5 + c * width :][:columns] = line
    np.testing.assert_array_equal(plane, expected)
    assert absmax[0] == largest(w[:, :n_columns])


@pytest.mark.parametrize("shape", [(1, 1), (3, 32), (40, 77), (5, 300)], ids=str)
@pytest.mark.parametrize("exponent", [0, 5, -20])
@pytest.mark.usefixtures("machine")
def test_planes_are_scaled(shape: tuple[int, int], exponent: int) -> None:
    channels, columns = shape
    source = halves(floats((channels, columns + 4), 2), 0)
    source[0, 0] = 0x7C00
    out = np.full((channels, columns + 6), GUARD, np.uint16)
    absmax, n_inf = ffi.new("float *"), ffi.new("int64_t *")
    arguments = at(source, 0), source.shape[1], channels, columns, exponent
    check(lib.anellm_ane_scale_plane(at(out, 0), out.shape[1], absmax, n_inf, *arguments))
    with np.errstate(over="ignore"):
        expected = halves(source[:, :columns].view(np.float16).astype(np.float32), exponent)
    np.testing.assert_array_equal(out[:, :columns], expected)
    assert (out[:, columns:] == GUARD).all()
    bad = ~np.isfinite(expected.view(np.float16))
    assert (absmax[0], n_inf[0]) == (float("inf"), int(bad.sum()))
    in_place = source.copy()
    check(lib.anellm_ane_scale_plane(at(in_place, 0), source.shape[1], absmax, n_inf, at(in_place, 0), *arguments[1:]))
    np.testing.assert_array_equal(in_place[:, :columns], expected)


def test_bad_arguments_are_refused() -> None:
    x, plane = np.zeros((4, 8), np.float32), np.zeros((8, 64), np.uint16)
    a, b, null = ptr(x, np.float32), ptr(plane, np.uint16), ffi.NULL
    pack = lib.anellm_ane_pack_rows
    for arguments, message in (
        ((null, 64, null, a, 8, 1, 4, 32, 8, 0), "NULL"),
        ((b, 64, null, null, 8, 1, 4, 32, 8, 0), "NULL"),
        ((b, 63, null, a, 8, 2, 4, 32, 8, 0), "width is 63"),
        ((b, 64, null, a, 7, 1, 4, 32, 8, 0), "stride is 7"),
        ((b, 64, null, a, 8, 1, 4, 3, 8, 0), "Tp 3"),
        ((b, 64, null, a, 8, -1, 4, 32, 8, 0), "B is -1"),
        ((b, 64, null, a, 8, 2**62, 4, 32, 8, 0), "B is"),
        ((b, 64, null, a, 8, 1, 4, 32, 8, 127), "exponent is 127"),
    ):
        with pytest.raises(InvalidError, match=message):
            check(pack(*arguments))
    for call in (
        lambda: lib.anellm_ane_unpack_rows(a, 8, null, null, null, 64, 1, 4, 32, 8, 0, 0),
        lambda: lib.anellm_ane_pack_weights(b, 64, null, a, 8, -1, 8, 0, 0),
        lambda: lib.anellm_ane_pack_weights(b, 3, null, a, 8, 4, 8, 1, 0),
        lambda: lib.anellm_ane_scale_plane(b, 64, null, null, b, 64, 8, -1, 0),
        lambda: lib.anellm_ane_scale_plane(b, 64, null, null, b, 63, 8, 64, 0),
    ):
        with pytest.raises(InvalidError):
            check(call())
    assert not plane.any()
    for shape in ((0, 4, 32, 8), (1, 0, 32, 8), (1, 4, 32, 0)):  # nothing to do
        check(pack(b, 64, null, a, 8, *shape, 0))
        check(lib.anellm_ane_unpack_rows(a, 8, null, null, b, 64, *shape, 0, 1))
    assert not plane.any()
