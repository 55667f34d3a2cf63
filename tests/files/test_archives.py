"""Archives of stories: streamed, in order, nothing unpacked, and hostile ones refused with little memory."""

from __future__ import annotations

import gzip
import io
import json
import tarfile
import tracemalloc
import zipfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from anellm import archives
from anellm.archives import Item, open_sources
from anellm.errors import DataError

STORIES = [["Once upon a time.\n", "  Two spaces, naïve 🦙 "], ["Second file."]]


def listed(stories: list[str]) -> bytes:
    return json.dumps([{"story": story, "source": "x", "n": [1, {"a": None}]} for story in stories]).encode()


def make_zip(path: Path, members: dict[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return path


def make_tar(path: Path, members: dict[str, bytes | tarfile.TarInfo], mode: str = "w:gz") -> Path:
    with tarfile.open(path, mode) as archive:
        for name, data in members.items():
            info = data if isinstance(data, tarfile.TarInfo) else tarfile.TarInfo(name)
            content = data if isinstance(data, bytes) else b""
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return path


def read(path: Path) -> list[list[Item]]:
    with open_sources(path) as sources:
        return [list(source.read()) for source in sources]


MEMBERS = {
    "a/data01.json": listed(STORIES[1]), "a/data00.json": b"\xef\xbb\xbf" + listed(STORIES[0]), "README.md": b"no",
    "__MACOSX/._data00.json": b"\0\1", "nested.zip": b"PK\3\4",
}  # fmt: skip
EXPECTED = [["Once upon a time.", "Two spaces, naïve 🦙"], ["Second file."]]


def test_members_in_order_of_their_names(tmp_path: Path) -> None:
    assert read(make_zip(tmp_path / "a.zip", MEMBERS)) == EXPECTED
    assert read(make_tar(tmp_path / "a.tar.gz", MEMBERS)) == EXPECTED
    assert read(make_tar(tmp_path / "a.tar", MEMBERS, "w")) == EXPECTED
    (tmp_path / "one.json").write_bytes(listed(STORIES[0]))
    assert read(tmp_path / "one.json") == EXPECTED[:1]
    (tmp_path / "one.txt").write_text(" One. \n<|endoftext|>\nTwo.\n", encoding="utf-8")
    assert read(tmp_path / "one.txt") == [["One.", "Two."]]
    with open_sources(make_zip(tmp_path / "t.zip", {"x.txt": b"One. \n<|endoftext|>\nTwo."})) as sources:
        assert [source.name for source in sources] == [f"{tmp_path}/t.zip: x.txt"]
        assert [list(source.read()) for source in sources for _ in range(2)] == [["One.", "Two."]] * 2  # again


def test_tokens_that_were_made_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(archives, "_BLOCK", 7)
    ids = np.arange(100, dtype="<u2")
    for path in (make_zip(tmp_path / "a.zip", {"data00.bin": ids.tobytes()}),):
        (parts,) = read(path)
        np.testing.assert_array_equal(np.concatenate(parts), ids)
    with pytest.raises(DataError, match=r"data00\.bin: expected a multiple of 2 bytes"):
        read(make_zip(tmp_path / "b.zip", {"data00.bin": ids.tobytes() + b"x"}))


# ---- hostile archives


def link(name: str, target: str) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = tarfile.SYMTYPE, target
    return info


@pytest.mark.parametrize("name", ["../data00.json", "a/../../data00.json", "/etc/data00.json", "..\\data00.json"])
def test_names_that_point_outside(tmp_path: Path, name: str) -> None:
    for path in (make_zip(tmp_path / "a.zip", {name: b"[]"}), make_tar(tmp_path / "a.tgz", {name: b"[]"})):
        with pytest.raises(DataError, match="expected a path inside the archive"):
            read(path)


def test_other_kinds_of_members(tmp_path: Path) -> None:
    for info in (link("data00.json", "/etc/passwd"), tarfile.TarInfo("data00.json")):
        info.type = info.type if info.issym() else tarfile.FIFOTYPE
        with pytest.raises(DataError, match="expected a plain file, found another kind"):
            read(make_tar(tmp_path / "a.tgz", {"x": info}))
    with zipfile.ZipFile(tmp_path / "l.zip", "w") as archive:
        info = zipfile.ZipInfo("data00.json")
        info.external_attr = 0o120777 << 16
        archive.writestr(info, "/etc/passwd")
    with pytest.raises(DataError, match="expected a plain file, found another kind"):
        read(tmp_path / "l.zip")
    with zipfile.ZipFile(tmp_path / "m.zip", "w", zipfile.ZIP_LZMA) as archive:
        archive.writestr("data00.json", "[]")
    with pytest.raises(DataError, match="expected it stored or deflated, found compression method 14"):
        read(tmp_path / "m.zip")
    broken = bytearray(make_zip(tmp_path / "e.zip", {"data00.json": b"[]"}).read_bytes())
    broken[broken.index(b"PK\1\2") + 8] |= 1
    (tmp_path / "e.zip").write_bytes(broken)
    with pytest.raises(DataError, match="found encryption"):
        read(tmp_path / "e.zip")


def test_nothing_to_read(tmp_path: Path) -> None:
    inner = make_zip(tmp_path / "in.zip", {"data00.json": b"[]"}).read_bytes()
    for path in (make_zip(tmp_path / "a.zip", {"in.zip": inner}), make_tar(tmp_path / "a.tgz", {"in.zip": inner})):
        with pytest.raises(DataError, match=r"expected members that end in \.json, \.txt, \.bin, found none"):
            read(path)


def bombs(folder: Path) -> Iterator[Path]:
    zeros, spaces = bytes(40 << 20), b" " * (40 << 20)
    yield make_zip(folder / "zeros.zip", {"d.json": b'[{"story": "' + zeros})
    yield make_zip(folder / "spaces.zip", {"d.json": spaces})
    yield make_zip(folder / "text.zip", {"d.txt": b"a" * (40 << 20)})
    yield make_zip(folder / "ids.zip", {"d.bin": zeros})
    yield make_tar(folder / "spaces.tgz", {"d.json": spaces})
    yield make_tar(folder / "skipped.tgz", {"a.md": zeros, "d.json": b"[]"})  # what is skipped is unpacked as well
    name = tarfile.TarInfo("././@LongLink")  # a header with a name of 40 MB
    name.type, name.size = tarfile.GNUTYPE_LONGNAME, len(zeros)
    (folder / "name.tgz").write_bytes(gzip.compress(name.tobuf() + zeros))
    yield folder / "name.tgz"
    (folder / "zeros.gz").write_bytes(gzip.compress(zeros))
    yield folder / "zeros.gz"


def test_bombs(tmp_path: Path) -> None:
    for path in list(bombs(tmp_path)):
        tracemalloc.start()
        with pytest.raises(DataError, match=r"\.(zip|tgz|gz)"):
            for items in read_lazily(path):
                assert len(items) < 1 << 21
        assert tracemalloc.get_traced_memory()[1] < 40 << 20, path
        tracemalloc.stop()


def read_lazily(path: Path) -> Iterator[Item]:
    with open_sources(path) as sources:
        for source in sources:
            yield from source.read()


def test_too_many_members(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(archives, "MOST_MEMBERS", 20)
    with pytest.raises(DataError, match="expected at most 20 members"):
        read(make_tar(tmp_path / "a.tgz", {f"{i}.md": b"" for i in range(30)}))


@pytest.mark.parametrize("kind", ["zip", "tgz", "tar"])
def test_cut_and_flipped(tmp_path: Path, kind: str) -> None:
    """A damaged archive is refused, or what is read is what some whole archive could hold: nothing else is raised."""
    path = tmp_path / f"a.{kind}"
    if kind == "zip":
        make_zip(path, MEMBERS)
    else:
        make_tar(path, MEMBERS, "w:gz" if kind == "tgz" else "w")
    data = path.read_bytes()
    rng = np.random.default_rng(3)
    cuts = [data[:size] for size in range(4, min(len(data), 2000), 23)]
    flips = []
    for bit in rng.integers(0, min(len(data), 2000) * 8, 150):
        broken = bytearray(data)
        broken[bit // 8] ^= 1 << bit % 8
        flips.append(bytes(broken))
    for broken in cuts + flips:
        path.write_bytes(broken)
        try:
            read(path)
        except DataError as error:
            assert path.name in str(error)


# ---- the list of stories


@given(st.lists(st.text(max_size=20)), st.integers(1, 9), st.booleans())
def test_lists_in_pieces(stories: list[str], step: int, spaced: bool) -> None:
    text = json.dumps([{"story": story} for story in stories], indent=1 if spaced else None)
    blocks = iter([text[at : at + step] for at in range(0, len(text), step)])
    assert [item["story"] for item in archives._elements(blocks, "x")] == stories


@given(st.text(alphabet='[]{},:"\\u12d tfn-.e', max_size=30), st.integers(1, 9))
@settings(max_examples=400)
def test_any_list(text: str, step: int) -> None:
    try:
        expected = json.loads(text)
    except ValueError:
        expected = None
    try:
        found = list(archives._elements(iter([text[at : at + step] for at in range(0, len(text), step)]), "x"))
    except DataError:
        assert not isinstance(expected, list)
    else:
        assert found == expected


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "expected a JSON list of stories"),
        (b'{"story": "a"}', "expected a JSON list of stories"),
        (b'[{"story": "a"} {"story": "b"}]', r"\[1\]: expected ',' or '\]', found '{'"),
        (b'[{"story": "a"}', r"\[1\]: expected ',' or '\]', found 'the end'"),
        (b'[{"story": "a"},]', r"\[1\]: expected JSON"),
        (b'[{"story": "a"}] x', "expected the end behind the list, found 'x'"),
        (b'[{"text": "a"}]', r"\[0\]:story: expected a text, found none"),
        (b'[{"story": 5}]', r"\[0\]:story: expected a text, found a number"),
        (b'["a"]', r"\[0\]: expected a JSON object, found a text"),
        (b'[{"story": "\xff"}]', "expected UTF-8 text, found byte 0xff"),
        (b"[" * 100_000, r"\[0\]: expected JSON"),
        (b"[" + b"9" * 5000 + b"]", r"\[0\]: expected JSON"),
    ],
)
def test_bad_lists(tmp_path: Path, data: bytes, message: str) -> None:
    (tmp_path / "d.json").write_bytes(data)
    with pytest.raises(DataError, match=rf"d\.json.*{message}"):
        read(tmp_path / "d.json")


def test_a_story_without_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(archives, "LONGEST_STORY", 5000)
    monkeypatch.setattr(archives, "_BLOCK", 1000)
    (tmp_path / "d.json").write_bytes(b'[{"story": "' + b"a" * 50_000)
    with pytest.raises(DataError, match=r"\[0\]: expected at most 5000 characters, found more"):
        read(tmp_path / "d.json")
