"""The global loss scale: when it falls and grows, its limits and state, and that a power of two changes nothing."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from anellm.config import ModelConfig
from anellm.errors import InvalidError
from anellm.loss_scaler import LossScaler
from anellm.model import Model

SHAPE = ModelConfig(dim=16, hidden_dim=24, n_layers=2, n_heads=2, n_kv_heads=1, vocab_size=64, max_seq_len=16)


def test_it_falls_at_once_and_grows_after_a_quiet_while() -> None:
    scaler = LossScaler()
    first = scaler.scale
    scaler.update(finite=False)
    assert scaler.scale == first / 2
    for _ in range(LossScaler.GROWTH_INTERVAL - 1):
        scaler.update(finite=True)
    assert scaler.scale == first / 2
    scaler.update(finite=True)
    assert (scaler.scale, scaler.quiet_steps) == (first, 0)


def test_a_bad_step_begins_the_quiet_while_anew() -> None:
    scaler = LossScaler()
    first = scaler.scale
    for _ in range(LossScaler.GROWTH_INTERVAL - 1):
        scaler.update(finite=True)
    scaler.update(finite=False)
    for _ in range(LossScaler.GROWTH_INTERVAL - 1):
        scaler.update(finite=True)
    assert scaler.scale == first / 2


def test_its_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LossScaler, "GROWTH_INTERVAL", 1)
    scaler = LossScaler()
    for _ in range(99):
        scaler.update(finite=False)
    assert scaler.scale == LossScaler.MIN
    for _ in range(99):
        scaler.update(finite=True)
    assert scaler.scale == LossScaler.MAX


@given(st.lists(st.booleans(), max_size=60))
def test_it_stays_a_power_of_two_and_its_state_is_all_there_is(steps: list[bool]) -> None:
    class Quick(LossScaler):
        GROWTH_INTERVAL = 3

    one, other = Quick(), Quick(scale=1.0, quiet_steps=2)
    for finite in steps:
        one.update(finite=finite)
        assert math.frexp(one.scale)[0] == 0.5
        assert Quick.MIN <= one.scale <= Quick.MAX
    other.load_state_dict(one.state_dict())
    for finite in (True, True, False, True, True, True):
        one.update(finite=finite)
        other.update(finite=finite)
        assert one == other


GOOD = LossScaler().state_dict()
DAMAGED: list[dict[str, Any]] = [
    {},
    {"loss_scale": 1.0},
    {**GOOD, "more": 1},
    *(
        {**GOOD, "loss_scale": value}
        for value in (3.0, 0.0, -2.0, 2.0**40, 2.0**-40, math.nan, math.inf, "1", None, True)
    ),
    *({**GOOD, "quiet_steps": value} for value in (-1, 10**9, 1.5, "1", None, True)),
]


@pytest.mark.parametrize("state", DAMAGED)
def test_a_damaged_state_is_refused(state: dict[str, Any]) -> None:
    scaler = LossScaler(scale=4.0, quiet_steps=5)
    with pytest.raises(InvalidError, match="expected .* found"):
        scaler.load_state_dict(state)
    assert scaler == LossScaler(scale=4.0, quiet_steps=5)


@pytest.mark.parametrize("scale", [LossScaler.MIN, LossScaler().scale, LossScaler.MAX])
def test_a_power_of_two_is_undone_exactly(scale: float) -> None:
    rng = np.random.default_rng(0)
    tokens, targets = rng.integers(0, 64, (2, 2, 16), np.int32)
    found = []
    for factor in (1.0, scale):
        model = Model(SHAPE, seed=3)
        model.forward(tokens, targets)
        model.backward(factor)
        norm = model.grad_norm(1.0 / factor)
        found.append(([array / np.float32(factor) for array in model.grads.values()], norm))
    for a, b in zip(found[0][0], found[1][0], strict=True):
        assert np.array_equal(a, b)
    assert found[0][1] == found[1][1]
