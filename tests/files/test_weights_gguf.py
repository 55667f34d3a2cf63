"""GGUF files: read to the bit, their tokenizers too, and refused by name where damaged or not supported."""

from __future__ import annotations

import struct
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from modelfiles import (
    ARRAY,
    BOOL,
    F32,
    F64,
    GQA,
    I8,
    I32,
    QWEN,
    SMALL,
    STRING,
    TYPES,
    U8,
    U32,
    U64,
    bit_flips,
    cuts,
    field,
    gguf_bytes,
    gguf_fields,
    gguf_tensors,
    info,
    message,
    random_params,
    read,
    same,
    survives,
    text,
    write_gguf,
)

from anellm import errors, gguf_file, weights
from anellm.config import ModelConfig
from anellm.gguf_file import GgufFile
from anellm.model import Model
from anellm.tokenizer import Tokenizer, load_tokenizer_file

WIDE = {**SMALL, "dim": 64, "hidden_dim": 96, "n_heads": 4, "n_kv_heads": 2, "vocab_size": 40}
LIMIT = 4 << 20  # of memory for files of a few kilobytes


@pytest.fixture(scope="module")
def gguf() -> Any:
    """Return the gguf package."""
    return pytest.importorskip("gguf", reason="quantised GGUF files need the extra 'gguf', which is not installed")


# ---- what is read --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("values", [SMALL, GQA, QWEN, {**QWEN, "tie_embeddings": False}])
def test_read(tmp_path: Path, values: dict[str, Any]) -> None:
    config = ModelConfig(**values)
    params = random_params(config)
    write_gguf(tmp_path / "a.gguf", config, params)
    found, tensors = read(tmp_path / "a.gguf")
    assert found == config
    assert same(tensors, params)


@pytest.mark.parametrize("kind", ["F16", "BF16", "Q8_0", "Q4_0", "Q4_1"])
def test_types(tmp_path: Path, kind: str) -> None:
    if kind.startswith("Q"):
        pytest.importorskip("gguf", reason="quantised GGUF files need the extra 'gguf', which is not installed")
    config = ModelConfig(**WIDE)
    params = random_params(config)
    expected = write_gguf(tmp_path / "a.gguf", config, params, kind)
    assert sum(not np.array_equal(expected[k], params[k]) for k in params) == 2 * 7 + 1
    _, tensors = read(tmp_path / "a.gguf")
    assert list(tensors) == list(expected)
    for name, array in expected.items():
        # The low halves of Q4_1 are scale * code + least: the order of two roundings is the decoder's own.
        np.testing.assert_allclose(tensors[name], array, rtol=0, atol=1e-6 if kind == "Q4_1" else 0, err_msg=name)
        assert np.abs(array - params[name]).max() < {"F16": 3e-3, "BF16": 4e-2, "Q8_0": 3e-2}.get(kind, 0.6)


def test_what_the_package_writes(tmp_path: Path, gguf: Any) -> None:
    """A file by another hand than ours."""
    config = ModelConfig(**WIDE)
    params = random_params(config)
    writer = gguf.GGUFWriter(tmp_path / "a.gguf", "llama")
    writer.add_context_length(config.max_seq_len)
    writer.add_embedding_length(config.dim)
    writer.add_block_count(config.n_layers)
    writer.add_feed_forward_length(config.hidden_dim)
    writer.add_head_count(config.n_heads)
    writer.add_head_count_kv(config.n_kv_heads)
    writer.add_layer_norm_rms_eps(config.norm_eps)
    for name, array in gguf_tensors(config, params).items():
        writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    found, tensors = read(tmp_path / "a.gguf")
    assert found == config
    assert same(tensors, params)


@pytest.fixture(scope="module")
def stories(data_dir: Path) -> Path:
    """Return the folder of a real model in every format."""
    path = data_dir / "weights" / "stories260K"
    if not path.is_dir():
        pytest.skip(f"{path} is missing")
    return path


def logits(path: Path) -> np.ndarray:
    model = Model.from_pretrained(path, device="cpu")
    tokens = np.random.default_rng(0).integers(0, model.config.vocab_size, (4, 128)).astype(np.int32)
    return model.forward(tokens)


def test_every_form_of_a_real_model_is_the_same(stories: Path) -> None:
    expected = logits(stories / "stories260K.bin")
    for name in ("stories260K.v1.bin", ".", "stories260K.f32.gguf"):
        np.testing.assert_allclose(logits(stories / name), expected, rtol=0, atol=1e-5, err_msg=name)
    config, tensors = read(stories / "stories260K.bin")
    for name in ("stories260K.v1.bin", ".", "stories260K.f32.gguf"):
        other, found = read(stories / name)
        assert other == config, name
        assert same(found, tensors), name


def test_quantised_forms_of_a_real_model(stories: Path, data_dir: Path, gguf: Any) -> None:
    """Each weight is within half a step of the original, and the loss hardly moves."""
    import json

    golden = json.loads((data_dir / "goldens" / "goldens_stories260K.json").read_text())
    ids = np.array([golden["tokens"]], np.int32)
    tokens, targets = np.ascontiguousarray(ids[:, :-1]), np.ascontiguousarray(ids[:, 1:])
    _, original = read(stories / "stories260K.bin")
    # Losses as the weights decoded by hand give them (test_quantised_weights below and in test_weights_llama2c.py).
    for name, loss in (("stories260K.q8_0.gguf", 1.338847), ("stories260K.v2_gs4.bin", 1.336680)):
        config, tensors = read(stories / name)
        for key, array in tensors.items():
            if array.ndim == 1:
                assert np.array_equal(array, original[key]), key
                continue
            group = 4 if name.endswith(".bin") else 32
            if array.shape[1] % group:
                assert np.array_equal(array, original[key]), key
                continue
            steps = np.abs(original[key].reshape(-1, group)).max(1, keepdims=True) / 127
            # 0.1 of a step more for the scale, which a GGUF file keeps in fp16
            assert (np.abs((array - original[key]).reshape(-1, group)) <= 0.6 * steps + 1e-9).all(), key
        model = Model(config, "cpu", seed=None)
        for key, array in tensors.items():
            model.params[key][...] = array
        model.weights_changed()
        assert model.forward(tokens, targets, training=False) == pytest.approx(loss, abs=1e-5), name


def test_quantised_weights(stories: Path, gguf: Any) -> None:
    """Q8_0 decoded by hand: for each 32 weights an fp16 scale and 32 int8."""
    path = stories / "stories260K.q8_0.gguf"
    file = GgufFile(path)
    tensor = file.tensors["blk.3.ffn_gate.weight"]
    assert (tensor.type_name, tensor.shape) == ("Q8_0", (172, 64))
    blocks = np.frombuffer(path.read_bytes(), np.dtype([("scale", "<f2"), ("codes", "i1", 32)]), 172 * 2, tensor.begin)
    expected = blocks["codes"].astype(np.float32) * blocks["scale"].astype(np.float32)[:, None]
    _, tensors = read(path)
    assert np.array_equal(tensors["model.layers.3.mlp.gate_proj.weight"], expected.reshape(172, 64))


def test_tokenizer_of_a_real_model(stories: Path, data_dir: Path) -> None:
    """The pieces and scores in the GGUF file are those of its tokenizer.bin, byte for byte."""
    path = stories / "stories260K.f32.gguf"
    found = load_tokenizer_file(path)
    assert isinstance(found, Tokenizer)
    assert found.to_bytes() == (data_dir / "tokenizers" / "tok512" / "tok512.bin").read_bytes()
    assert weights.load_pretrained(path).tokenizer_path == path
    config = weights.load_pretrained(path).config
    other = weights.load_tokenizer(path, config)
    assert other is not None
    assert other.sha256 == found.sha256


def test_without_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only quantised files need it; what is missing is named before anything is read."""
    monkeypatch.setitem(sys.modules, "gguf", None)
    config = ModelConfig(**WIDE)
    params = random_params(config)
    write_gguf(tmp_path / "a.gguf", config, params)
    assert same(read(tmp_path / "a.gguf")[1], params)
    write_gguf(tmp_path / "b.gguf", config, params, "Q8_0")
    with pytest.raises(errors.UnavailableError, match=r"token_embd.weight is Q8_0.*pip install 'anellm\[gguf\]'"):
        weights.load_pretrained(tmp_path / "b.gguf")


def test_a_failing_package_is_a_data_error(tmp_path: Path, gguf: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object) -> None:
        raise ValueError("broken \x1b[2J block")

    config = ModelConfig(**WIDE)
    write_gguf(tmp_path / "a.gguf", config, random_params(config), "Q8_0")
    monkeypatch.setattr(gguf, "dequantize", fails)
    assert "tensor token_embd.weight: the gguf package cannot decode Q8_0: ValueError" in message(tmp_path / "a.gguf")


def test_reading_takes_the_memory_of_a_tensor_or_two(tmp_path: Path, gguf: Any) -> None:
    import tracemalloc

    config = ModelConfig(dim=384, hidden_dim=384, n_layers=4, n_heads=4, vocab_size=384, max_seq_len=8)
    write_gguf(tmp_path / "a.gguf", config, random_params(config), "Q8_0")
    tracemalloc.start()
    try:
        for _ in weights.load_pretrained(tmp_path / "a.gguf").tensors:
            pass
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    # A tensor held by the reader, the next one and its rows in order, and the decoder's temporaries for a slice.
    assert peak < 3.5 * 4 * 384 * 384 + 14 * gguf_file._CHUNK_BYTES < 4 * 384 * 384 * 29


def test_fp32_tensors_are_views(tmp_path: Path) -> None:
    config = ModelConfig(**SMALL)
    write_gguf(tmp_path / "a.gguf", config, random_params(config))
    for name, array in weights.load_pretrained(tmp_path / "a.gguf").tensors:
        assert array.flags.aligned
        assert array.flags.owndata == name.endswith(("q_proj.weight", "k_proj.weight")) or array.base is not None


# ---- tokenizers ----------------------------------------------------------------------------------------------------

PIECES = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), "\u2581", "a", "b", "\u2581a", "ab", "<x>"]
KINDS = [2, 3, 3, *[6] * 256, 1, 1, 1, 1, 1, 3]
SCORES = [0.0] * 259 + [-1.0, -2.0, -3.0, -4.0, -5.0, 0.0]


def vocabulary(**changes: Any) -> dict[str, tuple[int, Any]]:
    """Return the fields of a sentencepiece vocabulary; a change of None leaves a field out."""
    values: dict[str, Any] = {
        "model": (STRING, "llama"),
        "tokens": (ARRAY, (STRING, PIECES)),
        "scores": (ARRAY, (F32, SCORES)),
        "token_type": (ARRAY, (I32, KINDS)),
        "bos_token_id": (U32, 1),
        **changes,
    }
    return {f"tokenizer.ggml.{key}": value for key, value in values.items() if value is not None}


def model_with(path: Path, fields: dict[str, tuple[int, Any]], vocab_size: int = len(PIECES)) -> Path:
    """Write a small model with a tokenizer."""
    config = ModelConfig(**{**SMALL, "vocab_size": vocab_size})
    write_gguf(path, config, random_params(config), extra=fields)
    return path


def test_sentencepiece(tmp_path: Path) -> None:
    path = model_with(tmp_path / "a.gguf", vocabulary())
    tokenizer = load_tokenizer_file(path)
    assert tokenizer.vocab_size == len(PIECES)
    assert tokenizer.encode("ab") == [1, 262, 261]  # " a" (score -4) before "ab" (-5)
    assert tokenizer.decode([1, 262, 261]) == "ab"
    # A control token is never made from text.
    assert 264 not in tokenizer.encode("<x> </s>")
    assert Tokenizer.from_bytes(tokenizer.to_bytes()).encode("a <x>b") == tokenizer.encode("a <x>b")


def test_user_defined_pieces_are_warned_of(tmp_path: Path) -> None:
    path = model_with(tmp_path / "a.gguf", vocabulary(token_type=(ARRAY, (I32, [*KINDS[:-1], 4]))))
    with pytest.warns(UserWarning, match="1 user-defined tokens"):
        load_tokenizer_file(path)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"model": (STRING, "bert")}, "field tokenizer.ggml.model: expected llama or gpt2, found bert"),
        ({"model": (U32, 1)}, "field tokenizer.ggml.model: expected a string, found int 1"),
        ({"model": None}, "expected a tokenizer"),
        ({"tokens": (ARRAY, (U8, [1, 2]))}, "tokenizer.ggml.tokens: expected an array of strings, found one of uint8"),
        ({"tokens": (STRING, "x")}, "tokenizer.ggml.tokens: expected an array of strings, found str"),
        ({"tokens": (ARRAY, (STRING, PIECES[:5]))}, "token_type: expected 5, found 265"),
        ({"tokens": (ARRAY, (STRING, [])), "token_type": None}, "tokenizer.ggml.scores: expected 0, found 265"),
        ({"scores": None}, "field tokenizer.ggml.scores: expected 265, found none"),
        ({"scores": (ARRAY, (F32, SCORES[1:]))}, "field tokenizer.ggml.scores: expected 265, found 264"),
        ({"scores": (ARRAY, (STRING, ["1"]))}, "expected an array of numbers, found one of strings"),
        ({"scores": (ARRAY, (F32, [*SCORES[:-3], float("nan"), 0.0, 0.0]))}, "nan"),
        ({"token_type": (ARRAY, (I32, KINDS[1:]))}, "token_type: expected 265, found 264"),
        ({"bos_token_id": (U32, 5)}, "tokenizer.ggml.bos_token_id: expected 1, found 5"),
        ({"bos_token_id": (I32, -1)}, "tokenizer.ggml.bos_token_id: expected a whole number"),
        ({"add_space_prefix": (BOOL, 0)}, "add_space_prefix: expected true (not supported), found false"),
        ({"add_space_prefix": (U32, 0)}, "add_space_prefix: expected true or false, found int 0"),
        ({"tokens": (ARRAY, (STRING, [*PIECES[:5], "x", *PIECES[6:]]))}, "token 5: expected the byte token"),
        ({"model": (STRING, "gpt2")}, "field tokenizer.ggml.merges: expected an array of strings"),
        (
            {"model": (STRING, "gpt2"), "merges": (ARRAY, (STRING, [b"\xff"]))},
            "field tokenizer.ggml.merges: expected UTF-8",
        ),
    ],
)
def test_damaged_tokenizer(tmp_path: Path, changes: dict[str, Any], expected: str) -> None:
    path = model_with(tmp_path / "a.gguf", vocabulary(**changes))
    with pytest.raises(errors.DataError) as caught:
        load_tokenizer_file(path)
    assert expected in str(caught.value)
    assert str(path) in str(caught.value)


def test_a_model_without_a_tokenizer(tmp_path: Path) -> None:
    path = model_with(tmp_path / "a.gguf", {})
    assert weights.load_pretrained(path).tokenizer_path is None
    assert weights.load_tokenizer(path, weights.load_pretrained(path).config) is None


def test_a_tokenizer_larger_than_its_model(tmp_path: Path) -> None:
    path = model_with(tmp_path / "a.gguf", vocabulary(), vocab_size=200)
    with pytest.raises(errors.DataError, match="vocab_size: expected at most the 200"):
        weights.load_tokenizer(path, weights.load_pretrained(path).config)


def test_byte_level(tmp_path: Path) -> None:
    """Tokens, merges and control tokens of a GPT-2 kind of vocabulary reach the tokenizer."""
    pytest.importorskip("tokenizers", reason="byte-level tokenizers need the extra 'tokenizers', not installed")
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [value for value in range(256) if value not in printable]
    alphabet = [*(chr(v) for v in printable), *(chr(256 + i) for i in range(len(others)))]
    tokens = ["<|endoftext|>", "<|im_end|>", *alphabet, "he", "\u0120he", "<think>"]
    kinds = [3, 3, *[1] * 258, 4]
    fields = vocabulary(
        model=(STRING, "gpt2"),
        pre=(STRING, "smollm"),
        tokens=(ARRAY, (STRING, tokens)),
        token_type=(ARRAY, (I32, kinds)),
        merges=(ARRAY, (STRING, ["h e", "\u0120 he"])),
        scores=None,
        bos_token_id=(U32, 0),
        eos_token_id=(U32, 1),
        add_bos_token=(BOOL, 0),
    )
    path = model_with(tmp_path / "a.gguf", fields, vocab_size=len(tokens))
    tokenizer = load_tokenizer_file(path)
    assert tokenizer.encode("he he") == [258, 259]
    assert tokenizer.decode([258, 259, 1]) == "he he"
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.add_bos) == (0, 1, False)
    assert {0, 1}.isdisjoint(tokenizer.encode("<|im_end|><|endoftext|>"))
    assert tokenizer.encode("he<think>") == [258, 260]
    fields["tokenizer.ggml.pre"] = (STRING, "martian")
    with pytest.raises(errors.DataError, match="martian"):
        load_tokenizer_file(model_with(tmp_path / "b.gguf", fields, vocab_size=len(tokens)))


# ---- what is refused -----------------------------------------------------------------------------------------------


@pytest.fixture
def small(tmp_path: Path) -> Path:
    """Return a valid file with a tokenizer of a few tokens."""
    config = ModelConfig(**SMALL)
    fields = vocabulary(tokens=(ARRAY, (STRING, PIECES[:11])), scores=(ARRAY, (F32, SCORES[:11])), token_type=None)
    path = tmp_path / "small.gguf"
    write_gguf(path, config, random_params(config), extra=fields)
    ends = [tensor.begin + tensor.n_bytes for tensor in GgufFile(path).tensors.values()]
    path.write_bytes(path.read_bytes()[: max(ends)])  # without the padding behind the last tensor, which may be absent
    read(path)
    return path


def header_bytes(path: Path) -> int:
    """Return where the data of a file begins."""
    return min(tensor.begin for tensor in GgufFile(path).tensors.values())


def test_cut_anywhere(small: Path) -> None:
    data = small.read_bytes()
    n = header_bytes(small)
    path = small.with_name("cut.gguf")
    for length in cuts(n, len(data)):
        path.write_bytes(data[:length])
        found = message(path)
        assert "expected" in found, length
        assert "found" in found, length


@pytest.mark.parametrize("extra", [bytes(17), bytes(32), bytes(4096)])
def test_extra_bytes(small: Path, extra: bytes) -> None:
    small.write_bytes(small.read_bytes() + extra)
    assert "size: expected" in message(small)


def test_last_tensor_may_be_padded(small: Path) -> None:
    """Some writers fill the last tensor's place up to the alignment, others do not."""
    _, expected = read(small)
    size = small.stat().st_size
    assert size % 32 == 16
    for extra in (b"\0", bytes(16)):
        small.write_bytes(small.read_bytes()[:size] + extra)
        assert same(read(small)[1], expected)


def test_bit_flips(small: Path) -> None:
    data = small.read_bytes()
    path = small.with_name("flipped.gguf")
    read_ = 0
    for damaged in bit_flips(data, 500, header_bytes(small), 100):
        path.write_bytes(damaged)
        read_ += survives(path, LIMIT)
    assert 50 < read_ < 550  # some flips only change a weight or a name that is not looked at


def build(
    change: Callable[[dict[str, Any], dict[str, Any]], None] | None = None, **parts: Any
) -> tuple[bytes, ModelConfig]:
    """Return a small file with its fields and tensor descriptions changed."""
    config = ModelConfig(**SMALL)
    fields: dict[str, Any] = dict(gguf_fields(config))
    infos: dict[str, Any] = {}
    data = b""
    for name, array in gguf_tensors(config, random_params(config)).items():
        infos[name] = [name, array.shape, 0, len(data)]
        data += array.tobytes() + bytes(-array.nbytes % 32)
    if change is not None:
        change(fields, infos)
    head = [f if isinstance(f, bytes) else field(key, *f) for key, f in fields.items() if f is not None]
    tails = [i if isinstance(i, bytes) else info(*i) for i in infos.values() if i is not None]
    return gguf_bytes(head, tails, data, **parts), config


NORM = "output_norm.weight"


def _set(key: str, kind: int, value: Any) -> Callable[[dict[str, Any], dict[str, Any]], None]:
    return lambda fields, infos: fields.update({key: (kind, value)})


def _drop(key: str) -> Callable[[dict[str, Any], dict[str, Any]], None]:
    return lambda fields, infos: fields.update({key: None})


def _info(index: int, value: Any, name: str = NORM) -> Callable[[dict[str, Any], dict[str, Any]], None]:
    return lambda fields, infos: infos[name].__setitem__(index, value)


def _raw(part: str, key: str, data: bytes) -> Callable[[dict[str, Any], dict[str, Any]], None]:
    return lambda fields, infos: (fields if part == "fields" else infos).update({key: data})


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (_set("general.architecture", STRING, "mamba"), "general.architecture: expected one of llama, qwen3, found m"),
        (_set("general.architecture", U32, 3), "general.architecture: expected a string, found int 3"),
        (_set("general.architecture", STRING, "\x1b[2J"), r"'\x1b[2J'"),
        (_set("general.architecture", STRING, b"\xff\xfe"), "field general.architecture: expected UTF-8"),
        (_drop("general.architecture"), "general.architecture: expected one of llama, qwen3, found None"),
        (_drop("llama.embedding_length"), "llama.embedding_length: expected a whole number, found no such field"),
        (_set("llama.embedding_length", F32, 12.0), "llama.embedding_length: expected a whole number"),
        (_set("llama.embedding_length", STRING, "12"), "llama.embedding_length: expected a whole number"),
        (_set("llama.embedding_length", BOOL, 1), "llama.embedding_length: expected a whole number"),
        (_set("llama.embedding_length", BOOL, 2), "field llama.embedding_length: expected 0 or 1, found 2"),
        (_set("llama.embedding_length", I32, -12), "llama.embedding_length: expected a whole number"),
        (_set("llama.embedding_length", U64, 2**40), "llama.embedding_length: expected a whole number"),
        (_set("llama.embedding_length", U32, 0), "small.gguf: "),
        (_set("llama.embedding_length", U32, 16), "shape: expected (11, 16) by the fields, found (11, 12)"),
        (
            _set("llama.embedding_length", ARRAY, (U32, [12])),
            "expected a whole number from 0 to 2147483647, found an a",
        ),
        (_set("llama.block_count", U32, 0), "small.gguf: "),
        (_set("llama.block_count", U32, 1), "unexpected tensors for its fields: blk.1.attn_k.weight"),
        (_set("llama.block_count", U32, 3), "missing tensors for its fields: blk.2.attn_k.weight"),
        (_set("llama.block_count", U32, 2**31 - 1), "llama.block_count: expected at most one a tensor (20)"),
        (_set("llama.attention.head_count", U32, 0), "small.gguf: "),
        (_set("llama.attention.head_count", ARRAY, (U32, [3, 3])), "head_count: expected a whole number"),
        (_set("llama.attention.head_count_kv", U32, 2), "n_kv_heads"),
        (_set("llama.attention.key_length", U32, 3), "attention.value_length: expected 3 by other fields, found 4"),
        (_set("llama.attention.value_length", U32, 8), "llama.attention.value_length: expected 4 by other fields"),
        (_set("llama.rope.dimension_count", U32, 2), "llama.rope.dimension_count: expected 4 by other fields, found 2"),
        (_set("llama.vocab_size", U32, 12), "llama.vocab_size: expected 11 by other fields, found 12"),
        (_set("llama.context_length", U32, 0), "small.gguf: "),
        (_drop("llama.context_length"), "llama.context_length: expected a whole number, found no such field"),
        (_drop("llama.attention.layer_norm_rms_epsilon"), "expected a number, found no such field"),
        (
            _set("llama.attention.layer_norm_rms_epsilon", F32, float("nan")),
            "expected a finite number, found float nan",
        ),
        (_set("llama.attention.layer_norm_rms_epsilon", F64, 1e300), "expected a finite number, found float 1e+300"),
        (_set("llama.attention.layer_norm_rms_epsilon", F32, -1.0), "norm_eps"),
        (_set("llama.rope.freq_base", F32, float("inf")), "expected a finite number"),
        (_set("llama.rope.freq_base", F32, 0.0), "rope_theta"),
        (
            _set("llama.rope.scaling.type", STRING, "yarn"),
            "rope.scaling.type: expected none (not supported), found yarn",
        ),
        (_set("llama.rope.scaling.factor", F32, 2.0), "rope.scaling.factor: expected 1 (not supported), found 2.0"),
        (_set("llama.rope.scale_linear", F32, 4.0), "llama.rope.scale_linear: expected 1 (not supported), found 4.0"),
        (_set("llama.expert_count", U32, 8), "llama.expert_count: expected 0 (not supported), found 8"),
        (_set("llama.attention.sliding_window", U32, 64), "sliding_window: expected 0 (not supported), found 64"),
        (_set("split.count", U32, 2), "split.count: expected the whole model in one file (not supported), found 2"),
        (_set("general.alignment", U32, 0), "general.alignment: expected a power of two"),
        (_set("general.alignment", U32, 48), "general.alignment: expected a power of two"),
        (_set("general.alignment", U32, 4), "general.alignment: expected a power of two"),
        (_set("general.alignment", U32, 2**31), "general.alignment: expected a power of two"),
        (_set("general.alignment", STRING, "32"), "general.alignment: expected a power of two"),
        (_set("general.alignment", U32, 4096), "offset: expected"),
        (
            _raw("fields", "twice", field("llama.vocab_size", U32, 11) + field("llama.vocab_size", U32, 11)),
            "small.gguf",
        ),
        (_raw("fields", "x", field("general.architecture", STRING, "llama")), "two (duplicate key)"),
        (_raw("fields", "x", text("x") + struct.pack("<I", 13)), "field x: type: expected 0 to 12, found 13"),
        (_raw("fields", "x", text("x") + struct.pack("<IIQ", ARRAY, ARRAY, 1)), "expected numbers or strings, found 9"),
        (_raw("fields", "x", text("x") + struct.pack("<IIQ", ARRAY, 77, 1)), "expected numbers or strings, found 77"),
        (_raw("fields", "x", text("x") + struct.pack("<IIQ", ARRAY, U8, 2**64 - 1)), "field x: length of array"),
        (_raw("fields", "x", text("x") + struct.pack("<IIQ", ARRAY, STRING, 2**61)), "field x: length of array"),
        (_raw("fields", "x", text("x") + struct.pack("<IIQQ", ARRAY, STRING, 1, 2**63)), "field x[0]: expected 92233"),
        (_raw("fields", "x", text("x") + struct.pack("<IQ", STRING, 2**64 - 1)), "field x: expected at most 16777216"),
        (_raw("fields", "x", struct.pack("<Q", 2**40)), "key of field 11: expected at most 65536 bytes"),
        (_raw("fields", "x", struct.pack("<Q", 60_000) + b"x"), "key of field 11: expected 60000 bytes at byte"),
        (_raw("fields", "x", text(b"\xc3(") + struct.pack("<IB", U8, 1)), "key of field 11: expected UTF-8"),
        (_raw("infos", NORM, b""), "name of tensor 19"),
        (_raw("infos", "x", info(NORM, (12,), 0, 0)), f"tensor {NORM}: expected one, found two (duplicate name)"),
        (_info(0, "output_norm.bias"), "missing tensors for its fields: output_norm.weight"),
        (_info(0, "\x1b]0;x\x07"), "missing tensors"),
        (_info(0, b"\xff"), "name of tensor 19: expected UTF-8"),
        (_info(1, (13,)), f"tensor {NORM}"),
        (_info(1, (3, 4)), f"tensor {NORM}: shape: expected (12,) by the fields, found (3, 4)"),
        (_info(1, (12, 1)), "shape: expected (12,) by the fields, found (12, 1)"),
        (_info(1, (0,)), f"tensor {NORM}: dimensions: expected numbers above 0, found (0,)"),
        (_info(1, ()), f"tensor {NORM}: number of dimensions: expected 1 to 4, found 0"),
        (_info(1, (1, 1, 1, 1, 12)), f"tensor {NORM}: number of dimensions: expected 1 to 4, found 5"),
        (_info(1, (2**63,)), "small.gguf: tensor"),
        (_info(1, (2**32, 2**32, 2**32, 2**32)), "small.gguf: tensor"),
        (_info(2, 12), f"tensor {NORM}: type: expected one of F32, F16, Q4_0, Q4_1, Q8_0, BF16, found Q4_K"),
        (_info(2, 4), "found number 4"),
        (_info(2, 2**32 - 1), "found number 4294967295"),
        (_info(2, TYPES["Q8_0"]), f"tensor {NORM}: row length: expected a multiple of 32 for Q8_0, found 12"),
        (_info(2, TYPES["F16"]), "size: expected 12856 bytes by its header (or 12864, padded), found 12896"),
        (_info(3, 2**63), f"tensor {NORM}: offset: expected"),
        (_info(3, 2**64 - 1), f"tensor {NORM}: offset: expected"),
        (_info(3, 0), "overlaps"),
        (_info(3, 544 + 1), "offset: expected"),
        (_info(3, 544 + 32), "offset: expected"),
        (lambda fields, infos: infos.pop("token_embd.weight"), "offset: expected"),
        (lambda fields, infos: infos.clear(), "size: expected"),
        (
            lambda fields, infos: infos["blk.0.attn_norm.weight"].__setitem__(0, "rope_freqs.weight"),
            "rope_freqs.weight: expected none (scaled rotary embeddings are not supported)",
        ),
    ],
)
def test_damaged_header(
    tmp_path: Path, change: Callable[[dict[str, Any], dict[str, Any]], None], expected: str
) -> None:
    path = tmp_path / "small.gguf"
    path.write_bytes(build(change)[0])
    assert expected in message(path)


def test_what_changes_nothing(tmp_path: Path) -> None:
    """The builder's own file is read; so is one with fields that are not looked at, or that say the usual."""
    path = tmp_path / "small.gguf"

    def more(fields: dict[str, Any], infos: dict[str, Any]) -> None:
        fields.update(
            {
                "general.name": (STRING, "x" * 1000),
                "llama.rope.scaling.type": (STRING, "none"),
                "llama.rope.scaling.factor": (F32, 1.0),
                "llama.rope.dimension_count": (U32, 4),
                "llama.vocab_size": (U32, 11),
                "some.array": (ARRAY, (I8, [-1, 2])),
                "llama.expert_count": (U32, 0),
            }
        )

    for change in (None, more):
        path.write_bytes(build(change)[0])
        config, tensors = read(path)
        assert config == ModelConfig(**SMALL)
        assert same(tensors, random_params(config))


@pytest.mark.parametrize(
    ("parts", "expected"),
    [
        ({"version": 1}, "GGUF version: expected 2 or 3, found 1"),
        ({"version": 4}, "GGUF version: expected 2 or 3, found 4"),
        ({"version": 0x03000000}, "GGUF version: expected 2 or 3, found 50331648 (big-endian)"),
        ({"n_fields": 2**63}, "GGUF number of fields: expected at most"),
        ({"n_fields": 2**40}, "GGUF number of fields: expected at most"),
        ({"n_tensors": 2**64 - 1}, "GGUF number of tensors: expected at most"),
        ({"n_tensors": 0}, "size: expected"),
        ({"n_fields": 0}, "small.gguf: "),
        ({"n_fields": 12}, "small.gguf: "),
        ({"n_tensors": 21}, "small.gguf: "),
    ],
)
def test_damaged_counts(tmp_path: Path, parts: dict[str, int], expected: str) -> None:
    path = tmp_path / "small.gguf"
    path.write_bytes(build(**parts)[0])
    assert expected in message(path)


@pytest.mark.parametrize("kind", ["F32", "F16", "BF16", "Q8_0", "Q4_1"])
def test_non_finite(tmp_path: Path, kind: str) -> None:
    if kind.startswith("Q"):
        pytest.importorskip("gguf", reason="quantised GGUF files need the extra 'gguf', which is not installed")
    config = ModelConfig(**WIDE)
    path = tmp_path / "a.gguf"
    write_gguf(path, config, random_params(config), kind)
    tensor = GgufFile(path).tensors["token_embd.weight"]
    data = bytearray(path.read_bytes())
    nan = {"F32": struct.pack("<f", np.nan), "BF16": b"\xc0\x7f"}.get(kind, b"\x00\x7e")
    data[tensor.begin : tensor.begin + len(nan)] = nan  # of a block: its scale
    path.write_bytes(data)
    assert "tensor model.embed_tokens.weight: expected finite weights, found nan at index 0" in message(path)


@given(st.binary(max_size=400))
@example(struct.pack("<IQQ", 3, 0, 0))
@example(struct.pack("<IQQ", 3, 0, 1) + field("general.alignment", U32, 8))
@settings(max_examples=200)
def test_any_bytes(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "any.gguf"
    path.write_bytes(b"GGUF" + data)
    assert not survives(path, LIMIT)


@given(
    st.lists(st.tuples(st.text(max_size=8), st.integers(0, 12), st.integers(0, 200)), max_size=4),
    st.lists(
        st.tuples(
            st.text(max_size=8),
            st.lists(st.one_of(st.integers(0, 40), st.integers(0, 2**64 - 1)), max_size=5),
            st.one_of(st.sampled_from(sorted(TYPES.values())), st.integers(0, 2**32 - 1)),
            st.one_of(st.integers(0, 300), st.integers(0, 2**64 - 1)),
        ),
        max_size=3,
    ),
    st.integers(0, 400),
)
@settings(max_examples=200)
def test_any_header(tmp_path: Path, fields: list[Any], infos: list[Any], n_data: int) -> None:
    """Whatever well-formed fields and descriptions say, the file is refused or its tensors are in it."""
    path = tmp_path / "any.gguf"
    head = []
    for key, kind, value in fields:
        values = {STRING: "x" * value, ARRAY: (U8, [1] * value), BOOL: value % 2, F32: 1.5, F64: 1.5, I8: value % 100}
        head.append(field(key, kind, values.get(kind, value)))
    tails = [info(name, tuple(shape), kind, offset) for name, shape, kind, offset in infos]
    path.write_bytes(gguf_bytes(head, tails, bytes(n_data)))
    try:
        file = GgufFile(path)
    except errors.DataError as error:
        assert str(path) in str(error)
        return
    size = path.stat().st_size
    assert all(0 < t.begin <= t.begin + t.n_bytes <= size for t in file.tensors.values())
