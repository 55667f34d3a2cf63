"""A token a character: nanoGPT's vocabulary, its file, and characters that it lacks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from anellm.errors import DataError, InvalidError
from anellm.tokenizer import load_tokenizer_file
from anellm.tokenizer_char import CharTokenizer

TEXT = "hello\nworld \u00fc\U0001f642"


def test_ids_are_places_among_the_sorted_characters() -> None:
    made = CharTokenizer.learn(["hello\n", "world \u00fc\U0001f642"])
    assert "".join(made.characters) == "".join(sorted(set(TEXT)))
    assert made.encode("lo\n") == [made.characters.index(char) for char in "lo\n"]
    assert made.decode(made.encode(TEXT)) == TEXT
    assert made.vocab_size == len(set(TEXT))
    assert (made.bos_id, made.eos_id, made.separator_id, made.add_bos, made.stop_ids) == (
        None, None, None, False, frozenset())  # fmt: skip
    assert made.count_bytes(made.encode(TEXT)) == len(TEXT.encode())
    assert made.token_dtype.name == "uint16"


def test_tinyshakespeare_has_nanogpts_vocabulary(data_dir: Path) -> None:
    text = (data_dir / "text" / "tinyshakespeare" / "input.txt").read_text(encoding="utf-8")
    made = CharTokenizer.learn([text])
    assert made.characters[:13] == tuple("\n !$&',-.3:;?")  # what nanoGPT's prepare.py prints, 65 in all
    assert made.vocab_size == 65
    ids = made.encode_documents(text)
    assert (ids.size, int(ids.size * 0.9)) == (1_115_394, 1_003_854)
    assert made.decode(ids) == text


@given(st.text(min_size=1, max_size=60))
def test_any_text_comes_back(text: str) -> None:
    made = CharTokenizer.learn([text])
    assert made.decode(made.encode(text)) == text
    again = CharTokenizer.from_bytes(made.to_bytes())
    assert (again.characters, again.sha256) == (made.characters, made.sha256)


def test_it_is_kept_as_a_tokenizer_json_that_the_package_reads(tmp_path: Path) -> None:
    made = CharTokenizer.learn([TEXT])
    assert list(made.files()) == ["tokenizer.json"]
    made.save(tmp_path / "tokenizer.json")
    found = load_tokenizer_file(tmp_path)
    assert isinstance(found, CharTokenizer)
    assert found.sha256 == made.sha256
    tokenizers = pytest.importorskip("tokenizers", reason="the extra `tokenizers` is not installed")
    other = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    assert other.encode(TEXT).ids == made.encode(TEXT)
    assert other.decode(made.encode(TEXT)) == TEXT


def test_a_character_that_it_lacks() -> None:
    made = CharTokenizer.learn(["abc\n"], source="abc.txt")
    with pytest.raises(InvalidError) as caught:
        made.encode("cab\u00fcx")
    assert str(caught.value) == (
        "text: expected one of the 4 characters of abc.txt, found '\u00fc' (U+00FC) at character 3"
    )
    with pytest.raises(InvalidError, match="lone surrogate"):
        made.encode("a\ud800")
    with pytest.raises(InvalidError, match="no token that ends a text"):
        made.encode("a", eos=True)


def test_a_prompt_of_nothing_is_a_lines_end() -> None:
    assert CharTokenizer.learn(["b\na"]).encode_prompt("") == [0]
    assert CharTokenizer.learn(["b a\n"]).encode_prompt("a") == [2]
    assert CharTokenizer.learn(["ba"]).encode_prompt("") == [0]


def test_nothing_to_learn() -> None:
    with pytest.raises(DataError, match="expected at least one character, found none"):
        CharTokenizer.learn([""])
    for bad, part in (
        (["a", ""], "token 1: expected one character"),
        (["ab"], "token 0: expected one character, found 'ab'"),
        (["a", "a"], "token 1: expected each once, found 'a' as 0"),
        (["\ud800"], "token 0: expected one character"),
    ):
        with pytest.raises(DataError, match=part):
            CharTokenizer(bad)


@pytest.mark.parametrize(
    ("vocab", "part"),
    [
        ({"a": 0, "b": 2}, "token 'b': id: expected 0 to 1, found 2"),
        ({"a": 0, "b": -1}, "token 'b': id: expected 0 to 1, found -1"),
        ({"a": 0, "b": True}, "token 'b': id: expected 0 to 1, found True"),
        ({"a": 0, "b": "1"}, "token 'b': id: expected 0 to 1, found 1"),
        ({"a": 0, "b": 0}, "token 'b': id 0: also of 'a'"),
    ],
)
def test_damaged(tmp_path: Path, vocab: dict[str, Any], part: str) -> None:
    values = json.loads(CharTokenizer(["a"]).to_bytes())
    values["model"]["vocab"] = vocab
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(values), encoding="utf-8")
    with pytest.raises(DataError) as caught:
        load_tokenizer_file(path)
    assert str(path) in str(caught.value)
    assert part in str(caught.value)
    with pytest.raises(DataError, match=r"expected a tokenizer\.json without merges"):
        CharTokenizer.from_bytes(b"{}")
