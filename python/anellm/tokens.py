"""Token files: raw ids, llm.c's shards, and our own with a checked header; found by path, folder or pattern.

Our own shard is a header of 128 bytes and the ids, little-endian (docs/formats.md has the layout).
"""

from __future__ import annotations

import glob
import os
import re
import struct
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from anellm import saferead
from anellm.errors import DataError, InvalidError

TOKEN_DTYPES: dict[str, np.dtype[Any]] = {
    "uint16": np.dtype("<u2"),
    "int32": np.dtype("<i4"),
    "uint32": np.dtype("<u4"),
}
TEXT_SUFFIXES = (".txt", ".jsonl", ".ndjson")
TOKEN_SUFFIXES = (".bin", ".tok")
PARTS = ("all", "train", "val")
CHUNK = 1 << 20  # tokens looked at in one go, so that a scan of a large file needs little memory

MAGIC = b"\x89ANTOK\r\n"  # a byte that is not ASCII and a line end: damage by a text-mode copy shows
VERSION = 1
HEADER_BYTES = 128
_HEADER = struct.Struct("<8sIIQQ32sI")  # magic, version, dtype, vocab_size, count, tokenizer's SHA-256, CRC-32 of data
_CODES = {"uint16": 1, "int32": 2, "uint32": 3}
_UNKNOWN_SHA256 = b"\0" * 32

_LLMC_BYTES, _LLMC_COUNT_LIMIT = 1024, 1 << 31
LLMC = {20240520: (1, "uint16"), 20240801: (7, "uint32")}  # magic -> version, dtype
# Other int32 magic numbers of llm.c, to name a file that was meant for something else.
LLMC_OTHERS = {
    20240326: "an llm.c model", 20240327: "an llm.c debug state", 20240328: "an llm.c tokenizer",
    20240522: "an llm.c evaluation set", 20240527: "an llm.c optimizer state", 20240803: "an llm.c Llama model",
}  # fmt: skip
_OTHERS = {b"GGUF": "a GGUF model", b"PK\x03\x04": "a zip archive", b"\x1f\x8b": "a gzip file"}
_HELD_OUT = re.compile(r"(?<![a-z])(val|valid|validation)(?![a-z])", re.IGNORECASE)

Tokens = npt.NDArray[Any]


@dataclass(frozen=True)
class TokenFile:
    """A token file whose header has been checked.

    Attributes:
        path: where it is.
        dtype: element type of the ids.
        offset: where the ids begin, in bytes.
        count: how many there are.
        vocab_size: every id is below it; None where the file does not say.
        tokenizer_sha256: of the tokenizer it was made with, in hexadecimal; None where the file does not say.
        crc32: of the ids' bytes; None where the file does not say.
    """

    path: Path
    dtype: np.dtype[Any]
    offset: int
    count: int
    vocab_size: int | None = None
    tokenizer_sha256: str | None = None
    crc32: int | None = None

    def open(self) -> Tokens:
        """Map the ids (count,) into memory, and check them against the file's own checksum.

        Raises:
            DataError: when the checksum does not match.
        """
        tokens = np.memmap(self.path, dtype=self.dtype, mode="r", offset=self.offset, shape=(self.count,))
        if self.crc32 is not None:
            found = crc32_of([tokens])
            if found != self.crc32:
                raise DataError(
                    f"{self.path}: CRC-32 of the tokens: expected {self.crc32:08x} by the header, found {found:08x}"
                )
        return tokens


def crc32_of(parts: Iterable[Tokens]) -> int:
    """Return the CRC-32 of arrays' bytes, one after the other."""
    value = 0
    for part in parts:
        for begin in range(0, part.size, CHUNK):
            value = zlib.crc32(np.ascontiguousarray(part[begin : begin + CHUNK]).data, value)
    return value


# ---- reading ---------------------------------------------------------------------------------------------------------


def read_header(path: Path, raw_dtype: str = "uint16") -> TokenFile:
    """Find out what a token file is, and check its header against its size; no token is read.

    Args:
        path: the file.
        raw_dtype: what a file without a header holds: "uint16", "int32" or "uint32".

    Raises:
        DataError: naming file, field, expected and found.
        InvalidError: on an unknown dtype.
    """
    if raw_dtype not in TOKEN_DTYPES:
        raise InvalidError(f"token dtype: expected one of {', '.join(TOKEN_DTYPES)}, found {raw_dtype!r}")
    with saferead.open_regular(path, DataError, follow=True) as file:
        size = os.fstat(file.fileno()).st_size
        head = file.read(_LLMC_BYTES) or b""
    if not size:
        raise DataError(f"{path}: expected tokens or text, found an empty file")
    if head.startswith(MAGIC) or (size > 1 and MAGIC.startswith(head)):
        return _ours(path, head, size)
    magic = int.from_bytes(head[:4], "little") if len(head) >= 4 else 0
    if magic in LLMC:
        return _llmc(path, head, size, magic)
    other = LLMC_OTHERS.get(magic) or next((name for start, name in _OTHERS.items() if head.startswith(start)), None)
    if other:
        raise DataError(f"{path}: expected a token file, found {other}")
    dtype = TOKEN_DTYPES[raw_dtype]
    if size % dtype.itemsize:
        raise DataError(
            f"{path}: expected a multiple of {dtype.itemsize} bytes ({raw_dtype} tokens), found {size} bytes"
        )
    return TokenFile(path, dtype, 0, size // dtype.itemsize)


def _check_size(path: Path, size: int, offset: int, count: int, itemsize: int) -> None:
    if count < 1:
        raise DataError(f"{path}: count: expected at least one token, found {count}")
    expected = offset + count * itemsize
    if size != expected:
        what = "truncated" if size < expected else "bytes behind the last token"
        raise DataError(
            f"{path}: count: {count} tokens of {itemsize} bytes: expected a file of {expected} bytes, "
            f"found {size} ({what})"
        )


def _llmc(path: Path, head: bytes, size: int, magic: int) -> TokenFile:
    if len(head) < _LLMC_BYTES:
        raise DataError(f"{path}: expected a header of {_LLMC_BYTES} bytes (llm.c shard), found {len(head)}")
    version, name = LLMC[magic]
    _, found, count = struct.unpack_from("<3i", head)
    if found != version:
        raise DataError(f"{path}: version: expected {version} (llm.c shard {magic}), found {found}")
    dtype = TOKEN_DTYPES[name]
    _check_size(path, size, _LLMC_BYTES, count, dtype.itemsize)
    return TokenFile(path, dtype, _LLMC_BYTES, count)


def _ours(path: Path, head: bytes, size: int) -> TokenFile:
    if len(head) < HEADER_BYTES:
        raise DataError(f"{path}: expected a header of {HEADER_BYTES} bytes, found {len(head)}")
    head = head[:HEADER_BYTES]
    _, version, code, vocab_size, count, sha256, crc32 = _HEADER.unpack_from(head)
    if version != VERSION:
        raise DataError(f"{path}: version: expected {VERSION}, found {version}")
    expected = zlib.crc32(head[:-4])
    (found,) = struct.unpack_from("<I", head, HEADER_BYTES - 4)
    if found != expected:
        raise DataError(f"{path}: CRC-32 of the header: expected {expected:08x}, found {found:08x}")
    name = next((name for name, number in _CODES.items() if number == code), None)
    if name is None:
        raise DataError(f"{path}: dtype: expected {', '.join(f'{n} ({k})' for k, n in _CODES.items())}, found {code}")
    if any(head[_HEADER.size : -4]):
        raise DataError(f"{path}: reserved bytes: expected zeros, found others")
    if not 1 <= vocab_size < 1 << 31:
        raise DataError(f"{path}: vocab_size: expected 1 to {(1 << 31) - 1}, found {vocab_size}")
    dtype = TOKEN_DTYPES[name]
    _check_size(path, size, HEADER_BYTES, count, dtype.itemsize)
    known = None if sha256 == _UNKNOWN_SHA256 else sha256.hex()
    return TokenFile(path, dtype, HEADER_BYTES, count, vocab_size, known, crc32)


# ---- writing ---------------------------------------------------------------------------------------------------------


def shard_header(parts: Sequence[Tokens], vocab_size: int, tokenizer_sha256: str | None) -> bytes:
    """Return the header of one of our shards.

    Args:
        parts: the ids, in arrays of one dtype.
        vocab_size: every id is below it.
        tokenizer_sha256: of the tokenizer, in hexadecimal; None where it is not known.
    """
    name = next(name for name, dtype in TOKEN_DTYPES.items() if dtype == parts[0].dtype)
    sha256 = bytes.fromhex(tokenizer_sha256) if tokenizer_sha256 else _UNKNOWN_SHA256
    count = sum(part.size for part in parts)
    head = _HEADER.pack(MAGIC, VERSION, _CODES[name], vocab_size, count, sha256, crc32_of(parts))
    head += b"\0" * (HEADER_BYTES - 4 - len(head))
    return head + struct.pack("<I", zlib.crc32(head))


def llmc_header(count: int, dtype: np.dtype[Any]) -> bytes:
    """Return the header of an llm.c shard of uint16 or uint32 ids.

    Raises:
        InvalidError: when it has no room for the count, or there is no such shard.
    """
    name = next(name for name, kind in TOKEN_DTYPES.items() if kind == dtype)
    magic, version = next(((magic, version) for magic, (version, kind) in LLMC.items() if kind == name), (0, 0))
    if not magic or count >= _LLMC_COUNT_LIMIT:
        raise InvalidError(f"llm.c shard: expected uint16 or uint32 and below 2**31 tokens, found {count} {name}")
    return struct.pack("<3i", magic, version, count).ljust(_LLMC_BYTES, b"\0")


# ---- finding ---------------------------------------------------------------------------------------------------------


def find_data(path: str | Path, part: str = "all") -> list[Path]:
    """Return the files that a data path means, in order.

    Args:
        path: a file; a folder: its ``.bin``, ``.tok``, ``.txt``, ``.jsonl`` and ``.ndjson`` files, sorted by name,
            without tokenizers; or a pattern such as ``dir/*.bin``, sorted.
        part: what to take of a folder where some names hold the word ``val``, ``valid`` or ``validation``: "val" takes
            those (all files where there are none), "train" the others, "all" all.

    Raises:
        DataError: when there is none, or files of tokens and of text are mixed.
    """
    if part not in PARTS:
        raise InvalidError(f"part: expected one of {', '.join(PARTS)}, found {part!r}")
    target = Path(path)
    if target.is_dir():
        files = [p for p in sorted(target.iterdir()) if _is_data(p)]
        if not files:
            kinds = ", ".join(TOKEN_SUFFIXES + TEXT_SUFFIXES)
            raise DataError(f"{path}: expected a folder with data ({kinds}), found none")
        held_out = [p for p in files if _HELD_OUT.search(p.name)]
        if held_out and len(held_out) < len(files) and part != "all":
            files = held_out if part == "val" else [p for p in files if p not in held_out]
    elif not target.exists() and any(char in str(path) for char in "*?["):
        files = [p for p in map(Path, sorted(glob.glob(str(path)))) if p.is_file()]
        if not files:
            raise DataError(f"{path}: expected files of this pattern, found none")
    else:
        files = [target]
    texts = sum(is_text(p) for p in files)
    if 0 < texts < len(files):
        raise DataError(f"{path}: expected files of tokens or of text, found both: name one kind with a pattern")
    return files


def has_held_out(path: str | Path) -> bool:
    """Return whether a data path is a folder that has held-out files beside others."""
    return Path(path).is_dir() and find_data(path, "val") != find_data(path, "all")


def is_text(path: Path) -> bool:
    """Return whether a file is text by its name."""
    return path.suffix.lower() in TEXT_SUFFIXES


def _is_data(path: Path) -> bool:
    if path.name.startswith((".", "tokenizer.")) or path.name.endswith((".tokenizer.bin", "_tokenizer.bin")):
        return False
    return path.suffix.lower() in TOKEN_SUFFIXES + TEXT_SUFFIXES and path.is_file()


class Concatenated:
    """Arrays of ids, read as one without copying them; a slice is a view, or a copy where it spans several."""

    def __init__(self, parts: Sequence[Tokens], begin: int = 0, end: int | None = None) -> None:
        """Join arrays of one dtype; begin and end choose a range of all their ids."""
        self._parts = parts
        self._starts = np.concatenate([[0], np.cumsum([part.size for part in parts])])
        self._begin = begin
        self.size = int(self._starts[-1] if end is None else end) - begin
        self.dtype, self.ndim = parts[0].dtype, 1

    def part(self, begin: int, end: int) -> Concatenated:
        """Return a range, without copying."""
        return Concatenated(self._parts, self._begin + begin, self._begin + end)

    def __getitem__(self, window: slice) -> Tokens:
        begin, end, step = window.indices(self.size)
        if step != 1 or end <= begin:
            return np.empty(0, dtype=self.dtype) if step == 1 else self[:][window]
        begin, end = begin + self._begin, end + self._begin
        first = int(np.searchsorted(self._starts, begin, side="right")) - 1
        pieces = []
        while begin < end:
            start = int(self._starts[first])
            piece = self._parts[first][begin - start : end - start]
            pieces.append(piece)
            begin += piece.size
            first += 1
        return pieces[0] if len(pieces) == 1 else np.concatenate(pieces)
