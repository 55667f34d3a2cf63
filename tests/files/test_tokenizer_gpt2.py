"""GPT-2's tokenizer without another package: recorded ids, equality with others, its files, what is refused."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import itertools
import json
import struct
import sys
import unicodedata
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from anellm import tokenizer_json, tokenizer_llmc
from anellm.byte_level import merge, word_pattern
from anellm.errors import DataError, InvalidError, UnavailableError
from anellm.tokenizer import load_tokenizer_file
from anellm.tokenizer_json import JsonTokenizer

RECORDED = json.loads((Path(__file__).parents[1] / "golden" / "gpt2_bpe.json").read_text(encoding="utf-8"))
DATA = Path(tokenizer_json.__file__).parent / "data"
# Unicode goes on: characters that this Python does not know yet may be letters to others.
KNOWN = st.text(st.characters(exclude_categories=["Cs", "Cn"]), max_size=40)
TRICKY = st.text(
    st.sampled_from("aA 'stremvld\n\t\r 09.\u00b2\u2167\u4e00\u00e9\u0301\u200d\x1c\x85\xa0\u3000\u2028"), max_size=40
)


@pytest.fixture(scope="module")
def gpt2() -> JsonTokenizer:
    return JsonTokenizer.gpt2()


# ---- what it gives


def test_it_gives_what_tiktoken_recorded(gpt2: JsonTokenizer) -> None:
    assert len(RECORDED["texts"]) > 35
    for case in RECORDED["texts"]:
        assert gpt2.encode(case["text"]) == case["ids"], case["text"]
        assert gpt2.decode(case["ids"]) == case["text"]
        assert gpt2.count_bytes(case["ids"]) == len(case["text"].encode())


def test_whole_books_give_what_tiktoken_recorded(data_dir: Path, gpt2: JsonTokenizer) -> None:
    folders = {"input.txt": "tinyshakespeare"}
    for name, expected in RECORDED["books"].items():
        text = (data_dir / "text" / folders.get(name, "public_domain") / name).read_bytes().decode()
        ids = np.array(gpt2.encode(text), "<u2")
        assert (ids.size, hashlib.sha256(ids.tobytes()).hexdigest()) == (
            expected["tokens"],
            expected["sha256_of_uint16"],
        )


def test_the_table_is_the_published_one(data_dir: Path, gpt2: JsonTokenizer) -> None:
    lines = (data_dir / "tokenizers" / "gpt2" / "r50k_base.tiktoken").read_bytes().splitlines()
    ranks = {int(rank): base64.b64decode(token) for token, rank in map(bytes.split, lines)}
    assert [gpt2.token_table[index] for index in range(50256)] == [ranks[index] for index in range(50256)]
    assert (gpt2.vocab_size, gpt2.bos_id, gpt2.eos_id, gpt2.separator_id) == (50257, 50256, 50256, 50256)
    assert not gpt2.add_bos


def test_what_is_shipped_is_openais_file(gpt2: JsonTokenizer) -> None:
    data = zlib.decompress((DATA / "gpt2.bpe.zlib").read_bytes())
    found = hashlib.sha256(data).hexdigest()
    assert found == "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5"  # of vocab.bpe as published
    assert (DATA / "gpt2.bpe.zlib").stat().st_size < 212_000
    assert JsonTokenizer.from_merges(data.decode()).sha256 == gpt2.sha256


def test_words_join_to_the_text_and_spaces_are_unicodes() -> None:
    words = word_pattern()
    # Two of the same are one word, which a space joins only if it is white space too.
    spaces = {code for code in range(0x4000) if len(words.findall(f"{chr(code)} {chr(code)}")) == 1}
    assert spaces == {*range(9, 14), 32, 0x85, 0xA0, 0x1680, *range(0x2000, 0x200B), 0x2028, 0x2029, 0x202F, 0x205F,
                      0x3000}  # Unicode's White_Space  # fmt: skip
    # The four separators that Python takes for white space are not.
    assert words.findall("a \x1c\x1f b") == ["a", " \x1c\x1f", " b"]
    for code in range(0, 0x110000, 97):
        text = f"x{chr(code)} {chr(code)}1"
        assert "".join(words.findall(text)) == text


def test_every_category_is_taken_as_it_is() -> None:
    """A letter joins letters, a number numbers; all the rest joins neither."""
    words = word_pattern()
    for code in range(0x20000):
        kind = unicodedata.category(char := chr(code))[0]
        assert (words.findall(f"a{char}") == [f"a{char}"]) == (kind == "L"), hex(code)
        assert (words.findall(f"1{char}") == [f"1{char}"]) == (kind == "N"), hex(code)


@given(KNOWN | TRICKY)
@settings(max_examples=300)
def test_it_equals_the_tokenizers_package(gpt2: JsonTokenizer, text: str) -> None:
    pytest.importorskip("tokenizers", reason="the extra `tokenizers` is not installed")
    expected = _package(gpt2).encode(text, add_special_tokens=False).ids
    assert gpt2.encode(text) == expected
    assert gpt2.decode(expected) == text


_KEPT: dict[str, Any] = {}


def _package(tokenizer: JsonTokenizer) -> Any:
    if tokenizer.sha256 not in _KEPT:
        _KEPT[tokenizer.sha256] = tokenizer_json._backend(tokenizer.to_bytes(), "gpt2")
    return _KEPT[tokenizer.sha256]


@given(st.lists(st.integers(0, 5), max_size=30), st.permutations([(a, b) for a in range(4) for b in range(4)]))
@settings(max_examples=200)
def test_merging_is_as_defined(ids: list[int], order: list[tuple[int, int]]) -> None:
    """Against the definition, one merge at a time: the least rank, leftmost first."""
    merges = {pair: (rank, 6 + rank) for rank, pair in enumerate(order[:10])}
    expected = list(ids)
    while True:
        found = [(merges[p], at) for at, p in enumerate(itertools.pairwise(expected)) if p in merges]
        if not found:
            break
        (_, made), at = min(found)
        expected[at : at + 2] = [made]
    assert merge(ids, merges) == expected


def test_long_words_take_no_quadratic_time(gpt2: JsonTokenizer) -> None:
    text = "ab" * 30_000 + " " * 30_000 + "\n" * 10_000 + "!" * 10_000 + "1" * 10_000
    assert gpt2.decode(gpt2.encode(text)) == text


def test_no_text_gives_the_end_of_text(gpt2: JsonTokenizer) -> None:
    ids = gpt2.encode_documents("one<|endoftext|>two\n<|endoftext|>\nthree")
    assert int((ids == 50256).sum()) == 3
    assert 50256 not in gpt2.encode("<|endoftext|>")
    assert gpt2.encode_prompt("") == [50256]
    assert gpt2.decode([50256, *gpt2.encode("a"), 50256]) == "a"
    with pytest.raises(InvalidError, match=r"lone surrogate '\\ud800' at character 1"):
        gpt2.encode("a\ud800")


# ---- without the package, from files


def test_no_package_is_needed(tmp_path: Path, gpt2: JsonTokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    for name, content in gpt2.files().items():
        (tmp_path / name).write_bytes(content)
    (tmp_path / "vocab.bpe").write_bytes(zlib.decompress((DATA / "gpt2.bpe.zlib").read_bytes()))
    (tmp_path / "gpt2_tokenizer.bin").write_bytes(tokenizer_llmc.to_bytes(gpt2))
    for name in ("tokenizer.json", "vocab.bpe", "gpt2_tokenizer.bin"):
        found = load_tokenizer_file(tmp_path / name)
        assert found.sha256 == gpt2.sha256
        assert found.encode("Hello, world!") == [15496, 11, 995, 0]
    monkeypatch.chdir(tmp_path)
    assert load_tokenizer_file("gpt2") is gpt2
    (tmp_path / "gpt2").write_bytes(b"\4\0\0\0")  # a file of that name is what is meant where there is one
    with pytest.raises(DataError, match="gpt2: "):
        load_tokenizer_file("gpt2")


def changed(gpt2: JsonTokenizer, **changes: Any) -> bytes:
    values = json.loads(gpt2.to_bytes())
    for key, value in changes.items():
        target = values["model"] if key in values["model"] else values
        target[key] = value
    return json.dumps(values).encode()


@pytest.mark.parametrize(
    "changes",
    [
        {"normalizer": {"type": "NFC"}},
        {"dropout": 0.1},
        {"ignore_merges": True},
        {"pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": True, "use_regex": True}},
        {"pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False}},
        {"pre_tokenizer": None},
        {"added_tokens": [{"id": 50256, "content": "<|endoftext|>", "special": False}]},
        {"post_processor": {"type": "TemplateProcessing"}},
    ],
    ids=lambda changes: "-".join(changes),
)
def test_what_is_not_gpt2s_kind_is_left_to_the_package(gpt2: JsonTokenizer, changes: dict[str, Any]) -> None:
    made = object.__new__(JsonTokenizer)
    with contextlib.suppress(DataError, UnavailableError):  # the package refuses some of them, or is not there
        made.__init__(changed(gpt2, **changes))  # type: ignore[misc]
    assert made._own is None
    assert gpt2._own is not None


@pytest.mark.parametrize(
    ("text", "part"),
    [
        (b"#version: 0.2\n\xff\n", "expected UTF-8 text, found byte 0xff at 14"),
        (b"#version: 0.2\na b c\n", "token 256: expected characters of the byte-level alphabet, found ' '"),
        (b"#version: 0.2\nab c\n", "model.merges[0]: expected tokens, found 'ab'"),
        (b"#version: 0.2\na b\na b\n", "token 257: expected each once, found 'ab' as 256"),
        (b"#version: 0.2\na \xc2\xad\n", "token 256: expected characters of the byte-level alphabet"),
    ],
)
def test_damaged_merges(tmp_path: Path, text: bytes, part: str) -> None:
    path = tmp_path / "merges.txt"
    path.write_bytes(text)
    with pytest.raises(DataError) as caught:
        load_tokenizer_file(path)
    assert str(path) in str(caught.value)
    assert part in str(caught.value)


# ---- llm.c's gpt2_tokenizer.bin


def table(tokens: list[bytes], version: int = 2, end: int | None = None, count: int | None = None) -> bytes:
    head = struct.pack("<4i", 20240328, version, len(tokens) if count is None else count,
                       (len(tokens) - 1 if end is None else end) if version == 2 else 0)  # fmt: skip
    return head.ljust(1024, b"\0") + b"".join(bytes([len(token)]) + token for token in tokens)


BYTES = [bytes([value]) for value in range(256)]
END = b"<|endoftext|>"


def test_llmc_table(gpt2: JsonTokenizer) -> None:
    data = tokenizer_llmc.to_bytes(gpt2)
    assert len(data) == 372_108
    assert hashlib.sha256(data).hexdigest().startswith("6f3abc21")  # as llm.c's own script writes it
    found = tokenizer_llmc.parse(data, source="here")
    assert (found.sha256, found.source, gpt2.source) == (gpt2.sha256, "here", "gpt2")
    first = struct.pack("<3i", 20240328, 1, 50257).ljust(1024, b"\0") + data[1024:]  # version 1 does not say the end
    assert tokenizer_llmc.parse(first).sha256 == gpt2.sha256
    tokens, end = tokenizer_llmc._table(data, "t")
    assert tokenizer_llmc._with_merges(tokens, end, "t").sha256 == gpt2.sha256  # all 50,000 merges follow from it


def test_merges_follow_from_a_table() -> None:
    made = tokenizer_llmc.parse(table([*BYTES, b"he", b"ll", b"hell", b" o", END]))
    assert made.vocab_size == 261
    assert made.encode("hell o") == [258, 259]
    assert made.separator_id == 260
    assert tokenizer_llmc.parse(tokenizer_llmc.to_bytes(made)).sha256 == made.sha256


SMALL = table([*BYTES, b"he", b"ll", b"hell", END])


def test_llmc_table_cut_anywhere(tmp_path: Path) -> None:
    path = tmp_path / "gpt2_tokenizer.bin"
    for length in [*range(40), *range(1000, len(SMALL))]:
        path.write_bytes(SMALL[:length])
        with pytest.raises(DataError) as caught:
            load_tokenizer_file(path)
        assert str(path) in str(caught.value), length
        assert "expected" in str(caught.value), length


def test_llmc_table_bit_flips() -> None:
    refused = 0
    for at in [*range(16), *range(1024, len(SMALL))]:
        for bit in range(8):
            data = bytearray(SMALL)
            data[at] ^= 1 << bit
            try:
                tokenizer_llmc.parse(bytes(data))
            except DataError as error:
                refused += 1
                assert "expected" in str(error)
    assert refused > 0.99 * 8 * (16 + len(SMALL) - 1024) - 8 * 16


@pytest.mark.parametrize(
    ("data", "part"),
    [
        (struct.pack("<4i", 20240329, 2, 260, 259) + SMALL[16:], "magic: expected 20240328, found 20240329"),
        (struct.pack("<4i", 20240328, 3, 260, 259) + SMALL[16:], "field version: expected 1 or 2, found 3"),
        (struct.pack("<4i", 20240328, 2, 0, 259) + SMALL[16:], "field vocab_size: expected 257 to"),
        (struct.pack("<4i", 20240328, 2, -5, 259) + SMALL[16:], "field vocab_size: expected 257 to"),
        (struct.pack("<4i", 20240328, 2, 2**31 - 1, 259) + SMALL[16:], "found 2147483647"),
        (struct.pack("<4i", 20240328, 2, 260, 260) + SMALL[16:], "field eot_token: expected 256 to 259, found 260"),
        (struct.pack("<4i", 20240328, 2, 260, -1) + SMALL[16:], "field eot_token: expected 256 to 259, found -1"),
        (struct.pack("<4i", 20240328, 2, 260, 258) + SMALL[16:], "token 258: expected <|endoftext|>, found b'hell'"),
        (struct.pack("<4i", 20240328, 2, 259, 258) + SMALL[16:], "bytes for 259 tokens, found"),
        (SMALL + b"\0", "bytes for 260 tokens, found"),
        (table([*BYTES[:255], b"\0", END]), "tokens 0 to 255: expected the 256 bytes, each once, found 255 different"),
        (table([*BYTES, b"hell", END]), "256: expected two tokens before it joined, found b'hell', which is 4"),
        (table([*BYTES, b"he", b"he", END]), "257: expected two tokens before it joined, found b'he', which is 1"),
        (table([*BYTES, b"", END]), "token 256 at byte 1536: length: expected 1 to 14 (the bytes left), found 0"),
    ],
)  # fmt: skip
def test_damaged_llmc_table(data: bytes, part: str) -> None:
    with pytest.raises(DataError) as caught:
        tokenizer_llmc.parse(data, source="t.bin")
    assert str(caught.value).startswith("t.bin: ")
    assert part in str(caught.value)


def test_a_tokenizer_without_an_end_is_not_written_for_llmc() -> None:
    tokens = [chr(code) for code in range(33, 127)]
    with pytest.raises(InvalidError, match=r"expected a token <\|endoftext\|>, found none"):
        pytest.importorskip("tokenizers", reason="the extra `tokenizers` is not installed")
        tokenizer_llmc.to_bytes(JsonTokenizer.from_bpe(tokens, [], "gpt-2"))
