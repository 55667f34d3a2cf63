"""The learning rate: a pure function with known ends."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from anellm.errors import InvalidError
from anellm.schedule import SCHEDULES, learning_rate


@given(
    schedule=st.sampled_from(SCHEDULES),
    steps=st.integers(1, 200),
    warmup=st.integers(0, 250),
    decay=st.none() | st.integers(1, 250),
    peak=st.floats(1e-6, 1.0),
    ratio=st.floats(0, 1),
)
def test_every_rate_lies_between_its_bounds(
    schedule: str, steps: int, warmup: int, decay: int | None, peak: float, ratio: float
) -> None:
    minimum = peak * ratio
    rates = [
        learning_rate(
            step,
            steps=steps,
            peak=peak,
            minimum=minimum,
            warmup_steps=warmup,
            schedule=schedule,
            decay_steps=decay,
        )
        for step in range(steps + 5)
    ]
    warm = min(warmup, steps)
    assert all(0 < a < b <= peak * (1 + 1e-12) for a, b in pairwise(rates[:warm]))
    after = rates[warmup:]
    assert all(minimum * (1 - 1e-12) <= rate <= peak * (1 + 1e-12) for rate in after)
    assert all(a >= b for a, b in pairwise(after))
    if after and schedule in ("linear", "cosine"):
        assert after[0] == pytest.approx(peak)
    if warmup < steps:
        assert rates[steps] == pytest.approx(peak if schedule == "constant" else minimum)


def test_known_values() -> None:
    def rates(schedule: str, **more: int) -> list[float]:
        return [
            learning_rate(step, steps=10, peak=1.0, minimum=0.2, warmup_steps=2, schedule=schedule, **more)
            for step in range(11)
        ]

    assert rates("constant") == [0.5, 1.0] + [1.0] * 9
    assert rates("linear") == pytest.approx([0.5, 1.0] + [1 - 0.1 * n for n in range(9)])
    assert rates("cosine") == pytest.approx(
        [0.5, 1.0] + [0.2 + 0.4 * (1 + math.cos(math.pi * n / 8)) for n in range(9)]
    )
    assert rates("wsd") == pytest.approx([0.5] + [1.0] * 8 + [0.6, 0.2])
    assert rates("wsd", decay_steps=4) == pytest.approx([0.5] + [1.0] * 6 + [0.8, 0.6, 0.4, 0.2])


def test_an_unknown_schedule_is_refused() -> None:
    with pytest.raises(InvalidError, match="cosin"):
        learning_rate(0, steps=1, peak=1, schedule="cosin")
