"""The state file: whole or refused, with one line that says why, and never changed by who only looks."""

from __future__ import annotations

import dataclasses
import os
import random
import struct
import subprocess
import sys
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from anellm import state_file
from anellm.config import ModelConfig
from anellm.errors import BusyError, CheckpointError, InvalidError, TornStateError
from anellm.stages import SECTIONS
from anellm.state_file import (
    DATA_OFFSET,
    HEADER_BYTES,
    MAX_VALUES_BYTES,
    SLOT_BYTES,
    WORK_OFFSET,
    Commit,
    StateFile,
    StateKey,
)

SHAPE = ModelConfig(dim=16, hidden_dim=24, n_layers=4, n_heads=2, n_kv_heads=1, vocab_size=64, max_seq_len=16)
KEY = StateKey(SHAPE, 2, 16, 3, (0, 2))
WORDS = (3, 1, 2, 0, 18)
VALUES = {"state": {"step": 3}, "text": "ü"}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """Return a file that holds a state of some age."""
    file = StateFile.create(tmp_path / "state.arena", KEY, (0,) * 5, {})
    for i in range(3):
        file.begin_work()
        file.store(Commit(0, (i, 1, 2, 0, 18), i, 0, VALUES))
    file.store(file.commit._replace(words=WORDS, idle_images=2))
    file.close()
    return tmp_path / "state.arena"


def reopen(path: Path, key: StateKey = KEY) -> Commit:
    file = StateFile.open(path, key)
    file.close()
    return file.commit


def refused(path: Path, message: str, key: StateKey = KEY, error: type[CheckpointError] = CheckpointError) -> None:
    """Expect an error of one line that names the file, and the file as it was."""
    before, times = path.read_bytes(), path.stat().st_mtime_ns
    with pytest.raises(CheckpointError, match=message) as caught:
        StateFile.open(path, key)
    assert type(caught.value) is error, caught.value
    assert str(caught.value).startswith(str(path))
    assert "\n" not in str(caught.value)
    assert (path.read_bytes(), path.stat().st_mtime_ns) == (before, times)


def patch(path: Path, at: int, data: bytes) -> None:
    with open(path, "r+b") as file:
        file.seek(at)
        file.write(data)


def newest_slot(path: Path) -> int:
    """Return where the slot in force begins."""
    data = path.read_bytes()
    return max((0, SLOT_BYTES), key=lambda at: struct.unpack_from("<Q", data, at + 16)[0])


def forge(path: Path, offset: int, data: bytes) -> None:
    """Change bytes of both slots and make their checksums fit."""
    for at in (0, SLOT_BYTES):
        patch(path, at + offset, data)
        head = path.read_bytes()[at : at + HEADER_BYTES - 4]
        patch(path, at + HEADER_BYTES - 4, struct.pack("<I", zlib.crc32(head)))


def test_a_state_comes_back(path: Path) -> None:
    commit = reopen(path)
    assert commit == Commit(6, WORDS, 2, 2, VALUES)
    assert path.stat().st_size == KEY.file_bytes == DATA_OFFSET + KEY.layout.total_bytes
    assert os.listdir(path.parent) == [path.name]


def test_work_that_was_not_finished_is_told(path: Path) -> None:
    file = StateFile.open(path, KEY)
    file.begin_work()
    file.close()
    refused(path, "work: expected state 6, found state 7 begun and not finished", error=TornStateError)
    patch(path, WORK_OFFSET, struct.pack("<Q", 6))
    file = StateFile.open(path, KEY)
    file.begin_work()
    file.store(file.commit)
    file.close()
    assert reopen(path).sequence == 7
    file = StateFile.open(path, KEY)
    file.begin_work()
    file.close()
    patch(path, SLOT_BYTES * (8 % 2), b"\0" * 300)  # a commit that was cut off
    refused(path, "work: expected state 7, found state 8", error=TornStateError)


def test_a_state_of_another_boot_must_be_on_the_disk(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def store(*, synced: bool) -> None:
        file = StateFile.open(path, KEY)
        file.store(file.commit._replace(synced=synced))
        file.close()

    assert any(state_file.boot_id())
    here, there = state_file.boot_id(), b"another machine."
    for boot in (there, bytes(16)):
        monkeypatch.setattr(state_file, "boot_id", lambda boot=boot: boot)
        refused(path, "boot: expected this one", error=TornStateError)
    monkeypatch.setattr(state_file, "boot_id", lambda: here)
    store(synced=True)
    monkeypatch.setattr(state_file, "boot_id", lambda: there)
    assert reopen(path).synced
    store(synced=False)
    assert not reopen(path).synced
    monkeypatch.setattr(state_file, "boot_id", lambda: here)
    refused(path, "boot: expected this one", error=TornStateError)


def test_every_flipped_bit_of_the_header_is_found(path: Path) -> None:
    """In the slot in force as in the other one, in the values and in the number of the state in work."""
    whole = path.read_bytes()
    chance = random.Random(1)
    ranges = [(at, at + HEADER_BYTES + 20) for at in (0, SLOT_BYTES)] + [(WORK_OFFSET, WORK_OFFSET + 8)]
    for first, end in ranges:
        for at in range(first, end):
            bit = 1 << chance.randrange(8)
            patch(path, at, bytes([whole[at] ^ bit]))
            with pytest.raises(CheckpointError, match=r"slot [01]: |work: |sequence: "):
                StateFile.open(path, KEY)
            patch(path, at, whole[at : at + 1])
    assert path.read_bytes() == whole
    assert reopen(path).words == WORDS


FIELDS: list[tuple[int, str, Any, str]] = [
    (0, "8s", b"\x89ANTOK\r\n", r"magic: expected b'\\x89ANSTA"),
    (8, "<I", 2, "slot 0: version: expected 1, found 2"),
    (12, "<I", 1000, "slot 0: header: expected 320 bytes, found 1000 bytes"),
    (16, "<Q", 9, "sequence: expected two neighbours, found 9 and 9|work: expected"),
    (28, "32s", bytes(32), "slot 0: config of the model: expected [0-9a-f]{64}, found 0{64}"),
    *((76 + 8 * i, "<Q", 2**60, f"slot 0: {name}: expected {value}, found {2**60}")
      for i, (name, value) in enumerate(KEY.numbers().items())),
    *((124 + 8 * i, "<Q", 2**63, f"slot 0: offset of {name}: expected [0-9]+, found {2**63}")
      for i, name in enumerate(SECTIONS)),
    *((188 + 8 * i, "<Q", 1, f"slot 0: size of {name}: expected [0-9]+, found 1")
      for i, name in enumerate(SECTIONS)),
    (308, "<I", 2**31, f"slot 0: values: expected at most {MAX_VALUES_BYTES} bytes, found {2**31}"),
    (312, "<I", 5, "slot 0: CRC of the values: expected 0x00000005"),
]  # fmt: skip


@pytest.mark.parametrize(("offset", "form", "value", "message"), FIELDS, ids=[message[:40] for *_, message in FIELDS])
def test_every_field_is_checked(path: Path, offset: int, form: str, value: Any, message: str) -> None:
    forge(path, offset, struct.pack(form, value))
    refused(path, message)


CHANGES: list[tuple[dict[str, Any], str]] = [
    ({"batch_size": 3}, "batch_size: expected 3, found 2"),
    ({"seq_len": 8}, "seq_len: expected 8, found 16"),
    ({"n_micro": 2}, "micro_batches: expected 2, found 3"),
    ({"starts": (0, 1, 2, 3)}, "groups: expected 4, found 2"),
    ({"starts": (0, 3)}, "layers_of_a_group: expected 3, found 2"),
    ({"config": SHAPE.replace(hidden_dim=32)}, "config of the model: expected [0-9a-f]{64}, found"),
    ({"config": SHAPE.replace(rope_theta=5e5)}, "config of the model: expected [0-9a-f]{64}, found"),
]


@pytest.mark.parametrize(("change", "message"), CHANGES, ids=[message[:20] for _, message in CHANGES])
def test_a_file_of_another_run_is_refused(path: Path, change: dict[str, Any], message: str) -> None:
    refused(path, message, dataclasses.replace(KEY, **change))


def cut(size: int) -> Callable[[Path], None]:
    return lambda path: os.truncate(path, size)


DAMAGES: list[tuple[Callable[[Path], None], str]] = [
    (cut(0), "magic: expected .*found b''"),
    (cut(7), "magic: expected"),
    (cut(100), "size: expected [0-9]+ bytes, found 100 bytes"),
    (cut(SLOT_BYTES + 20), "size: expected"),
    (cut(DATA_OFFSET), f"size: expected {KEY.file_bytes} bytes, found {DATA_OFFSET} bytes"),
    (cut(KEY.file_bytes - 1), "size: expected"),
    (cut(KEY.file_bytes + 1), "size: expected"),
    (lambda path: path.write_bytes(b"GGUF" + bytes(KEY.file_bytes - 4)), "magic: expected .*found b'GGUF"),
    (lambda path: path.write_bytes(bytes(KEY.file_bytes)), "magic: expected"),
    (lambda path: patch(path, newest_slot(path), bytes(SLOT_BYTES - 64)), "work: expected state 5, found state 6"),
    (lambda path: patch(path, WORK_OFFSET, struct.pack("<Q", 2**64 - 1)), "work: expected 6, the newest state, found"),
]


@pytest.mark.parametrize(("damage", "message"), DAMAGES, ids=[message[:30] for _, message in DAMAGES])
def test_damage_and_foreign_files_are_refused(path: Path, damage: Callable[[Path], None], message: str) -> None:
    damage(path)
    torn = "found state 6" in message  # a commit that was cut off looks the same
    refused(path, message, error=TornStateError if torn else CheckpointError)


def test_only_regular_files_are_opened(path: Path) -> None:
    for name, make in (("link", lambda p: p.symlink_to(path)), ("folder", Path.mkdir), ("fifo", os.mkfifo)):
        other = path.parent / name
        make(other)
        for call in (lambda p: StateFile.open(p, KEY), lambda p: StateFile.create(p, KEY, WORDS, {})):
            with pytest.raises(CheckpointError, match=f"{name}: expected a regular file"):
                call(other)
    with pytest.raises(CheckpointError, match="expected a regular file, found No such file"):
        StateFile.open(path.parent / "nowhere", KEY)


def test_create_replaces_only_its_own(path: Path) -> None:
    foreign = path.parent / "notes.txt"
    foreign.write_text("notes")
    with pytest.raises(CheckpointError, match="expected nothing or a state file, found one that begins with b'notes'"):
        StateFile.create(foreign, KEY, WORDS, {})
    assert foreign.read_text() == "notes"
    StateFile.create(path, KEY, (0,) * 5, {}).close()
    assert reopen(path).words == (0,) * 5
    assert sorted(os.listdir(path.parent)) == ["notes.txt", path.name]


def test_a_full_disk_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(OSError, match="No space left"):
        StateFile.create(tmp_path / "state.arena", KEY, WORDS, {})
    assert os.listdir(tmp_path) == []
    monkeypatch.delattr(os, "posix_fallocate")
    StateFile.create(tmp_path / "state.arena", KEY, WORDS, {}).close()
    assert (tmp_path / "state.arena").stat().st_blocks * 512 >= KEY.file_bytes


def test_one_process_at_a_time(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(state_file, "_WAIT_S", 0.05)
    file = StateFile.open(path, KEY)
    with pytest.raises(BusyError, match="in use by another process"):
        StateFile.open(path, KEY)
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE, pass_fds=[file.fd])
    os.close(file.fd)  # as the end of this process would
    file._map.close()
    with pytest.raises(BusyError):
        StateFile.open(path, KEY)
    child.communicate()
    assert reopen(path).words == WORDS


def test_values_have_a_limit(path: Path) -> None:
    file = StateFile.open(path, KEY)
    with pytest.raises(InvalidError, match=f"at most {MAX_VALUES_BYTES} bytes"):
        file.store(file.commit._replace(values={"text": "x" * MAX_VALUES_BYTES}))
    file.close()
    refused(path, "begun and not finished", error=TornStateError)
