"""Layer groups and compile budgets: anellm.pipeline.plan()."""

from __future__ import annotations

import dataclasses
import math
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from anellm import pipeline
from anellm.config import ModelConfig, preset_names
from anellm.errors import ConfigError
from anellm.pipeline import CompileBudget, LayerGroup, plan

TINY = ModelConfig.from_preset("tiny")

layer_counts = st.integers(1, 400)
kernels = st.integers(1, 12)
statics = st.integers(0, 4)
budgets = st.builds(CompileBudget, st.integers(1, 1000), st.floats(0.001, 0.999))


def of(n_layers: int) -> ModelConfig:
    return TINY.replace(n_layers=n_layers)


@given(layer_counts, budgets, kernels, statics)
def test_every_layer_is_in_one_group_and_no_group_is_over_the_budget(
    n_layers: int, budget: CompileBudget, kernels_per_layer: int, static_per_layer: int
) -> None:
    per_layer = kernels_per_layer + static_per_layer
    if budget.usable < per_layer:
        with pytest.raises(ConfigError, match=f"room for the {per_layer} programs of a layer, found {budget.usable}"):
            plan(of(n_layers), budget, kernels_per_layer, static_per_layer)
        return
    found = plan(of(n_layers), budget, kernels_per_layer, static_per_layer)
    assert [layer for group in found.groups for layer in range(group.start, group.end)] == list(range(n_layers))
    for group in found.groups:
        assert group.weight_kernels == kernels_per_layer * group.n_layers
        assert group.static_kernels == static_per_layer * group.n_layers
        assert per_layer <= group.programs <= budget.usable
    # Only the last may be shorter, and no two neighbours fit in one process.
    assert all(group.programs + per_layer > budget.usable for group in found.groups[:-1])
    assert len(found.groups) == math.ceil(n_layers / (budget.usable // per_layer))
    assert (found.n_layers, found.programs) == (n_layers, n_layers * per_layer)
    assert found.boundaries == tuple(group.start for group in found.groups)
    assert found.restarts_per_step == 2 * len(found.groups) - 1


@given(st.integers(1, 10**6), st.integers(1, 999))
def test_the_usable_budget_is_that_of_whole_numbers(limit: int, per_mille: int) -> None:
    """Floating point must not take one program away where limit x (1 - headroom) is whole."""
    exact = math.floor(Fraction(limit) * (1 - Fraction(per_mille, 1000)))
    assert CompileBudget(limit, per_mille / 1000).usable == exact


@given(st.integers(1, 60), kernels, statics, st.floats(0.001, 0.9))
def test_what_fits_exactly_is_one_group_and_one_more_layer_is_two(
    n_layers: int, kernels_per_layer: int, static_per_layer: int, headroom: float
) -> None:
    programs = n_layers * (kernels_per_layer + static_per_layer)
    limit = next(n for n in range(programs, 12 * programs + 12) if CompileBudget(n, headroom).usable >= programs)
    budget = CompileBudget(limit, headroom)
    assert len(plan(of(n_layers), budget, kernels_per_layer, static_per_layer).groups) == 1
    if budget.usable == programs:
        assert len(plan(of(n_layers + 1), budget, kernels_per_layer, static_per_layer).groups) == 2
    if limit > 1 and CompileBudget(limit - 1, headroom).usable >= kernels_per_layer + static_per_layer:
        below = CompileBudget(limit - 1, headroom)
        assert len(plan(of(n_layers), below, kernels_per_layer, static_per_layer).groups) >= 2


def test_stories110m_is_one_group_of_72_programs() -> None:
    found = plan(ModelConfig.from_preset("stories110m"))
    assert found.groups == (LayerGroup(0, 12, 60, 12),)
    assert (found.programs, found.restarts_per_step, found.steps_per_process) == (72, 1, 1)


def test_llama7b_is_several_groups() -> None:
    found = plan(ModelConfig.from_preset("llama7b"), CompileBudget(119, 0.1))
    assert found.budget.usable == 107
    assert found.groups == (LayerGroup(0, 17, 85, 17), LayerGroup(17, 32, 75, 15))
    assert found.restarts_per_step == 3


def test_a_budget_of_20_makes_two_groups_of_stories15m() -> None:
    found = plan(ModelConfig.from_preset("stories15m"), CompileBudget(20))
    assert found.budget.usable == 18
    assert [(group.start, group.end, group.programs) for group in found.groups] == [(0, 3, 18), (3, 6, 18)]


@pytest.mark.parametrize("preset", preset_names())
def test_every_preset_has_a_plan(preset: str) -> None:
    config = ModelConfig.from_preset(preset)
    assert plan(config).n_layers == config.n_layers


def test_runs_of_one_group_restart_when_the_budget_is_used_up() -> None:
    found = plan(TINY)  # 24 programs: 4 steps in 107
    assert found.steps_per_process == 4
    assert [found.restarts(steps) for steps in (0, 1, 4, 5, 8, 9)] == [0, 0, 0, 1, 1, 2]


def test_runs_of_several_groups_restart_before_each_group_but_the_first() -> None:
    found = plan(TINY, CompileBudget(20))
    assert (len(found.groups), found.steps_per_process) == (2, 0)
    assert [found.restarts(steps) for steps in (0, 1, 2, 30)] == [0, 2, 5, 89]


@pytest.mark.parametrize("headroom", [0, 0.0, 1, 1.0, -0.1, 1.5, math.nan, math.inf, True, "0.1", None])
def test_a_headroom_outside_its_range_is_refused_with_the_range(headroom: object) -> None:
    with pytest.raises(ConfigError, match="headroom: expected a number between 0 and 1, both excluded, found"):
        CompileBudget(119, headroom)  # type: ignore[arg-type]


@pytest.mark.parametrize("limit", [0, -1, 1.5, True, "119", None, 2**31])
def test_a_limit_that_is_no_whole_number_from_1_is_refused(limit: object) -> None:
    with pytest.raises(ConfigError, match="compile budget: expected a whole number from 1 to 2147483647, found"):
        CompileBudget(limit)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"kernels_per_layer": 0}, "kernels_per_layer: expected a whole number from 1 to 2147483647, found 0"),
        ({"kernels_per_layer": 2.0}, "kernels_per_layer: expected a whole number from 1 to 2147483647, found 2.0"),
        ({"static_per_layer": -1}, "static_per_layer: expected a whole number from 0 to 2147483647, found -1"),
        (
            {"budget": CompileBudget(6)},
            r"compile budget: expected room for the 6 programs of a layer, found 5 \(limit 6, headroom 0.1\)",
        ),
    ],
)
def test_impossible_numbers_of_programs_are_refused(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        plan(TINY, **arguments)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"n_heads": 0, "head_dim": 64}, "n_heads: expected 1 to"),
        ({"n_kv_heads": 3}, "n_kv_heads: expected a divisor of n_heads=4, found 3"),
        ({"n_layers": 0}, "n_layers: expected 1 to"),
        ({"dim": -1}, "dim: expected 1 to"),
        ({"hidden_dim": 1.5}, "hidden_dim: expected a whole number"),
        ({"head_dim": 3}, "head_dim: expected an even number"),
    ],
)
def test_impossible_dimensions_are_refused(changes: dict[str, object], message: str) -> None:
    """Also where somebody got around the checks of ModelConfig."""
    with pytest.raises(ConfigError, match=message):
        TINY.replace(**changes)
    broken = dataclasses.replace(TINY)
    for name, value in changes.items():
        object.__setattr__(broken, name, value)
    with pytest.raises(ConfigError, match=message):
        plan(broken)


@pytest.mark.parametrize("steps", [-1, 1.5, True])
def test_a_run_has_a_whole_number_of_steps(steps: object) -> None:
    with pytest.raises(ConfigError, match="steps: expected a whole number from 0"):
        plan(TINY).restarts(steps)  # type: ignore[arg-type]


def test_the_example_of_the_module_is_right() -> None:
    import doctest

    assert doctest.testmod(pipeline).attempted >= 3
    assert doctest.testmod(pipeline).failed == 0
