"""The global loss scale: a power of two on the loss, so that gradients stay in the range of 16-bit numbers.

It stands above the powers of two of single tensors, which the ANE backend chooses at its border: those follow each
tensor's largest value, this one follows what comes of a step. A power of two is exact, and undone exactly.

Source: Micikevicius et al. 2018, arXiv:1710.03740, section 3.2; halving after an overflow and doubling after a quiet
while are from NVIDIA's guide "Train With Mixed Precision".
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from anellm.errors import InvalidError


@dataclass
class LossScaler:
    """A loss scale that backs off after a step that was not finite, and grows after many that were.

    Attributes:
        scale: multiplies the loss; a power of two from MIN to MAX.
        quiet_steps: steps in a row that were finite, since the last change.
    """

    MIN: ClassVar[float] = 2.0**-8
    MAX: ClassVar[float] = 2.0**16
    GROWTH_INTERVAL: ClassVar[int] = 500  # quiet steps after which the scale doubles

    scale: float = 2.0**8
    quiet_steps: int = 0

    def update(self, *, finite: bool) -> None:
        """Take note of a step.

        Args:
            finite: its loss and all its gradients were finite. Otherwise it must not change the weights.
        """
        if not finite:
            self.scale = max(self.scale / 2, self.MIN)
            self.quiet_steps = 0
            return
        self.quiet_steps += 1
        if self.quiet_steps == self.GROWTH_INTERVAL:
            self.scale = min(self.scale * 2, self.MAX)
            self.quiet_steps = 0

    def state_dict(self) -> dict[str, Any]:
        """Return the state as JSON-serialisable numbers."""
        return {"loss_scale": self.scale, "quiet_steps": self.quiet_steps}

    def load_state_dict(self, values: Mapping[str, Any]) -> None:
        """Take the state that state_dict() gave; a damaged one changes nothing.

        Raises:
            InvalidError: naming what was expected and what was found.
        """
        if values.keys() != {"loss_scale", "quiet_steps"}:
            raise InvalidError(f"loss scaler: expected loss_scale and quiet_steps, found {', '.join(map(str, values))}")
        scale, quiet = values["loss_scale"], values["quiet_steps"]
        number = isinstance(scale, (int, float)) and not isinstance(scale, bool)
        if not number or not self.MIN <= scale <= self.MAX or math.frexp(scale)[0] != 0.5:
            raise InvalidError(
                f"loss_scale: expected a power of two from {self.MIN:g} to {self.MAX:g}, found {scale!r:.80}"
            )
        if not isinstance(quiet, int) or isinstance(quiet, bool) or not 0 <= quiet < self.GROWTH_INTERVAL:
            raise InvalidError(f"quiet_steps: expected 0 to {self.GROWTH_INTERVAL - 1}, found {quiet!r:.80}")
        self.scale, self.quiet_steps = float(scale), quiet
