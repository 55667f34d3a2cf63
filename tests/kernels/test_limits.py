"""Measuring the machine's limits, and the ladder of matrix products."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from anellm import errors
from anellm._ffi import check, ffi, lib, ptr, text

PEAK_TIERS = ("portable", "neon", "avx2", "avx512", "avx512bf16", "amx")


def rungs() -> list[str]:
    names = []
    while (name := lib.anellm_matmul_rung(len(names))) != ffi.NULL:
        names.append(text(name))
    return names


def ladder(a: np.ndarray, b: np.ndarray, rung: int) -> np.ndarray:
    (M, K), N = a.shape, b.shape[1]
    c = np.full((M, N), np.nan, np.float32)
    check(lib.anellm_matmul_ladder(*(ptr(x, np.float32) for x in (c, a, b)), M, N, K, rung))
    return c


@settings(max_examples=40)
@given(st.integers(1, 40), st.integers(1, 80), st.integers(0, 70), st.integers(0, 2**32 - 1))
def test_every_rung_is_the_product(M: int, N: int, K: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    a, b = rng.standard_normal((M, K), np.float32), rng.standard_normal((K, N), np.float32)
    exact = a.astype(np.float64) @ b.astype(np.float64)
    bound = 2 * max(K, 1) * 2.0**-24 * (np.abs(a).astype(np.float64) @ np.abs(b).astype(np.float64))
    for rung in range(len(rungs())):
        assert np.all(np.abs(ladder(a, b, rung) - exact) <= bound + 1e-30), rungs()[rung]


def test_blocks_that_k_and_n_span() -> None:
    rng = np.random.default_rng(0)
    a, b = rng.standard_normal((13, 530), np.float32), rng.standard_normal((530, 1100), np.float32)
    for rung in range(len(rungs())):
        np.testing.assert_allclose(ladder(a, b, rung), a @ b, rtol=0, atol=1e-3)


def test_threads_do_not_show() -> None:
    rng = np.random.default_rng(0)
    a, b = rng.standard_normal((100, 60), np.float32), rng.standard_normal((60, 70), np.float32)
    last = len(rungs()) - 1
    found = []
    for n in (1, 2, 5):
        check(lib.anellm_set_threads(n))
        found.append(ladder(a, b, last).tobytes())
    assert len(set(found)) == 1


def test_ladder_refuses() -> None:
    x = np.zeros((2, 2), np.float32)
    p = ptr(x, np.float32)
    n = len(rungs())
    for args, message in (
        ((p, p, p, 2, 2, 2, n), f"rung is {n}, expected 0..{n - 1}"),
        ((p, p, p, 2, 2, 2, -1), "rung is -1"),
        ((p, p, p, -2, 2, 2, 0), "M, N and K are -2, 2 and 2"),
        ((ffi.NULL, p, p, 2, 2, 2, 0), "C is NULL"),
        ((p, ffi.NULL, p, 2, 2, 2, 0), "A or B is NULL"),
    ):
        with pytest.raises(errors.InvalidError, match=message):
            check(lib.anellm_matmul_ladder(*args))
    check(lib.anellm_matmul_ladder(ffi.NULL, ffi.NULL, ffi.NULL, 0, 2, 2, 0))
    assert lib.anellm_matmul_rung(-1) == ffi.NULL


def test_peak_of_every_tier_here() -> None:
    found = ffi.new("double *")
    features = text(lib.anellm_cpu_features()).replace("amx_permitted", "amx").split(",")
    before = lib.anellm_get_threads()
    for tier in PEAK_TIERS:
        if tier != "portable" and tier not in features:
            continue
        found[0] = -1.0
        status = lib.anellm_peak_gflops(found, tier.encode(), 2, 0.001)
        if tier == "amx" and status == lib.ANELLM_INVALID:
            continue  # a build that emulates it for tests cannot measure it
        check(status)
        assert found[0] > 0
    assert lib.anellm_get_threads() == before


def test_bandwidth() -> None:
    found = ffi.new("double *")
    before = lib.anellm_get_threads()
    check(lib.anellm_bandwidth_gbs(found, 1 << 20, 2, 0.001))
    assert found[0] > 0
    assert lib.anellm_get_threads() == before


def test_measuring_refuses() -> None:
    found = ffi.new("double *", 7.0)
    missing = next(tier for tier in PEAK_TIERS if tier not in text(lib.anellm_cpu_features()) and tier != "portable")
    calls = [
        (lib.anellm_peak_gflops, (ffi.NULL, b"portable", 1, 0.1), "gflops is NULL"),
        (lib.anellm_peak_gflops, (found, ffi.NULL, 1, 0.1), "tier is NULL"),
        (lib.anellm_peak_gflops, (found, b"avx3", 1, 0.1), 'tier is "avx3"'),
        (lib.anellm_peak_gflops, (found, b"portable", 257, 0.1), "threads is 257"),
        (lib.anellm_peak_gflops, (found, b"portable", -1, 0.1), "threads is -1"),
        (lib.anellm_peak_gflops, (found, b"portable", 1, 0.0), "seconds is 0"),
        (lib.anellm_peak_gflops, (found, b"portable", 1, float("nan")), "seconds is -?nan"),
        (lib.anellm_bandwidth_gbs, (ffi.NULL, 1 << 20, 1, 0.1), "gbs is NULL"),
        (lib.anellm_bandwidth_gbs, (found, 1000, 1, 0.1), "bytes is 1000, expected at least 262144"),
        (lib.anellm_bandwidth_gbs, (found, 1 << 20, 1, 61.0), "seconds is 61"),
    ]
    for call, args, message in calls:
        with pytest.raises(errors.InvalidError, match=message):
            check(call(*args))
    # Known in this build but not on this machine, or not known in this build at all.
    with pytest.raises((errors.UnavailableError, errors.InvalidError), match=missing):
        check(lib.anellm_peak_gflops(found, missing.encode(), 1, 0.1))
    assert found[0] == 7.0
