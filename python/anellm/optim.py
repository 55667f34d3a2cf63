"""AdamW over a model's parameters, in the C core."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

from anellm._ffi import check, ffi, lib
from anellm.errors import InvalidError

if TYPE_CHECKING:
    from anellm.model import Model

DECAYS = ("matrices", "all")


@dataclass
class AdamWState:
    """What AdamW keeps besides the moments, which live in the model.

    Attributes:
        step: updates done; the bias correction depends on it.
    """

    step: int = 0


class AdamW:
    """Adam with decoupled weight decay and bias correction.

    Source: Loshchilov & Hutter 2019, arXiv:1711.05101, algorithm 2; Kingma & Ba 2015, arXiv:1412.6980.
    """

    def __init__(
        self,
        model: Model,
        learning_rate: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        weight_decay: float = 0.1,
        decay: str = "matrices",
    ) -> None:
        """Prepare to train a model; takes memory for its gradients and moments.

        Args:
            model: the model.
            learning_rate: rate of step() where it is given none, >= 0.
            betas: decay of the first and second moment, each in [0, 1).
            eps: added to the root of the second moment, > 0.
            weight_decay: part of a weight taken off in an update, times the learning rate; >= 0.
            decay: "matrices" leaves the norms' vectors out, embeddings decay; "all" decays everything.

        Raises:
            InvalidError: on a value outside its range.
            OutOfMemoryError: when the system refuses the memory.
        """
        if decay not in DECAYS:
            raise InvalidError(f"decay: expected one of {', '.join(DECAYS)}, found {decay!r}")
        for name, value in (("betas[0]", betas[0]), ("betas[1]", betas[1])):
            if not 0 <= value < 1:
                raise InvalidError(f"{name}: expected 0 <= x < 1, found {value}")
        if not eps > 0:
            raise InvalidError(f"eps: expected more than 0, found {eps}")
        for name, value in (("learning_rate", learning_rate), ("weight_decay", weight_decay)):
            if not 0 <= value < float("inf"):
                raise InvalidError(f"{name}: expected a finite number of at least 0, found {value}")
        self.model = model
        self.learning_rate, self.betas, self.eps = learning_rate, betas, eps
        self.weight_decay, self.decay = weight_decay, decay
        self.state = AdamWState()
        model.enable_training()

    def step(self, lr: float | None = None, grad_scale: float = 1.0) -> None:
        """Update the parameters by the model's gradients.

        Args:
            lr: learning rate of this update; None takes ``learning_rate``.
            grad_scale: the gradients are multiplied by it first (to clip or unscale them).

        Raises:
            InvalidError: on impossible numbers.
        """
        params = ffi.new("anellm_adamw_params *")
        params.lr = self.learning_rate if lr is None else lr
        params.beta1, params.beta2 = self.betas
        params.eps = self.eps
        params.weight_decay = self.weight_decay
        params.grad_scale = grad_scale
        params.step = self.state.step + 1
        decay = lib.ANELLM_DECAY_ALL if self.decay == "all" else lib.ANELLM_DECAY_MATRICES
        check(lib.anellm_model_adamw(self.model._pointer, params, decay))
        self.state.step += 1

    def state_dict(self) -> dict[str, int]:
        """Return the state as JSON-serialisable numbers (the moments are the model's)."""
        return asdict(self.state)

    def load_state_dict(self, values: Mapping[str, int]) -> None:
        """Take the state that state_dict() gave.

        Raises:
            InvalidError: when it is not one.
        """
        step = values.get("step")
        if set(values) != {"step"} or not isinstance(step, int) or isinstance(step, bool) or step < 0:
            raise InvalidError(f"optimizer state: expected a step of at least 0, found {dict(values)}")
        self.state.step = step


def clip_scale(norm: float, max_norm: float) -> float:
    """Return the factor that brings a gradient of this norm down to ``max_norm``; 1 when it is below, or max_norm is 0.

    Source: Pascanu et al. 2013, arXiv:1211.5063.
    """
    return max_norm / norm if 0 < max_norm < norm else 1.0
