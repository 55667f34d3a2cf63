"""The tokenizer against recorded ids, a literal reading of the algorithm, and damaged files."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from anellm.errors import DataError, InvalidError, TokenRangeError
from anellm.tokenizer import BYTE_PIECES, Tokenizer, split_documents

SPECIAL = [b"<unk>", b"\n<s>\n", b"\n</s>\n", *BYTE_PIECES]


def table(*pieces: str, scores: list[float] | None = None) -> Tokenizer:
    """Return a tokenizer of the given pieces, scored 0, -1, -2, ... unless told."""
    scores = [-float(rank) for rank in range(len(pieces))] if scores is None else scores
    return Tokenizer([*SPECIAL, *(piece.encode() for piece in pieces)], [0.0] * 259 + scores)


# "ab cd" joins across a space and "x\n" holds a newline, so this one must not be cut there.
CROSSING = table("b ", "b c", "ab", "a", "b", "c", "d", " ", "ab cd", "cd", "x\n", "x", "\n")
# Ties, pieces made of pieces or of characters that have none, spaces in front, look-alikes of special and byte tokens,
# and a score below the one that run.c starts from.
PLAIN = table(
    " ", "a", "b", "c", "é", "🦙", "\n", "<", "0", "x", "4", "1", ">", "s", "aa", "ab", " a", "  ", "   a", "aab", "zz",
    "<0", "x4", "<0x4", "1>", "<s", "🦙a", "\n\n", "cab", "bb", "cc", "bbcc", "az", "za", "<0x41>",
    scores=[-9.0] * 14 + [-1.0, -1.0, -2.0, -0.5, 3.0, -1.0, 0.0, -1.0, -1.0, -1.0, -1.0, -1.0, -1.5, -3.0]
    + [-0.2, -0.1, -0.2, -0.3, -0.1, -0.1, -2e10],
)  # fmt: skip


def encode_literally(tokenizer: Tokenizer, text: str) -> list[int]:
    """Encode as llama2.c's run.c reads: search all pairs for the best, merge it, start over."""
    ids_of = {piece: index for index, piece in reversed(list(enumerate(tokenizer.pieces))) if index >= 259}
    ids: list[int] = []
    for char in " " + text if text else "":
        piece = char.encode()
        ids.extend([ids_of[piece]] if piece in ids_of else [value + 3 for value in piece])
    while True:
        best, place, merged = -1e10, -1, -1
        for at in range(len(ids) - 1):
            found = ids_of.get(tokenizer.pieces[ids[at]] + tokenizer.pieces[ids[at + 1]])
            if found is not None and tokenizer.scores[found] > best:
                best, place, merged = tokenizer.scores[found], at, found
        if place < 0:
            return [1, *ids]
        ids[place : place + 2] = [merged]


@pytest.mark.parametrize("tokenizer", [PLAIN, CROSSING], ids=["plain", "crossing"])
@given(st.one_of(st.text(alphabet="abc", max_size=40), st.text(alphabet="abcd \nx<0s41>zé🦙☃", max_size=40)))
@example("bbcc cab  bbccbbcc")
@settings(max_examples=300)
def test_encode_equals_the_literal_algorithm(tokenizer: Tokenizer, text: str) -> None:
    assert tokenizer.encode(text) == encode_literally(tokenizer, text)


@pytest.mark.parametrize("tokenizer", [PLAIN, CROSSING, table("a")], ids=["plain", "crossing", "no-space"])
@given(st.one_of(st.text(max_size=60), st.text(alphabet=" \n\ta<s>/unk0x41\x00\u2581", max_size=40)))
def test_round_trip(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert tokenizer.count_bytes(ids) == len(text.encode())
    stream = tokenizer.stream()
    parts = [stream.feed(token) for token in ids]
    assert "".join(parts) == text
    assert stream.flush() == ""


def test_segments_are_used_only_where_they_are_exact() -> None:
    assert CROSSING._segments is None
    assert PLAIN._segments is not None
    assert "\n" not in PLAIN._segments.pattern  # "\n\n" is a piece
    assert "\n" in table("a", "\n")._segments.pattern  # type: ignore[union-attr]


def test_best_score_first_and_leftmost_among_equals() -> None:
    names = {token: piece.decode() for token, piece in enumerate(PLAIN.pieces)}
    assert [names[token] for token in PLAIN.encode("aaab", bos=False)] == [" ", "aa", "ab"]
    assert [names[token] for token in PLAIN.encode("baaa", bos=False)] == [" ", "b", "aa", "a"]


def test_text_never_becomes_a_special_or_byte_token() -> None:
    for text in ("<s>", "<0x41>", "\n<s>\n", "<unk>", "</s>"):
        ids = PLAIN.encode(text)[1:]
        assert not {0, 1, 2} & set(ids)
        assert 3 + 0x41 not in ids
        assert PLAIN.decode(ids).lstrip(" ") == text


def test_bos_eos_and_the_space_in_front() -> None:
    assert PLAIN.encode("") == [1]
    assert PLAIN.encode("", bos=False) == []
    assert PLAIN.encode("", eos=True) == [1, 2]
    ids = PLAIN.encode("a", bos=False)
    assert PLAIN.decode(ids) == " a"
    assert PLAIN.decode([1, *ids]) == "a"
    assert PLAIN.decode([1, *ids, 2, 1, *ids]) == "aa"
    assert [PLAIN.token_bytes(token) for token in (1, 2, 3, ids[0])] == [0, 0, 1, 2]


def test_stream_never_gives_half_a_code_point() -> None:
    stream = PLAIN.stream()
    assert [stream.feed(value + 3) for value in "☃é".encode()] == ["", "", "☃", "", "é"]
    assert stream.feed(0xE2 + 3) == ""
    assert stream.flush() == "\ufffd"


def test_invalid_utf8_is_kept_in_bytes_and_replaced_in_text() -> None:
    ids = [0xFF + 3, 0x41 + 3]
    assert PLAIN.decode_bytes(ids) == b"\xffA"
    assert PLAIN.decode(ids) == "\ufffdA"


def test_bad_arguments() -> None:
    with pytest.raises(InvalidError, match=r"lone surrogate .* at character 2"):
        PLAIN.encode("ab\ud800")
    for bad in (-1, PLAIN.vocab_size):
        with pytest.raises(TokenRangeError, match=f"expected 0 to {PLAIN.vocab_size - 1}, found {bad}"):
            PLAIN.decode([bad])
        with pytest.raises(TokenRangeError):
            PLAIN.count_bytes([bad])
        with pytest.raises(TokenRangeError):
            PLAIN.token_bytes(bad)


def test_documents() -> None:
    text = "ab\n<|endoftext|>\n<|endoftext|>\r\n\n c<|endoftext|>"
    assert split_documents(text) == ["ab", " c"]
    ids = PLAIN.encode_documents(text)
    assert ids.dtype == np.dtype("<u2")
    assert ids.tolist() == PLAIN.encode("ab") + PLAIN.encode(" c")
    assert PLAIN.encode_documents("").size == 0
    assert split_documents("\na\n") == ["\na\n"]


def test_a_large_vocabulary_gives_int32() -> None:
    # 66,000 different pieces, three letters each
    pieces = [f"{chr(0x4E00 + i % 300)}{chr(0x4E00 + i // 300)}" for i in range(66000)]
    assert table(*pieces).encode_documents("a").dtype == np.dtype("<i4")


def test_save_gives_the_same_bytes(tmp_path: Path) -> None:
    PLAIN.save(tmp_path / "t.bin")
    again = Tokenizer.from_file(tmp_path / "t.bin")
    assert again.to_bytes() == (tmp_path / "t.bin").read_bytes()
    assert (again.pieces, again.scores, again.sha256) == (PLAIN.pieces, PLAIN.scores, PLAIN.sha256)
    assert again.vocab_size == 294


GOOD = PLAIN.to_bytes()
FIRST = 4  # the first record: score, length 5, "<unk>"


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "expected at least 4 bytes of header, found 0"),
        (b"\x07\x00\x00", "header, found 3"),
        (struct.pack("<i", -1) + GOOD[4:], "max_token_length: expected 1 to .*, found -1"),
        (struct.pack("<i", 2**31 - 1) + GOOD[4:], "max_token_length: expected 1 to .*, found 2147483647"),
        (struct.pack("<i", 7) + GOOD[4:], r"max_token_length: expected 6 \(the longest token\), found 7"),
        (struct.pack("<i", 4) + GOOD[4:], "token 0 at byte 4: length: expected 1 to max_token_length = 4, found 5"),
        (GOOD[:8] + struct.pack("<i", -5) + GOOD[12:], "token 0 at byte 4: length: .* found -5"),
        (GOOD[:8] + struct.pack("<i", 0) + GOOD[12:], "token 0 at byte 4: length: .* found 0"),
        (GOOD[:4] + struct.pack("<f", float("nan")) + GOOD[8:], "token 0: score: expected a finite number, found nan"),
        (GOOD + b"\x00", "token 294 at byte .*: expected 8 bytes of score and length, found 1"),
        (GOOD[:-1], "token 293 at byte .*: expected 6 bytes of text, found 5"),
        (GOOD[:200], "token .* at byte"),
        (GOOD.replace(b"<0x41>", b"<0x42>", 1), "token 68: expected the byte token <0x41>, found b'<0x42>'"),
    ],
)
def test_damaged_files_are_refused(tmp_path: Path, data: bytes, message: str) -> None:
    path = tmp_path / "bad.bin"
    path.write_bytes(data)
    with pytest.raises(DataError, match=message) as caught:
        Tokenizer.from_file(path)
    assert str(path) in str(caught.value)


def test_too_few_tokens_and_missing_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"expected at least 259 tokens .*, found 3"):
        Tokenizer(SPECIAL[:3], [0.0] * 3)
    with pytest.raises(DataError, match="token 258: score: expected a finite number, found inf"):
        Tokenizer(SPECIAL, [0.0] * 258 + [1e39])
    with pytest.raises(DataError, match="expected one score a piece, found 259 pieces, 1 scores"):
        Tokenizer(SPECIAL, [0.0])
    with pytest.raises(DataError, match="cannot read"):
        Tokenizer.from_file(tmp_path / "none.bin")
    with pytest.raises(DataError, match="not a plain file"):
        Tokenizer.from_file(tmp_path)


@given(st.lists(st.tuples(st.integers(0, len(GOOD) - 1), st.integers(0, 255)), min_size=1, max_size=4), st.booleans())
def test_any_damage_is_refused_or_read_as_it_stands(changes: list[tuple[int, int]], cut: bool) -> None:
    data = bytearray(GOOD)
    for at, value in changes:
        data[at] = value
    if cut:
        del data[changes[0][0] :]
    try:
        tokenizer = Tokenizer.from_bytes(bytes(data))
    except DataError:
        return
    assert tokenizer.to_bytes() == bytes(data)
    assert tokenizer.decode(tokenizer.encode("ab <s>\n")) == "ab <s>\n"


def test_llama2_goldens(data_dir: Path) -> None:
    tokenizer = Tokenizer.from_file(data_dir / "tokenizers" / "llama2" / "tokenizer.bin")
    assert tokenizer.vocab_size == 32000
    cases = json.loads((data_dir / "goldens" / "llama2_bpe_golden.json").read_text("utf-8"))
    assert len(cases) == 13
    for case in cases:
        assert tokenizer.encode(case["text"]) == case["ids"] == case["run_c"]
        assert tokenizer.decode(case["ids"]) == case["text"]


@pytest.mark.parametrize("name", ["llama2/tokenizer.bin", "tok512/tok512.bin"])
def test_reference_files_round_trip(data_dir: Path, name: str) -> None:
    path = data_dir / "tokenizers" / name
    assert Tokenizer.from_file(path).to_bytes() == path.read_bytes()


def test_tinystories_tokens(data_dir: Path) -> None:
    tokenizer = Tokenizer.from_file(data_dir / "tokenizers" / "llama2" / "tokenizer.bin")
    folder = data_dir / "text" / "tinystories"
    text = (folder / "sample_val.txt").read_bytes().decode("utf-8")
    expected = np.fromfile(folder / "sample_val.llama2.uint16.bin", dtype="<u2")
    np.testing.assert_array_equal(tokenizer.encode_documents(text), expected)
    assert tokenizer.count_bytes(expected) == len(tokenizer.decode_bytes(expected))
