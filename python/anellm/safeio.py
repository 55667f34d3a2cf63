"""Every write to the file system: whole or not at all, and on the disk before its name says so.

Five operations carry everything: ``write``, ``fsync``, ``rename``, ``fsync_dir`` and ``remove``. A new file is written
under a ``.tmp-`` name beside its place, synced, renamed, and the folder is synced. A folder is removed by renaming it
to a ``.trash-`` name first, so that a kill in between never leaves half of it under its real name. ``sweep`` clears
what a kill left behind.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import itertools
import json
import math
import os
import re
import shutil
import stat
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from anellm.errors import BusyError, InvalidError
from anellm.saferead import kind_of

TMP, TRASH = ".tmp-", ".trash-"
_OURS = re.compile(r"\.(tmp|trash)-.+-\d+-\d+", re.DOTALL)  # name, process and count
_CHUNK = 16 << 20
_NOFOLLOW = getattr(os, "O_NOFOLLOW", 0)
_unique = itertools.count()


class NewFile:
    """A file being written: counts and hashes what goes in.

    Attributes:
        path: where it stands.
        size: bytes written so far.
    """

    def __init__(self, path: Path) -> None:
        """Create the file, which must not exist yet."""
        self.path = path
        self.size = 0
        self._hash = hashlib.sha256()
        self._fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | _NOFOLLOW, 0o666)

    @property
    def sha256(self) -> str:
        """Return the SHA-256 of what was written so far, in hexadecimal."""
        return self._hash.hexdigest()

    def write(self, data: bytes | bytearray | memoryview) -> int:
        """Append bytes, all of them.

        Raises:
            OSError: from the system, e.g. on a full disk.
        """
        view = memoryview(data).cast("B")
        for start in range(0, len(view), _CHUNK):
            piece = view[start : start + _CHUNK]
            write(self._fd, piece)
            self._hash.update(piece)
        self.size += len(view)
        return len(view)

    def sync(self) -> None:
        """Bring what was written to the disk."""
        fsync(self._fd)

    def close(self) -> None:
        """Close the file; calling it again does nothing."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)


def write(fd: int, data: memoryview) -> None:
    """Write all of ``data`` to a file descriptor."""
    while data:
        written = os.write(fd, data)
        if written <= 0:
            raise OSError(errno.EIO, "nothing was written")
        data = data[written:]


def fsync(fd: int) -> None:
    """Bring a file's content to the disk; on macOS past the drive's cache, which its fsync does not do."""
    if sys.platform == "darwin":
        with contextlib.suppress(OSError):  # not every file system has it
            fcntl.fcntl(fd, fcntl.F_FULLFSYNC)
            return
    os.fsync(fd)


def rename(source: Path, target: Path) -> None:
    """Give a file or folder another name in one step, replacing a file (or an empty folder) that has it."""
    os.replace(source, target)


def fsync_dir(path: Path) -> None:
    """Bring a folder's names to the disk."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def remove(path: Path) -> None:
    """Remove a file or folder: gone under its name at once, its content after that."""
    trash = path.parent / f"{TRASH}{path.name}-{_mark()}"
    rename(path, trash)
    fsync_dir(path.parent)
    _delete(trash)


def _delete(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _mark() -> str:
    return f"{os.getpid()}-{next(_unique)}"


def temporary(path: Path) -> Path:
    """Return a new name beside a file's place, for what is to be renamed to it; sweep() knows such names."""
    return path.parent / f"{TMP}{path.name}-{_mark()}"


def sweep(folder: Path) -> list[str]:
    """Delete what a killed process left in a folder (``.tmp-NAME-PID-N`` and ``.trash-NAME-PID-N``); return the names.

    Only for a folder whose lock is held: another process's temporary files look the same.
    """
    names = sorted(p.name for p in folder.iterdir() if is_temporary(p.name))
    for name in names:
        _delete(folder / name)
    return names


def is_temporary(name: str) -> bool:
    """Return whether this module made a name, for what is being written or removed."""
    return _OURS.fullmatch(name) is not None


def check_replaceable(path: Path) -> None:
    """Refuse to write over anything but a regular file: a rename would replace the device or link itself.

    Raises:
        InvalidError: naming the path and what is there.
    """
    try:
        mode = path.lstat().st_mode
    except FileNotFoundError:
        return
    if not stat.S_ISREG(mode):
        raise InvalidError(f"{path}: expected a regular file or nothing to write to, found a {kind_of(mode)}")


@contextlib.contextmanager
def atomic_file(path: str | Path) -> Iterator[NewFile]:
    """Write a file that appears under its name complete and synced, or not at all.

    Args:
        path: the file, replaced when it exists; its folder must exist.

    Raises:
        InvalidError: when something other than a regular file is there.
        OSError: from the system; the old file is then untouched.
    """
    path = Path(path)
    check_replaceable(path)
    new = temporary(path)
    file = NewFile(new)
    try:
        yield file
        file.sync()
        file.close()
        rename(new, path)
        fsync_dir(path.parent)
    except BaseException:
        file.close()
        with contextlib.suppress(OSError):
            new.unlink(missing_ok=True)
        raise


def write_bytes(path: str | Path, data: bytes) -> None:
    """Write a small file, complete or not at all; see atomic_file()."""
    with atomic_file(path) as file:
        file.write(data)


class NewDirectory:
    """A folder being written under a temporary name, with the size and hash of each file in it.

    Attributes:
        path: the temporary folder.
        files: name -> {"size": bytes, "sha256": hex} of each file finished.
    """

    def __init__(self, path: Path) -> None:
        """Make the temporary folder; see atomic_directory()."""
        self.path = path
        self.files: dict[str, dict[str, Any]] = {}
        path.mkdir()

    @contextlib.contextmanager
    def file(self, name: str) -> Iterator[NewFile]:
        """Write one file of the folder; it is synced when the block ends."""
        file = NewFile(self.path / name)
        try:
            yield file
            file.sync()
            self.files[name] = {"size": file.size, "sha256": file.sha256}
        finally:
            file.close()

    def write_bytes(self, name: str, data: bytes) -> None:
        """Write one small file of the folder."""
        with self.file(name) as file:
            file.write(data)


@contextlib.contextmanager
def atomic_directory(path: Path) -> Iterator[NewDirectory]:
    """Write a folder that appears under its name complete and synced, or not at all.

    A folder that already has the name goes to the trash at the last moment.

    Raises:
        OSError: from the system; what was there before is then untouched.
    """
    folder = NewDirectory(temporary(path))
    try:
        yield folder
        fsync_dir(folder.path)
        if os.path.lexists(path):
            remove(path)
        rename(folder.path, path)
        fsync_dir(path.parent)
    except BaseException:
        shutil.rmtree(folder.path, ignore_errors=True)
        raise


def make_directory(path: Path) -> None:
    """Make a folder and its parents, and sync the names; nothing happens when it exists."""
    missing = [p for p in (path, *path.parents) if not p.exists()]
    path.mkdir(parents=True, exist_ok=True)
    for made in missing:
        fsync_dir(made.parent)


class AppendFile:
    """A file that grows by whole lines, each in one system call."""

    def __init__(self, path: Path) -> None:
        """Open or make the file; anything but a regular file is refused."""
        check_replaceable(path)
        self._fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC | _NOFOLLOW, 0o666)

    def write(self, data: bytes) -> None:
        """Append bytes; they are in the kernel's hands when it returns, so a killed process loses none."""
        write(self._fd, memoryview(data))

    def sync(self) -> None:
        """Bring what was written to the disk."""
        fsync(self._fd)

    def close(self) -> None:
        """Sync and close the file; calling it again does nothing."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            try:
                fsync(fd)
            finally:
                os.close(fd)


class Lock:
    """An exclusive lock on a file, freed by close() or by the end of the process, however it ends."""

    def __init__(self, path: Path, what: str) -> None:
        """Take the lock.

        Args:
            path: the lock file; it is made when missing, and stays.
            what: what is locked, for the error.

        Raises:
            BusyError: when another process has it.
            InvalidError: when something other than a regular file is there.
        """
        check_replaceable(path)
        self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | _NOFOLLOW, 0o666)
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            with contextlib.suppress(OSError):  # a full disk: the note who has it is a courtesy
                os.ftruncate(self._fd, 0)
                os.pwrite(self._fd, f"pid {os.getpid()}\n".encode(), 0)
            fsync_dir(path.parent)
        except BlockingIOError:
            owner = os.pread(self._fd, 32, 0).decode("ascii", "replace").strip()
            self.close()
            raise BusyError(f"{what}: in use by another process{f' ({owner})' if owner else ''}") from None
        except OSError:
            self.close()
            raise

    @classmethod
    def adopt(cls, path: Path, fd: int) -> Lock:
        """Return a lock that this process had before it was replaced by exec().

        Args:
            path: the lock file.
            fd: what hand_over() gave.

        Raises:
            BusyError: when the descriptor is not that of the lock, or does not hold it.
        """
        try:
            ours, file = os.fstat(fd), path.lstat()
            if (ours.st_dev, ours.st_ino) != (file.st_dev, file.st_ino):
                raise BusyError(f"{path}: expected descriptor {fd} to be this lock, found another file")
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise BusyError(f"{path}: expected descriptor {fd} to hold this lock: {error.strerror or error}") from None
        os.set_inheritable(fd, False)
        lock = cls.__new__(cls)
        lock._fd = fd
        return lock

    def hand_over(self) -> int:
        """Return the descriptor, which from now on outlives exec()."""
        os.set_inheritable(self._fd, True)
        return self._fd

    def close(self) -> None:
        """Free the lock; calling it again does nothing."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return value


def json_bytes(values: Any, indent: int | None = 2) -> bytes:
    """Return JSON that every reader takes: UTF-8, inf and NaN as null, a newline at the end.

    Args:
        values: numbers, strings, booleans, None, and lists and mappings of them.
        indent: spaces of indentation; None for one line.
    """
    return (json.dumps(_finite(values), indent=indent, ensure_ascii=False, allow_nan=False) + "\n").encode()
