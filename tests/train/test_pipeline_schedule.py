"""The order of compiling, computing and restarting: anellm.pipeline_schedule."""

from __future__ import annotations

import dataclasses
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from anellm.config import ModelConfig
from anellm.errors import ConfigError, DataError
from anellm.pipeline import CompileBudget, PipelinePlan, plan
from anellm.pipeline_schedule import Action, Schedule, ScheduleState, in_new_process, runs

TINY = ModelConfig.from_preset("tiny")


@st.composite
def schedules(draw: st.DrawFn) -> Schedule:
    kernels, statics = draw(st.integers(1, 6)), draw(st.integers(0, 2))
    config = TINY.replace(n_layers=draw(st.integers(1, 12)))
    budget = CompileBudget(draw(st.integers(2 * (kernels + statics), 60)), 0.1)
    return Schedule(plan(config, budget, kernels, statics), draw(st.integers(1, 4)))


def two_groups(accumulation: int = 2) -> Schedule:
    return Schedule(plan(TINY, CompileBudget(20)), accumulation)


def actions(schedule: Schedule, steps: int) -> list[Action]:
    return [action for _, action in schedule.trace(steps)]


def work(found: list[Action]) -> list[Action]:
    """What changes the model: all but compiling and restarting."""
    return [action for action in found if action.kind not in ("compile", "restart")]


def test_two_groups_in_full() -> None:
    first = ["compile group 0", "forward group 0 micro-batch 0", "forward group 0 micro-batch 1",
             "restart", "compile group 1", "forward group 1 micro-batch 0", "backward group 1 micro-batch 0",
             "forward group 1 micro-batch 1", "backward group 1 micro-batch 1",
             "restart", "compile group 0", "backward group 0 micro-batch 0", "backward group 0 micro-batch 1",
             "update"]  # fmt: skip
    assert [str(action) for action in actions(two_groups(), 1)] == first
    assert [str(action) for action in actions(two_groups(), 2)] == [*first, "restart", *first]


def test_evaluations_of_a_phase_are_taken_together() -> None:
    found = [run[1:] for run in runs(two_groups(3).trace(1))]
    assert found == [
        (("compile",), 0, None), (("forward",), 0, (0, 2)),
        (("restart",), -1, None), (("compile",), 1, None), (("forward", "backward"), 1, (0, 2)),
        (("restart",), -1, None), (("compile",), 0, None), (("backward",), 0, (0, 2)),
        (("update",), -1, None),
    ]  # fmt: skip
    middle = ScheduleState(phase=2, unit=1)  # a new process in the middle of a phase
    assert [run[1:] for run in runs(two_groups(3).trace(1, middle))] == [
        (("compile",), 0, None), (("backward",), 0, (1, 2)), (("update",), -1, None),
    ]  # fmt: skip


@given(schedules(), st.integers(1, 3))
def test_no_action_is_lost_when_they_are_taken_together(schedule: Schedule, steps: int) -> None:
    count = 0
    for run in runs(schedule.trace(steps)):
        count += 1 if run.micros is None else len(run.kinds) * (run.micros[1] - run.micros[0] + 1)
    assert count == len(list(schedule.trace(steps)))


def test_one_group_goes_on_in_a_process_while_its_budget_lasts() -> None:
    schedule = Schedule(plan(TINY), 1)  # 24 programs: 4 steps in 107
    kinds = [action.kind for action in actions(schedule, 5)]
    step = ["compile", "forward", "backward", "update"]
    assert kinds == [*(4 * step), "restart", *step]


@given(schedules(), st.integers(0, 9))
def test_restarts_are_those_of_the_plan_whatever_the_accumulation(schedule: Schedule, steps: int) -> None:
    per_step = [0] * steps
    for state, action in schedule.trace(steps):
        per_step[state.step] += action.kind == "restart"
    most = schedule.plan.restarts_per_step
    assert sum(per_step) == schedule.plan.restarts(steps)
    if len(schedule.plan.groups) > 1:
        assert per_step == [most - 1, *[most] * (steps - 1)][:steps]
    else:
        each = schedule.plan.steps_per_process
        assert per_step == [int(step > 0 and step % each == 0) for step in range(steps)]
        assert max(per_step, default=0) <= most == 1


@given(schedules(), st.integers(1, 3))
def test_every_micro_batch_goes_through_every_group_and_back(schedule: Schedule, steps: int) -> None:
    forward_done: dict[int, int] = {}
    backward_done: dict[int, int] = {}
    groups, last = len(schedule.plan.groups), 0
    for state, action in schedule.trace(steps):
        if action.kind == "forward":
            assert forward_done.get(action.micro, 0) == action.group
            forward_done[action.micro] = action.group + 1
        elif action.kind == "backward":
            assert forward_done[action.micro] == groups
            assert backward_done.get(action.micro, groups) == action.group + 1
            backward_done[action.micro] = action.group
        elif action.kind == "update":
            assert forward_done == dict.fromkeys(range(schedule.accumulation), groups)
            assert backward_done == dict.fromkeys(range(schedule.accumulation), 0)
            forward_done, backward_done, last = {}, {}, state.step + 1
    assert last == steps


@given(schedules(), st.integers(1, 3))
def test_programs_are_there_and_current_and_within_the_budget(schedule: Schedule, steps: int) -> None:
    """Kept apart from the schedule's own state: what a process has compiled, how often, with which weights."""
    has, with_weights_of, compiles, compiled_in_step = None, -1, 0, 0
    for state, action in schedule.trace(steps):
        if action.kind == "restart":
            assert compiles > 0  # a process that restarts has done something
            has, compiles = None, 0
        elif action.kind == "compile":
            has, with_weights_of = action.group, state.step
            compiles += schedule.plan.groups[action.group].programs
            compiled_in_step += 1
            assert compiles <= schedule.plan.budget.usable
        elif action.kind == "update":
            assert compiled_in_step == schedule.n_phases
            compiled_in_step = 0
        else:
            assert (has, with_weights_of) == (action.group, state.step)


@given(schedules(), st.integers(1, 3))
def test_a_run_that_stops_anywhere_goes_on_with_the_same_rest(schedule: Schedule, steps: int) -> None:
    """The state goes through JSON, as it would through a file."""
    whole = list(schedule.trace(steps))
    for i, (state, _) in enumerate(whole):
        stored = json.loads(json.dumps(list(state)))
        again = Schedule(schedule.plan, schedule.accumulation)
        assert list(again.trace(steps, again.read(stored))) == whole[i:]


@given(schedules(), st.integers(1, 2))
def test_a_process_that_is_killed_anywhere_leaves_the_same_work(schedule: Schedule, steps: int) -> None:
    """A new process has compiled nothing; the work that is left is the same."""
    whole = list(schedule.trace(steps))
    for i, (state, _) in enumerate(whole):
        rest = [action for _, action in schedule.trace(steps, in_new_process(state))]
        assert work(rest) == work([action for _, action in whole[i:]])
        if rest[0].kind != "update":
            assert rest[0].kind == "compile"  # and not a restart: it has its whole budget


def test_a_trace_may_begin_behind_its_end() -> None:
    assert list(two_groups().trace(2, ScheduleState(step=2))) == []
    assert list(two_groups().trace(0)) == []


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ((0, 0, 0, -1), "expected 5 numbers, found 4"),
        ((0, 0, 0, -1, 0, 0), "expected 5 numbers, found 6"),
        ((0, 0.0, 0, -1, 0), "phase: expected a whole number, found 0.0"),
        ((0, True, 0, -1, 0), "phase: expected a whole number, found True"),
        ((0, "1", 0, -1, 0), "phase: expected a whole number, found '1'"),
        ((-1, 0, 0, -1, 0), "step: expected 0 to"),
        ((0, 4, 0, -1, 0), "phase: expected 0 to 3, found 4"),
        ((0, -1, 0, -1, 0), "phase: expected 0 to 3, found -1"),
        ((0, 0, 2, -1, 0), "unit: expected 0 to 1, found 2"),
        ((0, 1, 4, -1, 0), "unit: expected 0 to 3, found 4"),
        ((0, 3, 1, -1, 0), "unit: expected 0 to 0, found 1"),
        ((0, 0, 0, 2, 18), "compiled: expected -1 to 1, found 2"),
        ((0, 0, 0, -2, 0), "compiled: expected -1 to 1, found -2"),
        ((0, 0, 0, -1, 19), "compiles: expected 0 to 18, found 19"),
        ((0, 0, 0, 0, 17), "compiles: expected at least the 18 of group 0, found 17"),
    ],
)
def test_a_state_of_another_plan_is_refused(values: tuple[int, ...], message: str) -> None:
    with pytest.raises(DataError, match=f"schedule state: {message}"):
        two_groups().read(values)
    with pytest.raises(DataError):
        next(two_groups().trace(9, values))  # type: ignore[arg-type]


def test_a_group_that_no_process_could_compile_is_refused() -> None:
    """Instead of restarting for ever."""
    found = dataclasses.replace(plan(TINY), budget=CompileBudget(26))
    with pytest.raises(ConfigError, match="groups: expected at most 23 programs in each, found 24"):
        Schedule(found, 1)


@pytest.mark.parametrize("accumulation", [0, -1, 1.0, True, "2"])
def test_an_accumulation_that_is_no_whole_number_from_1_is_refused(accumulation: object) -> None:
    found: PipelinePlan = plan(TINY)
    with pytest.raises(ConfigError, match="accumulation: expected a whole number from 1, found"):
        Schedule(found, accumulation)  # type: ignore[arg-type]
