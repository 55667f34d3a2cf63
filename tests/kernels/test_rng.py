"""Philox4x32-10 against its published answers, and the distributions built on it."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from reference import assert_refused, assert_same_bytes_for_any_threads, filled, pointer

from anellm._ffi import check, ffi, lib

# philox4x32-10 in the known-answer file (kat_vectors) of Random123, the authors' library: counter, key, output.
KNOWN = [
    ([0] * 4, [0] * 2, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
    ([0xFFFFFFFF] * 4, [0xFFFFFFFF] * 2, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
    (
        [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
        [0xA4093822, 0x299F31D0],
        [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
    ),
]
U64 = st.integers(0, 2**64 - 1)


def philox(counter: list[int], key: list[int]) -> list[int]:
    """Return the four words of a block, as in figure 2 and section 3.3 of Salmon et al. (2011)."""
    c, k = list(counter), list(key)
    for _ in range(10):
        p0, p1 = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [(p1 >> 32) ^ c[1] ^ k[0], p1 & 0xFFFFFFFF, (p0 >> 32) ^ c[3] ^ k[1], p0 & 0xFFFFFFFF]
        k = [(k[0] + 0x9E3779B9) & 0xFFFFFFFF, (k[1] + 0xBB67AE85) & 0xFFFFFFFF]
    return c


def words(low: int, high: int) -> int:
    return low | high << 32


def block(seed: int, stream: int, number: int) -> list[int]:
    low = 0xFFFFFFFF
    return philox([number & low, number >> 32, stream & low, stream >> 32], [seed & low, seed >> 32])


def uniform(n: int, seed: int, stream: int, counter: int = 0) -> np.ndarray:
    out = filled(n)
    check(lib.anellm_rng_uniform(pointer(out), n, seed, stream, counter))
    return out


def normal(n: int, seed: int, stream: int, mean: float = 0.0, std: float = 1.0) -> np.ndarray:
    out = filled(n)
    check(lib.anellm_rng_normal(pointer(out), n, seed, stream, mean, std))
    return out


@pytest.mark.parametrize(("counter", "key", "answer"), KNOWN)
def test_known_answers(counter: list[int], key: list[int], answer: list[int]) -> None:
    assert philox(counter, key) == answer  # the reference below is itself right
    value = lib.anellm_rng_u64(words(*key), words(*counter[2:]), words(*counter[:2]))
    assert value == words(*answer[:2])


@given(seed=U64, stream=U64, counter=U64)
def test_u64_is_a_philox_block(seed: int, stream: int, counter: int) -> None:
    assert lib.anellm_rng_u64(seed, stream, counter) == words(*block(seed, stream, counter)[:2])


@given(seed=U64, stream=U64, counter=U64, n=st.integers(1, 9))
def test_uniform_is_the_words_in_order(seed: int, stream: int, counter: int, n: int) -> None:
    out = uniform(n, seed, stream, counter)
    for i in range(n):
        element = (counter + i) % 2**64
        assert out[i] == (block(seed, stream, element // 4)[element % 4] >> 8) / 2**24


@given(seed=U64, stream=U64, n=st.integers(1, 9))
def test_normal_is_box_muller_of_the_words(seed: int, stream: int, n: int) -> None:
    out = normal(n, seed, stream, mean=0.25, std=3.0)
    for i in range(n):
        w = block(seed, stream, i // 4)
        u, t = w[i % 4 // 2 * 2], w[i % 4 // 2 * 2 + 1]
        radius, angle = math.sqrt(-2 * math.log((u + 1) / 2**32)), 2 * math.pi * t / 2**32
        expected = 0.25 + 3.0 * radius * (math.sin(angle) if i % 2 else math.cos(angle))
        assert abs(float(out[i]) - expected) <= 1e-6 * (1 + abs(expected))


def test_any_place_is_reached_directly() -> None:
    whole = uniform(50_000, 7, 3)
    assert np.array_equal(uniform(1000, 7, 3, counter=16_383), whole[16_383:17_383])
    assert np.array_equal(normal(17, 7, 3), normal(50_000, 7, 3)[:17])


def test_seeds_and_streams_differ() -> None:
    draws = [uniform(64, seed, stream).tobytes() for seed in (0, 1, 2**32, 2**63) for stream in (0, 1, 2**32, 2**63)]
    assert len(set(draws)) == len(draws)


def test_moments() -> None:
    u, z = uniform(400_000, 1, 2).astype(np.float64), normal(400_000, 1, 2).astype(np.float64)
    assert u.min() >= 0
    assert u.max() < 1
    # six standard errors of each estimate
    sixth = 6 / math.sqrt(len(u))
    assert abs(u.mean() - 0.5) < sixth * math.sqrt(1 / 12)
    assert abs(z.mean()) < sixth
    assert abs((z**2).mean() - 1) < sixth * math.sqrt(2)
    assert abs((z**4).mean() - 3) < sixth * math.sqrt(96)
    assert abs((z[:-1] * z[1:]).mean()) < sixth
    assert 4 < np.abs(z).max() < 6.67
    scaled = normal(400_000, 1, 2, mean=2.0, std=0.02)
    assert np.allclose(scaled, 2.0 + 0.02 * z, rtol=0, atol=3e-7)


def test_threads_do_not_change_bytes() -> None:
    assert_same_bytes_for_any_threads(lambda: (uniform(100_001, 5, 6, 3), normal(100_001, 5, 6)))


def test_bad_arguments_are_refused() -> None:
    out = filled(4)
    p, null, bad = pointer(out), ffi.NULL, lib.ANELLM_INVALID
    assert_refused(lib.anellm_rng_uniform(null, 4, 0, 0, 0), bad, "anellm_rng_uniform: out is NULL")
    assert_refused(lib.anellm_rng_uniform(p, -4, 0, 0, 0), bad, "n is -4", untouched=(out,))
    assert_refused(lib.anellm_rng_normal(null, 4, 0, 0, 0.0, 1.0), bad, "anellm_rng_normal: out is NULL")
    for args, word in [
        ((-4, 0, 0, 0.0, 1.0), "n is -4"),
        ((4, 0, 0, 0.0, -1.0), "std is -1"),
        ((4, 0, 0, 0.0, float("inf")), "std is inf"),
        ((4, 0, 0, float("nan"), 1.0), "mean is"),
    ]:
        assert_refused(lib.anellm_rng_normal(p, *args), bad, word, untouched=(out,))
    check(lib.anellm_rng_uniform(null, 0, 0, 0, 0))
    check(lib.anellm_rng_normal(null, 0, 0, 0, 0.0, 1.0))
