"""Byte-pair tokenizer in llama2.c's ``tokenizer.bin`` layout: strict reader, exact encoder, streaming decoder."""

from __future__ import annotations

import codecs
import hashlib
import heapq
import math
import re
import stat
import struct
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from anellm.errors import DataError, InvalidError, TokenRangeError

DOCUMENT_SEPARATOR = "<|endoftext|>"
UNK_ID, BOS_ID, EOS_ID = 0, 1, 2
FIRST_BYTE_ID, FIRST_PIECE_ID = 3, 259
BYTE_PIECES = tuple(b"<0x%02X>" % value for value in range(256))

_HEADER = struct.Struct("<i")  # max_token_length
_RECORD = struct.Struct("<fi")  # score, length; the piece's bytes follow
_SCORE_FLOOR = -1e10  # llama2.c's run.c starts its search for the best merge here, so it never takes a lower score
_CACHE_ENTRIES, _CACHE_TEXT = 1 << 17, 48  # segments kept, and the longest one worth keeping, in characters


class Tokenizer:
    """Encode text to token ids and back, exactly as llama2.c's run.c and sentencepiece's BPE do.

    Id 0 is the unknown token, 1 begins a document, 2 ends one, 3 to 258 are the 256 bytes, pieces follow.
    """

    bos_id = BOS_ID
    eos_id = EOS_ID

    def __init__(self, pieces: Sequence[bytes], scores: Sequence[float], *, source: str = "tokenizer") -> None:
        """Build a tokenizer from its table.

        Args:
            pieces: the bytes of each token; 3 to 258 must be ``<0x00>`` to ``<0xFF>``.
            scores: merge priority of each token, higher first; stored as float32.
            source: what to call the table in an error.

        Raises:
            DataError: if the table is too short, an entry is empty, a score is not finite, or a byte token is missing.
        """
        if len(pieces) != len(scores):
            raise DataError(f"{source}: expected one score a piece, found {len(pieces)} pieces, {len(scores)} scores")
        if len(pieces) < FIRST_PIECE_ID:
            raise DataError(
                f"{source}: expected at least {FIRST_PIECE_ID} tokens (3 special, 256 bytes), found {len(pieces)}"
            )
        with np.errstate(over="ignore"):  # what overflows float32 becomes inf, and is refused below
            self.scores: tuple[float, ...] = tuple(np.asarray(scores, dtype=np.float32).tolist())
        for index, (piece, score) in enumerate(zip(pieces, self.scores, strict=True)):
            if not piece:
                raise DataError(f"{source}: token {index}: length: expected at least 1, found 0")
            if not math.isfinite(score):
                raise DataError(f"{source}: token {index}: score: expected a finite number, found {score}")
            if FIRST_BYTE_ID <= index < FIRST_PIECE_ID and piece != BYTE_PIECES[index - FIRST_BYTE_ID]:
                expected = BYTE_PIECES[index - FIRST_BYTE_ID].decode()
                raise DataError(f"{source}: token {index}: expected the byte token {expected}, found {piece!r}")
        self.pieces = tuple(pieces)
        self._build_tables()
        self._cache: dict[str, list[int]] = {}

    def _build_tables(self) -> None:
        """Fill the lookup tables of the encoder and decoder."""
        # As in sentencepiece, text never merges into a special or byte token: only pieces from 259 on count. A piece
        # that is not UTF-8 cannot arise from whole code points. Of equal pieces the first counts.
        self._ids: dict[str, int] = {}
        for index, piece in enumerate(self.pieces[FIRST_PIECE_ID:], FIRST_PIECE_ID):
            try:
                self._ids.setdefault(piece.decode("utf-8"), index)
            except UnicodeDecodeError:
                continue
        # heap key and id of every piece that a merge can make
        self._merges = {
            text: (-self.scores[index], index)
            for text, index in self._ids.items()
            if len(text) > 1 and self.scores[index] > _SCORE_FLOOR
        }
        self._segments = self._segment_pattern()
        self._bytes = [b"", *self.pieces[1:]]
        self._bytes[UNK_ID] = self.pieces[UNK_ID]
        self._bytes[BOS_ID] = self._bytes[EOS_ID] = b""
        self._bytes[FIRST_BYTE_ID:FIRST_PIECE_ID] = [bytes([value]) for value in range(256)]
        # run.c drops the space that encode put in front. Where " " is no piece that space is the byte token 0x20.
        first = FIRST_PIECE_ID if " " in self._ids else FIRST_BYTE_ID
        self._drops_space = np.array(
            [index >= first and text.startswith(b" ") for index, text in enumerate(self._bytes)], dtype=bool
        )

    def _segment_pattern(self) -> re.Pattern[str] | None:
        """Return the pattern that cuts text into parts that can be encoded one by one, or None.

        Why that is exact: all that BPE does is merge two neighbours into a piece. If no piece holds a non-space
        followed by a space, no merge ever joins the two sides of such a place, so neighbours on one side never depend
        on the other. The global order (best score first, ties leftmost), restricted to one side, is the same order
        over that side alone. Hence the text may be cut before every run of spaces, and each part encoded by itself.
        The same holds on both sides of a newline, if no piece of two or more characters holds one.
        """
        if any(re.search("[^ ] ", text) for text in self._merges):
            return None
        if any("\n" in text for text in self._merges):
            return re.compile(" *[^ ]+| +")
        return re.compile("\n| *[^ \n]+| +")

    @classmethod
    def from_file(cls, path: str | Path) -> Tokenizer:
        """Read a llama2.c ``tokenizer.bin``; the vocabulary size is the number of tokens up to the end of the file.

        Args:
            path: little-endian file: int32 max_token_length; per token float32 score, int32 length, bytes.

        Raises:
            DataError: naming file, token, field, expected and found, if anything is not as it must be.
        """
        path = Path(path)
        try:
            if not stat.S_ISREG(path.stat().st_mode):
                raise DataError(f"{path}: expected a tokenizer.bin file, found something that is not a plain file")
            data = path.read_bytes()
        except OSError as error:
            raise DataError(f"{path}: cannot read the tokenizer: {error.strerror or error}") from error
        return cls.from_bytes(data, source=str(path))

    @classmethod
    def from_bytes(cls, data: bytes, *, source: str = "tokenizer") -> Tokenizer:
        """Parse the bytes of a ``tokenizer.bin``; see from_file.

        Raises:
            DataError: naming source, token, field, expected and found.
        """
        size = len(data)
        if size < _HEADER.size:
            raise DataError(f"{source}: expected at least {_HEADER.size} bytes of header, found {size}")
        (max_token_length,) = _HEADER.unpack_from(data)
        if not 0 < max_token_length <= size:
            raise DataError(
                f"{source}: max_token_length: expected 1 to {size} (the file size), found {max_token_length}"
            )
        pieces: list[bytes] = []
        scores: list[float] = []
        offset = _HEADER.size
        while offset < size:
            where = f"{source}: token {len(pieces)} at byte {offset}"
            if size - offset < _RECORD.size:
                raise DataError(f"{where}: expected {_RECORD.size} bytes of score and length, found {size - offset}")
            score, length = _RECORD.unpack_from(data, offset)
            offset += _RECORD.size
            if not 1 <= length <= max_token_length:
                raise DataError(f"{where}: length: expected 1 to max_token_length = {max_token_length}, found {length}")
            if length > size - offset:
                raise DataError(
                    f"{where}: expected {length} bytes of text, found {size - offset} before the file's end"
                )
            pieces.append(data[offset : offset + length])
            scores.append(score)
            offset += length
        longest = max(map(len, pieces), default=0)
        if longest != max_token_length:
            raise DataError(
                f"{source}: max_token_length: expected {longest} (the longest token), found {max_token_length}"
            )
        return cls(pieces, scores, source=source)

    @classmethod
    def shipped(cls) -> Tokenizer:
        """Return the tokenizer of the text that comes with the package."""
        return cls.from_file(Path(__file__).parent / "data" / "shakespeare.tokenizer.bin")

    def to_bytes(self) -> bytes:
        """Return the table in the layout of ``tokenizer.bin``."""
        parts = [_HEADER.pack(max(map(len, self.pieces)))]
        for piece, score in zip(self.pieces, self.scores, strict=True):
            parts.append(_RECORD.pack(score, len(piece)) + piece)
        return b"".join(parts)

    def save(self, path: str | Path) -> None:
        """Write the table to a ``tokenizer.bin`` file; reading it and saving it again gives the same bytes."""
        Path(path).write_bytes(self.to_bytes())

    @cached_property
    def sha256(self) -> str:
        """Return the SHA-256 of the serialised table, in hexadecimal."""
        return hashlib.sha256(self.to_bytes()).hexdigest()

    @property
    def vocab_size(self) -> int:
        """Return the number of tokens."""
        return len(self.pieces)

    @property
    def token_dtype(self) -> np.dtype[Any]:
        """Return the smallest of uint16 and int32 that holds every id."""
        return np.dtype("<u2") if self.vocab_size <= 1 << 16 else np.dtype("<i4")

    def encode(self, text: str, bos: bool = True, eos: bool = False) -> list[int]:
        """Encode text to token ids.

        A space is put in front of text that is not empty; each code point becomes its piece, or its UTF-8 bytes where
        there is none; then the two neighbours whose joint piece has the best score merge, leftmost first among equals,
        until none is left. ``<s>`` and the like in the text are text.

        Args:
            text: any string without lone surrogates.
            bos: whether to begin with bos_id.
            eos: whether to end with eos_id.

        Returns:
            Token ids, each in [0, vocab_size).

        Raises:
            InvalidError: if the text holds a lone surrogate, which has no UTF-8 form.

        Source: llama2.c run.c ``encode``; Sennrich et al. 2016, https://arxiv.org/abs/1508.07909.
        """
        ids = [BOS_ID] if bos else []
        if text:
            try:
                self._encode_into(ids, " " + text)
            except UnicodeEncodeError:
                at = next(i for i, char in enumerate(text) if "\ud800" <= char <= "\udfff")
                raise InvalidError(
                    f"text: expected Unicode text, found the lone surrogate {text[at]!r} at character {at}"
                ) from None
        if eos:
            ids.append(EOS_ID)
        return ids

    def _encode_into(self, ids: list[int], text: str) -> None:
        """Append the ids of text, which already has its leading space."""
        if self._segments is None:
            ids.extend(self._encode_segment(text))
            return
        cache = self._cache
        for segment in self._segments.findall(text):
            found = cache.get(segment)
            if found is None:
                found = self._encode_segment(segment)
                if len(segment) <= _CACHE_TEXT and len(cache) < _CACHE_ENTRIES:
                    cache[segment] = found
            ids.extend(found)

    def _encode_segment(self, text: str) -> list[int]:
        """Merge one segment with a heap of candidate pairs; O(n log n)."""
        known, merges = self._ids, self._merges
        n = len(text)
        # Symbol i starts at text[i] and ends where the next live one starts. `ends[i]` is 0 once i was merged away.
        ends = list(range(1, n + 1))
        previous = list(range(-1, n - 1))
        # An unknown character becomes bytes at once and merges with nothing, as in run.c.
        fixed = [char not in known for char in text]
        heap: list[tuple[float, int, int, int]] = []  # (-score, start, middle, end): leftmost first among equals

        def offer(start: int, middle: int) -> None:
            if start < 0 or middle >= n or fixed[start] or fixed[middle]:
                return
            merge = merges.get(text[start : ends[middle]])
            if merge is not None:
                heapq.heappush(heap, (merge[0], start, middle, ends[middle]))

        for i in range(n - 1):
            offer(i, i + 1)
        while heap:
            _, start, middle, end = heapq.heappop(heap)
            if ends[start] != middle or ends[middle] != end:
                continue  # one of the two has grown, or is gone
            ends[start], ends[middle] = end, 0
            if end < n:
                previous[end] = start
                offer(start, end)
            offer(previous[start], start)
        ids: list[int] = []
        i = 0
        while i < n:
            if fixed[i]:
                ids.extend(value + FIRST_BYTE_ID for value in text[i].encode("utf-8"))
            else:
                ids.append(known[text[i : ends[i]]])
            i = ends[i]
        return ids

    def encode_documents(self, text: str) -> npt.NDArray[Any]:
        """Encode text that holds documents separated by ``<|endoftext|>``.

        The marker is never encoded as text: each document that is not empty begins with bos_id instead. Newlines
        right before and after a marker belong to it.

        Returns:
            Token ids (n,), uint16, or int32 where the vocabulary has more than 65536 tokens.

        Raises:
            InvalidError: if the text holds a lone surrogate.
        """
        documents = split_documents(text)
        parts = [np.array(self.encode(document), dtype=self.token_dtype) for document in documents]
        return np.concatenate(parts) if parts else np.empty(0, dtype=self.token_dtype)

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """Return the bytes that token ids stand for.

        As in llama2.c the space that leads the first token after bos_id is dropped; bos_id and eos_id give nothing.

        Raises:
            TokenRangeError: if an id is outside the vocabulary.
        """
        stream = TokenStream(self)
        return b"".join([stream.feed_bytes(int(token)) for token in ids])

    def decode(self, ids: Iterable[int]) -> str:
        """Return the text that token ids stand for, with U+FFFD in place of bytes that are not UTF-8.

        Raises:
            TokenRangeError: if an id is outside the vocabulary.
        """
        return self.decode_bytes(ids).decode("utf-8", "replace")

    def stream(self) -> TokenStream:
        """Return a decoder that takes one id at a time."""
        return TokenStream(self)

    def token_bytes(self, token: int) -> int:
        """Return the number of bytes that a token decodes to: 0 for bos_id and eos_id.

        Raises:
            TokenRangeError: if the id is outside the vocabulary.
        """
        self._check(token)
        return len(self._bytes[token])

    def count_bytes(self, ids: npt.ArrayLike) -> int:
        """Return ``len(decode_bytes(ids))`` for an array of ids, without decoding them.

        Raises:
            TokenRangeError: if an id is outside the vocabulary.
        """
        array = np.asarray(ids)
        if array.size == 0:
            return 0
        self._check(int(array.min()))
        self._check(int(array.max()))
        dropped = self._drops_space[array[1:]] & (array[:-1] == BOS_ID)
        return int(self._byte_lengths[array].sum()) - int(np.count_nonzero(dropped))

    @cached_property
    def _byte_lengths(self) -> npt.NDArray[np.int64]:
        return np.array([len(text) for text in self._bytes], dtype=np.int64)

    def _check(self, token: int) -> None:
        if not 0 <= token < len(self.pieces):
            raise TokenRangeError(f"token id: expected 0 to {len(self.pieces) - 1}, found {token}")


class TokenStream:
    """Decode token ids as they come, never giving out half a code point."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        """Start at the beginning of a text; Tokenizer.stream() is the usual way here."""
        self._tokenizer = tokenizer
        self._after_bos = False
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def feed_bytes(self, token: int) -> bytes:
        """Return the bytes of the next token.

        Raises:
            TokenRangeError: if the id is outside the vocabulary.
        """
        tokenizer = self._tokenizer
        tokenizer._check(token)
        drop = self._after_bos and bool(tokenizer._drops_space[token])
        self._after_bos = token == BOS_ID
        return tokenizer._bytes[token][drop:]

    def feed(self, token: int) -> str:
        """Return the text that the next token completes; bytes of an unfinished code point wait.

        Raises:
            TokenRangeError: if the id is outside the vocabulary.
        """
        return self._decoder.decode(self.feed_bytes(token))

    def flush(self) -> str:
        """Return what is left at the end of the text: U+FFFD for an unfinished code point, else nothing."""
        return self._decoder.decode(b"", final=True)


def split_documents(text: str) -> list[str]:
    """Return the documents between ``<|endoftext|>`` markers, without the newlines around them; none is empty."""
    parts = text.split(DOCUMENT_SEPARATOR)
    last = len(parts) - 1
    for index in range(last):
        parts[index] = parts[index].rstrip("\r\n")
        parts[index + 1] = parts[index + 1].lstrip("\r\n")
    return [part for part in parts if part]
