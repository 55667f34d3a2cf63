"""Documents out of text and JSONL: streamed as if read at once, and errors with file, line and field."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from anellm import documents
from anellm.data import TokenDataset
from anellm.documents import read_documents, split_stream
from anellm.errors import DataError
from anellm.tokenizer import Tokenizer
from anellm.tokenizer_base import split_documents

PIECES = st.lists(
    st.sampled_from(["<|endoftext|>", "<|end", "oftext|>", "\n", "\r\n", "a", "é", " ", "🦙b"]), max_size=30
)


@given(PIECES, st.integers(1, 7))
def test_streamed_text_equals_text_at_once(pieces: list[str], step: int) -> None:
    text = "".join(pieces)
    blocks = iter([text[at : at + step] for at in range(0, len(text), step)])
    assert list(split_stream(blocks)) == split_documents(text)


def test_a_long_document_is_cut_at_a_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(documents, "LONGEST_DOCUMENT", 10)
    monkeypatch.setattr(documents, "_BLOCK", 4)
    text = "abc\ndefg\nhijklmnopqrstuvwxyz stop\n<|endoftext|>\nend"
    found = list(split_stream(iter([text[at : at + 4] for at in range(0, len(text), 4)])))
    # A newline before the marker stays where the cut came right behind it.
    assert "".join(found).replace("\n", "") == "abcdefghijklmnopqrstuvwxyz stopend"
    assert found[0] == "abc\ndefg\n"
    assert found[-1] == "end"
    assert max(map(len, found)) <= 18


@pytest.mark.parametrize("block", [1, 2, 3, 1 << 20])
def test_text_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, block: int) -> None:
    monkeypatch.setattr(documents, "_BLOCK", block)
    path = tmp_path / "t.txt"
    path.write_bytes("\ufeffnaïve\r\n<|endoftext|>\n🦙\0 end\n".encode())
    if block >= 3:  # a byte-order mark is three bytes
        assert list(read_documents(path)) == ["naïve", "🦙\0 end\n"]
    path.write_bytes("é\nü\n".encode() + b"x\xffy")
    with pytest.raises(DataError, match=r"t\.txt:3: expected UTF-8 text, found byte 0xff at 7"):
        list(read_documents(path))
    path.write_bytes("one\ntwo 🦙".encode()[:-1])
    with pytest.raises(DataError, match=r"t\.txt:2: expected UTF-8 text, found byte 0xf0 at 8"):
        list(read_documents(path))


def test_jsonl(tmp_path: Path) -> None:
    path = tmp_path / "d.jsonl"
    lines = [
        b'\xef\xbb\xbf{"text": "one"}\r\n', b"\n", b"  \t\r\n", b'{"text": "", "id": 3}\n',
        '{"id": 1, "text": "naïve \\u0000 \\ud83e\\udd99 <|endoftext|>"}\n'.encode(), b'{"text": "last, no newline"}',
    ]  # fmt: skip
    path.write_bytes(b"".join(lines))
    expected = ["one", "", "naïve \0 🦙 <|endoftext|>", "last, no newline"]
    assert list(read_documents(path)) == expected
    tokenizer = Tokenizer.shipped()
    found = TokenDataset.from_file(path, tokenizer=tokenizer).tokens[:].tolist()
    # The marker in a field is text: it neither splits nor becomes a token that ends texts.
    assert found == [i for text in expected if text for i in tokenizer.encode(text)]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"txt": "a"}', r":2:text: expected a text, found none \(there is 'txt'\)"),
        (b"{}", r":2:text: expected a text, found none \(there is no field\)"),
        (b'{"text": 3}', ":2:text: expected a text, found a number"),
        (b'{"text": null}', ":2:text: expected a text, found null"),
        (b'{"text": ["a"]}', ":2:text: expected a text, found a list"),
        (b'["text"]', ":2: expected a JSON object, found a list"),
        (b'"text"', ":2: expected a JSON object, found a text"),
        (b'{"text": "a"', ":2: expected a JSON object, found "),
        (b'{"text": "a"} {"text": "b"}', ":2: expected a JSON object, found Extra data"),
        (b'{"text": "\xff"}', ":2: expected UTF-8 text, found byte 0xff at 10"),
        (b'{"text": "\0"}', ":2: expected a JSON object, found Invalid control"),
        (b'{"text": "\\ud800"}', r":2:text: expected Unicode text, found the lone surrogate '\\ud800' at character 0"),
        (b"[" * 100_000, ":2: expected a JSON object, found "),
        (b"9" * 5000, ":2: expected a JSON object, found "),
    ],
)
def test_bad_jsonl(tmp_path: Path, line: bytes, message: str) -> None:
    path = tmp_path / "d.jsonl"
    path.write_bytes(b'{"text": "good"}\n' + line + b"\n")
    with pytest.raises(DataError, match=rf"d\.jsonl{message}") as error:
        list(read_documents(path))
    assert len(str(error.value)) < 600


def test_a_line_without_end_takes_bounded_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(documents, "LONGEST_LINE", 1000)
    monkeypatch.setattr(documents, "_BLOCK", 100)
    path = tmp_path / "d.jsonl"
    path.write_bytes(b'{"text": "a"}\n{"text": "' + b"b" * 5000)
    with pytest.raises(DataError, match=r"d\.jsonl:2: expected a line of at most 1000 bytes"):
        list(read_documents(path))


ROWS = st.lists(st.dictionaries(st.sampled_from(["text", "x"]), st.text() | st.integers()))


@given(st.binary(max_size=80) | ROWS.map(lambda rows: "\n".join(map(json.dumps, rows)).encode()))
@settings(max_examples=300)
def test_any_jsonl(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "d.jsonl"
    path.write_bytes(data)
    try:
        found = list(read_documents(path))
    except DataError as error:
        assert "d.jsonl:" in str(error)
    else:
        assert all(isinstance(text, str) for text in found)
