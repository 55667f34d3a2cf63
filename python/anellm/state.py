"""Where a training run stands, apart from the loop that advances it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from anellm.errors import CheckpointError


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

    def to_dict(self) -> dict[str, Any]:
        """Return the state as JSON-serialisable values."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], source: str) -> TrainState:
        """Return the state that to_dict() gave.

        Raises:
            CheckpointError: naming the source and the key that is missing, unknown or of the wrong type.
        """
        fields = {f.name: f for f in dataclasses.fields(cls)}
        if values.keys() != fields.keys():
            wrong = min(values.keys() ^ fields.keys())
            raise CheckpointError(f"{source}: expected the keys {', '.join(fields)}; {wrong!r} differs")
        for name, value in values.items():
            hint = str(fields[name].type)
            fits = (
                (value is None and "None" in hint)
                or (isinstance(value, str) and "str" in hint)
                or (isinstance(value, int) and not isinstance(value, bool) and "int" in hint and value >= 0)
                or (isinstance(value, (int, float)) and not isinstance(value, bool) and "float" in hint)
            )
            if not fits:
                raise CheckpointError(f"{source}: {name}: expected {hint}, found {value!r}")
        return cls(**values)
