"""The five file operations: whole or not at all, whichever of them fails."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import subprocess
import sys
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from anellm import safeio, saferead
from anellm.errors import BusyError, DataError, InvalidError

OPERATIONS = ("write", "fsync", "rename", "fsync_dir")


def fail_at(monkeypatch: pytest.MonkeyPatch, nth: int, error: BaseException) -> Callable[[], int]:
    """Make the nth file operation fail; return a counter of the operations begun."""
    count = 0
    for name in OPERATIONS:
        real = getattr(safeio, name)

        def operation(*args: Any, real: Callable[..., Any] = real) -> Any:
            nonlocal count
            count += 1
            if count == nth:
                raise error
            return real(*args)

        monkeypatch.setattr(safeio, name, operation)
    return lambda: count


def test_a_file_is_written_whole(tmp_path: Path) -> None:
    path = tmp_path / "x.bin"
    data = os.urandom(100_000)
    with safeio.atomic_file(path) as file:
        file.write(data[:7])
        file.write(memoryview(data)[7:])
        assert not path.exists()
        assert (file.size, file.sha256) == (len(data), hashlib.sha256(data).hexdigest())
    assert path.read_bytes() == data
    safeio.write_bytes(path, b"new")
    assert path.read_bytes() == b"new"
    assert os.listdir(tmp_path) == ["x.bin"]


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()])
def test_a_file_survives_every_failure_of_its_replacement(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    path = tmp_path / "x.bin"
    seen = set()
    for nth in range(1, 20):
        path.write_bytes(b"old")
        with monkeypatch.context() as patch:
            count = fail_at(patch, nth, error)
            try:
                safeio.write_bytes(path, b"new")
            except type(error):
                seen.add(path.read_bytes())
            else:
                assert count() < nth
                break
        assert os.listdir(tmp_path) == ["x.bin"]
    # Only the sync of the folder comes after the rename.
    assert nth == len(OPERATIONS) + 1
    assert seen == {b"old", b"new"}


def test_a_folder_appears_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "step"
    for nth in range(1, 30):
        with monkeypatch.context() as patch:
            fail_at(patch, nth, OSError(errno.EIO, "Input/output error"))
            try:
                with safeio.atomic_directory(target) as folder:
                    folder.write_bytes("a", b"1")
                    folder.write_bytes("b", b"22")
                    assert folder.files["b"] == {"size": 2, "sha256": hashlib.sha256(b"22").hexdigest()}
            except OSError:
                pass
            else:
                break
        if target.exists():
            assert sorted(os.listdir(target)) == ["a", "b"]
            safeio.remove(target)
        assert os.listdir(tmp_path) == []
    assert nth == 2 * 2 + 3 + 1
    assert sorted(os.listdir(target)) == ["a", "b"]


def test_remove_takes_the_name_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "step"
    target.mkdir()
    (target / "a").write_bytes(b"1")

    def no_deletion(path: Path) -> None:
        raise OSError(errno.EIO, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(safeio, "_delete", no_deletion)
        with pytest.raises(OSError, match="Input"):
            safeio.remove(target)
    assert not target.exists()
    (left,) = os.listdir(tmp_path)
    assert left.startswith(safeio.TRASH)
    (tmp_path / ".tmp-x-1-0").write_bytes(b"")
    (tmp_path / "kept").write_bytes(b"")
    (tmp_path / ".tmp-theirs").write_bytes(b"")
    assert len(safeio.sweep(tmp_path)) == 2
    assert sorted(os.listdir(tmp_path)) == [".tmp-theirs", "kept"]


def test_only_regular_files_are_replaced(tmp_path: Path) -> None:
    real = tmp_path / "real"
    real.write_bytes(b"1")
    link, fifo, folder = tmp_path / "link", tmp_path / "fifo", tmp_path / "folder"
    link.symlink_to(real)
    os.mkfifo(fifo)
    folder.mkdir()
    for path, kind in (
        (link, "symbolic link"),
        (fifo, "special file"),
        (folder, "folder"),
        (Path("/dev/null"), "spec"),
    ):
        with pytest.raises(InvalidError, match=f"{path}.*{kind}"):
            safeio.write_bytes(path, b"2")
        with pytest.raises(InvalidError, match=kind):
            safeio.AppendFile(path)
    assert real.read_bytes() == b"1"
    assert link.is_symlink()


def test_only_small_regular_files_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    link = tmp_path / "link"
    link.symlink_to(tmp_path / "x")
    for path in (fifo, link, tmp_path, tmp_path / "missing"):
        with pytest.raises(DataError, match=str(path)):
            saferead.read_regular(path, DataError, 10)
    (tmp_path / "x").write_bytes(b"x" * 11)
    with pytest.raises(DataError, match="at most 10 bytes, found 11"):
        saferead.read_regular(tmp_path / "x", DataError, 10)
    for length in (0, 1, 9, 10):
        (tmp_path / "x").write_bytes(b"0123456789"[:length])
        assert saferead.read_regular(tmp_path / "x", DataError, 10) == b"0123456789"[:length]
    tracemalloc.start()
    assert saferead.read_regular(tmp_path / "x", DataError, 1 << 34) == b"0123456789"
    assert tracemalloc.get_traced_memory()[1] < 1 << 20  # as much as the file needs, not as the limit allows
    tracemalloc.stop()
    monkeypatch.setattr(saferead, "_CHUNK", 3)
    assert saferead.read_regular(tmp_path / "x", DataError, 10) == b"0123456789"
    monkeypatch.undo()
    for text in (b"", b"[]", b"{", b'{"a": 1}x', b"[" * 100_000):
        (tmp_path / "x").write_bytes(text)
        with pytest.raises(DataError, match=str(tmp_path / "x")):
            saferead.read_json(tmp_path / "x", DataError)


def test_a_lock_keeps_others_out(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    lock = safeio.Lock(path, "run x")
    with pytest.raises(BusyError, match=f"run x: in use by another process .pid {os.getpid()}"):
        safeio.Lock(path, "run x")
    code = f"from anellm import safeio, errors; from pathlib import Path\ntry: safeio.Lock(Path({str(path)!r}), 'x')\n"
    code += "except errors.BusyError: raise SystemExit(7)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 7
    lock.close()
    safeio.Lock(path, "run x").close()


def test_append_adds_lines(tmp_path: Path) -> None:
    for text in (b"a\n", b"b\n"):
        file = safeio.AppendFile(tmp_path / "x")
        file.write(text)
        file.close()
        file.close()
    assert (tmp_path / "x").read_bytes() == b"a\nb\n"


json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=10,
)


@given(json_values)
def test_json_is_strict(value: Any) -> None:
    def refuse(text: str) -> None:
        raise AssertionError(text)

    try:
        data = safeio.json_bytes(value)
    except UnicodeEncodeError:
        return  # a lone surrogate is no text
    parsed = json.loads(data.decode(), parse_constant=refuse)
    assert safeio.json_bytes(parsed) == data
