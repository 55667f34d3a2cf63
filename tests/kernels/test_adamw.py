"""AdamW against a float64 implementation of its formula, its portable kernel, and its contract."""

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
    normal,
    pointer,
    portable,
    unaligned,
)

from anellm._ffi import check, ffi, lib

NULL = ffi.NULL
DEFAULTS = {"lr": 1e-3, "beta1": 0.9, "beta2": 0.95, "eps": 1e-8, "weight_decay": 0.1, "grad_scale": 1.0, "step": 1}
State = tuple[np.ndarray, ...]


def reference(p: np.ndarray, m: np.ndarray, v: np.ndarray, g: np.ndarray, **options: float) -> State:
    """Return p, m, v after one step, in float64, as Loshchilov and Hutter (2019, algorithm 2) and PyTorch do."""
    o = DEFAULTS | options
    g = g.astype(np.float64) * o["grad_scale"]
    m = o["beta1"] * m + (1 - o["beta1"]) * g
    v = o["beta2"] * v + (1 - o["beta2"]) * g * g
    m_hat, v_hat = m / (1 - o["beta1"] ** o["step"]), v / (1 - o["beta2"] ** o["step"])
    return p - o["lr"] * o["weight_decay"] * p - o["lr"] * m_hat / (np.sqrt(v_hat) + o["eps"]), m, v


def step(p: np.ndarray, m: np.ndarray, v: np.ndarray, g: np.ndarray, **options: float) -> State:
    """Run the kernel on copies at awkward addresses."""
    p, m, v, g = (unaligned(a) for a in (p, m, v, g))
    params = ffi.new("anellm_adamw_params *", DEFAULTS | options)
    check(lib.anellm_adamw(pointer(p), pointer(m), pointer(v), pointer(g), p.size, params))
    return p, m, v


def state(seed: int, n: int) -> State:
    """Return p, m, v, g in the middle of a training run."""
    return normal(seed, n), normal(seed + 1, n, scale=0.1), normal(seed + 2, n, scale=0.1) ** 2, normal(seed + 3, n)


def assert_step(actual: State, before: State, **options: float) -> None:
    o = DEFAULTS | options
    p, m, _, g = before
    expected = reference(*(a.astype(np.float64) for a in before), **options)
    assert_within(actual[1], expected[1], 2.5e-7 * (np.abs(m) + np.abs(g * o["grad_scale"])))
    assert_within(actual[2], expected[2], 4e-7 * expected[2])
    # the update: m may cancel, v may not
    denominator = np.sqrt(expected[2] / (1 - o["beta2"] ** o["step"])) + o["eps"]
    size = o["lr"] / (1 - o["beta1"] ** o["step"]) * (np.abs(m) + np.abs(g * o["grad_scale"])) / denominator
    # p is rounded once: half a unit in the last place is at most 2^-24 of it
    assert_within(actual[0], expected[0], 6e-8 * np.abs(expected[0]) + 1e-6 * (size + o["lr"] * np.abs(p)))


@given(
    n=st.integers(1, 90),
    seed=st.integers(0, 99),
    lr=st.sampled_from([0.0, 1e-4, 0.3]),
    beta1=st.sampled_from([0.0, 0.9]),
    beta2=st.sampled_from([0.0, 0.95, 0.9999]),
    eps=st.sampled_from([1e-12, 1e-3]),
    weight_decay=st.sampled_from([0.0, 0.1]),
    grad_scale=st.sampled_from([1.0, -0.5, 1e-3]),
    step_number=st.sampled_from([1, 2, 1000, 10**9]),
)
def test_one_step_is_the_reference(variant: str, n: int, seed: int, step_number: int, **options: float) -> None:
    before = state(seed, n)
    assert_step(step(*before, step=step_number, **options), before, step=step_number, **options)


def test_a_run_of_steps_follows_the_reference(variant: str) -> None:
    p, m, v = normal(0, 1003), np.zeros(1003, dtype=np.float32), np.zeros(1003, dtype=np.float32)
    exact: State = tuple(a.astype(np.float64) for a in (p, m, v))
    for number in range(1, 21):
        g = normal(number, 1003)
        p, m, v = step(p, m, v, g, step=number)
        exact = reference(*exact, g.astype(np.float64), step=number)
    assert_within(p, exact[0], 1e-6 + 20 * 6e-8 * np.abs(exact[0]))
    assert_within(m, exact[1], 1e-6)
    assert_within(v, exact[2], 1e-6 * exact[2] + 1e-12)


def test_the_first_step_moves_by_the_learning_rate(variant: str) -> None:
    """With bias correction, step 1 is lr * sign(g), whatever the size of g."""
    p, zero = np.ones(64, dtype=np.float32), np.zeros(64, dtype=np.float32)
    g = np.float32([1e-3, -1e-3, 5.0, -5.0] * 16)
    out, _, _ = step(p, zero, zero, g, lr=0.01, weight_decay=0.0)
    assert_within(out, 1 - 0.01 * np.sign(g).astype(np.float64), 2e-7)


def test_decay_is_decoupled(variant: str) -> None:
    """With no gradient and no moments only the weights shrink."""
    p, zero = normal(0, 33), np.zeros(33, dtype=np.float32)
    out, m, v = step(p, zero, zero, zero, lr=0.1, weight_decay=0.5)
    assert_within(out, p.astype(np.float64) * 0.95, 7e-8 * np.abs(p))
    assert not m.any()
    assert not v.any()


def test_a_small_decay_is_not_rounded_to_a_multiple_of_2_to_the_minus_24(variant: str) -> None:
    """Over many steps the weights shrink by what was asked for, not by the nearest fp32 factor below 1."""
    p, zero = 1 + np.abs(normal(0, 500)), np.zeros(500, dtype=np.float32)
    out = p
    for _ in range(400):
        out, _, _ = step(out, zero, zero, zero, lr=1e-4, weight_decay=0.1)
    shrunk = -np.log(out.astype(np.float64) / p).mean() / 400
    assert abs(shrunk / 1e-5 - 1) < 1e-3


@pytest.mark.parametrize("n", range(1, 41))
def test_every_tail_matches_portable(variant: str, n: int) -> None:
    before = state(n, n)
    p, m, v = step(*before, step=3)
    p_p, m_p, v_p = portable(lambda: step(*before, step=3))
    assert_within(m, m_p, 2.5e-7 * (np.abs(before[1]) + np.abs(before[3])))
    assert_within(v, v_p, 4e-7 * v_p)
    assert_within(p, p_p, 4e-7 * np.abs(p_p) + 1e-8)


def test_a_slice_is_updated_as_part_of_the_whole(variant: str) -> None:
    """Training one tensor at a time, or all as one span, gives the same bytes."""
    before = state(0, 1000)
    whole = step(*before)
    for start, stop in [(0, 3), (3, 500), (500, 517), (517, 1000)]:
        for a, b in zip(step(*(x[start:stop] for x in before)), whole, strict=True):
            assert np.array_equal(a, b[start:stop])


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_non_finite_gradients_stay_in_their_place(variant: str, value: float) -> None:
    before = state(0, 41)
    clean = step(*before)
    for at in (0, 17, 40):
        g = before[3].copy()
        g[at] = value
        for a, b in zip(step(*before[:3], g), clean, strict=True):
            assert not np.isfinite(a[at])
            assert np.array_equal(np.delete(a, at), np.delete(b, at))


def test_threads_do_not_change_bytes(variant: str) -> None:
    before = state(0, 200_003)
    assert_same_bytes_for_any_threads(lambda: step(*before))


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"lr": -1e-3}, "lr is -0.001"),
        ({"lr": float("inf")}, "lr is inf"),
        ({"beta1": 1.0}, "beta1 is 1"),
        ({"beta1": -0.1}, "beta1 is -0.1"),
        ({"beta2": 1.5}, "beta2 is 1.5"),
        ({"beta2": float("nan")}, "beta2 is"),
        ({"eps": -1e-8}, "eps is -1e-08"),
        ({"weight_decay": -0.1}, "weight_decay is -0.1"),
        ({"grad_scale": float("nan")}, "grad_scale is"),
        ({"step": 0}, "step is 0"),
    ],
)
def test_bad_scalars_are_refused(change: dict[str, float], word: str) -> None:
    p, m, v = filled(8), filled(8), filled(8)
    params = ffi.new("anellm_adamw_params *", DEFAULTS | change)
    status = lib.anellm_adamw(pointer(p), pointer(m), pointer(v), pointer(normal(0, 8)), 8, params)
    assert_refused(status, lib.ANELLM_INVALID, "anellm_adamw", word, untouched=(p, m, v))


def test_bad_arguments_are_refused() -> None:
    p, m, v, g = filled(8), filled(8), filled(8), normal(0, 8)
    params = ffi.new("anellm_adamw_params *", DEFAULTS)
    good = (pointer(p), pointer(m), pointer(v), pointer(g), 8, params)
    for i, word in enumerate(["param is NULL", "m is NULL", "v is NULL", "grad is NULL", "n is -1", "p is NULL"]):
        status = lib.anellm_adamw(*good[:i], -1 if i == 4 else NULL, *good[i + 1 :])
        assert_refused(status, lib.ANELLM_INVALID, "anellm_adamw", word, untouched=(p, m, v))
    check(lib.anellm_adamw(NULL, NULL, NULL, NULL, 0, params))
