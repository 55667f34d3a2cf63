"""Token data: token files and text, split into training and held-out parts, drawn as windows."""

from __future__ import annotations

import hashlib
import stat
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path

import numpy as np
import numpy.typing as npt

from anellm.documents import read_jsonl
from anellm.errors import DataError, InvalidError
from anellm.tokenizer import Tokenizer
from anellm.tokenizer_base import BaseTokenizer, split_documents
from anellm.tokens import CHUNK, TOKEN_DTYPES, Concatenated, TokenFile, Tokens, find_data, is_text, read_header
from anellm.windows import SAMPLER_MODES, Rng, WindowSampler

__all__ = ["SAMPLER_MODES", "TOKEN_DTYPES", "TokenDataset", "WindowSampler", "read_text"]

Batch = tuple[npt.NDArray[np.int32], npt.NDArray[np.int32]]

_MAX_ID = (1 << 31) - 1


class TokenDataset:
    """A run of token ids, memory-mapped or in memory, with what is needed to train on it and to measure it."""

    def __init__(
        self,
        tokens: Tokens | Concatenated,
        *,
        source: str = "tokens",
        vocab_size: int | None = None,
        tokenizer: BaseTokenizer | None = None,
        first: int = 0,
        checked: bool = False,
    ) -> None:
        """Wrap an array of ids.

        Args:
            tokens: (n,) uint16, int32 or uint32, n >= 1.
            source: what to call the data in an error.
            vocab_size: every id must be below it; None takes the tokenizer's, if there is one.
            tokenizer: what the ids were made with, where that is known.
            first: position of tokens[0] in the source, for errors.
            checked: whether the ids are known to be in range.

        Raises:
            DataError: if there are no tokens, or an id is outside the vocabulary.
            InvalidError: on another dtype or shape.
        """
        if tokens.ndim != 1 or tokens.dtype not in TOKEN_DTYPES.values():
            raise InvalidError(
                f"tokens: expected a 1-D array of uint16, int32 or uint32, found {tokens.ndim}-D {tokens.dtype}"
            )
        if tokens.size == 0:
            raise DataError(f"{source}: expected at least one token, found none")
        self.tokens, self.source, self.tokenizer = tokens, source, tokenizer
        self.vocab_size = tokenizer.vocab_size if vocab_size is None and tokenizer is not None else vocab_size
        self._first = first
        if not checked:
            self.check_ids(self.vocab_size)

    @classmethod
    def from_file(
        cls,
        path: str | Path,
        dtype: str = "uint16",
        vocab_size: int | None = None,
        tokenizer: BaseTokenizer | None = None,
        part: str = "all",
    ) -> TokenDataset:
        """Open files of tokens, or read and encode text.

        Args:
            path: a token file of any kind that tokens.py reads, which is memory-mapped; a UTF-8 text whose name ends
                in ``.txt``, with ``<|endoftext|>`` between documents; JSONL (``.jsonl``) with a ``text`` a line; or a
                folder or pattern of such files, which are taken one after the other as one run of tokens.
            dtype: element type of a token file without a header: "uint16", "int32" or "uint32".
            vocab_size: every id must be below it; None takes the tokenizer's, if there is one.
            tokenizer: needed for text; for token files, what they were made with, where that is known.
            part: what to take of a folder with held-out files: "train", "val" or "all"; see tokens.find_data().

        Raises:
            DataError: if a file is missing, empty, damaged, of odd size, not UTF-8, looks like another dtype, was made
                with another tokenizer, or holds an id outside the vocabulary; naming file, position, expected and
                found.
            InvalidError: on an unknown dtype, or text without a tokenizer.
        """
        if dtype not in TOKEN_DTYPES:
            raise InvalidError(f"token dtype: expected one of {', '.join(TOKEN_DTYPES)}, found {dtype!r}")
        files = find_data(path, part)
        limit = tokenizer.vocab_size if vocab_size is None and tokenizer is not None else vocab_size
        parts = [
            _read_text_file(file, limit, tokenizer)
            if is_text(_plain(file))
            else _open_token_file(read_header(file, dtype), dtype, limit, tokenizer)
            for file in files
        ]
        for file, tokens in zip(files, parts, strict=True):
            if tokens.dtype != parts[0].dtype:
                raise DataError(f"{file}: dtype: expected {parts[0].dtype}, as {files[0]} has, found {tokens.dtype}")
        parts = [tokens for tokens in parts if tokens.size]
        if not parts:
            raise DataError(f"{path}: expected at least one token, found none")
        joined = parts[0] if len(parts) == 1 else Concatenated(parts)
        return cls(joined, source=str(path), vocab_size=vocab_size, tokenizer=tokenizer, checked=True)

    @classmethod
    def shipped(cls) -> TokenDataset:
        """Return the tokens of the text that comes with the package, with its tokenizer."""
        folder = Path(__file__).parent / "data"
        return cls.from_file(folder / "shakespeare.uint16.bin", tokenizer=Tokenizer.shipped())

    def check_ids(self, vocab_size: int | None) -> None:
        """Look at every id once.

        Args:
            vocab_size: every id must be below it; None allows any id that fits in 31 bits.

        Raises:
            DataError: naming source, position, id and vocab_size.
        """
        limit = _MAX_ID + 1 if vocab_size is None else vocab_size
        for begin in range(0, self.n_tokens, CHUNK):
            chunk = self.tokens[begin : begin + CHUNK]
            if int(chunk.max()) < limit and int(chunk.min()) >= 0:
                continue
            at = int(np.argmax((chunk < 0) | (chunk >= limit)))
            message = (
                f"{self.source}: token {self._first + begin + at}: expected an id from 0 to {limit - 1}"
                f"{'' if vocab_size is None else f' (vocab_size {vocab_size})'}, found {int(chunk[at])}"
            )
            halves = chunk.view(np.uint16) if chunk.dtype.itemsize == 4 else None
            if halves is not None and int(halves.max()) < limit:
                message += "; the file looks like uint16 tokens: use --token-dtype uint16"
            raise DataError(message)

    def occurring_ids(self, vocab_size: int) -> npt.NDArray[np.bool_]:
        """Return which ids below vocab_size occur: (vocab_size,) bool."""
        occurs = np.zeros(vocab_size, bool)
        for begin in range(0, self.n_tokens, CHUNK):
            occurs[self.tokens[begin : begin + CHUNK]] = True
        return occurs

    def check_window(self, seq_len: int) -> None:
        """Check that one window of seq_len tokens and their targets fits.

        Raises:
            DataError: naming the source and both sizes.
            InvalidError: if seq_len is below 1.
        """
        if seq_len < 1:
            raise InvalidError(f"seq_len: expected at least 1, found {seq_len}")
        if self.n_tokens < seq_len + 1:
            raise DataError(
                f"{self.source}: expected at least {seq_len + 1} tokens (one window of seq_len {seq_len} and the token "
                f"after it), found {self.n_tokens}; use more data or a smaller --seq-len"
            )

    @property
    def n_tokens(self) -> int:
        """Return the number of tokens."""
        return int(self.tokens.size)

    @cached_property
    def n_bytes(self) -> int | None:
        """Return how many bytes of text the tokens stand for; None where the tokenizer is not known."""
        if self.tokenizer is None:
            return None
        total = 0
        for begin in range(0, self.n_tokens, CHUNK):
            # One token of overlap, taken off again: whether a leading space counts depends on the token before.
            head = self.tokens[max(0, begin - 1) : begin]
            total += self.tokenizer.count_bytes(self.tokens[max(0, begin - 1) : begin + CHUNK])
            total -= self.tokenizer.count_bytes(head)
        return total

    def target_bytes(self, count: int) -> int | None:
        """Return how many bytes of text the first ``count`` targets stand for; None where the tokenizer is not known.

        Args:
            count: targets, from the second token on: the first token is context only.
        """
        if self.tokenizer is None:
            return None
        # It is counted and taken off again, since whether a leading space counts depends on the token before.
        seen = TokenDataset(self.tokens[: count + 1], tokenizer=self.tokenizer, checked=True)
        return (seen.n_bytes or 0) - self.tokenizer.count_bytes(self.tokens[:1])

    @cached_property
    def sha256(self) -> str:
        """Return the SHA-256 of the tokens as they are stored, in hexadecimal."""
        digest = hashlib.sha256()
        for begin in range(0, self.n_tokens, CHUNK):
            digest.update(np.ascontiguousarray(self.tokens[begin : begin + CHUNK]).data)
        return digest.hexdigest()

    def split(
        self, val_fraction: float | None = None, val_tokens: int | None = None
    ) -> tuple[TokenDataset, TokenDataset]:
        """Hold out the end of the data.

        No training window can touch a held-out token: the training part ends where the other one begins, and windows
        (targets included) lie inside their part.

        Args:
            val_fraction: part to hold out, in (0, 1); or
            val_tokens: number of tokens to hold out, from 1 to n_tokens - 1.

        Returns:
            The training part and the held-out part.

        Raises:
            InvalidError: if not exactly one is given, or nothing would be left on one side.
        """
        if (val_fraction is None) == (val_tokens is None):
            raise InvalidError("split: expected exactly one of val_fraction and val_tokens")
        if val_tokens is None:
            if not 0.0 < float(val_fraction or 0.0) < 1.0:
                raise InvalidError(f"val_fraction: expected a number between 0 and 1, found {val_fraction}")
            val_tokens = round(self.n_tokens * float(val_fraction or 0.0))
        if not 1 <= val_tokens < self.n_tokens:
            raise InvalidError(
                f"{self.source}: tokens to hold out: expected 1 to {self.n_tokens - 1}, found {val_tokens}"
            )
        return self._part(0, self.n_tokens - val_tokens), self._part(self.n_tokens - val_tokens, self.n_tokens)

    def _part(self, begin: int, end: int) -> TokenDataset:
        whole = self.tokens
        return TokenDataset(
            whole.part(begin, end) if isinstance(whole, Concatenated) else whole[begin:end],
            source=self.source,
            vocab_size=self.vocab_size,
            tokenizer=self.tokenizer,
            first=self._first + begin,
            checked=True,
        )

    def sampler(self, seq_len: int, seed: int, mode: str = "random", rng: Rng | None = None) -> WindowSampler:
        """Return the sampler of this data's training windows; see WindowSampler.

        Raises:
            DataError: if the data is shorter than a window.
            InvalidError: on an unknown mode or a seed out of range.
        """
        self.check_window(seq_len)
        return WindowSampler(self.n_tokens, seq_len, seed, mode, rng)

    def batch(
        self,
        seed: int,
        step: int,
        micro_step: int,
        B: int,
        T: int,
        gradient_accumulation_steps: int = 1,
        mode: str = "random",
        rng: Rng | None = None,
    ) -> Batch:
        """Return the training windows of one micro-step: a pure function of the arguments and the data.

        Rows are numbered through all steps and micro-steps, so a batch of B in A micro-steps draws the same windows
        as one of B * A at once.

        Args:
            seed: in [0, 2**64).
            step: optimizer step, from 0.
            micro_step: in [0, gradient_accumulation_steps).
            B: rows.
            T: tokens a row.
            gradient_accumulation_steps: micro-steps a step.
            mode: "random" or "epoch"; see WindowSampler.
            rng: the random numbers; None takes the C core's.

        Returns:
            tokens and targets, each (B, T) int32; targets are one token ahead.

        Raises:
            DataError: if the data is shorter than a window.
            InvalidError: on an argument out of range.
        """
        if step < 0 or B < 1 or not 0 <= micro_step < gradient_accumulation_steps:
            raise InvalidError(
                f"batch: expected step >= 0, B >= 1, 0 <= micro_step < {gradient_accumulation_steps}, found "
                f"step {step}, B {B}, micro_step {micro_step}"
            )
        sampler = self.sampler(T, seed, mode, rng)
        first_row = (step * gradient_accumulation_steps + micro_step) * B
        return self._rows([sampler.start(first_row + row) for row in range(B)], T)

    def _rows(self, starts: list[int], seq_len: int) -> Batch:
        """Gather windows into (B, T) tokens and targets."""
        tokens = np.empty((len(starts), seq_len), dtype=np.int32)
        targets = np.empty_like(tokens)
        for row, start in enumerate(starts):
            tokens[row] = self.tokens[start : start + seq_len]
            targets[row] = self.tokens[start + 1 : start + seq_len + 1]
        return tokens, targets

    def n_eval_windows(self, T: int, max_windows: int | None = None) -> int:
        """Return the number of windows that eval_windows gives.

        Raises:
            DataError: if the data is shorter than a window.
            InvalidError: if max_windows is below 1.
        """
        self.check_window(T)
        if max_windows is not None and max_windows < 1:
            raise InvalidError(f"max_windows: expected at least 1, found {max_windows}")
        n = (self.n_tokens - 1) // T
        return n if max_windows is None else min(n, max_windows)

    def eval_windows(self, B: int, T: int, max_windows: int | None = None) -> Iterator[Batch]:
        """Yield consecutive windows that do not overlap; what is left at the end, shorter than a window, is dropped.

        Args:
            B: rows a batch; the last batch may have fewer.
            T: tokens a row; window s has the tokens s*T to s*T + T - 1, and targets one ahead.
            max_windows: stop after so many.

        Yields:
            tokens and targets, each (<= B, T) int32.

        Raises:
            DataError: if the data is shorter than a window.
            InvalidError: if B or max_windows is below 1.
        """
        if B < 1:
            raise InvalidError(f"B: expected at least 1, found {B}")
        n = self.n_eval_windows(T, max_windows)
        for begin in range(0, n, B):
            yield self._rows([window * T for window in range(begin, min(begin + B, n))], T)


def read_text(path: Path) -> str:
    """Return a UTF-8 text, line ends as they are.

    Raises:
        DataError: naming file, line, and byte, if it cannot be read or is not UTF-8.
    """
    try:
        data = path.read_bytes()
        return data.decode("utf-8-sig" if data.startswith(b"\xef\xbb\xbf") else "utf-8")
    except OSError as error:
        raise DataError(f"{path}: cannot read the text: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise DataError(
            f"{path}:{line}: expected UTF-8 text, found byte 0x{error.object[error.start]:02x} at {error.start}"
        ) from error


def _plain(path: Path) -> Path:
    """Return a path after checking that a plain file is there, which is not empty."""
    try:
        info = path.stat()
    except OSError as error:
        raise DataError(f"{path}: cannot open the data: {error.strerror or error}") from error
    if not stat.S_ISREG(info.st_mode):
        raise DataError(f"{path}: expected a data file, found something that is not a plain file")
    if info.st_size == 0:
        raise DataError(f"{path}: expected tokens or text, found an empty file")
    return path


def _read_text_file(path: Path, vocab_size: int | None, tokenizer: BaseTokenizer | None) -> Tokens:
    """Read and encode a text or JSONL file."""
    if tokenizer is None:
        raise InvalidError(f"{path}: a text needs a tokenizer; give one, or a file of tokens")
    documents = split_documents(read_text(path)) if path.suffix.lower() == ".txt" else read_jsonl(path)
    try:
        tokens = tokenizer.encode_each(documents)
    except InvalidError as error:  # a character that the tokenizer lacks
        raise DataError(f"{path}: {error}") from None
    if tokens.size:
        TokenDataset(tokens, source=str(path), vocab_size=vocab_size)
    return tokens


def _open_token_file(file: TokenFile, dtype: str, vocab_size: int | None, tokenizer: BaseTokenizer | None) -> Tokens:
    """Map a token file into memory, and check it against the tokenizer and the vocabulary."""
    if tokenizer is not None and file.tokenizer_sha256 not in (None, tokenizer.sha256):
        raise DataError(
            f"{file.path}: tokenizer: expected SHA-256 {file.tokenizer_sha256}, with which it was made, "
            f"found {tokenizer.sha256} ({tokenizer.source})"
        )
    if vocab_size is not None and file.vocab_size is not None and file.vocab_size > vocab_size:
        raise DataError(f"{file.path}: vocab_size: expected at most {vocab_size}, found {file.vocab_size}")
    tokens = file.open()
    if not file.offset and dtype == "uint16" and tokens.size % 2 == 0 and not _any_nonzero(tokens[1::2]):
        raise DataError(
            f"{file.path}: every second uint16 is zero, so the file looks like int32 tokens: use --token-dtype int32"
        )
    TokenDataset(tokens, source=str(file.path), vocab_size=file.vocab_size or vocab_size)
    return tokens


def _any_nonzero(tokens: Tokens) -> bool:
    return any(bool(tokens[begin : begin + CHUNK].any()) for begin in range(0, tokens.size, CHUNK))
