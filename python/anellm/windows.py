"""Where training windows begin: drawn at random, or every window once an epoch in an order of its own."""

from __future__ import annotations

import math
from collections.abc import Callable

from anellm.errors import InvalidError

SAMPLER_MODES = ("random", "epoch")

Rng = Callable[[int, int, int], int]  # (seed, stream, counter) -> uniform 64-bit integer

# One stream of random numbers per purpose: ASCII "wind", "offs", "perm".
_STREAM_WINDOW, _STREAM_OFFSET, _STREAM_ORDER = 0x77696E64, 0x6F666673, 0x7065726D
_FEISTEL_ROUNDS = 6


def _core_rng(seed: int, stream: int, counter: int) -> int:
    """Return a random 64-bit integer from the C core's counter-based generator."""
    from anellm._ffi import lib  # reading and splitting data needs no C core

    return int(lib.anellm_rng_u64(seed, stream, counter))


def _scale(value: int, n: int) -> int:
    """Map a uniform 64-bit integer to [0, n), each result within 2**-64 of 1/n (Lemire, arXiv:1805.10941)."""
    return (value * n) >> 64


class WindowSampler:
    """Choose where training windows begin: a pure function of the seed and a running row number.

    Mode "random" draws each start uniformly, with replacement. Mode "epoch" takes every window of a grid once before
    any comes again; each epoch has its own order and shifts the grid by its own offset in [0, seq_len), so that window
    edges do not always fall on the same tokens.
    """

    def __init__(self, n_tokens: int, seq_len: int, seed: int, mode: str = "random", rng: Rng | None = None) -> None:
        """Prepare a sampler.

        Args:
            n_tokens: tokens to draw from, at least seq_len + 1.
            seq_len: tokens a row, T >= 1; a window holds T + 1, since the targets are one ahead.
            seed: in [0, 2**64).
            mode: "random" or "epoch".
            rng: the random numbers; None takes the C core's.

        Raises:
            InvalidError: on an unknown mode, a seed or size out of range, or fewer tokens than one window.
        """
        if mode not in SAMPLER_MODES:
            raise InvalidError(f"sampling mode: expected one of {', '.join(SAMPLER_MODES)}, found {mode!r}")
        if not 0 <= seed < 1 << 64:
            raise InvalidError(f"seed: expected 0 to 2**64 - 1, found {seed}")
        if seq_len < 1:
            raise InvalidError(f"seq_len: expected at least 1, found {seq_len}")
        if n_tokens < seq_len + 1:
            raise InvalidError(f"n_tokens: expected at least seq_len + 1 = {seq_len + 1}, found {n_tokens}")
        self.n_tokens, self.seq_len, self.seed, self.mode = n_tokens, seq_len, seed, mode
        # One window less than would fit leaves room for any offset; with fewer than two, the one window stays.
        self.n_windows = max(1, n_tokens // seq_len - 1)
        self._n_offsets = min(seq_len, n_tokens - self.n_windows * seq_len)
        self._half_bits = max(1, ((self.n_windows - 1).bit_length() + 1) // 2)
        self._rng = rng or _core_rng

    def start(self, row: int) -> int:
        """Return the first token of the window of a row.

        Args:
            row: number of the row since the start of training, over all steps, micro-steps and batches.

        Returns:
            A start in [0, n_tokens - seq_len - 1]: the window's seq_len + 1 tokens lie inside the data.
        """
        if self.mode == "random":
            return _scale(self._rng(self.seed, _STREAM_WINDOW, row), self.n_tokens - self.seq_len)
        epoch, index = divmod(row, self.n_windows)
        offset = _scale(self._rng(self.seed, _STREAM_OFFSET, epoch), self._n_offsets)
        return offset + self._permuted(epoch, index) * self.seq_len

    def _permuted(self, epoch: int, index: int) -> int:
        """Return the index-th element of this epoch's permutation of [0, n_windows), without making the list.

        A Feistel network permutes the next power of four; walking its cycle until it comes back into range permutes
        the range itself (Black and Rogaway 2002, "Ciphers with arbitrary finite domains").
        """
        bits = self._half_bits
        mask = (1 << bits) - 1
        while True:
            left, right = index >> bits, index & mask
            for number in range(_FEISTEL_ROUNDS):
                counter = (epoch * _FEISTEL_ROUNDS + number) << 32 | right
                left, right = right, left ^ (self._rng(self.seed, _STREAM_ORDER, counter) & mask)
            index = left << bits | right
            if index < self.n_windows:
                return index

    def steps_for(self, epochs: float, rows_per_step: int) -> int:
        """Return the number of steps that take at least `epochs` times n_windows windows.

        Args:
            epochs: passes over the data, > 0; need not be whole.
            rows_per_step: batch_size * gradient_accumulation_steps.
        """
        windows = max(1, math.ceil(self.n_windows * epochs))
        return -(-windows // rows_per_step)
