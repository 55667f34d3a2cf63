"""What a run on a Neural Engine with weights in its programs does, and when: pure functions, which touch no device.

docs/pipeline.md has the definitions; ``anellm plan`` prints it all.

>>> found = plan(ModelConfig.from_preset("llama7b"), CompileBudget(limit=119, headroom=0.1))
>>> [(group.start, group.end, group.programs) for group in found.groups]
[(0, 17, 102), (17, 32, 90)]
>>> found.restarts_per_step
3
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final

from anellm.config import ModelConfig
from anellm.errors import ConfigError

KERNELS_PER_LAYER: Final = 5  # attn_fwd, ffn_fwd, ffn_bwd, sdpa_bwd1, qkv_bwd: they hold weights
STATIC_PER_LAYER: Final = 1  # sdpa_bwd2
COMPILE_LIMIT: Final = 119  # ANE.md Q15
HEADROOM: Final = 0.10
_MOST: Final = 2**31 - 1  # of everything that is counted


def _whole(name: str, value: object, low: int = 1, high: int = _MOST) -> int:
    """Return a number if it is whole and in a range."""
    if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
        raise ConfigError(f"{name}: expected a whole number from {low} to {high}, found {value!r}")
    return value


@dataclass(frozen=True)
class CompileBudget:
    """How many programs a process may compile; planner and runtime both go by ``usable``.

    Attributes:
        limit: compilations after which the system fails, at least 1 (ANE.md Q15: about 119).
        headroom: part of the limit that is left alone, between 0 and 1, both excluded.

    Raises:
        ConfigError: naming the field, its range and what was found.
    """

    limit: int = COMPILE_LIMIT
    headroom: float = HEADROOM

    def __post_init__(self) -> None:
        _whole("compile budget", self.limit)
        headroom = self.headroom
        if not isinstance(headroom, (int, float)) or isinstance(headroom, bool) or not 0.0 < headroom < 1.0:
            raise ConfigError(f"headroom: expected a number between 0 and 1, both excluded, found {headroom!r}")

    @property
    def usable(self) -> int:
        """Return how many compilations a process makes at most.

        The small number keeps a product such as 20 x 0.9 = 18 from falling below itself in floating point.
        """
        return math.floor(self.limit * (1.0 - self.headroom) + 1e-9)


@dataclass(frozen=True)
class LayerGroup:
    """Layers whose programs are compiled together in one process.

    Attributes:
        start: the first layer.
        end: the layer behind the last.
        weight_kernels: programs that hold weights: compiled anew when those have changed.
        static_kernels: programs that hold none.
    """

    start: int
    end: int
    weight_kernels: int
    static_kernels: int

    @property
    def n_layers(self) -> int:
        """Return the number of layers."""
        return self.end - self.start

    @property
    def programs(self) -> int:
        """Return the number of compilations that the group takes."""
        return self.weight_kernels + self.static_kernels


@dataclass(frozen=True)
class PipelinePlan:
    """The groups of a model, and what they cost in processes.

    A step compiles 2 G - 1 times a group: G on the way forward, and G - 1 on the way back, which begins with the group
    that forward ended with. The next step compiles everything anew, because the weights are others then.

    Attributes:
        groups: every layer in one of them, in order.
        restarts_per_step: 2 G - 1: the most restarts of a process in a step. With more than one group no two
            neighbours fit in one process, so that every step takes as many, but the first of a run, which begins in a
            new process, one less. With one group it is 1, in one step of ``steps_per_process``.
        budget: what a process may compile.
    """

    groups: tuple[LayerGroup, ...]
    restarts_per_step: int
    budget: CompileBudget

    @property
    def n_layers(self) -> int:
        """Return the number of layers."""
        return self.groups[-1].end

    @property
    def programs(self) -> int:
        """Return the number of programs of all layers."""
        return sum(group.programs for group in self.groups)

    @property
    def boundaries(self) -> tuple[int, ...]:
        """Return the first layer of each group."""
        return tuple(group.start for group in self.groups)

    @property
    def steps_per_process(self) -> int:
        """Return how many whole steps a process makes, where there is one group; 0 where there are more."""
        return self.budget.usable // self.groups[0].programs if len(self.groups) == 1 else 0

    def restarts(self, steps: int) -> int:
        """Return the restarts in a run of some steps that begins in a new process and is not interrupted."""
        _whole("steps", steps, 0)
        if steps == 0:
            return 0
        if len(self.groups) == 1:
            return (steps - 1) // self.steps_per_process
        return steps * self.restarts_per_step - 1


def plan(
    config: ModelConfig,
    budget: CompileBudget | None = None,
    kernels_per_layer: int = KERNELS_PER_LAYER,
    static_per_layer: int = STATIC_PER_LAYER,
) -> PipelinePlan:
    """Return the groups of layers that a process can compile.

    Groups are as long as the budget lets them be, so only the last may be shorter.

    Args:
        config: the model.
        budget: what a process may compile; None: CompileBudget().
        kernels_per_layer: programs of a layer that hold weights, at least 1.
        static_per_layer: programs of a layer that hold none.

    Raises:
        ConfigError: when a dimension is impossible, or not even one layer fits.
    """
    config.validate()
    budget = budget or CompileBudget()
    _whole("kernels_per_layer", kernels_per_layer)
    _whole("static_per_layer", static_per_layer, 0)
    per_layer = kernels_per_layer + static_per_layer
    longest = budget.usable // per_layer
    if longest < 1:
        raise ConfigError(
            f"compile budget: expected room for the {per_layer} programs of a layer, found {budget.usable} "
            f"(limit {budget.limit}, headroom {budget.headroom:g})"
        )
    groups = []
    for start in range(0, config.n_layers, longest):
        end = min(start + longest, config.n_layers)
        groups.append(LayerGroup(start, end, kernels_per_layer * (end - start), static_per_layer * (end - start)))
    return PipelinePlan(tuple(groups), 2 * len(groups) - 1, budget)
