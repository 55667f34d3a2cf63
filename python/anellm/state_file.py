"""The state of a run in the middle of a step, as a file that processes map one after the other: docs/formats.md.

The file is the memory of the model (stages.py) with a header before it: two slots, of which each commit writes the one
that is not in force, and a number that says which state is being worked on. The data is changed only while that number
is ahead of the slots; a process that is killed then leaves a file that says so, and any other file is whole.

What a process wrote outlives it, whether it is on the disk or not; only a machine that stops loses it. So a state says
in which boot of the machine it was written and whether it was synced, and one that was not is good for that boot alone.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import mmap
import os
import struct
import subprocess
import sys
import time
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, NamedTuple

from anellm import safeio, saferead
from anellm.config import ModelConfig
from anellm.errors import BusyError, CheckpointError, InvalidError, TornStateError
from anellm.stages import SECTIONS, StateLayout, state_layout

MAGIC: Final = b"\x89ANSTA\r\n"
VERSION: Final = 1
SLOT_BYTES: Final = 128 << 10
DATA_OFFSET: Final = 2 * SLOT_BYTES  # of the sections
WORK_OFFSET: Final = DATA_OFFSET - 16
N_WORDS: Final = 5  # of the schedule
_N: Final = len(SECTIONS)
_WAIT_S: Final = 30.0  # for another process to end
_HEAD: Final = struct.Struct(f"<8sIIQI32s16s6Q{_N}Q{_N}Q{N_WORDS}q2QII")
_CRC: Final = struct.Struct("<I")
_WORD: Final = struct.Struct("<Q")
HEADER_BYTES: Final = _HEAD.size + _CRC.size
MAX_VALUES_BYTES: Final = SLOT_BYTES - HEADER_BYTES - 64


@dataclass(frozen=True)
class StateKey:
    """What a state is of: a file of another key is refused.

    Attributes:
        config: the model.
        batch_size: sequences in a micro-batch.
        seq_len: tokens in each.
        n_micro: micro-batches in a step.
        starts: the first layer of each group.
    """

    config: ModelConfig
    batch_size: int
    seq_len: int
    n_micro: int
    starts: tuple[int, ...]

    @property
    def layout(self) -> StateLayout:
        """Return where the sections lie, from DATA_OFFSET on."""
        return state_layout(self.config, self.batch_size, self.seq_len, self.n_micro, len(self.starts))

    @property
    def file_bytes(self) -> int:
        """Return the size of the file."""
        return DATA_OFFSET + self.layout.total_bytes

    def numbers(self) -> dict[str, int]:
        """Return the shape of a step as the header has it."""
        ends = (*self.starts[1:], self.config.n_layers)
        return {
            "batch_size": self.batch_size,
            "seq_len": self.seq_len,
            "micro_batches": self.n_micro,
            "groups": len(self.starts),
            "layers_of_a_group": ends[0] - self.starts[0],
            "file_bytes": self.file_bytes,
        }

    def digest(self) -> bytes:
        """Return the SHA-256 of the model's config and the groups."""
        text = json.dumps([self.config.to_dict(), list(self.starts)], sort_keys=True)
        return hashlib.sha256(text.encode()).digest()


class Commit(NamedTuple):
    """A state that is whole.

    Attributes:
        sequence: its number, from 1.
        words: of the schedule: where the run is.
        images: processes that have worked on the run in this file, this one included.
        idle_images: how many of the last of them got nothing done.
        values: what else the run needs to go on, as JSON-serialisable values.
        synced: it is on the disk.
    """

    sequence: int
    words: tuple[int, ...]
    images: int
    idle_images: int
    values: Mapping[str, Any]
    synced: bool = False


class _Slot(NamedTuple):
    commit: Commit
    boot: bytes


class StateFile:
    """An open state file; whoever opens it holds the lock of its run.

    Attributes:
        path: the file.
        key: what it is of.
        commit: the newest state.
    """

    def __init__(self, path: Path, key: StateKey, fd: int, commit: Commit) -> None:
        """Take an open file over; see create() and open()."""
        self.path, self.key, self._fd, self.commit = path, key, fd, commit
        self._map = mmap.mmap(fd, DATA_OFFSET)
        self._working = False
        self._boot = boot_id()

    @classmethod
    def create(cls, path: Path, key: StateKey, words: Sequence[int], values: Mapping[str, Any]) -> StateFile:
        """Make a new file, whose sections hold zeros; a state file that is there already is replaced.

        Raises:
            CheckpointError: when another file has the name; it is not touched.
            OSError: from the system, e.g. on a full disk; nothing is left behind then.
        """
        if os.path.lexists(path):
            with saferead.open_regular(path, CheckpointError) as file:
                found = file.read(len(MAGIC))
            if found != MAGIC:
                raise CheckpointError(f"{path}: expected nothing or a state file, found one that begins with {found!r}")
        new = safeio.temporary(path)
        fd = os.open(new, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | getattr(os, "O_NOFOLLOW", 0), 0o666)
        try:
            _lock(fd, path)
            allocate(fd, key.file_bytes)
            made = cls(path, key, fd, Commit(0, tuple(words), 1, 0, {}))
            try:
                for _ in range(2):  # both slots are always whole
                    made._store(made.commit._replace(sequence=made.commit.sequence + 1, values=dict(values)))
                    made._set_work(made.commit.sequence)
                made._map.flush()
                safeio.fsync(fd)
                safeio.rename(new, path)
                safeio.fsync_dir(path.parent)
            except BaseException:
                made._map.close()
                raise
        except BaseException:
            os.close(fd)
            new.unlink(missing_ok=True)
            raise
        return made

    @classmethod
    def open(cls, path: Path, key: StateKey) -> StateFile:
        """Open a file and check every field of its header; nothing in it is changed.

        Raises:
            TornStateError: when it was being changed, or not on the disk, when its process or machine stopped.
            CheckpointError: when it is no state file, of another version or key, or damaged; names the file, the
                field, what was expected and what was found.
            BusyError: when another process has it mapped and does not end.
            OSError: when the system cannot open it now.
        """
        saferead.open_regular(path, CheckpointError).close()
        fd = os.open(path, os.O_RDWR | os.O_CLOEXEC | getattr(os, "O_NOFOLLOW", 0))
        try:
            _lock(fd, path)
            commit = _check(path, key, fd)
            return cls(path, key, fd, commit)
        except BaseException:
            os.close(fd)
            raise

    @property
    def fd(self) -> int:
        """Return the descriptor, for share() and Stages."""
        return self._fd

    def begin_work(self) -> None:
        """Say that the data is about to be changed."""
        if self._working:
            return
        self._set_work(self.commit.sequence + 1)
        if self.commit.synced:  # what is on the disk must not look whole while the data there changes
            self._map.flush()
        self._working = True

    def store(self, commit: Commit) -> None:
        """Say that the data is now that of a state, and which; ``sequence`` is counted on.

        With ``synced`` all of it is on the disk when this returns.

        Raises:
            InvalidError: when its values take too much room.
        """
        self.begin_work()
        if commit.synced:
            with mmap.mmap(self._fd, self.key.file_bytes) as everything:
                everything.flush()  # msync: of the pages, whoever has them mapped
        self._store(commit._replace(sequence=self.commit.sequence + 1))
        if commit.synced:
            self._map.flush()
            safeio.fsync(self._fd)
        self._working = False

    def close(self) -> None:
        """Close the file; what is mapped of it elsewhere stays mapped."""
        if self._fd >= 0:
            self._map.close()
            fcntl.flock(self._fd, fcntl.LOCK_UN)  # what is mapped of the file would keep the lock
            os.close(self._fd)
            self._fd = -1

    def _set_work(self, sequence: int) -> None:
        self._map[WORK_OFFSET : WORK_OFFSET + _WORD.size] = _WORD.pack(sequence)

    def _store(self, commit: Commit) -> None:
        values = json.dumps(commit.values, allow_nan=False, separators=(",", ":")).encode()
        if len(values) > MAX_VALUES_BYTES:
            raise InvalidError(f"state: expected values of at most {MAX_VALUES_BYTES} bytes, found {len(values)}")
        layout = self.key.layout
        head = _HEAD.pack(
            MAGIC, VERSION, HEADER_BYTES, commit.sequence, commit.synced, self.key.digest(), self._boot,
            *self.key.numbers().values(), *(DATA_OFFSET + offset for offset in layout.offsets), *layout.sizes,
            *commit.words, commit.images, commit.idle_images, len(values), zlib.crc32(values),
        )  # fmt: skip
        at = commit.sequence % 2 * SLOT_BYTES
        data = head + _CRC.pack(zlib.crc32(head)) + values
        self._map[at : at + len(data)] = data
        self.commit = commit


def _lock(fd: int, path: Path) -> None:
    """Keep others from opening the file as long as this process, or a child that has the descriptor, is there.

    A child whose parent was killed may still be computing: it ends when it looks for the next thing to do.
    """
    deadline = time.monotonic() + _WAIT_S
    while True:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() > deadline:
                raise BusyError(f"{path}: in use by another process") from None
            time.sleep(0.02)
        else:
            return


def allocate(fd: int, size: int, start: int = 0) -> None:
    """Take the room on the disk now: a mapped page for which there is none later would end the process.

    Args:
        fd: a new file.
        size: of the file.
        start: where what needs room begins in it.
    """
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(fd, start, size - start)
        return
    zeros = memoryview(bytes(1 << 20))
    os.lseek(fd, start, os.SEEK_SET)
    for at in range(start, size, len(zeros)):
        safeio.write(fd, zeros[: size - at])


def _check(path: Path, key: StateKey, fd: int) -> Commit:
    """Return the newest state of a file."""
    size = os.fstat(fd).st_size
    raw = [os.pread(fd, SLOT_BYTES, at) for at in (0, SLOT_BYTES)]
    if all(data[: len(MAGIC)] != MAGIC for data in raw):
        raise CheckpointError(f"{path}: magic: expected {MAGIC!r}, found {raw[0][: len(MAGIC)]!r}")
    if size < DATA_OFFSET:
        raise CheckpointError(f"{path}: size: expected {key.file_bytes} bytes, found {size} bytes")
    slots: list[_Slot] = []
    problems: list[CheckpointError] = []
    for index, data in enumerate(raw):
        try:
            slots.append(_read_slot(f"{path}: slot {index}", data, key, size))
        except CheckpointError as error:
            problems.append(error)
    if not slots:
        raise problems[0]
    (work,) = _WORD.unpack_from(raw[1], WORK_OFFSET - SLOT_BYTES)
    newest = max(slots, key=lambda slot: slot.commit.sequence)
    sequence = newest.commit.sequence
    if work == sequence + 1:
        raise TornStateError(f"{path}: work: expected state {sequence}, found state {work} begun and not finished")
    if problems:
        raise problems[0]
    _check_sequence(path, [slot.commit.sequence for slot in slots], work)
    boot = boot_id()
    if not newest.commit.synced and (not any(boot) or boot != newest.boot):
        raise TornStateError(f"{path}: boot: expected this one, or a state that is on the disk, found another one's")
    return newest.commit


def _check_sequence(path: Path, sequences: list[int], work: int) -> None:
    """Refuse numbers that no run leaves together."""
    newest, other = max(sequences), min(sequences)
    if newest != other + 1:
        raise CheckpointError(f"{path}: sequence: expected two neighbours, found {other} and {newest}")
    if work != newest:
        raise CheckpointError(f"{path}: work: expected {newest}, the newest state, found {work}")


def _read_slot(what: str, data: bytes, key: StateKey, size: int) -> _Slot:
    """Return what a slot holds, every field of it checked."""

    def expect(field: str, expected: object, found: object) -> None:
        if found != expected:
            raise CheckpointError(f"{what}: {field}: expected {expected}, found {found}")

    fields = _HEAD.unpack_from(data)
    magic, version, header_bytes, sequence, synced, digest, boot = fields[:7]
    expect("magic", MAGIC, magic)
    expect("version", VERSION, version)
    expect("header", f"{HEADER_BYTES} bytes", f"{header_bytes} bytes")
    (crc,) = _CRC.unpack_from(data, _HEAD.size)
    expect("CRC of the header", f"{crc:#010x}", f"{zlib.crc32(data[: _HEAD.size]):#010x}")
    rest = fields[7:]
    numbers = key.numbers()
    for (name, expected), found in zip(numbers.items(), rest, strict=False):
        if name == "file_bytes":
            expect("config of the model", key.digest().hex(), digest.hex())
        expect(name, expected, found)
    rest = rest[len(numbers) :]
    layout = key.layout
    for name, offset, length, found, found_length in zip(
        SECTIONS, layout.offsets, layout.sizes, rest[:_N], rest[_N : 2 * _N], strict=True
    ):
        expect(f"offset of {name}", DATA_OFFSET + offset, found)
        expect(f"size of {name}", length, found_length)
    expect("size", f"{key.file_bytes} bytes", f"{size} bytes")
    rest = rest[2 * _N :]
    words, (images, idle, n_values, values_crc) = rest[:N_WORDS], rest[N_WORDS:]
    if n_values > MAX_VALUES_BYTES:
        raise CheckpointError(f"{what}: values: expected at most {MAX_VALUES_BYTES} bytes, found {n_values}")
    text = data[HEADER_BYTES : HEADER_BYTES + n_values]
    expect("CRC of the values", f"{values_crc:#010x}", f"{zlib.crc32(text):#010x}")
    values = saferead.parse_json(text, f"{what}: values", CheckpointError)
    return _Slot(Commit(sequence, tuple(words), images, idle, values, bool(synced)), boot)


def boot_id() -> bytes:
    """Return 16 bytes that name this boot of the machine; zeros where the system does not tell."""
    try:
        if sys.platform == "darwin":
            command = ["/usr/sbin/sysctl", "-n", "kern.bootsessionuuid"]
            text = subprocess.run(command, capture_output=True, check=True, timeout=10).stdout  # noqa: S603
        else:
            text = Path("/proc/sys/kernel/random/boot_id").read_bytes()
    except (OSError, subprocess.SubprocessError):
        return bytes(16)
    return hashlib.sha256(text.strip()).digest()[:16]
