"""tokenizer.json through the tokenizers package: recorded ids, parity with the exact encoder, rules, damage."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from anellm.byte_level import byte_alphabet
from anellm.errors import DataError, InvalidError, UnavailableError
from anellm.tokenizer import Tokenizer, find_tokenizer_file, load_tokenizer_file
from anellm.tokenizer_json import _PRE_TOKENIZERS, JsonTokenizer

pytest.importorskip("tokenizers", reason="the extra `tokenizers` is not installed: pip install 'anellm[tokenizers]'")

ALPHABET = sorted(byte_alphabet(), key=lambda char: (ord(char) >= 256, ord(char)))
MERGES = ["h e", "l l", "he ll", "hell o", "Ġ hello", "1 2", "< |", "| >", "Ġ Ġ", "Ċ Ċ"]
TOKENS = ["<|endoftext|>", "<s>", *ALPHABET, *(merge.replace(" ", "") for merge in MERGES), "<tool>"]


def small(pre: str = "gpt-2", **more: Any) -> JsonTokenizer:
    options: dict[str, Any] = {"bos_id": 1, "eos_id": 0, "user_ids": [len(TOKENS) - 1]}
    return JsonTokenizer.from_bpe(TOKENS, MERGES, pre, **{**options, **more})


@pytest.fixture(scope="module")
def gpt2(data_dir: Path) -> JsonTokenizer:
    """Return GPT-2's tokenizer, made of its merges alone."""
    lines = (data_dir / "tokenizers" / "gpt2" / "vocab.bpe").read_text(encoding="utf-8").split("\n")
    merges = [line for line in lines[1:] if line]
    tokens = [*ALPHABET, *(merge.replace(" ", "") for merge in merges), "<|endoftext|>"]
    return JsonTokenizer.from_bpe(tokens, merges, "gpt-2", bos_id=50256, eos_id=50256, add_bos=False, source="gpt2")


# ---- what it gives


def test_gpt2_gives_the_recorded_ids(data_dir: Path, gpt2: JsonTokenizer) -> None:
    cases = json.loads((data_dir / "goldens" / "gpt2_bpe_golden.json").read_text(encoding="utf-8"))
    assert len(cases) > 5
    for case in cases:
        assert gpt2.encode(case["text"]) == case["ids"]
        assert gpt2.decode(case["ids"]) == case["text"]
    assert (gpt2.vocab_size, gpt2.bos_id, gpt2.add_bos, gpt2.separator_id) == (50257, 50256, False, 50256)
    assert 50256 not in gpt2.encode("a<|endoftext|>b")
    assert gpt2.decode(gpt2.encode("a<|endoftext|>b")) == "a<|endoftext|>b"


def test_gpt2_documents_end_with_the_separator(data_dir: Path, gpt2: JsonTokenizer) -> None:
    text = (data_dir / "text" / "tinystories" / "sample_val.txt").read_text(encoding="utf-8")
    ids = gpt2.encode_documents(text)
    assert ids.dtype.name == "uint16"
    assert ids.size == 622_159  # of the published shard this text was decoded from
    assert int((ids == 50256).sum()) == 3117
    assert ids[-1] == 50256


def llama_json(tokenizer: Tokenizer) -> bytes:
    """Return a tokenizer.json of Llama-2's kind with the vocabulary of a tokenizer.bin."""
    texts = [piece.decode().strip("\n") if i < 3 else piece.decode().replace(" ", "\u2581")
             for i, piece in enumerate(tokenizer.pieces)]  # fmt: skip
    ids = {text: index for index, text in enumerate(texts)}
    pairs = []
    for index in range(259, len(texts)):
        text = texts[index]
        splits = [(text[:at], text[at:]) for at in range(1, len(text))]
        pairs += [
            (ids[a], ids[b], index, a, b) for a, b in splits if a in ids and b in ids and min(ids[a], ids[b]) > 258
        ]
    merges = [[a, b] for *_, a, b in sorted(pairs, key=lambda pair: (-tokenizer.scores[pair[2]], pair[2]))]
    return json.dumps({
        "version": "1.0",
        "truncation": {"max_length": 5, "strategy": "LongestFirst", "stride": 0, "direction": "Right"},
        "padding": None,
        "added_tokens": [
            {"id": i, "content": texts[i], "single_word": False, "lstrip": False, "rstrip": False, "normalized": False,
             "special": True} for i in range(3)
        ],
        "normalizer": {"type": "Sequence", "normalizers": [
            {"type": "Prepend", "prepend": "\u2581"},
            {"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"}]},
        "pre_tokenizer": None,
        "post_processor": {"type": "TemplateProcessing",
            "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
            "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}}},
        "decoder": {"type": "Sequence", "decoders": [
            {"type": "Replace", "pattern": {"String": "\u2581"}, "content": " "}, {"type": "ByteFallback"},
            {"type": "Fuse"}, {"type": "Strip", "content": " ", "start": 1, "stop": 0}]},
        "model": {"type": "BPE", "dropout": None, "unk_token": "<unk>", "continuing_subword_prefix": None,
            "end_of_word_suffix": None, "fuse_unk": True, "byte_fallback": True, "vocab": ids, "merges": merges},
    }).encode()  # fmt: skip


@pytest.fixture(scope="module")
def pair() -> tuple[Tokenizer, JsonTokenizer]:
    """Return the shipped tokenizer and the same vocabulary as a tokenizer.json."""
    exact = Tokenizer.shipped()
    return exact, JsonTokenizer(llama_json(exact))


@given(st.text(max_size=60) | st.text(alphabet="the king<s>/unk|0x41 \n'", max_size=60))
@settings(max_examples=200)
def test_llama_kind_equals_the_exact_encoder(pair: tuple[Tokenizer, JsonTokenizer], text: str) -> None:
    exact, ours = pair
    ids = exact.encode(text)
    assert ours.encode(text) == ids
    assert ours.decode(ids) == text
    assert ours.count_bytes(ids) == exact.count_bytes(ids)


def test_llama_kind_has_the_same_rules(pair: tuple[Tokenizer, JsonTokenizer]) -> None:
    exact, ours = pair
    for name in ("bos_id", "eos_id", "add_bos", "vocab_size", "token_dtype"):
        assert getattr(ours, name) == getattr(exact, name)
    assert {1, 2} <= ours.stop_ids
    text = "First story.\n<|endoftext|>\nSecond."
    assert ours.encode_documents(text).tolist() == exact.encode_documents(text).tolist()
    assert ours.encode_prompt("") == exact.encode_prompt("") == [1]


@pytest.mark.parametrize("pre", [*_PRE_TOKENIZERS, "starcoder", "llama3"])
@given(text=st.text(max_size=40) | st.text(alphabet="hello 12\n\t<|endoftext|>s<tool>é", max_size=40))
@settings(max_examples=60)
def test_byte_level_gives_back_every_text(pre: str, text: str) -> None:
    tokenizer = small(pre)
    ids = tokenizer.encode(text, bos=False)
    if pre != "qwen2":  # which normalises to NFC
        assert tokenizer.decode(ids) == text
        assert tokenizer.count_bytes(ids) == len(text.encode())
        stream = tokenizer.stream()
        assert "".join(stream.feed(i) for i in ids) + stream.flush() == text
    assert not {0, 1} & set(ids)


def test_how_text_is_cut() -> None:
    def words(pre: str, text: str) -> list[str]:
        tokenizer = small(pre)
        return [tokenizer.decode([i]) for i in tokenizer.encode(text, bos=False)]

    assert words("gpt-2", "hello hello12  12") == ["hello", " hello", "12", " ", " ", "12"]
    assert words("smollm", "hello hello12") == ["hello", " hello", "1", "2"]  # digits one by one
    assert words("qwen2", "hello12") == ["hello", "1", "2"]
    assert words("llama-bpe", "hello1212") == ["hello", "12", "1", "2"]  # at most three together
    assert words("gpt-2", "a<tool>b") == ["a", "<tool>", "b"]  # a user's token is found in text
    assert words("gpt-2", "a\n\nb") == ["a", "\n", "\n", "b"]
    with pytest.raises(DataError, match="pre-tokenizer: expected one of gpt-2, smollm, .*, found 'klingon'"):
        small("klingon")


def test_merges_cannot_spell_a_special_token() -> None:
    tokens = [*TOKENS, "ab", "abc"]
    tokenizer = JsonTokenizer.from_bpe(tokens, [*MERGES, "a b", "ab c"], "gpt-2", control_ids=[len(tokens) - 1])
    ids = tokenizer.encode("xabc abcabc")
    assert len(tokens) - 1 not in ids
    assert tokenizer.decode(ids) == "xabc abcabc"


# ---- how texts begin and end


def test_rules_of_a_gguf() -> None:
    plain = small()
    assert (plain.add_bos, plain.separator_id, plain.stop_ids) == (False, 0, {0, 1})
    assert plain.encode("12") == [TOKENS.index("12")]
    assert plain.encode("12", bos=True, eos=True) == [1, TOKENS.index("12"), 0]
    assert plain.encode_documents("12\n<|endoftext|>\n12").tolist() == [TOKENS.index("12"), 0] * 2
    assert plain.encode_prompt("") == [0]
    begins = small(add_bos=True)
    assert begins.encode("12") == [1, TOKENS.index("12")]
    assert begins.encode_documents("12\n<|endoftext|>\n12").tolist() == [1, TOKENS.index("12")] * 2
    assert begins.encode_prompt("") == [1]
    assert small("llama-bpe").add_bos is True
    assert small("llama-bpe", add_bos=False).add_bos is False
    none = JsonTokenizer.from_bpe(ALPHABET, [], "gpt-2", add_bos=True)
    assert (none.bos_id, none.eos_id, none.add_bos, none.separator_id, none.stop_ids) == (
        None,
        None,
        False,
        None,
        set(),
    )
    for ends in ({"bos": True}, {"eos": True}):
        with pytest.raises(InvalidError, match="no token that"):
            none.encode("a", **ends)
    with pytest.raises(InvalidError, match="prompt: expected text"):
        none.encode_prompt("")
    assert none.encode_documents("a\n<|endoftext|>\nb").tolist() == [ALPHABET.index("a"), ALPHABET.index("b")]


def test_rules_of_tokenizer_config() -> None:
    data = small(bos_id=None, eos_id=None, control_ids=[0, 1]).to_bytes()

    def rules(config: dict[str, Any] | None) -> tuple[Any, ...]:
        found = JsonTokenizer(data, None if config is None else json.dumps(config).encode())
        return found.bos_id, found.eos_id, found.add_bos

    assert rules(None) == (None, 0, False)  # <|endoftext|> by its name
    assert rules({"bos_token": "<s>"}) == (1, 0, False)
    assert rules({"bos_token": "<s>", "add_bos_token": True}) == (1, 0, True)
    assert rules({"bos_token": {"content": "<s>"}, "eos_token": "he", "add_bos_token": True}) == (
        1,
        TOKENS.index("he"),
        True,
    )
    assert rules({"bos_token": None, "eos_token": "absent", "add_bos_token": True}) == (None, 0, False)
    template = json.loads(llama_json(Tokenizer.shipped()))
    found = JsonTokenizer(json.dumps(template).encode(), b'{"add_bos_token": false}')
    assert (found.bos_id, found.add_bos) == (1, False)
    template["post_processor"]["single"].insert(0, {"SpecialToken": {"id": "<s>", "type_id": 0}})
    with pytest.raises(DataError, match=r"post_processor: expected at most one token before a text, found \[1, 1\]"):
        JsonTokenizer(json.dumps(template).encode())


def test_files_and_folders(tmp_path: Path) -> None:
    tokenizer = small(add_bos=True)
    assert list(tokenizer.files()) == ["tokenizer.json", "tokenizer_config.json"]
    for name, content in tokenizer.files().items():
        (tmp_path / name).write_bytes(content)
    for path in (tmp_path, tmp_path / "tokenizer.json"):
        again = load_tokenizer_file(path)
        assert isinstance(again, JsonTokenizer)
        assert (again.sha256, again.bos_id, again.add_bos, again.files()) == (
            tokenizer.sha256,
            1,
            True,
            tokenizer.files(),
        )
    Tokenizer.shipped().save(tmp_path / "tokenizer.bin")
    assert find_tokenizer_file(tmp_path) == tmp_path / "tokenizer.bin"  # what needs no package comes first
    assert isinstance(load_tokenizer_file(tmp_path / "tokenizer.bin"), Tokenizer)
    with pytest.raises(InvalidError, match="lone surrogate"):
        tokenizer.encode("a\ud800")


# ---- damage


def changed(**changes: Any) -> bytes:
    values = json.loads(small().to_bytes())
    for path, value in changes.items():
        *parents, last = path.split("__")
        node = values
        for name in parents:
            node = node[name]
        node[last] = value
    return json.dumps(values).encode()


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "expected JSON"),
        (b"[]", "expected a JSON object, found list"),
        (b"{}", "model.type: expected BPE, found None"),
        (b"[" * 100_000, "expected JSON"),
        (changed(model__type="Unigram"), "model.type: expected BPE, found 'Unigram'"),
        (changed(model__vocab=[]), "model.vocab: expected an object with tokens, found list"),
        (changed(model__vocab={}), "model.vocab: expected"),
        (changed(model__vocab={"a": 1 << 40}), "token 'a': id: expected 0 to"),
        (changed(model__vocab={"a": -1}), "token 'a': id: expected 0 to"),
        (changed(model__vocab={"a": True}), "token 'a': id: expected 0 to"),
        (changed(model__vocab={"a": 5, "b": 5}, added_tokens=[]), "token 'b': id 5: also of 'a'"),
        (changed(model__vocab={"\u0416": 0}, model__merges=[], added_tokens=[]), "byte-level alphabet, found '\u0416'"),
        (changed(model__merges=["x y z"]), r"model.merges\[0\]: expected two tokens, found 'x y z'"),
        (changed(model__merges=["q zebra"]), r"model.merges\[0\]: expected tokens, found 'zebra'"),
        (changed(model__merges=[["h", "h"]]), r"model.merges\[0\]: expected tokens, found 'hh'"),
        (changed(added_tokens={"a": 1}), "added_tokens: expected a list, found dict"),
        (changed(added_tokens=[{"id": 0}]), r"added_tokens\[0\]: expected an id and a content"),
        (changed(added_tokens=[{"id": 1 << 30, "content": "x"}]), r"added_tokens\[0\]: expected an id"),
        (changed(added_tokens=[{"id": 7, "content": "he"}]), r"added_tokens\[0\]: id: expected \d+, found 7"),
        (changed(decoder={"type": "WordPiece"}), "decoder: expected ByteLevel, or .*, found WordPiece"),
        (changed(decoder=None, pre_tokenizer=None), "decoder: expected ByteLevel, or .*, found none"),
        (changed(pre_tokenizer={"type": "Nonsense"}), "expected a tokenizer.json, found "),
    ],
)
def test_bad_files(tmp_path: Path, data: bytes, message: str) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_bytes(data)
    with pytest.raises(DataError, match=message) as error:
        JsonTokenizer.from_file(path)
    assert str(path) in str(error.value)
    assert len(str(error.value)) < 1000


def test_cut_anywhere(tmp_path: Path) -> None:
    data = small().to_bytes()
    path = tmp_path / "tokenizer.json"
    for size in range(2, len(data) - 2, 97):
        path.write_bytes(data[:size])
        with pytest.raises(DataError, match=r"tokenizer\.json"):
            load_tokenizer_file(path)
    (tmp_path / "tokenizer_config.json").write_bytes(b"{")
    path.write_bytes(data)
    with pytest.raises(DataError, match=r"tokenizer_config\.json"):
        load_tokenizer_file(path)


@given(st.integers(0, 10_000), st.integers(0, 255))
@settings(max_examples=150)
def test_any_byte_changed(at: int, value: int) -> None:
    data = bytearray(small().to_bytes())
    data[at % len(data)] = value
    try:
        tokenizer = JsonTokenizer(bytes(data))
        assert all(0 <= i < tokenizer.vocab_size for i in tokenizer.encode("hello <s> 12"))
    except DataError as error:
        assert "tokenizer.json" in str(error)


@pytest.mark.parametrize("ends", [{"bos_id": -1}, {"eos_id": len(TOKENS)}, {"control_ids": [10**9]}])
def test_bad_parts(ends: dict[str, Any]) -> None:
    with pytest.raises(DataError, match=rf"expected 0 to {len(TOKENS) - 1}, found"):
        small(**ends)
    with pytest.raises(DataError, match="token 2: expected each once, found 'a' as 0"):
        JsonTokenizer.from_bpe(["a", "b", "a"], [])


def test_without_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    data = small().to_bytes()
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(UnavailableError, match=r"pip install 'anellm\[tokenizers\]'"):
        JsonTokenizer(data)
