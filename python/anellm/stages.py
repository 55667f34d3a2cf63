"""A training step in ranges of layers, whose state between any two of them can lie in a file: docs/pipeline.md."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import numpy as np

from anellm._ffi import check, ffi, lib, ptr
from anellm.config import ModelConfig
from anellm.errors import InvalidError

if TYPE_CHECKING:
    from anellm.model import Model

SECTIONS: Final = ("params", "grads", "m", "v", "activations", "gradients", "batches", "progress")
ALIGNMENT: Final = 16384  # of sections in a file: the page size of Apple silicon


class StateLayout(NamedTuple):
    """Where the sections of a state lie, in bytes from its start; in the order of SECTIONS.

    Attributes:
        offsets: multiples of ALIGNMENT.
        sizes: of each, without what fills it up to the next.
        total_bytes: of all.
    """

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    total_bytes: int


def state_layout(config: ModelConfig, batch_size: int, seq_len: int, n_micro: int, n_groups: int) -> StateLayout:
    """Return the layout of weights, gradients, moments, and what lies between groups of layers.

    Raises:
        InvalidError: on a number out of range.
    """
    from anellm.model import _c_config

    layout = ffi.new("anellm_state_layout *")
    check(lib.anellm_state_sizes(layout, _c_config(config), batch_size, seq_len, n_micro, n_groups))
    n = len(SECTIONS)
    return StateLayout(
        tuple(layout.offset[i] for i in range(n)), tuple(layout.bytes[i] for i in range(n)), layout.total_bytes
    )


def share(model: Model, fd: int, offset: int, *, load: bool) -> None:
    """Let a file be the memory of a model's parameters, gradients and moments; arrays of them stay what they are.

    Args:
        model: the model; training is enabled.
        fd: a file open for reading and writing; it can be closed afterwards.
        offset: where they begin in it, a multiple of ALIGNMENT.
        load: take over what the file holds; else it takes over what the model holds.

    Raises:
        InvalidError: when the file is too short, or no regular one.
        OutOfMemoryError: when the system refuses to map it.
    """
    check(lib.anellm_model_share(model._pointer, fd, offset, int(load)))


def infer_on_cpu(model: Model, *, on: bool = True) -> None:
    """Let forward() without training compute on the CPU, so that it compiles nothing."""
    check(lib.anellm_model_infer_on_cpu(model._pointer, int(on)))


class Stages:
    """Take micro-batches through groups of layers, forward and back, one group at a time.

    On the CPU losses and gradients are those of Model.forward() and backward(), bit for bit, whatever the groups; with
    tied embeddings and several micro-batches up to the order of a sum (csrc/anellm.h).
    """

    def __init__(
        self, model: Model, batch_size: int, seq_len: int, n_micro: int, starts: Sequence[int], fd: int = -1,
        offset: int = 0,
    ) -> None:  # fmt: skip
        """Begin.

        Args:
            model: the model; training is enabled.
            batch_size: sequences in a micro-batch.
            seq_len: tokens in each.
            n_micro: micro-batches in a step.
            starts: the first layer of each group, ascending; the first is 0.
            fd: a file that holds, or is to hold, what lies between groups; -1: memory. See share().
            offset: where the state begins in it.

        Raises:
            InvalidError: on a number out of range, or a file that is too short.
            OutOfMemoryError: when the system refuses the memory.
        """
        self.model, self.shape = model, (batch_size, seq_len)
        self.starts = tuple(starts)
        self._ends = (*self.starts[1:], model.config.n_layers)
        groups = np.array(self.starts, np.int32)
        pointer = ptr(groups, np.int32)
        check(lib.anellm_stage_begin(model._pointer, batch_size, seq_len, n_micro, pointer, len(groups), fd, offset))

    def layers(self, group: int) -> tuple[int, int]:
        """Return the first layer of a group, and the one behind its last.

        Raises:
            InvalidError: when there is no such group.
        """
        if not 0 <= group < len(self.starts):
            raise InvalidError(f"group: expected 0 to {len(self.starts) - 1}, found {group}")
        return self.starts[group], self._ends[group]

    def batch(self, micro: int, tokens: np.ndarray[Any, Any], targets: np.ndarray[Any, Any]) -> None:
        """Give a micro-batch its tokens and targets, (batch_size, seq_len) int32; it begins anew.

        Raises:
            InvalidError: on another shape or dtype.
            TokenRangeError: on a micro-batch that there is not, or an id outside the vocabulary.
        """
        check(
            lib.anellm_stage_batch(
                self.model._pointer,
                micro,
                ptr(tokens, np.int32, self.shape, name="tokens"),
                ptr(targets, np.int32, self.shape, name="targets"),
            )
        )

    def forward(self, micro: int, group: int) -> None:
        """Take a micro-batch through a group; the last one ends with its loss.

        Raises:
            InvalidError: when it has not come to that group.
        """
        try:
            check(lib.anellm_stage_forward(self.model._pointer, micro, *self.layers(group)))
        finally:
            if self.model.ane is not None:
                self.model.ane.note_refusals()

    def backward(self, micro: int, group: int, scale: float = 1.0, *, accumulate: bool = False) -> None:
        """Take a micro-batch back through a group: gradients of scale * its loss.

        Raises:
            InvalidError: when it has not come back to that group, or another one goes before.
        """
        check(lib.anellm_stage_backward(self.model._pointer, micro, *self.layers(group), scale, int(accumulate)))

    def loss(self, micro: int) -> float:
        """Return the loss of a micro-batch, in nats a token.

        Raises:
            InvalidError: before it has gone through the last group.
        """
        out = ffi.new("double *")
        check(lib.anellm_stage_loss(self.model._pointer, micro, out))
        return float(out[0])

    def close(self) -> None:
        """Give the memory back; the model stays."""
        lib.anellm_stage_end(self.model._pointer)
