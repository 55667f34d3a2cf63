"""Embedding: gather and scatter-add against NumPy, and their contract."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from reference import (
    assert_refused,
    assert_same_bytes_for_any_threads,
    assert_within,
    filled,
    finite_differences,
    normal,
    pointer,
    portable,
    rng,
    unaligned,
)

from anellm._ffi import check, ffi, lib

NULL = ffi.NULL


def ids(seed: int, n: int, vocab: int) -> np.ndarray:
    return rng(seed).integers(0, vocab, n, dtype=np.int32)


def forward(table: np.ndarray, tokens: np.ndarray) -> np.ndarray:
    vocab, dim = table.shape
    out = unaligned(filled(len(tokens), dim))
    check(lib.anellm_embedding_forward(pointer(out), pointer(table), pointer(tokens), len(tokens), dim, vocab))
    return out


def backward(start: np.ndarray, dout: np.ndarray, tokens: np.ndarray) -> np.ndarray:
    vocab, dim = start.shape
    dtable = unaligned(start)
    check(lib.anellm_embedding_backward(pointer(dtable), pointer(dout), pointer(tokens), len(tokens), dim, vocab))
    return dtable


def in_order(start: np.ndarray, dout: np.ndarray, tokens: np.ndarray) -> np.ndarray:
    expected = start.copy()
    np.add.at(expected, tokens, dout)
    return expected


@given(n=st.integers(1, 40), dim=st.integers(1, 140), vocab=st.integers(1, 20), seed=st.integers(0, 99))
def test_both_directions_are_numpys(variant: str, n: int, dim: int, vocab: int, seed: int) -> None:
    table, dout, tokens = normal(seed, vocab, dim), normal(seed + 1, n, dim), ids(seed, n, vocab)
    assert np.array_equal(forward(table, tokens), table[tokens])
    # The sum runs in the order of the tokens, so it is exact, repeated tokens included.
    assert np.array_equal(backward(table, dout, tokens), in_order(table, dout, tokens))


def test_backward_is_the_derivative(variant: str) -> None:
    table, dout = normal(0, 5, 7), normal(1, 9, 7)
    tokens = np.array([0, 4, 4, 2, 0, 4, 1, 1, 4], dtype=np.int32)
    slope = finite_differences(lambda v: float((v[tokens] * dout).sum()), table)
    assert_within(backward(np.zeros_like(table), dout, tokens), slope, 2e-6)


@pytest.mark.parametrize("dim", range(1, 41))
def test_every_tail_matches_portable(variant: str, dim: int) -> None:
    table, dout, tokens = unaligned(normal(0, 6, dim)), unaligned(normal(1, 11, dim)), unaligned(ids(2, 11, 6))
    assert np.array_equal(forward(table, tokens), portable(lambda: forward(table, tokens)))
    assert np.array_equal(backward(table, dout, tokens), portable(lambda: backward(table, dout, tokens)))


def test_non_finite_stays_where_it_is(variant: str) -> None:
    table, dout, tokens = normal(0, 3, 9), normal(1, 2, 9), np.array([2, 1], dtype=np.int32)
    table[2, 4], dout[1, 8] = np.nan, np.inf
    assert np.array_equal(forward(table, tokens), table[tokens], equal_nan=True)
    assert np.array_equal(backward(table, dout, tokens), in_order(table, dout, tokens), equal_nan=True)


def test_threads_do_not_change_bytes(variant: str) -> None:
    table, dout, tokens = normal(0, 10, 300), normal(1, 500, 300), ids(2, 500, 10)
    assert_same_bytes_for_any_threads(lambda: (forward(table, tokens), backward(table, dout, tokens)))


@pytest.mark.parametrize("token", [-1, 5, 2**31 - 1, -(2**31), -100])
@pytest.mark.parametrize("at", [0, 3])
def test_a_token_outside_the_vocabulary_is_refused(variant: str, token: int, at: int) -> None:
    table, dout, tokens, out, dtable = normal(0, 5, 8), normal(1, 4, 8), ids(2, 4, 5), filled(4, 8), filled(5, 8)
    tokens[at] = token
    words = ("tokens", f"[{at}]", str(token), "[0, 5)")
    status = lib.anellm_embedding_forward(pointer(out), pointer(table), pointer(tokens), 4, 8, 5)
    assert_refused(status, lib.ANELLM_RANGE, "anellm_embedding_forward", *words, untouched=(out,))
    status = lib.anellm_embedding_backward(pointer(dtable), pointer(dout), pointer(tokens), 4, 8, 5)
    assert_refused(status, lib.ANELLM_RANGE, "anellm_embedding_backward", *words, untouched=(dtable,))


@pytest.mark.parametrize(
    ("run", "names"),
    [
        (lib.anellm_embedding_forward, ("out", "table", "tokens")),
        (lib.anellm_embedding_backward, ("dtable", "dout", "tokens")),
    ],
)
def test_bad_arguments_are_refused(run: object, names: tuple[str, ...]) -> None:
    out, data, tokens = filled(4, 8), normal(0, 5, 8), ids(0, 4, 4)
    good = (pointer(out), pointer(data), pointer(tokens), 4, 8, 4)
    for i, word in enumerate((*(f"{name} is NULL" for name in names), "N is -1", "dim is -1", "vocab_size is -1")):
        args = (*good[:i], NULL if i < 3 else -1, *good[i + 1 :])
        assert_refused(run(*args), lib.ANELLM_INVALID, word, untouched=(out,))
    check(run(NULL, NULL, NULL, 0, 8, 4))
    check(run(NULL, NULL, NULL, 4, 0, 4))
    assert run(*good[:5], 0) == lib.ANELLM_RANGE  # no token is inside an empty vocabulary
