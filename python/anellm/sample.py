"""Choose tokens from logits, and write on from a prompt.

The random number of a choice is a pure function of (seed, sample index, position), so the same seed gives the same
text however the work is split, and any single choice can be repeated alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from anellm import errors
from anellm._ffi import lib

if TYPE_CHECKING:
    from anellm.model import KVCache, Model

BOS_ID, EOS_ID = 1, 2  # of the Llama 2 vocabulary and those trained like it
_STREAM = 0x53414D50 << 32  # keeps these random numbers apart from those of the data loader
_MAX_SEED = 2**64
_MARGIN = 1e-9  # of probability; far above what rounding does to a sum


@dataclass(frozen=True)
class Sampling:
    """How to choose the next token. Applied in the order temperature, top_k, top_p, min_p.

    Attributes:
        temperature: divides the logits; 0 takes the likeliest token (the lowest id among equals).
        top_k: keep only the k likeliest tokens; 0 keeps all.
        top_p: keep the likeliest tokens that together reach this probability; in (0, 1], 1 keeps all.
        min_p: keep tokens at least this fraction as likely as the likeliest; in [0, 1], 0 keeps all.
        seed: 0 to 2^64 - 1.
    """

    temperature: float = 0.8
    top_k: int = 0
    top_p: float = 0.9
    min_p: float = 0.0
    seed: int = 1337

    def __post_init__(self) -> None:
        """Refuse impossible settings.

        Raises:
            ConfigError: naming the setting, its range and its value.
        """
        self._require(
            "temperature", math.isfinite(self.temperature) and self.temperature >= 0, "a number of at least 0"
        )
        self._require("top_k", isinstance(self.top_k, int) and self.top_k >= 0, "a whole number of at least 0 (0: off)")
        self._require("top_p", 0 < self.top_p <= 1, "above 0 and at most 1 (1: off)")
        self._require("min_p", 0 <= self.min_p <= 1, "0 to 1 (0: off)")
        self._require(
            "seed", isinstance(self.seed, int) and 0 <= self.seed < _MAX_SEED, "a whole number, 0 to 2^64 - 1"
        )

    def _require(self, name: str, ok: bool, expected: str) -> None:
        if not ok:
            raise errors.ConfigError(f"{name}: expected {expected}, found {getattr(self, name)}")


def _check_logits(logits: np.ndarray) -> float:
    """Return the largest logit.

    Raises:
        InvalidError: when they are not a vector of at least one.
        NonFiniteError: on NaN or +inf, or when all are -inf (a masked token is -inf).
    """
    if logits.ndim != 1 or logits.size == 0:
        raise errors.InvalidError(f"logits: expected shape (vocab_size,), found {logits.shape}")
    top = logits.max()  # NaN if there is one
    if not np.isfinite(top):
        where = int(np.argmax(~(logits < np.inf)))
        raise errors.NonFiniteError(f"logits: expected finite values, found {logits[where]} for token {where}")
    return float(top)


def _likeliest(logits: np.ndarray, sampling: Sampling, reach: float) -> tuple[np.ndarray, np.ndarray]:
    """Return at least as many of the likeliest tokens as together reach a probability, likeliest first.

    Sorting a whole vocabulary can take longer than a small model's forward pass. So what will not be needed is left out
    first: tokens that min_p drops, and those below (1 - reach) / n, which together have less than 1 - reach.

    Args:
        logits: (vocab_size,).
        sampling: its temperature (above 0), top_k and min_p count.
        reach: a probability; from 1 on all that min_p leaves.

    Returns:
        ids (n,) int64, lowest id first among equals, and (n,) float64 probabilities among all (top_k) tokens.
    """
    top = _check_logits(logits)
    ids = np.arange(logits.size)
    if sampling.top_k and sampling.top_k < logits.size:
        ids = np.flatnonzero(logits >= np.partition(logits, -sampling.top_k)[-sampling.top_k])
        ids = ids[np.argsort(-logits[ids], kind="stable")[: sampling.top_k]]
    shifted = logits[ids].astype(np.float64) - top
    with np.errstate(over="ignore"):  # a tiny temperature: -inf, whose exponential is 0
        probs = np.exp(shifted / sampling.temperature)
    probs /= probs.sum()
    too_small = sampling.min_p * probs.max() * (1 - 1e-9)  # with a margin: who is dropped is decided later
    near = np.flatnonzero(probs >= max(too_small, (1 - reach) / probs.size))
    order = near[np.argsort(-shifted[near], kind="stable")]
    return ids[order], probs[order]


def candidates(logits: np.ndarray, sampling: Sampling) -> tuple[np.ndarray, np.ndarray]:
    """Return the tokens that may be chosen, and how likely each is.

    Args:
        logits: (vocab_size,).
        sampling: temperature must be above 0.

    Returns:
        ids (n,) int64, likeliest first (lowest id first among equals), and probabilities (n,) float64 that sum to 1.

    Raises:
        InvalidError: on a wrong shape.
        NonFiniteError: on NaN or +inf.

    Source: nucleus (top_p): Holtzman et al., arXiv:1904.09751; min_p: Nguyen et al., arXiv:2407.01082.
    """
    if sampling.temperature == 0:
        raise errors.InvalidError("temperature: expected above 0 to draw from, found 0 (that is `choose`'s argmax)")
    ids, probs = _likeliest(logits, sampling, sampling.top_p + _MARGIN)
    if sampling.top_p < 1:
        # The first count at which the sum reaches top_p; rounding may keep it below for ever, then all stay.
        keep = int(np.searchsorted(np.cumsum(probs), sampling.top_p)) + 1
        ids, probs = ids[:keep], probs[:keep]
    if sampling.min_p > 0:
        keep = int(np.count_nonzero(probs >= sampling.min_p * probs[0]))
        ids, probs = ids[:keep], probs[:keep]
    return ids, probs / probs.sum()


def uniform(seed: int, sample_index: int, position: int) -> float:
    """Return the random number in [0, 1) of one choice, with 53 random bits.

    Args:
        seed: 0 to 2^64 - 1.
        sample_index: which of several texts from one seed, 0 to 2^32 - 1.
        position: how many tokens stand before the one to choose.
    """
    bits = int(lib.anellm_rng_u64(seed, _STREAM | sample_index, position))
    return (bits >> 11) * 2.0**-53


def choose(logits: np.ndarray, sampling: Sampling, position: int, sample_index: int = 0) -> int:
    """Choose one token.

    Args:
        logits: (vocab_size,).
        sampling: how.
        position: how many tokens stand before it; selects the random number.
        sample_index: which of several texts from one seed.

    Returns:
        The token id.

    Raises:
        InvalidError: on a wrong shape.
        NonFiniteError: on NaN or +inf.
    """
    if sampling.temperature == 0:
        _check_logits(logits)
        return int(np.argmax(logits))
    drawn = uniform(sampling.seed, sample_index, position)
    if sampling.top_p == 1 and sampling.min_p == 0:
        ids, probs = _likeliest(logits, sampling, drawn + _MARGIN)  # the token is not behind these
    else:
        ids, probs = candidates(logits, sampling)
    at = int(np.searchsorted(np.cumsum(probs), drawn, side="right"))
    return int(ids[min(at, len(ids) - 1)])


class TokenStream(Iterator[int]):
    """Yield new token ids one at a time; `finish_reason` then says why it ended.

    Attributes:
        finish_reason: None while running; "length" (max_new_tokens), "stop" (a stop id, which is not yielded) or
            "context" (the model's max_seq_len is full).
    """

    def __init__(
        self,
        model: Model,
        ids: Sequence[int],
        max_new_tokens: int,
        sampling: Sampling,
        stop_ids: Collection[int],
        sample_index: int,
        vocab_size: int | None,
    ) -> None:
        """See `generate_stream`."""
        self.finish_reason: str | None = None
        self._model, self._sampling, self._sample_index = model, sampling, sample_index
        self._stop_ids = frozenset(stop_ids)
        self._vocab_size = vocab_size
        try:
            self._pending = np.array(ids, dtype=np.int32)
        except OverflowError:
            raise errors.TokenRangeError(
                f"ids: expected 0 to {model.config.vocab_size - 1}, found {max(ids)}"
            ) from None
        self._fed = 0
        # The last new token is not fed back, so it may stand just behind the context's end.
        room = model.config.max_seq_len - len(ids) + 1
        self._left = min(max_new_tokens, room)
        self._reason_at_end = "length" if max_new_tokens <= room else "context"
        self._cache: KVCache | None = model.kvcache(len(ids) + self._left - 1) if self._left > 0 else None

    def __next__(self) -> int:
        """Return the next token id."""
        if self.finish_reason is not None or self._cache is None:
            self.finish_reason = self.finish_reason or self._reason_at_end
            raise StopIteration
        logits = self._model.decode(self._cache, self._pending)[: self._vocab_size]
        self._fed += len(self._pending)
        token = choose(logits, self._sampling, self._fed, self._sample_index)
        if token in self._stop_ids:
            self._finish("stop")
            raise StopIteration
        self._pending = np.array([token], dtype=np.int32)
        self._left -= 1
        if self._left == 0:
            self._finish(self._reason_at_end)
        return token

    def _finish(self, reason: str) -> None:
        self.finish_reason = reason
        if self._cache is not None:
            self._cache.close()
            self._cache = None


def generate_stream(
    model: Model,
    ids: Sequence[int],
    max_new_tokens: int,
    sampling: Sampling | None = None,
    *,
    stop_ids: Collection[int] = (BOS_ID, EOS_ID),
    sample_index: int = 0,
    vocab_size: int | None = None,
) -> TokenStream:
    """Write on from a prompt, token by token, with a key/value cache.

    TokenStream stops where the model's max_seq_len is full: the context does not slide.

    Args:
        model: the model.
        ids: the prompt's tokens, at least one (BOS to start a new text), at most max_seq_len.
        max_new_tokens: how many to write at most, at least 0.
        sampling: how to choose; the default settings if None.
        stop_ids: tokens that end the text; they are not yielded.
        sample_index: which of several texts from one seed, 0 to 2^32 - 1.
        vocab_size: choose only ids below it, for a tokenizer with fewer tokens than the model; None takes all.

    Returns:
        An iterator of token ids. Asking for the first one reads the prompt.

    Raises:
        InvalidError: on an empty prompt, one longer than max_seq_len, or a negative count.
    """
    if len(ids) == 0:
        raise errors.InvalidError("ids: expected at least one token (BOS to start a new text), found none")
    if len(ids) > model.config.max_seq_len:
        raise errors.InvalidError(
            f"ids: expected at most max_seq_len = {model.config.max_seq_len} tokens, found {len(ids)}: "
            "shorten the prompt"
        )
    if max_new_tokens < 0:
        raise errors.InvalidError(f"max_new_tokens: expected at least 0, found {max_new_tokens}")
    if not 0 <= sample_index < 2**32:
        raise errors.InvalidError(f"sample_index: expected 0 to 2^32 - 1, found {sample_index}")
    return TokenStream(model, ids, max_new_tokens, sampling or Sampling(), stop_ids, sample_index, vocab_size)


class StopText:
    """Let text through, up to a stop text; holds back what may be its beginning."""

    def __init__(self, stop: str | None, emit: Callable[[str], None]) -> None:
        """Pass text on to `emit`; `stop` None or "" never stops."""
        self._stop, self._emit, self._held = stop or "", emit, ""
        self.text = ""
        self.found = False

    def feed(self, piece: str, *, last: bool = False) -> bool:
        """Take the next piece; return whether the stop text has come."""
        self._held += piece
        at = self._held.find(self._stop) if self._stop else -1
        self.found = at >= 0
        keep = 0 if last else self._overlap()
        out = self._held[:at] if self.found else self._held[: len(self._held) - keep]
        self._held = "" if self.found else self._held[len(out) :]
        if out:
            self.text += out
            self._emit(out)
        return self.found

    def _overlap(self) -> int:
        """Return the length of the longest end of the held text that begins the stop text."""
        longest = min(len(self._stop) - 1, len(self._held))
        return next((n for n in range(longest, 0, -1) if self._held.endswith(self._stop[:n])), 0)
