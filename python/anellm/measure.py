"""How well a model predicts: its loss over consecutive windows of data."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from anellm.data import TokenDataset
    from anellm.model import Model

_LARGEST_EXPONENT = math.log(sys.float_info.max)


def perplexity(loss: float) -> float:
    """Return exp(loss), inf where that is beyond a float."""
    return math.exp(loss) if loss < _LARGEST_EXPONENT else math.inf


@dataclass(frozen=True)
class Measurement:
    """A model's loss over consecutive windows of data.

    Attributes:
        loss: mean negative log-likelihood of a token, in nats.
        tokens: targets that were measured.
        windows: windows they were in.
        seconds: how long it took.
        n_bytes: bytes of text that the targets stand for; None where the tokenizer is not known.
    """

    loss: float
    tokens: int
    windows: int
    seconds: float
    n_bytes: int | None

    @property
    def perplexity(self) -> float:
        """Return exp(loss)."""
        return perplexity(self.loss)

    @property
    def bits_per_byte(self) -> float | None:
        """Return the loss in bits per byte of text; None where the tokenizer is not known."""
        return self.loss * self.tokens / math.log(2) / self.n_bytes if self.n_bytes else None

    @property
    def tokens_per_s(self) -> float | None:
        """Return the speed; None when no time was measured."""
        return self.tokens / self.seconds if self.seconds > 0 else None


def measure(
    model: Model,
    data: TokenDataset,
    batch_size: int,
    seq_len: int,
    max_windows: int = 0,
    on_batch: Callable[[int, float], None] | None = None,
) -> Measurement:
    """Measure a model on consecutive windows that do not overlap; what is left at the end is not measured.

    Args:
        model: the model.
        data: the tokens; each is predicted from those before it in its window.
        batch_size: windows at a time.
        seq_len: tokens in a window.
        max_windows: stop after so many; 0 takes all.
        on_batch: called after each batch with the windows done and the mean loss so far.

    Raises:
        DataError: when the data is shorter than one window.
    """
    nats, windows = 0.0, 0
    start = time.perf_counter()
    for tokens, targets in data.eval_windows(batch_size, seq_len, max_windows or None):
        nats += model.forward(tokens, targets, training=False) * targets.size  # a float64 sum
        windows += len(tokens)
        if on_batch is not None:
            on_batch(windows, nats / (windows * seq_len))
    seconds = time.perf_counter() - start
    count = windows * seq_len
    return Measurement(nats / count, count, windows, seconds, data.target_bytes(count))
