"""sentencepiece models: the same table as tokenizer.bin, and nothing that is not one is taken for it."""

from __future__ import annotations

import random
import struct
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from anellm import tokenizer_spm
from anellm.errors import DataError
from anellm.tokenizer import Tokenizer, load_tokenizer_file


def varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*out, value])


def field(number: int, value: float | bytes) -> bytes:
    if isinstance(value, bytes):
        return varint(number << 3 | 2) + varint(len(value)) + value
    if isinstance(value, float):
        return varint(number << 3 | 5) + struct.pack("<f", value)
    return varint(number << 3) + varint(value)


def message(**fields: int | bytes) -> bytes:
    return b"".join(field(int(number[1:]), value) for number, value in fields.items())


TRAINER = {"_3": 2, "_35": 1, "_40": 0, "_41": 1, "_42": 2}
NORMALIZER = {"_1": b"identity", "_2": b"", "_3": 1, "_4": 0, "_5": 1}


def model(tokenizer: Tokenizer, trainer: dict | None = None, normalizer: dict | None = None) -> bytes:
    kinds = [2, 3, 3, *[6] * 256, *[1] * (tokenizer.vocab_size - 259)]
    parts = []
    for index, (piece, score) in enumerate(zip(tokenizer.pieces, tokenizer.scores, strict=True)):
        text = piece.strip(b"\n") if index in (1, 2) else piece.replace(b" ", "\u2581".encode())
        kind = b"" if kinds[index] == 1 else field(3, kinds[index])  # normal is the default, and left out
        parts.append(field(1, field(1, text) + field(2, score) + kind))
    parts.append(field(2, message(**{**TRAINER, **(trainer or {})})))
    parts.append(field(3, message(**{**NORMALIZER, **(normalizer or {})})))
    return b"".join(parts)


@pytest.fixture(scope="module")
def small() -> Tokenizer:
    shipped = Tokenizer.shipped()
    return Tokenizer(shipped.pieces[:300], shipped.scores[:300])


def test_it_is_the_same_table(tmp_path: Path, small: Tokenizer) -> None:
    path = tmp_path / "tokenizer.model"
    path.write_bytes(model(small))
    found = load_tokenizer_file(path)
    assert found.sha256 == small.sha256
    assert list(found.files()) == ["tokenizer.bin"]
    assert load_tokenizer_file(tmp_path).sha256 == small.sha256


def test_llama2(data_dir: Path) -> None:
    folder = data_dir / "tokenizers" / "llama2"
    found = load_tokenizer_file(folder / "tokenizer.model")
    assert found.to_bytes() == (folder / "tokenizer.bin").read_bytes()


def test_equals_the_package(data_dir: Path) -> None:
    spm = pytest.importorskip("sentencepiece", reason="sentencepiece is not installed: nothing to compare with")
    path = data_dir / "tokenizers" / "llama2" / "tokenizer.model"
    theirs, ours = spm.SentencePieceProcessor(model_file=str(path)), load_tokenizer_file(path)
    text = (data_dir / "text" / "tinystories" / "v2_gpt4_train_first10k_lines.txt").read_text(encoding="utf-8")
    cases = text.split("\n")[:400] + [
        "  two  spaces ",
        "\t\r\n",
        "naïve — “q” 日本語 🦙\u200d",
        "ﬁ Ａ é e\u0301",
        "<s></s><unk>",
    ]
    for case in cases:
        assert ours.encode(case) == [1, *theirs.encode(case)]


@pytest.mark.parametrize(
    ("trainer", "normalizer", "expected"),
    [
        ({"_3": 1}, {}, "model_type: expected BPE, found 'UNIGRAM'"),
        ({"_3": 77}, {}, "model_type: expected BPE, found 77"),
        ({"_24": 1}, {}, "treat_whitespace_as_suffix: expected 0, found 1"),
        ({"_41": 5}, {}, "bos_id: expected 1, found 5"),
        ({"_42": (1 << 64) - 1}, {}, "eos_id: expected 2"),
        ({}, {"_2": b"xyz"}, "precompiled_charsmap: expected none, found 3 bytes"),
        ({}, {"_3": 0}, "add_dummy_prefix: expected 1, found 0"),
        ({}, {"_4": 1}, "remove_extra_whitespaces: expected 0, found 1"),
    ],
)
def test_other_kinds_are_refused(small: Tokenizer, trainer: dict, normalizer: dict, expected: str) -> None:
    with pytest.raises(DataError, match=expected):
        tokenizer_spm.parse(model(small, trainer, normalizer))


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (field(1, 5), "piece 0: expected a message, found a number"),
        (field(1, field(1, b"a") + field(9, 1)), "piece 0: expected text, score or kind, found field 9"),
        (field(1, field(1, b"\xff")), "piece 0: expected UTF-8 text, found byte 0xff"),
        (field(2, 3), "field 2: expected a message, found wire type 0"),
        (b"\x0a\xff\xff\xff\xff\x0f" + b"a", "field 1: expected 4294967295 bytes, found 1 before the end"),
        (b"\x0a" + b"\xff" * 12, "expected a number of at most 64 bits"),
        (b"\x0b\x01", "wire type: expected 0, 1, 2 or 5, found 3"),
        (b"", "model_type: expected BPE"),
        (field(2, message(_3=2)) + field(3, message(_4=0)), "expected at least 259 tokens"),
    ],
)
def test_bad_bytes(data: bytes, expected: str) -> None:
    with pytest.raises(DataError, match=expected):
        tokenizer_spm.parse(data)


def test_kinds_of_pieces(small: Tokenizer) -> None:
    texts = [piece.decode() for piece in small.pieces]
    kinds = [2, 3, 3, *[6] * 256, *[1] * 41]
    control = tokenizer_spm.from_pieces([*texts, "<|x|>"], [*small.scores, 0.0], [*kinds, 3], source="t")
    assert 300 not in control.encode("<|x|>")  # a control token is never made of text
    for at, kind in ((1, 1), (5, 1), (299, 4)):
        with pytest.raises(DataError, match=f"t: token {at}: kind: expected"):
            tokenizer_spm.from_pieces(texts, small.scores, [*kinds[:at], kind, *kinds[at + 1 :]], source="t")
    with pytest.raises(DataError, match="found 300 tokens, 300 scores, 1 kinds"):
        tokenizer_spm.from_pieces(texts, small.scores, [1], source="t")


def test_cut_and_flipped(small: Tokenizer) -> None:
    data = model(small)
    whole = tokenizer_spm.parse(data)
    for size in [*range(200), *range(200, len(data), 41)]:
        with pytest.raises(DataError):
            tokenizer_spm.parse(data[:size])
    rng = random.Random(2)
    for _ in range(500):
        broken = bytearray(data)
        broken[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        try:
            found = tokenizer_spm.parse(bytes(broken))
        except DataError:
            continue
        assert found.vocab_size <= whole.vocab_size
        assert found.decode(found.encode("the king")) is not None


@given(st.binary(max_size=200))
@settings(max_examples=300)
def test_any_bytes(data: bytes) -> None:
    with pytest.raises(DataError):
        tokenizer_spm.parse(data)
