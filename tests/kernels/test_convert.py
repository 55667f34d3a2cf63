"""Conversions between fp32 and fp16 / bf16, value by value."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from reference import assert_refused, assert_same_bytes_for_any_threads, normal, pointer, portable, rng, unaligned

from anellm._ffi import check, ffi, lib

NULL = ffi.NULL
ALL_16 = np.arange(65536, dtype=np.uint16)


def convert(run: Any, values: np.ndarray) -> np.ndarray:
    out = unaligned(np.zeros(values.shape, dtype=np.uint16 if values.dtype == np.float32 else np.float32))
    check(run(pointer(out), pointer(values), values.size))
    return out


def bits(values: np.ndarray) -> np.ndarray:
    return values.view(np.uint32)


def awkward_floats() -> np.ndarray:
    """Return fp32 around every rounding decision of fp16 and bf16, and random bit patterns."""
    halves = np.arange(0x7C00, dtype=np.uint16).view(np.float16).astype(np.float64)
    ties16 = ((halves[:-1] + halves[1:]) / 2).astype(np.float32)  # exact
    brains = (np.arange(0, 0x7F80, 7, dtype=np.uint32) << 16).view(np.float32)
    ties_b = (bits(brains) + 0x8000).view(np.float32)
    edges = np.array([65504, 65519.996, 65520, 65535, 65536, 2.0**-24, 2.0**-25, 2.0**-14, 3.4028235e38], np.float32)
    special = np.array([0, np.inf, np.nan, 1e-45, 1.1754944e-38, 1e-40], dtype=np.float32)
    near = np.concatenate([halves.astype(np.float32), ties16, brains, ties_b, edges])
    with np.errstate(over="ignore"):
        near = np.concatenate([near, np.nextafter(near, np.float32(np.inf)), np.nextafter(near, np.float32(-np.inf))])
    random = rng(0).integers(0, 2**32, 200_000, dtype=np.uint32).view(np.float32)
    nans = (rng(1).integers(1, 2**23, 999, dtype=np.uint32) | np.uint32(0x7F800000)).view(np.float32)
    values = np.concatenate([near, special, nans])
    return np.concatenate([values, -values, random])


def nearest_bf16(values: np.ndarray) -> np.ndarray:
    """Return the bf16 bits nearest to finite fp32 values: compare the distances to both neighbours in float64."""
    low = bits(values) & np.uint32(0xFFFF0000)
    high = low.astype(np.uint64) + 0x10000
    magnitude = np.abs(values.astype(np.float64))

    def value(pattern: np.ndarray) -> np.ndarray:
        exponent = (pattern.astype(np.int64) >> 23) & 0xFF
        fraction = (pattern.astype(np.int64) & 0x7FFFFF) / 2.0**23
        return np.where(exponent == 0, fraction * 2.0**-126, (1 + fraction) * 2.0 ** (exponent - 127.0))

    below, above = magnitude - value(low), value(high) - magnitude
    odd = (low >> 16) & 1 == 1
    return np.where((below < above) | ((below == above) & ~odd), low, high).astype(np.uint32) >> 16


def test_every_half_becomes_its_float(variant: str) -> None:
    out = convert(lib.anellm_convert_f16_to_f32, ALL_16)
    expected = ALL_16.view(np.float16).astype(np.float32)
    nan = np.isnan(expected)
    assert np.array_equal(bits(out)[~nan], bits(expected)[~nan])  # -0.0 and subnormals included
    assert np.isnan(out[nan]).all()
    assert np.array_equal(np.signbit(out[nan]), np.signbit(expected[nan]))


def test_every_half_survives_the_round_trip(variant: str) -> None:
    out = convert(lib.anellm_convert_f32_to_f16, convert(lib.anellm_convert_f16_to_f32, ALL_16))
    nan = np.isnan(ALL_16.view(np.float16))
    assert np.array_equal(out[~nan], ALL_16[~nan])
    assert np.array_equal(out[nan], ALL_16[nan] | 0x200)


def test_floats_round_to_the_nearest_half(variant: str) -> None:
    values = awkward_floats()
    out = convert(lib.anellm_convert_f32_to_f16, values)
    with np.errstate(over="ignore"):
        expected = values.astype(np.float16)
    nan = np.isnan(values)
    assert np.array_equal(out[~nan], expected.view(np.uint16)[~nan])
    assert np.isnan(out.view(np.float16)[nan]).all()
    assert np.array_equal(out[nan] >> 15, bits(values)[nan] >> 31)


def test_every_bf16_becomes_its_float_and_returns(variant: str) -> None:
    out = convert(lib.anellm_convert_bf16_to_f32, ALL_16)
    assert np.array_equal(bits(out), ALL_16.astype(np.uint32) << 16)
    back = convert(lib.anellm_convert_f32_to_bf16, out)
    nan = np.isnan(out)
    assert np.array_equal(back[~nan], ALL_16[~nan])
    assert np.array_equal(back[nan], ALL_16[nan] | 0x40)


def test_floats_round_to_the_nearest_bf16(variant: str) -> None:
    values = awkward_floats()
    out = convert(lib.anellm_convert_f32_to_bf16, values)
    finite = np.isfinite(values)
    assert np.array_equal(out[finite], nearest_bf16(values[finite]))
    assert np.array_equal(out[np.isinf(values)], bits(values)[np.isinf(values)] >> 16)
    nan = np.isnan(values)
    assert (out[nan] & 0x7FFF > 0x7F80).all()
    assert np.array_equal(out[nan] >> 15, bits(values)[nan] >> 31)


RUNS = {
    "f32_to_f16": lib.anellm_convert_f32_to_f16,
    "f16_to_f32": lib.anellm_convert_f16_to_f32,
    "f32_to_bf16": lib.anellm_convert_f32_to_bf16,
    "bf16_to_f32": lib.anellm_convert_bf16_to_f32,
}


@pytest.mark.parametrize("name", RUNS)
def test_every_variant_gives_the_same_bytes(variant: str, name: str) -> None:
    values = awkward_floats() if name.startswith("f32") else ALL_16
    out, expected = convert(RUNS[name], values), portable(lambda: convert(RUNS[name], values))
    assert out.tobytes() == expected.tobytes()  # NaN payloads included


@pytest.mark.parametrize("name", RUNS)
def test_every_tail_at_every_address(variant: str, name: str) -> None:
    values = normal(0, 41) if name.startswith("f32") else ALL_16[0x3C00:0x3C29].copy()
    whole = convert(RUNS[name], values)
    for n in range(1, 41):
        part = unaligned(values[:n])
        out = np.full(n + 9, 77, dtype=whole.dtype)
        check(RUNS[name](pointer(out), pointer(part), n))
        assert np.array_equal(out[:n], whole[:n])
        assert (out[n:] == 77).all()


@pytest.mark.parametrize("name", RUNS)
def test_threads_do_not_change_bytes(variant: str, name: str) -> None:
    values = awkward_floats() if name.startswith("f32") else np.tile(ALL_16, 3)
    assert_same_bytes_for_any_threads(lambda: (convert(RUNS[name], values),))


@pytest.mark.parametrize("name", RUNS)
def test_bad_arguments_are_refused(name: str) -> None:
    wide, narrow = np.full(4, 5, dtype=np.float32), np.full(4, 5, dtype=np.uint16)
    out, values = (narrow, wide) if name.startswith("f32") else (wide, narrow)
    function = f"anellm_convert_{name}: "
    for args, word in [
        ((NULL, pointer(values), 4), "out is NULL"),
        ((pointer(out), NULL, 4), "in is NULL"),
        ((pointer(out), pointer(values), -4), "n is -4"),
    ]:
        assert_refused(RUNS[name](*args), lib.ANELLM_INVALID, function + word, untouched=(out,), fill=5)
    check(RUNS[name](NULL, NULL, 0))
