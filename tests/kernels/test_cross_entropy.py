"""Cross entropy against float64, finite differences, its portable kernel, and its contract."""

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
    rng,
    strided,
    unaligned,
)

from anellm._ffi import check, ffi, lib

NULL = ffi.NULL
IGNORE = lib.ANELLM_IGNORE_INDEX


def reference(logits: np.ndarray, targets: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return losses and lse of (N, V)."""
    logits = logits.astype(np.float64)
    top = logits.max(axis=1)
    lse = top + np.log(np.exp(logits - top[:, None]).sum(axis=1))
    keep = targets != IGNORE
    losses = lse - logits[np.arange(len(logits)), np.where(keep, targets, 0)]
    return np.where(keep, losses, 0), np.where(keep, lse, 0)


def reference_backward(logits: np.ndarray, targets: np.ndarray, scale: float) -> tuple[np.ndarray, np.ndarray]:
    """Return the gradient and the probabilities."""
    logits = logits.astype(np.float64)
    keep = targets != IGNORE
    p = np.exp(logits - logits.max(axis=1, keepdims=True))
    p /= p.sum(axis=1, keepdims=True)
    onehot = np.zeros_like(p)
    onehot[np.arange(len(p)), np.where(keep, targets, 0)] = 1
    return (p - onehot) * scale * keep[:, None], p


def forward(logits: np.ndarray, targets: np.ndarray, vocab: int | None = None) -> tuple[np.ndarray, np.ndarray]:
    n, ld = logits.shape
    losses, lse = unaligned(filled(n)), unaligned(filled(n))
    check(
        lib.anellm_cross_entropy_forward(
            pointer(losses), pointer(lse), pointer(logits), ld, pointer(targets), n, vocab or ld
        )
    )
    return losses, lse


def backward(logits: np.ndarray, targets: np.ndarray, scale: float, vocab: int | None = None) -> np.ndarray:
    n, ld = logits.shape
    lse = forward(logits, targets, vocab)[1]
    out = unaligned(filled(n, ld))
    check(
        lib.anellm_cross_entropy_backward(
            pointer(out), ld, pointer(logits), ld, pointer(lse), pointer(targets), n, vocab or ld, scale
        )
    )
    return out


def make(seed: int, n: int, vocab: int, scale: float = 3.0) -> tuple[np.ndarray, np.ndarray]:
    targets = rng(seed).integers(0, vocab, n, dtype=np.int32)
    targets[rng(seed + 1).random(n) < 0.25] = IGNORE
    return normal(seed, n, vocab, scale=scale), targets


def assert_gradient(actual: np.ndarray, logits: np.ndarray, targets: np.ndarray, scale: float) -> None:
    expected, p = reference_backward(logits, targets, scale)
    # exp multiplies the rounding of lse and of logits - lse, a few 1e-7 of their size, into p; 1 - p rounds once more.
    assert_within(actual, expected, abs(scale) * (p * 2e-7 * (10 + np.abs(logits).max()) + 1e-7))
    assert (actual[targets == IGNORE] == 0).all()


@given(
    n=st.integers(1, 9),
    vocab=st.integers(1, 90),
    gap=st.integers(0, 5),
    seed=st.integers(0, 99),
    scale=st.sampled_from([0.1, 3.0, 30.0]),
)
def test_forward_and_backward_are_the_reference(
    variant: str, n: int, vocab: int, gap: int, seed: int, scale: float
) -> None:
    logits, targets = make(seed, n, vocab, scale)
    rows = strided(logits, vocab + gap)
    losses, lse = forward(rows, targets, vocab)
    expected_losses, expected_lse = reference(logits, targets)
    assert_within(losses, expected_losses, 5e-7 * (1 + np.abs(expected_losses)))
    assert_within(lse, expected_lse, 5e-7 * (1 + np.abs(expected_lse)))
    dlogits = backward(rows, targets, 0.7, vocab)
    assert_gradient(dlogits[:, :vocab], logits, targets, 0.7)
    assert_gaps_untouched(dlogits, vocab)


@given(n=st.integers(1, 3), vocab=st.integers(1, 20), seed=st.integers(0, 99))
def test_backward_is_the_derivative(variant: str, n: int, vocab: int, seed: int) -> None:
    logits, targets = make(seed, n, vocab)
    slope = finite_differences(lambda v: 2.5 * float(reference(v, targets)[0].sum()), logits)
    assert_within(backward(logits, targets, 2.5), slope, 1e-5)


def test_a_large_vocabulary(variant: str) -> None:
    logits, targets = make(0, 3, 50_257)
    targets[:] = [50_256, 0, 12_345]
    losses, lse = forward(logits, targets)
    expected_losses, expected_lse = reference(logits, targets)
    assert_within(losses, expected_losses, 2e-6)
    assert_within(lse, expected_lse, 2e-6)
    assert_gradient(backward(logits, targets, 1.0), logits, targets, 1.0)


def test_shifted_logits_neither_overflow_nor_lose_small_losses(variant: str) -> None:
    logits = np.array([[1e4, 1e4 - 12, 1e4 - 13], [-3e38, -3e38, -3e38], [0, -12, -13]], dtype=np.float32)
    targets = np.array([0, 1, 0], dtype=np.int32)
    losses, _ = forward(logits, targets)
    small = np.log1p(np.exp(-12.0) + np.exp(-13.0))
    assert_within(losses, np.array([small, np.log(3.0), small]), np.array([1e-7, 1e-6, 1e-7]))


@pytest.mark.parametrize("vocab", range(1, 41))
def test_every_tail_matches_portable(variant: str, vocab: int) -> None:
    logits, targets = (unaligned(a) for a in make(vocab, 4, vocab))
    targets[0] = vocab - 1
    losses, lse = forward(logits, targets)
    losses_p, lse_p = portable(lambda: forward(logits, targets))
    assert_within(losses, losses_p, 1e-6 * (1 + np.abs(losses_p)))
    assert_within(lse, lse_p, 1e-6 * (1 + np.abs(lse_p)))
    dlogits_p = portable(lambda: backward(logits, targets, 1.0))
    assert_within(backward(logits, targets, 1.0), dlogits_p, 2e-6)


def test_in_place_gives_the_same_bytes(variant: str) -> None:
    logits, targets = make(3, 33, 101)
    expected, lse = backward(logits, targets, 0.3), forward(logits, targets)[1]
    p = pointer(logits)
    check(lib.anellm_cross_entropy_backward(p, 101, p, 101, pointer(lse), pointer(targets), 33, 101, 0.3))
    assert np.array_equal(logits, expected)


def test_lse_may_be_left_out(variant: str) -> None:
    logits, targets = make(3, 5, 10)
    losses = filled(5)
    check(lib.anellm_cross_entropy_forward(pointer(losses), NULL, pointer(logits), 10, pointer(targets), 5, 10))
    assert np.array_equal(losses, forward(logits, targets)[0])


@pytest.mark.parametrize("at", [0, 32, 40])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_non_finite_logits_show_in_their_row(variant: str, value: float, at: int) -> None:
    logits = normal(0, 3, 41)
    targets = np.array([1, 2, 3], dtype=np.int32)
    clean = forward(logits, targets)[0]
    logits[1, at] = value
    losses, _ = forward(logits, targets)
    assert np.isnan(losses[1])
    assert np.array_equal(losses[[0, 2]], clean[[0, 2]])
    dlogits = backward(logits, targets, 1.0)
    assert np.isnan(dlogits[1]).all()
    assert np.isfinite(dlogits[[0, 2]]).all()
    targets[1] = IGNORE  # an ignored row is not read
    assert np.isfinite(forward(logits, targets)[0]).all()
    assert (backward(logits, targets, 1.0)[1] == 0).all()


def test_minus_infinity_is_probability_zero(variant: str) -> None:
    logits, targets = normal(0, 2, 50), np.array([3, 4], dtype=np.int32)
    logits[:, 10:45] = -np.inf
    losses, _ = forward(logits, targets)
    assert_within(losses, reference(logits, targets)[0], 1e-6)
    assert (backward(logits, targets, 1.0)[:, 10:45] == 0).all()
    targets[0] = 20
    assert np.isposinf(forward(logits, targets)[0][0])


def test_threads_do_not_change_bytes(variant: str) -> None:
    logits, targets = make(0, 97, 1001)
    assert_same_bytes_for_any_threads(lambda: (*forward(logits, targets), backward(logits, targets, 0.5)))


@pytest.mark.parametrize("target", [-1, -99, -101, 8, 2**31 - 1])
def test_a_target_outside_the_vocabulary_is_refused(variant: str, target: int) -> None:
    logits, targets = normal(0, 4, 8), np.array([0, 7, target, IGNORE], dtype=np.int32)
    losses, lse, dlogits = filled(4), filled(4), filled(4, 8)
    words = ("targets[2]", f"is {target};", "[0, 8)", "-100")
    status = lib.anellm_cross_entropy_forward(pointer(losses), pointer(lse), pointer(logits), 8, pointer(targets), 4, 8)
    assert_refused(status, lib.ANELLM_RANGE, "anellm_cross_entropy_forward", *words, untouched=(losses, lse))
    status = lib.anellm_cross_entropy_backward(
        pointer(dlogits), 8, pointer(logits), 8, pointer(lse), pointer(targets), 4, 8, 1.0
    )
    assert_refused(status, lib.ANELLM_RANGE, "anellm_cross_entropy_backward", *words, untouched=(dlogits,))


def test_bad_arguments_are_refused() -> None:
    logits, targets = make(0, 4, 8)
    losses, lse, dlogits = filled(4), filled(4), filled(4, 9)
    lo, ls, x, t, d = (pointer(a) for a in (losses, lse, logits, targets, dlogits))
    bad = lib.ANELLM_INVALID
    for args, word in [
        ((NULL, ls, x, 8, t, 4, 8), "losses is NULL"),
        ((lo, ls, NULL, 8, t, 4, 8), "logits is NULL"),
        ((lo, ls, x, 8, NULL, 4, 8), "targets is NULL"),
        ((lo, ls, x, 7, t, 4, 8), "ld_logits is 7"),
        ((lo, ls, x, 8, t, -4, 8), "N is -4"),
        ((lo, ls, x, 8, t, 4, -8), "vocab_size is -8"),
        ((lo, ls, x, 8, t, 4, 0), "vocab_size is 0"),
    ]:
        status = lib.anellm_cross_entropy_forward(*args)
        assert_refused(status, bad, "anellm_cross_entropy_forward", word, untouched=(losses, lse))
    for args, word in [
        ((NULL, 9, x, 8, ls, t, 4, 8, 1.0), "dlogits is NULL"),
        ((d, 9, NULL, 8, ls, t, 4, 8, 1.0), "logits is NULL"),
        ((d, 9, x, 8, NULL, t, 4, 8, 1.0), "lse is NULL"),
        ((d, 9, x, 8, ls, NULL, 4, 8, 1.0), "targets is NULL"),
        ((d, 7, x, 8, ls, t, 4, 8, 1.0), "ld_dlogits is 7"),
        ((d, 9, x, 7, ls, t, 4, 8, 1.0), "ld_logits is 7"),
        ((d, 9, d, 8, ls, t, 4, 8, 1.0), "ld_dlogits is 9"),
        ((d, 9, x, 8, ls, t, -1, 8, 1.0), "N is -1"),
        ((d, 9, x, 8, ls, t, 4, 0, 1.0), "vocab_size is 0"),
    ]:
        status = lib.anellm_cross_entropy_backward(*args)
        assert_refused(status, bad, "anellm_cross_entropy_backward", word, untouched=(dlogits,))
    check(lib.anellm_cross_entropy_forward(NULL, NULL, NULL, 0, NULL, 0, 8))
    check(lib.anellm_cross_entropy_backward(NULL, 0, NULL, 0, NULL, NULL, 0, 8, 1.0))
