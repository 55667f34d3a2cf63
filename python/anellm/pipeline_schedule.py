"""The order in which a run with weights in its programs compiles, computes and restarts: a pure state machine.

A step is made of 2 G - 1 phases for G groups of layers. Groups are outermost, micro-batches inside, so that a group is
compiled once for all of them:

- phases 0 to G - 2: forward of groups 0 to G - 2, micro-batch by micro-batch;
- phase G - 1: forward and at once backward of the last group, micro-batch by micro-batch;
- phases G to 2 G - 2: backward of groups G - 2 to 0, micro-batch by micro-batch;
- then the update of the weights, which ends the step: no compiled program is of use any more.

Where a phase's group is not compiled, it is compiled first, all of it; where the process has not enough compilations
left, the process restarts before that. Each micro-batch goes through a layer in the same order as it would with one
group, so that gradients are summed in the same order.

>>> schedule = Schedule(plan(config), accumulation=2)
>>> for state, action in schedule.trace(steps=1):
...     print(action)
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Final, Literal, NamedTuple, get_args

from anellm.errors import ConfigError, DataError
from anellm.pipeline import LayerGroup, PipelinePlan

Kind = Literal["restart", "compile", "forward", "backward", "update"]
KINDS: Final[tuple[Kind, ...]] = get_args(Kind)
NONE: Final = -1  # no group
_MOST: Final = 2**62


class ScheduleState(NamedTuple):
    """Where a run is: whole numbers, to be stored before each action and read back by another process.

    Attributes:
        step: steps that are done.
        phase: of this step, from 0; 2 G - 1 where only the update is left.
        unit: what is done of this phase: evaluations of a group by a micro-batch, forward or backward.
        compiled: the group whose programs this process has, with the weights of now; -1: none.
        compiles: compilations that this process has made.
    """

    step: int = 0
    phase: int = 0
    unit: int = 0
    compiled: int = NONE
    compiles: int = 0


class Action(NamedTuple):
    """What is to be done next.

    Attributes:
        kind: ``restart`` the process; ``compile`` the programs of a group; take a micro-batch ``forward`` or
            ``backward`` through a group; ``update`` the weights.
        group: which group; -1 for restart and update.
        micro: which micro-batch, from 0; -1 unless it is forward or backward.
    """

    kind: Kind
    group: int = NONE
    micro: int = -1

    def __str__(self) -> str:
        """Return it in words."""
        words: list[str] = [self.kind]
        if self.group != NONE:
            words.append(f"group {self.group}")
        if self.micro >= 0:
            words.append(f"micro-batch {self.micro}")
        return " ".join(words)


@dataclass(frozen=True)
class Schedule:
    """What follows what, for a plan.

    Attributes:
        plan: the groups, and what a process may compile.
        accumulation: micro-batches in a step, at least 1.

    Raises:
        ConfigError: on an accumulation that is no whole number from 1, or a group that no process could compile.
    """

    plan: PipelinePlan
    accumulation: int

    def __post_init__(self) -> None:
        n = self.accumulation
        if not isinstance(n, int) or isinstance(n, bool) or not 1 <= n <= _MOST:
            raise ConfigError(f"accumulation: expected a whole number from 1, found {n!r}")
        most, usable = max(group.programs for group in self.plan.groups), self.plan.budget.usable
        if most > usable:  # it would restart for ever
            raise ConfigError(f"groups: expected at most {usable} programs in each, found {most}")

    @property
    def n_phases(self) -> int:
        """Return the phases of a step: as many as its compilations of a group."""
        return 2 * len(self.plan.groups) - 1

    def group_of(self, phase: int) -> int:
        """Return the group of a phase."""
        return min(phase, self.n_phases - 1 - phase)

    def units(self, phase: int) -> int:
        """Return the evaluations of a group by a micro-batch in a phase."""
        return (2 if phase == len(self.plan.groups) - 1 else 1) * self.accumulation

    def action(self, state: ScheduleState) -> Action:
        """Return what is to be done in a state."""
        if state.phase == self.n_phases:
            return Action("update")
        group = self.group_of(state.phase)
        if state.compiled != group:
            fits = state.compiles + self._group(group).programs <= self.plan.budget.usable
            return Action("compile", group) if fits else Action("restart")
        turn = len(self.plan.groups) - 1
        if state.phase == turn:
            micro, backward = divmod(state.unit, 2)
            return Action("backward" if backward else "forward", group, micro)
        return Action("forward" if state.phase < turn else "backward", group, state.unit)

    def after(self, state: ScheduleState) -> ScheduleState:
        """Return the state when that is done."""
        action = self.action(state)
        if action.kind == "restart":
            return in_new_process(state)
        if action.kind == "compile":
            made = state.compiles + self._group(action.group).programs
            return state._replace(compiled=action.group, compiles=made)
        if action.kind == "update":
            return ScheduleState(state.step + 1, compiles=state.compiles)
        if state.unit + 1 < self.units(state.phase):
            return state._replace(unit=state.unit + 1)
        return state._replace(phase=state.phase + 1, unit=0)

    def trace(self, steps: int, state: ScheduleState | None = None) -> Iterator[tuple[ScheduleState, Action]]:
        """Yield each state with what is done in it, until some number of steps is done.

        Args:
            steps: of the run, from its beginning.
            state: where to begin; None: at the beginning.

        Raises:
            DataError: when the state is none of this schedule.
        """
        state = self.read(state) if state is not None else ScheduleState()
        while state.step < steps:
            yield state, self.action(state)
            state = self.after(state)

    def read(self, values: Sequence[int]) -> ScheduleState:
        """Return the state that was stored as whole numbers.

        Raises:
            DataError: naming what is impossible in it for this plan.
        """
        fields = ScheduleState._fields
        if len(values) != len(fields):
            raise DataError(f"schedule state: expected {len(fields)} numbers, found {len(values)}")
        for name, value in zip(fields, values, strict=True):
            if not isinstance(value, int) or isinstance(value, bool):
                raise DataError(f"schedule state: {name}: expected a whole number, found {value!r:.80}")
        state = ScheduleState(*values)
        most = {
            "step": _MOST,
            "phase": self.n_phases,
            "unit": self.units(state.phase) - 1 if state.phase != self.n_phases else 0,
            "compiled": len(self.plan.groups) - 1,
            "compiles": self.plan.budget.usable,
        }
        for name, value in zip(fields, state, strict=True):
            low = NONE if name == "compiled" else 0
            if not low <= value <= most[name]:
                raise DataError(f"schedule state: {name}: expected {low} to {most[name]}, found {value}")
        if state.compiled != NONE and state.compiles < self._group(state.compiled).programs:
            raise DataError(
                f"schedule state: compiles: expected at least the {self._group(state.compiled).programs} of group "
                f"{state.compiled}, found {state.compiles}"
            )
        return state

    def _group(self, index: int) -> LayerGroup:
        return self.plan.groups[index]


def in_new_process(state: ScheduleState) -> ScheduleState:
    """Return a state as a new process finds it: nothing is compiled, and nothing of the budget is used."""
    return state._replace(compiled=NONE, compiles=0)


class Run(NamedTuple):
    """Actions of one phase that differ in the micro-batch alone, taken together.

    Attributes:
        step: of which step.
        kinds: what is done with each micro-batch, in turn; or the one thing that is done.
        group: which group; -1 for restart and update.
        micros: the first and the last micro-batch; none for what is done once.
    """

    step: int
    kinds: tuple[Kind, ...]
    group: int
    micros: tuple[int, int] | None


def runs(trace: Iterable[tuple[ScheduleState, Action]]) -> Iterator[Run]:
    """Yield what a trace does, evaluations of a phase taken together."""

    def key(entry: tuple[ScheduleState, Action]) -> tuple[int, int, str]:
        state, action = entry
        return state.step, state.phase, action.kind if action.micro < 0 else "evaluate"

    for (step, _, _), entries in groupby(trace, key):
        actions = [action for _, action in entries]
        kinds = tuple(dict.fromkeys(action.kind for action in actions))
        micros = None if actions[0].micro < 0 else (actions[0].micro, actions[-1].micro)
        yield Run(step, kinds, actions[0].group, micros)
