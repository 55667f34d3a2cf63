"""Byte-pair tokenizer in llama2.c's ``tokenizer.bin`` layout: strict reader, exact encoder, streaming decoder."""

from __future__ import annotations

import heapq
import math
import re
import stat
import struct
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from anellm.errors import DataError
from anellm.tokenizer_base import DOCUMENT_SEPARATOR, BaseTokenizer, TokenStream, split_documents

__all__ = ["DOCUMENT_SEPARATOR", "TokenStream", "Tokenizer", "load_tokenizer_file", "split_documents"]

FILE_NAME = "tokenizer.bin"
# Names a tokenizer is found by beside weights, the ones that need nothing else first.
TOKENIZER_FILES = (FILE_NAME, "tokenizer.model", "tokenizer.json", "gpt2_tokenizer.bin")
GPT2, CHARACTERS = "gpt2", "char"  # what stands for a tokenizer instead of a file
UNK_ID, BOS_ID, EOS_ID = 0, 1, 2
FIRST_BYTE_ID, FIRST_PIECE_ID = 3, 259
BYTE_PIECES = tuple(b"<0x%02X>" % value for value in range(256))

_HEADER = struct.Struct("<i")  # max_token_length
_RECORD = struct.Struct("<fi")  # score, length; the piece's bytes follow
_SCORE_FLOOR = -1e10  # llama2.c's run.c starts its search for the best merge here, so it never takes a lower score
_CACHE_ENTRIES, _CACHE_TEXT = 1 << 17, 48  # segments kept, and the longest one worth keeping, in characters


class Tokenizer(BaseTokenizer):
    """Encode text to token ids and back, exactly as llama2.c's run.c and sentencepiece's BPE do.

    Id 0 is the unknown token, 1 begins a document, 2 ends one, 3 to 258 are the 256 bytes, pieces follow.
    """

    file_name = FILE_NAME
    bos_id: int = BOS_ID
    eos_id: int = EOS_ID
    add_bos = True
    separator_id = None
    stop_ids = frozenset((BOS_ID, EOS_ID))

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
        self.pieces, self.source = tuple(pieces), source
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

    def _encode_text(self, text: str) -> list[int]:
        """Encode as llama2.c's run.c does.

        A space is put in front; each code point becomes its piece, or its UTF-8 bytes where there is none; then the
        two neighbours whose joint piece has the best score merge, leftmost first among equals, until none is left.

        Source: llama2.c run.c ``encode``; Sennrich et al. 2016, https://arxiv.org/abs/1508.07909.
        """
        ids: list[int] = []
        self._encode_into(ids, " " + text)
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


def load_tokenizer_file(path: str | Path) -> BaseTokenizer:
    """Read a tokenizer of any kind; the content decides which.

    Args:
        path: a llama2.c tokenizer.bin, a Hugging Face tokenizer.json (with the extra ``tokenizers``, if it is not
            GPT-2's kind), a sentencepiece .model, llm.c's gpt2_tokenizer.bin, GPT-2's vocab.bpe or merges.txt, a GGUF
            file; or a folder that holds one. "gpt2", where no such file is, means the one that comes along.

    Raises:
        DataError: naming file, field, expected and found.
        UnavailableError: for a tokenizer.json, if the ``tokenizers`` package is needed and not installed.
    """
    path = Path(path)
    if str(path) == GPT2 and not path.exists():
        from anellm.tokenizer_json import JsonTokenizer

        return JsonTokenizer.gpt2()
    if path.is_dir():
        found = find_tokenizer_file(path)
        if found is None:
            raise DataError(f"{path}: expected a folder with {', '.join(TOKENIZER_FILES)}, found none of them")
        path = found
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            raise DataError(f"{path}: expected a tokenizer file, found something that is not a plain file")
        with path.open("rb") as file:
            head = file.read(64)
    except OSError as error:
        raise DataError(f"{path}: cannot read the tokenizer: {error.strerror or error}") from error
    return _reader(head)(path)


def _reader(head: bytes) -> Callable[[Path], BaseTokenizer]:
    """Return what reads a tokenizer file that begins like this."""
    from anellm import tokenizer_files, tokenizer_llmc, tokenizer_spm, weights_gguf

    # A tokenizer.bin starts with an int32, whose upper bytes are zero.
    json = head.lstrip(b" \t\r\n\xef\xbb\xbf").startswith(b"{") and b"\0" not in head
    kinds: tuple[tuple[bool, Callable[[Path], BaseTokenizer]], ...] = (
        (head.startswith(b"GGUF"), weights_gguf.read_tokenizer),
        (json, tokenizer_files.read_json),
        (tokenizer_llmc.looks_like_table(head), tokenizer_llmc.read),
        (head.startswith(b"#version"), tokenizer_files.read_merges),
        (tokenizer_spm.looks_like_model(head), tokenizer_spm.read),
    )
    return next((reader for fits, reader in kinds if fits), Tokenizer.from_file)


def find_tokenizer_file(folder: Path) -> Path | None:
    """Return the tokenizer file in a folder, or None."""
    return next((folder / name for name in TOKENIZER_FILES if (folder / name).is_file()), None)
