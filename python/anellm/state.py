"""Where a training run stands, apart from the loop that advances it."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from anellm.errors import CheckpointError

_MAX = 2**53  # the largest range in which JSON readers keep whole numbers exact
_SHOWN = 100  # characters of a value in a message
Name = str
_NAME = re.compile(r"[a-z0-9]{1,32}")
_SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass
class TrainState:
    """Where a run stands, apart from weights and moments; plain numbers, so that it travels as JSON.

    Windows and samples are functions of (seed, step), so that the step is also the position in the data.

    Attributes:
        step: steps done, skipped ones included.
        tokens: tokens trained on.
        optimizer_step: updates done.
        bad_steps: steps in a row whose gradients were not finite.
        skipped_steps: all steps that were skipped for that.
        val_loss: last validation loss, in nats a token.
        best_val_loss: lowest validation loss after step 0.
        best_step: the step it belongs to.
        seconds: time spent training.
        data_sha256: of the training tokens.
        val_sha256: of the held-out tokens.
        cpu_variant: the tier of CPU kernels, which decides on the last digits.
    """

    step: int = 0
    tokens: int = 0
    optimizer_step: int = 0
    bad_steps: int = 0
    skipped_steps: int = 0
    val_loss: float | None = None
    best_val_loss: float | None = None
    best_step: int | None = None
    seconds: float = 0.0
    data_sha256: str | None = None
    val_sha256: str | None = None
    cpu_variant: Name | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return the state as JSON-serialisable values."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], source: str) -> TrainState:
        """Return the state that to_dict() gave.

        Raises:
            CheckpointError: naming the source, the key, what was expected and what was found.
        """
        fields = {f.name: f for f in dataclasses.fields(cls)}
        if values.keys() != fields.keys():
            wrong = min(values.keys() ^ fields.keys())
            what = "is missing" if wrong in fields else "is unknown"
            raise CheckpointError(f"{source}: expected the keys {', '.join(fields)}; {wrong[:_SHOWN]!r} {what}")
        for name, value in values.items():
            hint = str(fields[name].type)
            if not _fits(value, hint):
                text = repr(value)
                text = text if len(text) <= _SHOWN else text[:_SHOWN] + "..."
                expected = {
                    "int": "a whole number from 0",
                    "float": "a finite number from 0",
                    "str": "a SHA-256",
                    "Name": "a name",
                }
                kind, _, none = hint.partition(" | ")
                raise CheckpointError(
                    f"{source}: {name}: expected {expected[kind]}{' or null' if none else ''}, found {text}"
                )
        state = cls(**values)
        state._check_sums(source)
        return state

    def _check_sums(self, source: str) -> None:
        """Refuse numbers that no run can have together."""
        best = self.best_step
        for name, found, expected, holds in (
            ("optimizer_step", self.optimizer_step, f"step {self.step} less the skipped {self.skipped_steps}",
             self.optimizer_step == self.step - self.skipped_steps),
            ("bad_steps", self.bad_steps, f"at most the skipped {self.skipped_steps}",
             self.bad_steps <= self.skipped_steps),
            ("best_step", best, f"a step up to {self.step}, with a best_val_loss",
             (best is None) == (self.best_val_loss is None) and (best or 0) <= self.step),
        ):  # fmt: skip
            if not holds:
                raise CheckpointError(f"{source}: {name}: expected {expected}, found {found}")


_BETWEEN = {
    "state": (dict, "an object"),
    "ane": (dict, "an object or null"),
    "stop": (bool, "true or false"),
    "last_saved": (int, "a whole number or null"),
    "partial": (dict, "an object"),
    "step_seconds": (float, "a time"),
}


def check_between(values: Mapping[str, Any], source: str) -> None:
    """Check what a process left in the middle of a step, as far as TrainState and others do not check it.

    Raises:
        CheckpointError: naming the source, the key, what was expected and what was found.
    """
    if values.keys() != _BETWEEN.keys():
        raise CheckpointError(f"{source}: expected the keys {', '.join(_BETWEEN)}, found {', '.join(sorted(values))}")
    for name, (kind, expected) in _BETWEEN.items():
        value = values[name]
        if value is None and "null" in expected:
            continue
        if not isinstance(value, kind) or (isinstance(value, float) and not 0 <= value <= _MAX):
            raise CheckpointError(f"{source}: {name}: expected {expected}, found {value!r:.100}")


def _fits(value: object, hint: str) -> bool:
    """Return whether a value from JSON is what a field's type says: counts and losses are never negative."""
    if value is None:
        return "None" in hint
    if isinstance(value, str):
        pattern = _NAME if "Name" in hint else _SHA256 if "str" in hint else None
        return pattern is not None and pattern.fullmatch(value) is not None
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return False
    if isinstance(value, int) and "int" in hint:
        return 0 <= value <= _MAX
    return "float" in hint and 0 <= value <= _MAX and math.isfinite(value)
