"""Read small files that may be anything: only regular ones, of bounded size, with one line for what is wrong."""

from __future__ import annotations

import errno
import json
import os
import re
import stat
import tomllib
from io import FileIO
from pathlib import Path
from typing import Any

from anellm.errors import AnellmError

_MAX_TOML_BYTES = 1 << 18
_MAX_DOTS = 200
_CHUNK = 1 << 30  # a read makes a buffer of all that it asks for, and gets 2 GiB at most
_PLAIN_LINE = re.compile(r"\s*[A-Za-z0-9_-]+\s*=(\s*[\"']|[^{]*$)")  # KEY = a string, or no table in it
_NOFOLLOW = getattr(os, "O_NOFOLLOW", 0)
# What says that a file is not there or not a plain file; anything else is the system's trouble, not the file's.
_FILE_ERRORS = {errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ELOOP, errno.ENXIO, errno.ENAMETOOLONG}


def kind_of(mode: int) -> str:
    """Return what a mode of os.stat() is, in words."""
    kinds = ((stat.S_ISREG, "regular file"), (stat.S_ISLNK, "symbolic link"), (stat.S_ISDIR, "folder"))
    return next((kind for test, kind in kinds if test(mode)), "special file")


def parse_json(data: bytes, what: str, error: type[AnellmError]) -> dict[str, Any]:
    """Return the JSON object in some bytes; keys given twice and numbers that are not finite are refused.

    Raises:
        AnellmError: of the class given.
    """

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        values = dict(pairs)
        if len(values) != len(pairs):
            raise ValueError("a key given twice in one object")
        return values

    def refuse(text: str) -> None:
        raise ValueError(f"{text}, which JSON does not have")

    try:
        values = json.loads(data, object_pairs_hook=unique, parse_constant=refuse)
    except (ValueError, RecursionError) as problem:
        raise error(f"{what}: expected JSON, found {problem}") from None
    if not isinstance(values, dict):
        raise error(f"{what}: expected a JSON object, found {type(values).__name__}")
    return values


def read_json(path: Path, error: type[AnellmError], limit_bytes: int = 1 << 20) -> dict[str, Any]:
    """Return the JSON object in a small regular file; see parse_json().

    Raises:
        AnellmError: of the class given: missing, not a regular file, too large, or not a JSON object.
        OSError: when the system cannot open it now, e.g. for want of file descriptors.
    """
    return parse_json(read_regular(path, error, limit_bytes), str(path), error)


def open_regular(path: Path, error: type[AnellmError], *, follow: bool = False) -> FileIO:
    """Open a regular file to read; special files are refused, and none of them is waited for.

    Args:
        path: the file.
        error: the class of what is raised.
        follow: whether a symbolic link is as good as what it points to; else it is refused.

    Raises:
        AnellmError: of the class given.
        OSError: when the system cannot open it now, e.g. for want of file descriptors.
    """
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | (0 if follow else _NOFOLLOW))
    except OSError as problem:
        if problem.errno not in _FILE_ERRORS:
            raise
        found = "a symbolic link" if problem.errno == errno.ELOOP else problem.strerror or problem
        raise error(f"{path}: expected a regular file, found {found}") from None
    mode = os.fstat(fd).st_mode
    if not stat.S_ISREG(mode):
        os.close(fd)
        raise error(f"{path}: expected a regular file, found a {kind_of(mode)}")
    return FileIO(fd)


def read_regular(path: Path, error: type[AnellmError], limit_bytes: int, *, follow: bool = False) -> bytes:
    """Return the content of a small regular file; see open_regular().

    Raises:
        AnellmError: of the class given.
        OSError: when the system cannot open it now.
    """
    with open_regular(path, error, follow=follow) as file:
        size = os.fstat(file.fileno()).st_size
        if size > limit_bytes:
            raise error(f"{path}: expected at most {limit_bytes} bytes, found {size}")
        try:
            parts = []
            while size > 0 and (part := file.read(min(size, _CHUNK))):
                parts.append(part)
                size -= len(part)
            return b"".join(parts)
        except OSError as problem:
            raise error(f"{path}: {problem.strerror or problem}") from None


def read_toml(path: Path, error: type[AnellmError], *, follow: bool = False) -> dict[str, Any]:
    """Return the content of a small TOML file.

    Raises:
        AnellmError: of the class given: missing, not a regular file, too large, or not TOML.
        OSError: when the system cannot open it now.
    """
    try:
        text = read_regular(path, error, _MAX_TOML_BYTES, follow=follow).decode()
        for number, line in enumerate(text.split("\n"), 1):
            # A key of n parts takes tomllib n * n steps and as many bytes; one part and a plain value take none.
            if line.count(".") > _MAX_DOTS and not _PLAIN_LINE.match(line):
                raise error(f"{path}: line {number}: expected KEY = VALUE, found {line.count('.')} dots")
        return tomllib.loads(text)
    except (ValueError, RecursionError) as problem:
        if isinstance(problem, AnellmError):
            raise
        raise error(f"{path}: not a TOML file: {problem}") from None
