"""Activation checkpointing: what forward keeps for backward, and what backward computes again."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from anellm.errors import ConfigError

CHECKPOINT_POLICIES: Final = ("all", "boundary", "sqrt", "every:N", "none")
_EVERY: Final = "every:"
_DIGITS: Final = 10  # of N: more layers than any model has


@dataclass(frozen=True)
class SavedLayers:
    """What forward keeps for backward of a stack of layers, numbered from 0.

    A layer's *input* is the residual stream at its start, (B T, dim); its *activations* are all that its backward
    reads, the input included. Layers from one of ``inputs`` up to the next are a segment: backward computes the
    activations of a segment again from the input of its first layer, in one go, unless they are kept. So besides what
    is kept it needs room for the activations of ``buffer_layers`` layers. The residual stream behind the last layer,
    which the classifier reads, is kept in any case.

    Attributes:
        n_layers: how many layers there are.
        inputs: layers whose input is kept, ascending; the first is 0. With several groups, those inside a group only
            while it is at work.
        full: layers whose activations are there when backward begins, ascending.
        buffer_layers: how many layers' activations are in memory at a time, at most. The kept ones lie where those of
            other layers are computed again later, so they count once.
        starts: the first layer of each group, ascending; of one group (0,).
    """

    n_layers: int
    inputs: tuple[int, ...]
    full: tuple[int, ...]
    buffer_layers: int
    starts: tuple[int, ...] = (0,)

    @property
    def segments(self) -> tuple[tuple[int, int], ...]:
        """Return (first layer, layer behind the last) of each segment, ascending."""
        return tuple(zip(self.inputs, (*self.inputs[1:], self.n_layers), strict=True))

    @property
    def groups(self) -> tuple[tuple[int, int], ...]:
        """Return (first layer, layer behind the last) of each group, ascending."""
        return tuple(zip(self.starts, (*self.starts[1:], self.n_layers), strict=True))

    @property
    def recomputed(self) -> tuple[int, ...]:
        """Return the layers whose forward is computed again in backward, in that order; some are repeatedly.

        A group but the last goes forward again as a whole first; then the same holds in it as in the last one.
        """
        again: list[int] = []
        for first, end in reversed(self.groups):
            if end < self.n_layers:
                again += range(first, end)
            segments = [segment for segment in self.segments if first <= segment[0] < end]
            if self.buffer_layers >= end - first:
                continue
            if len(segments) > 1:
                for start, behind in reversed(segments[:-1]):
                    again += range(start, behind)
            else:  # room for less than the segment
                for behind in range(end - 1, first, -1):
                    again += range(first, behind)
        return tuple(again)


def check_policy(policy: str, what: str = "activation_checkpoint") -> int | None:
    """Return N of ``every:N``, and None for a policy without a number.

    Args:
        policy: see saved_layers().
        what: what an error calls it.

    Raises:
        ConfigError: when it is no policy of activation checkpointing.
    """
    if policy in CHECKPOINT_POLICIES[:3] or policy == "none":
        return None
    number = policy.removeprefix(_EVERY) if isinstance(policy, str) and policy.startswith(_EVERY) else ""
    if number.isascii() and number.isdigit() and len(number) <= _DIGITS and int(number) >= 1:
        return int(number)
    expected = ", ".join(CHECKPOINT_POLICIES[:-1])
    raise ConfigError(f"{what}: expected {expected} (N from 1) or none, found {policy!r:.80}")


def saved_layers(n_layers: int, policy: str, boundaries: Sequence[int] = ()) -> SavedLayers:
    """Return what forward keeps for backward.

    ===========  ============================================  ==============================================
    policy       inputs that are kept                          activations that are kept
    ===========  ============================================  ==============================================
    all          of every layer                                of every layer: nothing is computed again
    boundary     of every layer                                of the last layer
    every:N      of layers 0, N, 2N, ...                       of the last segment
    sqrt         as every:N with N = floor(sqrt(n_layers))     of the last segment
    none         of layer 0, which is the model's embedding    of the last layer
    ===========  ============================================  ==============================================

    The last segment keeps its activations because backward begins with them: they are still where forward computed
    them, and that place is needed for the other segments anyway. So the first layer's input and the last layer's
    activations are kept under every policy. ``none`` has room for one layer's activations and nothing else: to reach
    those of a layer, backward computes all layers below it once more.

    ``sqrt`` keeps the fewest *equal* pieces: k pieces and a segment of n/k layers are least for k = sqrt(n). In a
    transformer the input of a layer is some ten times smaller than its activations, so that ``boundary`` takes the
    least memory, for one more forward pass, as ``sqrt``.

    Args:
        n_layers: layers, at least 1.
        policy: one of the above.
        boundaries: the first layer of each group (PipelinePlan.boundaries), where a process takes one group at a time:
            its input is kept under every policy, and the policy holds inside the group at work, counted from its first
            layer (``sqrt`` with the N of all layers). Of other groups nothing else is kept.

    Raises:
        ConfigError: naming what was expected and what was found.

    Source: Chen et al. 2016, Training Deep Nets with Sublinear Memory Cost, arXiv:1604.06174, section 4.
    """
    every = check_policy(policy)
    if not isinstance(n_layers, int) or isinstance(n_layers, bool) or n_layers < 1:
        raise ConfigError(f"n_layers: expected a whole number from 1, found {n_layers!r}")
    for layer in boundaries:
        if not isinstance(layer, int) or isinstance(layer, bool) or not 0 <= layer < n_layers:
            raise ConfigError(f"boundary: expected a layer from 0 to {n_layers - 1}, found {layer!r}")
    starts = tuple(sorted({0, *boundaries}))
    groups = list(zip(starts, (*starts[1:], n_layers), strict=True))
    interval = every or {"none": n_layers, "sqrt": math.isqrt(n_layers)}.get(policy, 1)
    inputs = tuple(layer for first, end in groups for layer in range(first, end, interval))
    if policy in ("all", "none"):
        room = max(end - first for first, end in groups) if policy == "all" else 1
        last = starts[-1] if policy == "all" else n_layers - 1
    else:
        room = max(end - start for start, end in zip(inputs, (*inputs[1:], n_layers), strict=True))
        last = inputs[-1]
    return SavedLayers(n_layers, inputs, tuple(range(last, n_layers)), room, starts)


def checkpoint_interval(n_layers: int, policy: str) -> int:
    """Return a policy as the C core takes it: 0 for all, -1 for none, else the layers of a segment; see saved_layers().

    Raises:
        ConfigError: naming what was expected and what was found.
    """
    kept = saved_layers(n_layers, policy)
    return {"all": 0, "none": -1}.get(policy, kept.buffer_layers)
