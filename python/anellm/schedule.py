"""The learning rate as a pure function of the step."""

from __future__ import annotations

import math

from anellm.errors import InvalidError

SCHEDULES = ("constant", "linear", "cosine", "wsd")


def default_learning_rate(n_params: int, *, pretrained: bool = False) -> float:
    """Return a peak learning rate that suits a model of this size, to three digits.

    Args:
        n_params: parameters without embeddings.
        pretrained: the weights are trained already; a tenth then, which does not undo them.

    Source: ``0.003239 - 0.0001395 ln n``, Kaplan et al. 2020, arXiv:2001.08361, eq. D.1; not below 1e-4, since it
        would end at 0 for very large models.
    """
    rate = max(1e-4, 0.003239 - 0.0001395 * math.log(max(1, n_params)))
    return float(f"{rate / 10 if pretrained else rate:.3g}")


def learning_rate(
    step: int,
    *,
    steps: int,
    peak: float,
    minimum: float = 0.0,
    warmup_steps: int = 0,
    schedule: str = "cosine",
    decay_steps: int | None = None,
) -> float:
    """Return the learning rate of an update.

    The rate rises as ``peak * (step + 1) / warmup_steps`` over the warmup, so that no update is lost on a rate of 0;
    then it follows the schedule from ``peak`` towards ``minimum``, which it would reach at ``step == steps``.

    Args:
        step: updates done before this one, from 0; beyond ``steps`` the rate stays where it ended.
        steps: updates in the whole run.
        peak: highest rate.
        minimum: rate at the end of linear, cosine and wsd.
        warmup_steps: updates of linear warmup.
        schedule: "constant"; "linear"; "cosine" (Loshchilov & Hutter 2017, arXiv:1608.03983, one cycle);
            "wsd": warmup, stable, linear decay (Hu et al. 2024, arXiv:2404.06395).
        decay_steps: updates of wsd's decay; None means a fifth of ``steps``.

    Raises:
        InvalidError: on an unknown schedule.
    """
    if schedule not in SCHEDULES:
        raise InvalidError(f"schedule: expected one of {', '.join(SCHEDULES)}, found {schedule!r}")
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    if schedule == "constant":
        return peak
    start = warmup_steps
    if schedule == "wsd":
        start = max(start, steps - (max(1, steps // 5) if decay_steps is None else decay_steps))
    progress = min(1.0, max(0.0, (step - start) / max(1, steps - start)))
    left = 0.5 * (1.0 + math.cos(math.pi * progress)) if schedule == "cosine" else 1.0 - progress
    return minimum + (peak - minimum) * left
