"""Documents and tokens out of zip and tar archives of TinyStories' kind, streamed: nothing is ever unpacked to disk.

Members are read where they lie, in order of their names, and only those whose names end as expected. Whatever an
archive claims, no more than a few megabytes of it are in memory, and no more than RATIO times its own size is read.
"""

from __future__ import annotations

import codecs
import contextlib
import gzip
import json
import re
import stat
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO, Any, Self

import numpy as np
import numpy.typing as npt

from anellm import saferead
from anellm.documents import read_documents, split_stream, text_field
from anellm.errors import DataError

SUFFIXES = (".json", ".txt", ".bin")
RATIO, SLACK_BYTES = 100, 1 << 20
MOST_MEMBERS = 10_000
LONGEST_STORY = 16 << 20  # bytes of one element of a list
_BLOCK = 1 << 20
_SPACE = re.compile("[ \t\r\n]*")
_DAMAGE = (zipfile.BadZipFile, tarfile.TarError, zlib.error, EOFError, gzip.BadGzipFile, NotImplementedError)

Item = str | npt.NDArray[Any]


@dataclass(frozen=True)
class Source:
    """One file, or one member of an archive.

    Attributes:
        name: for messages.
        read: yields documents, or arrays of uint16 ids where they were made before.
    """

    name: str
    read: Callable[[], Iterator[Item]]


@contextlib.contextmanager
def open_sources(path: Path) -> Iterator[list[Source]]:
    """Open a file or archive, and list what it holds, in order of the names.

    Args:
        path: a zip or tar archive (tar.gz too) of ``.json`` (lists of ``{"story": …}``), ``.txt`` or
            ``.bin`` (uint16 ids) members; or one such file.

    Raises:
        DataError: naming file, member, expected and found.
    """
    with saferead.open_regular(path, DataError, follow=True) as file:
        head = file.read(512) or b""
        file.seek(0)
        try:
            if head.startswith(b"PK\x03\x04"):
                with zipfile.ZipFile(file) as archive:
                    yield _zip_sources(path, archive)
            elif head.startswith(b"\x1f\x8b") or head[257:262] == b"ustar":
                plain: Any = gzip.GzipFile(fileobj=file) if head.startswith(b"\x1f\x8b") else file
                limited: Any = _Limited(path).wrap(plain)
                with tarfile.open(fileobj=limited, mode="r:") as tar:
                    yield _tar_sources(path, tar)
            else:
                yield [_plain_source(path)]
        except _DAMAGE as error:
            raise DataError(f"{path}: expected a whole archive, found {error}") from None


def _plain_source(path: Path) -> Source:
    if path.suffix.lower() == ".json":
        return Source(str(path), lambda: _read_member(path.name, lambda: path.open("rb"), str(path)))
    return Source(str(path), lambda: _stripped(read_documents(path)))


# ---- members ---------------------------------------------------------------------------------------------------------


def _wanted(name: str, where: str) -> bool:
    """Return whether a member is one to read; refuse names that point out of the archive."""
    pure = PurePosixPath(name.replace("\\", "/"))
    if pure.suffix.lower() not in SUFFIXES or pure.name.startswith("."):
        return False
    if pure.is_absolute() or ".." in pure.parts:
        raise DataError(f"{where}: member {name[:200]!r}: expected a path inside the archive")
    return True


def _check_found(path: Path, sources: list[Source]) -> list[Source]:
    if not sources:
        raise DataError(f"{path}: expected members that end in {', '.join(SUFFIXES)}, found none")
    return sources


def _zip_sources(path: Path, archive: zipfile.ZipFile) -> list[Source]:
    limited = _Limited(path)
    found = []
    for info in sorted(archive.infolist(), key=lambda info: info.filename):
        if info.is_dir() or not _wanted(info.filename, str(path)):
            continue
        mode = info.external_attr >> 16
        if stat.S_IFMT(mode) not in (0, stat.S_IFREG):
            raise DataError(f"{path}: member {info.filename[:200]!r}: expected a plain file, found another kind")
        if info.flag_bits & 1 or info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            kind = "encryption" if info.flag_bits & 1 else f"compression method {info.compress_type}"
            raise DataError(f"{path}: member {info.filename[:200]!r}: expected it stored or deflated, found {kind}")

        def opened(info: zipfile.ZipInfo = info) -> IO[bytes]:
            return limited.wrap(archive.open(info))

        found.append(_source(path, info.filename, opened))
    return _check_found(path, found)


def _tar_sources(path: Path, archive: tarfile.TarFile) -> list[Source]:
    members = []
    for number, member in enumerate(archive):
        if number >= MOST_MEMBERS:
            raise DataError(f"{path}: expected at most {MOST_MEMBERS} members, found more")
        if member.isdir() or not _wanted(member.name, str(path)):
            continue
        if not member.isreg() or member.issparse():
            raise DataError(f"{path}: member {member.name[:200]!r}: expected a plain file, found another kind")
        members.append(member)
    found = []
    for member in sorted(members, key=lambda member: member.name):

        def opened(member: tarfile.TarInfo = member) -> IO[bytes]:
            file = archive.extractfile(member)
            if file is None:
                raise DataError(f"{path}: member {member.name[:200]!r}: expected a plain file")
            return file

        found.append(_source(path, member.name, opened))
    return _check_found(path, found)


def _source(path: Path, name: str, opened: Callable[[], IO[bytes]]) -> Source:
    where = f"{path}: {name[:200]}"

    def read() -> Iterator[Item]:
        try:
            yield from _read_member(name, opened, where)
        except _DAMAGE as error:
            raise DataError(f"{where}: expected a whole member, found {error}") from None

    return Source(where, read)


def _read_member(name: str, opened: Callable[[], IO[bytes]], where: str) -> Iterator[Item]:
    suffix = PurePosixPath(name).suffix.lower()
    with opened() as file:
        if suffix == ".bin":
            yield from _read_ids(file, where)
        elif suffix == ".txt":
            yield from _stripped(split_stream(_text(file, where)))
        else:
            for number, story in enumerate(_elements(_text(file, where), where)):
                yield text_field(story, "story", f"{where}[{number}]").strip()


def _stripped(documents: Iterator[str]) -> Iterator[str]:
    """Take white space off both ends of each story, as llama2.c's tinystories.py does."""
    return (document.strip() for document in documents)


def _read_ids(file: IO[bytes], where: str) -> Iterator[npt.NDArray[Any]]:
    rest = b""
    while block := file.read(_BLOCK):
        data = rest + block
        whole = len(data) // 2 * 2
        rest = data[whole:]
        yield np.frombuffer(data[:whole], dtype="<u2")
    if rest:
        raise DataError(f"{where}: expected a multiple of 2 bytes (uint16 tokens), found one byte more")


def _text(file: IO[bytes], where: str) -> Iterator[str]:
    decoder = codecs.getincrementaldecoder("utf-8-sig")()
    try:
        while block := file.read(_BLOCK):
            yield decoder.decode(block)
        yield decoder.decode(b"", final=True)
    except UnicodeDecodeError as error:
        raise DataError(f"{where}: expected UTF-8 text, found byte 0x{error.object[error.start]:02x}") from None


def _elements(blocks: Iterator[str], where: str) -> Iterator[Any]:
    """Yield the elements of a JSON list as they come."""
    reader = _JsonReader(blocks, where)
    if reader.take() != "[":
        raise DataError(f"{where}: expected a JSON list of stories, found something else")
    if reader.peek() == "]":
        reader.take()
    else:
        while True:
            yield reader.value()
            found = reader.take()
            if found == "]":
                break
            if found != ",":
                raise DataError(f"{where}[{reader.number}]: expected ',' or ']', found {found or 'the end'!r}")
    if reader.peek():
        raise DataError(f"{where}: expected the end behind the list, found {reader.peek()!r}")


class _JsonReader:
    """JSON values out of text that comes in blocks; the text held is never longer than one value and a block."""

    def __init__(self, blocks: Iterator[str], where: str) -> None:
        self._blocks, self._where = blocks, where
        self._text, self._at, self._ended = "", 0, False
        self._decoder = json.JSONDecoder()
        self.number = 0

    def _more(self) -> None:
        block = next(self._blocks, None)
        self._ended = block is None
        self._text, self._at = self._text[self._at :] + (block or ""), 0
        if len(self._text) > LONGEST_STORY + _BLOCK:
            raise DataError(f"{self._where}[{self.number}]: expected at most {LONGEST_STORY} characters, found more")

    def peek(self) -> str:
        """Return the next character that is not white space; nothing at the end."""
        while True:
            space = _SPACE.match(self._text, self._at)
            self._at = space.end() if space else self._at
            if self._at < len(self._text) or self._ended:
                return self._text[self._at : self._at + 1]
            self._more()

    def take(self) -> str:
        """Return what peek() does, and go on behind it."""
        char = self.peek()
        self._at += 1
        return char

    def value(self) -> Any:
        """Return the next value."""
        self.peek()
        wanted = 0
        while True:
            if self._ended or len(self._text) - self._at >= wanted:
                try:
                    value, end = self._decoder.raw_decode(self._text, self._at)
                except (ValueError, RecursionError) as error:
                    if self._ended or not _unfinished(error, len(self._text)):
                        what = f"{self._where}[{self.number}]"
                        raise DataError(f"{what}: expected JSON, found {str(error)[:200]}") from None
                else:
                    if self._ended or end < len(self._text):  # a value that ends the text may go on behind it
                        self._at = end
                        self.number += 1
                        return value
                wanted = 2 * (len(self._text) - self._at)  # each try reads it anew, so the next is twice as long
            self._more()


def _unfinished(error: Exception, size: int) -> bool:
    """Return whether a value may only lack what comes after the text."""
    if not isinstance(error, json.JSONDecodeError):
        return False
    return error.msg.startswith("Unterminated string") or error.pos >= size - 16


# ---- limits ----------------------------------------------------------------------------------------------------------


class _Limited:
    """Counts what comes out of an archive, and stops at RATIO times what went in."""

    def __init__(self, path: Path) -> None:
        self.path, self._left = path, RATIO * path.stat().st_size + SLACK_BYTES

    def count(self, n: int) -> None:
        self._left -= n
        if self._left < 0:
            raise DataError(f"{self.path}: expected at most {RATIO} times the archive's size unpacked, found more")

    def wrap(self, file: IO[bytes]) -> IO[bytes]:
        return _Counted(file, self)  # type: ignore[return-value]


class _Counted:
    """A stream that counts how far it was read, and gives out no more than a block at once.

    tarfile asks for a whole header at once, of any size that the archive claims.
    """

    def __init__(self, file: IO[bytes], limited: _Limited) -> None:
        self._file, self._limited, self._farthest = file, limited, 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def _reached(self, position: int) -> None:
        if position > self._farthest:
            self._limited.count(position - self._farthest)
            self._farthest = position

    def read(self, n: int = -1) -> bytes:
        if not 0 <= n <= 2 * _BLOCK:
            raise DataError(f"{self._limited.path}: expected headers of at most {2 * _BLOCK} bytes, found {n}")
        data = self._file.read(n)
        self._reached(self._file.tell())
        return data

    def tell(self) -> int:
        return self._file.tell()

    def seek(self, position: int, whence: int = 0) -> int:
        if whence == 0:
            self._reached(position)  # going there means unpacking what is before it
        return self._file.seek(position, whence)
