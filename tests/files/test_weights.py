"""Model files: what is written is read back to the last bit, and what is damaged is refused by name."""

from __future__ import annotations

import json
import math
import struct
import tracemalloc
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from modelfiles import GQA, QWEN, SMALL, Params, message, random_params, read, same

from anellm import errors, floats, weights, weights_llama2c
from anellm.config import ModelConfig

# ---- llama2.c -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("values", [SMALL, GQA])
def test_llama2c_round_trip(tmp_path: Path, values: dict[str, Any]) -> None:
    config = ModelConfig(**values)
    params = random_params(config)
    weights.save_llama2c(tmp_path / "a.bin", config, params)
    found, tensors = read(tmp_path / "a.bin")
    assert found == config
    assert same(tensors, params)
    weights.save_llama2c(tmp_path / "b.bin", found, tensors)
    assert (tmp_path / "a.bin").read_bytes() == (tmp_path / "b.bin").read_bytes()


def test_llama2c_layout(tmp_path: Path) -> None:
    """The file is laid out as its format says, with the rows of q and k interleaved."""
    config = ModelConfig(**GQA)
    params = random_params(config)
    weights.save_llama2c(tmp_path / "a.bin", config, params)
    data = (tmp_path / "a.bin").read_bytes()
    assert struct.unpack("<7i", data[:28]) == (16, 20, 2, 4, 2, -11, 8)
    floats = np.frombuffer(data, "<f4", offset=28)
    at = 0

    def take(*shape: int) -> np.ndarray:
        nonlocal at
        at += math.prod(shape)
        return floats[at - math.prod(shape) : at].reshape(shape)

    def layers(part: str) -> np.ndarray:
        return np.stack([params[f"model.layers.{i}.{part}.weight"] for i in range(2)])

    assert np.array_equal(take(11, 16), params["model.embed_tokens.weight"])
    assert np.array_equal(take(2, 16), layers("input_layernorm"))
    # Hugging Face's own conversion: view(heads, head_dim/2, 2, dim).transpose(1, 2) of the interleaved rows.
    for heads, part in ((4, "self_attn.q_proj"), (2, "self_attn.k_proj")):
        rows = take(2, heads * 4, 16)
        halves = rows.reshape(2, heads, 2, 2, 16).transpose(0, 1, 3, 2, 4).reshape(rows.shape)
        assert np.array_equal(halves, layers(part))
        assert not np.array_equal(rows, layers(part))
    assert np.array_equal(take(2, 8, 16), layers("self_attn.v_proj"))
    assert np.array_equal(take(2, 16, 16), layers("self_attn.o_proj"))
    assert np.array_equal(take(2, 16), layers("post_attention_layernorm"))
    assert np.array_equal(take(2, 20, 16), layers("mlp.gate_proj"))
    assert np.array_equal(take(2, 16, 20), layers("mlp.down_proj"))
    assert np.array_equal(take(2, 20, 16), layers("mlp.up_proj"))
    assert np.array_equal(take(16), params["model.norm.weight"])
    angles = np.outer(np.arange(8), [1.0, 0.01])
    np.testing.assert_allclose(take(8, 2), np.cos(angles), atol=1e-6)
    np.testing.assert_allclose(take(8, 2), np.sin(angles), atol=1e-6)
    assert np.array_equal(take(11, 16), params["lm_head.weight"])
    assert at == floats.size


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"qk_norm": True}, "q/k norm"),
        ({"head_dim": 6}, "head_dim 6 is not dim/n_heads = 4"),
        ({"rope_theta": 500000.0}, "rope_theta 500000"),
        ({"norm_eps": 1e-6}, "norm_eps 1e-06"),
    ],
)
def test_llama2c_refuses_what_it_cannot_express(tmp_path: Path, change: dict[str, Any], reason: str) -> None:
    config = ModelConfig(**{**SMALL, **change})
    with pytest.raises(errors.InvalidError, match=reason):
        weights.save_llama2c(tmp_path / "a.bin", config, random_params(config))
    assert not list(tmp_path.iterdir())


@pytest.fixture
def small_bin(tmp_path: Path) -> Path:
    """Return a valid tied llama2.c file."""
    config = ModelConfig(**SMALL)
    weights.save_llama2c(tmp_path / "small.bin", config, random_params(config))
    return tmp_path / "small.bin"


@pytest.mark.parametrize("length", [*range(29), 30, 100, 1000, -5, -4, -1])
def test_llama2c_truncated(small_bin: Path, length: int) -> None:
    data = small_bin.read_bytes()
    small_bin.write_bytes(data[: length if length >= 0 else len(data) + length])
    text = message(small_bin)
    assert str(small_bin) in text
    assert "expected" in text
    assert "found" in text


@pytest.mark.parametrize("extra", [b"\0", b"\0" * 4, b"\0" * 4096])
def test_llama2c_extra_bytes(small_bin: Path, extra: bytes) -> None:
    size = small_bin.stat().st_size
    small_bin.write_bytes(small_bin.read_bytes() + extra)
    assert f"expected {size} bytes for the dimensions in its header, found {size + len(extra)}" in message(small_bin)


@pytest.mark.parametrize("field", range(7))
@pytest.mark.parametrize("value", [0, -1, -(2**31), 2**31 - 1, 7])
def test_llama2c_impossible_dimension(small_bin: Path, field: int, value: int) -> None:
    data = bytearray(small_bin.read_bytes())
    struct.pack_into("<i", data, 4 * field, value)
    small_bin.write_bytes(data)
    text = message(small_bin)
    if value <= 0 and not (field == 5 and value == -1):
        assert f"field {weights_llama2c._FIELDS[field]}: expected a positive number, found {value}" in text
    else:
        assert str(small_bin) in text


def test_llama2c_separate_classifier_needs_its_bytes(small_bin: Path) -> None:
    data = bytearray(small_bin.read_bytes())
    struct.pack_into("<i", data, 20, -11)
    small_bin.write_bytes(data)
    assert f"expected {len(data) + 4 * 11 * 12} bytes" in message(small_bin)
    small_bin.write_bytes(data + data[28 : 28 + 4 * 11 * 12])
    config, tensors = read(small_bin)
    assert not config.tie_embeddings
    assert np.array_equal(tensors["lm_head.weight"], tensors["model.embed_tokens.weight"])


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_llama2c_non_finite(small_bin: Path, value: float) -> None:
    data = bytearray(small_bin.read_bytes())
    struct.pack_into("<f", data, 28 + 4 * 7, value)
    small_bin.write_bytes(data)
    assert f"tensor model.embed_tokens.weight: expected finite weights, found {value} at index 7" in message(small_bin)


@given(
    st.lists(
        st.one_of(st.integers(-(2**31), 2**31 - 1), st.integers(-2, 64), st.sampled_from([2**15, 2**16, 2**30])),
        min_size=7,
        max_size=7,
    ),
    st.integers(0, 5000),
)
@example([2**31 - 2, 2**31 - 1, 2**31 - 1, 1, 1, 2**31 - 1, 2**31 - 1], 64)
@example([2, 1, 1, 1, 1, 1, 1], 4 * 27)
@settings(max_examples=200)
def test_llama2c_any_header(tmp_path: Path, header: list[int], n_body: int) -> None:
    """Whatever seven numbers stand in the header, the file is read or refused; nothing else happens."""
    path = tmp_path / "any.bin"
    path.write_bytes(struct.pack("<7i", *header) + bytes(n_body))
    try:
        config, tensors = read(path)
    except errors.DataError as error:
        assert str(path) in str(error)
    else:
        tables = config.max_seq_len * config.head_dim
        assert 28 + 4 * (sum(a.size for a in tensors.values()) + tables) == 28 + n_body


@pytest.mark.parametrize(("magic", "what"), [(b"PK\x03\x04", "pickle"), (b"BLZT", "big-endian")])
def test_other_formats_are_named(tmp_path: Path, magic: bytes, what: str) -> None:
    path = tmp_path / "model.bin"
    path.write_bytes(magic + bytes(2000))
    assert what in message(path)


# ---- Hugging Face -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("values", [SMALL, GQA, QWEN])
def test_hf_round_trip(tmp_path: Path, values: dict[str, Any]) -> None:
    config = ModelConfig(**values)
    params = random_params(config)
    weights.save_hf(tmp_path / "new" / "a", config, params)
    found, tensors = read(tmp_path / "new" / "a")
    assert found == config
    assert same(tensors, params)
    weights.save_hf(tmp_path / "b", found, tensors)
    for name in ("config.json", "model.safetensors"):
        assert (tmp_path / "new" / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


@pytest.mark.parametrize("values", [SMALL, GQA])
def test_between_formats(tmp_path: Path, values: dict[str, Any]) -> None:
    config = ModelConfig(**values)
    params = random_params(config)
    weights.save_hf(tmp_path / "hf", config, params)
    weights.save_llama2c(tmp_path / "a.bin", *read(tmp_path / "hf"))
    weights.save_hf(tmp_path / "hf2", *read(tmp_path / "a.bin"))
    assert same(read(tmp_path / "hf2")[1], params)
    assert (tmp_path / "hf/model.safetensors").read_bytes() == (tmp_path / "hf2/model.safetensors").read_bytes()


def test_hf_file_is_what_the_safetensors_library_reads(tmp_path: Path) -> None:
    from safetensors.numpy import load_file

    config = ModelConfig(**GQA)
    params = random_params(config)
    weights.save_hf(tmp_path, config, params)
    found = load_file(tmp_path / "model.safetensors")
    assert found.keys() == params.keys()
    assert all(np.array_equal(found[k], params[k]) for k in params)


def test_hf_reads_what_the_safetensors_library_writes(tmp_path: Path) -> None:
    from safetensors.numpy import save_file

    config = ModelConfig(**QWEN)
    params = random_params(config)
    weights.save_hf(tmp_path, config, params)
    save_file(params, tmp_path / "model.safetensors")
    assert same(read(tmp_path)[1], params)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_hf_half_precision(tmp_path: Path, dtype: str) -> None:
    config = ModelConfig(**SMALL)
    params = random_params(config)
    weights.save_hf(tmp_path, config, params, dtype=dtype)
    assert json.loads((tmp_path / "config.json").read_text())["torch_dtype"] == dtype
    _, tensors = read(tmp_path)
    for name, array in params.items():
        if dtype == "float16":
            expected = array.astype(np.float16).astype(np.float32)
        else:  # in float64: the nearest multiple of 2^-7 of the power of two below; numpy rounds halves to even
            unit = np.exp2(np.floor(np.log2(np.abs(array.astype(np.float64)))) - 7)
            expected = (np.rint(array.astype(np.float64) / unit) * unit).astype(np.float32)
        assert np.array_equal(tensors[name], expected)
    before = (tmp_path / "model.safetensors").read_bytes()
    weights.save_hf(tmp_path, config, tensors, dtype=dtype)  # exactly representable now
    assert (tmp_path / "model.safetensors").read_bytes() == before


def test_hf_bfloat16_halves_to_even(tmp_path: Path) -> None:
    bits = np.array([0x3F808000, 0x3F818000, 0x3F808001, 0xBF808000, 0x00008000, 0x00000001], np.uint32)
    out = np.frombuffer(floats.encode("x", bits.view(np.float32), "BF16"), "<u2")
    assert [hex(v) for v in out] == ["0x3f80", "0x3f82", "0x3f81", "0xbf80", "0x0", "0x0"]


@pytest.mark.parametrize(("dtype", "value"), [("float16", 70000.0), ("bfloat16", 3.4e38), ("float32", math.inf)])
def test_hf_refuses_to_write_infinity(tmp_path: Path, dtype: str, value: float) -> None:
    config = ModelConfig(**SMALL)
    params = random_params(config)
    params["model.norm.weight"][3] = value
    with pytest.raises(errors.NonFiniteError, match="model.norm.weight"):
        weights.save_hf(tmp_path / "x", config, params, dtype=dtype)
    assert not (tmp_path / "x" / "model.safetensors").exists()
    assert not list(tmp_path.glob("**/.tmp*"))


def test_write_checks_params(tmp_path: Path) -> None:
    config = ModelConfig(**SMALL)
    params = random_params(config)

    def refused(changed: Params, match: str) -> None:
        for save in (weights.save_hf, weights.save_llama2c):
            with pytest.raises(errors.InvalidError, match=match):
                save(tmp_path / "x", config, changed)

    refused({k: v for k, v in params.items() if k != "model.norm.weight"}, "missing model.norm.weight")
    refused({**params, "lm_head.weight": params["model.embed_tokens.weight"]}, "unexpected lm_head.weight")
    refused({**params, "model.norm.weight": np.ones(13, np.float32)}, r"expected float32 of shape \(12,\)")
    refused({**params, "model.norm.weight": np.ones(12)}, "found float64")
    with pytest.raises(errors.InvalidError, match="dtype"):
        weights.save_hf(tmp_path / "x", config, params, dtype="int8")
    assert not list(tmp_path.iterdir())


@pytest.fixture
def hf(tmp_path: Path) -> Path:
    """Return a valid tied Hugging Face directory."""
    config = ModelConfig(**SMALL)
    weights.save_hf(tmp_path / "hf", config, random_params(config))
    return tmp_path / "hf"


def split(path: Path) -> tuple[dict[str, Any], bytes]:
    """Return header and data of a safetensors file."""
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def join(path: Path, header: dict[str, Any] | str, data: bytes) -> None:
    """Write a safetensors file."""
    text = (header if isinstance(header, str) else json.dumps(header)).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


@pytest.mark.parametrize("length", [*range(17), 500, -5, -1])
def test_hf_truncated(hf: Path, length: int) -> None:
    path = hf / "model.safetensors"
    data = path.read_bytes()
    path.write_bytes(data[: length if length >= 0 else len(data) + length])
    text = message(hf)
    assert str(path) in text
    assert "expected" in text
    assert "found" in text


NORM, EMBED = "model.norm.weight", "model.embed_tokens.weight"


def _edit(**fields: Any) -> Callable[[dict[str, Any]], None]:
    return lambda header: header[NORM].update(fields)


def _overlap(header: dict[str, Any]) -> None:
    begin, end = header[NORM]["data_offsets"]
    header[NORM]["data_offsets"] = [begin - 4, end - 4]


def _gap(header: dict[str, Any]) -> None:
    begin, end = header[NORM]["data_offsets"]
    header[NORM] = {"dtype": "F32", "shape": [11], "data_offsets": [begin + 4, end]}


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda h: h.pop(NORM), "size: expected"),
        (lambda h: h.update({"extra": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}}), "unexpected tensors"),
        (lambda h: h.update({"model.norm.bias": h.pop(NORM)}), f"missing tensors for its config.json: {NORM}"),
        (_edit(dtype="I32"), f"tensor {NORM}: dtype: expected F32, F16 or BF16, found I32"),
        (_edit(dtype="F16"), f"tensor {NORM}: data_offsets: expected 24 bytes for F16 of shape [12], found 48 bytes"),
        (_edit(dtype=4), "dtype: expected F32, F16 or BF16, found 4"),
        (_edit(dtype=["F32"]), "dtype: expected"),
        (_edit(shape=[13]), "expected 52 bytes for F32 of shape [13], found 48 bytes"),
        (_edit(shape=[3, 4]), "shape: expected (12,) by config.json, found (3, 4)"),
        (_edit(shape=[-12]), "shape: expected a list of sizes"),
        (_edit(shape=[True, 12]), "shape: expected a list of sizes"),
        (_edit(shape=12), "shape: expected a list of sizes"),
        (_edit(shape=[1] * 9), "shape: expected a list of sizes"),
        (lambda h: h.update({"\x1b[2J\n": h.pop(NORM)}), "missing tensors"),
        (lambda h: h.update({"\x1b[2J\n": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}}), r"'\x1b[2J\n'"),
        (_edit(shape=[2**63 - 1] * 8), "data_offsets: expected"),
        (_edit(shape=[10**4000] * 8), "shape: expected a list of sizes"),
        (_edit(data_offsets=[0]), "data_offsets: expected two offsets"),
        (_edit(data_offsets=[-48, 0]), "data_offsets: expected two offsets"),
        (_edit(data_offsets=[48, 0]), "data_offsets: expected 48 bytes"),
        (_edit(data_offsets=[2**62, 2**62 + 48]), "data_offsets: expected an end within"),
        (_edit(data_offsets=[2**63, 2**63 + 48]), "data_offsets: expected two offsets"),
        (_edit(data_offsets=[0, 48]), "overlaps"),
        (_overlap, "(overlaps model.layers.1.mlp.down_proj.weight)"),
        (_gap, "(leaves a gap behind model.layers.1.mlp.down_proj.weight)"),
        (lambda h: h.update({NORM: 5}), "description: expected an object"),
        (lambda h: h.update(__metadata__=[1]), "__metadata__"),
        (lambda h: h.update(__metadata__={"a": 1}), "__metadata__"),
    ],
)
def test_hf_damaged_header(hf: Path, change: Callable[[dict[str, Any]], None], expected: str) -> None:
    path = hf / "model.safetensors"
    header, data = split(path)
    change(header)
    join(path, header, data)
    text = message(hf)
    assert expected in text
    assert str(hf) in text
    assert text.isprintable()  # nothing in a file can steer the terminal
    assert len(text) < 1000


def test_hf_extra_bytes(hf: Path) -> None:
    path = hf / "model.safetensors"
    size = path.stat().st_size
    path.write_bytes(path.read_bytes() + b"\0")
    assert f"size: expected {size} bytes by its header, found {size + 1}" in message(hf)


@pytest.mark.parametrize("length", [2**64 - 1, 2**63, 10**9, 100_000])
def test_hf_header_length_beyond_the_file(hf: Path, length: int) -> None:
    path = hf / "model.safetensors"
    data = path.read_bytes()
    path.write_bytes(struct.pack("<Q", length) + data[8:])
    assert f"header length: expected at most {len(data) - 8}, found {length}" in message(hf)


@pytest.mark.parametrize("text", ["", "[]", "nul", "{", '{"a":', "[" * 100_000, '{"a": 1' + "0" * 5000 + "}", "\ud800"])
def test_hf_header_is_not_json(hf: Path, text: str) -> None:
    path = hf / "model.safetensors"
    data = text.encode("utf-8", "surrogatepass")
    path.write_bytes(struct.pack("<Q", len(data)) + data)
    assert f"{path}: header: expected" in message(hf) or "tensor a: description" in message(hf)


def test_hf_duplicate_tensor(hf: Path) -> None:
    path = hf / "model.safetensors"
    header, data = split(path)
    text = json.dumps(header)
    join(path, f'{text[:-1]}, "{NORM}": {json.dumps(header[NORM])}}}', data)
    assert f"header: duplicate {NORM}" in message(hf)


def test_hf_non_finite(hf: Path) -> None:
    path = hf / "model.safetensors"
    header, data = split(path)
    at = header[NORM]["data_offsets"][0] + 20
    join(path, header, data[:at] + struct.pack("<f", math.nan) + data[at + 4 :])
    found = weights.load_pretrained(hf)  # values are looked at when they are read
    with pytest.raises(errors.DataError, match=f"tensor {NORM}: expected finite weights, found nan at index 5"):
        list(found.tensors)


def test_hf_unaligned_data(hf: Path) -> None:
    """A header of odd length puts the floats at odd addresses."""
    _, before = read(hf)
    path = hf / "model.safetensors"
    header, data = split(path)
    text = json.dumps(header)
    for pad in range(4):
        join(path, text + " " * pad, data)
        found = weights.load_pretrained(hf)
        tensors = dict(found.tensors)
        assert all(a.flags.aligned for a in tensors.values())
        assert same(tensors, before)


def test_streaming_copies_nothing(hf: Path) -> None:
    """fp32 tensors are views of the mapped file, and cannot be written to."""
    for _, array in weights.load_pretrained(hf).tensors:
        assert not array.flags.owndata
        assert not array.flags.writeable


@pytest.mark.parametrize("kind", ["float32", "bfloat16", "llama2c"])
def test_reading_takes_the_memory_of_a_tensor_or_two(tmp_path: Path, kind: str) -> None:
    """The consumer may hold one while the next is converted."""
    config = ModelConfig(dim=384, hidden_dim=384, n_layers=4, n_heads=4, vocab_size=384, max_seq_len=8)
    params = random_params(config)
    path = tmp_path / "model"
    if kind == "llama2c":
        weights.save_llama2c(path, config, params)
    else:
        weights.save_hf(path, config, params, dtype=kind)
    largest = max(a.nbytes for a in params.values())
    tracemalloc.start()
    try:
        for _, array in weights.load_pretrained(path).tensors:
            assert array.nbytes <= largest
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 3.5 * largest < sum(a.nbytes for a in params.values()) / 8


def _with_head(hf: Path, head: np.ndarray) -> None:
    from safetensors.numpy import save_file

    _, params = read(hf)
    save_file({**params, "lm_head.weight": head}, hf / "model.safetensors")


def test_hf_tied_ignores_an_equal_head(hf: Path) -> None:
    _, params = read(hf)
    _with_head(hf, params[EMBED])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        config, found = read(hf)
    assert config.tie_embeddings
    assert same(found, params)


@pytest.mark.parametrize("shape", [(11, 12), (5, 5)])
def test_hf_tied_warns_of_another_head(hf: Path, shape: tuple[int, ...]) -> None:
    _, params = read(hf)
    _with_head(hf, np.ones(shape, np.float32))
    with pytest.warns(UserWarning, match="lm_head.weight differs from model.embed_tokens.weight"):
        _, found = read(hf)
    assert same(found, params)


def test_hf_untied_needs_its_head(hf: Path) -> None:
    fields = json.loads((hf / "config.json").read_text())
    (hf / "config.json").write_text(json.dumps({**fields, "tie_word_embeddings": False}))
    assert "missing tensors for its config.json: lm_head.weight" in message(hf)


def test_hf_ignores_stored_rotary_tables(hf: Path) -> None:
    from safetensors.numpy import save_file

    _, params = read(hf)
    table = np.ones(2, np.float32)
    save_file({**params, "model.layers.0.self_attn.rotary_emb.inv_freq": table}, hf / "model.safetensors")
    assert same(read(hf)[1], params)


def test_hf_config_cannot_make_long_tables(hf: Path) -> None:
    fields = json.loads((hf / "config.json").read_text())
    (hf / "config.json").write_text(json.dumps({**fields, "num_hidden_layers": 2**31 - 1}))
    assert "num_hidden_layers: expected at most one a tensor" in message(hf)


@pytest.mark.parametrize("text", ["", "[]", "{", '{"model_type": "llama"}', '{"model_type": 3}', '{"a": 1, "a": 2}'])
def test_hf_damaged_config(hf: Path, text: str) -> None:
    (hf / "config.json").write_text(text)
    assert str(hf / "config.json") in message(hf)


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
        max_leaves=6,
    ),
    st.sampled_from(["header", "dtype", "shape", "data_offsets", "config"]),
    st.data(),
)
@settings(max_examples=150)
def test_hf_any_json(hf: Path, value: Any, where: str, data: st.DataObject) -> None:
    """Any JSON value in any place is refused by a DataError, or harmless."""
    config_path, path = hf / "config.json", hf / "model.safetensors"
    config_text, body = config_path.read_text(), path.read_bytes()
    header, rest = split(path)
    try:
        if where == "config":
            key = data.draw(st.sampled_from(sorted(json.loads(config_text))))
            config_path.write_text(json.dumps({**json.loads(config_text), key: value}))
        elif where == "header":
            join(path, {**header, NORM: value}, rest)
        else:
            header[NORM][where] = value
            join(path, header, rest)
        try:
            read(hf)
        except errors.DataError as error:
            assert str(hf) in str(error)
    finally:
        config_path.write_text(config_text)
        path.write_bytes(body)


def _shard(hf: Path) -> dict[str, str]:
    """Turn a directory into one of two shards; returns the weight map."""
    from safetensors.numpy import save_file

    _, params = read(hf)
    names = list(params)
    parts = {"model-00001-of-00002.safetensors": names[:7], "model-00002-of-00002.safetensors": names[7:]}
    for file, members in parts.items():
        save_file({k: params[k] for k in members}, hf / file)
    (hf / "model.safetensors").unlink()
    return {name: file for file, members in parts.items() for name in members}


def _write_index(hf: Path, weight_map: object) -> None:
    (hf / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def test_hf_shards(hf: Path) -> None:
    _, params = read(hf)
    _write_index(hf, _shard(hf))
    assert same(read(hf)[1], params)


def test_hf_damaged_index(hf: Path) -> None:
    mapping = _shard(hf)
    other = next(file for file in mapping.values() if file != mapping[NORM])
    for changed, expected in [
        ({**mapping, NORM: other}, "by the index"),
        ({k: v for k, v in mapping.items() if k != NORM}, "expected in no file by the index"),
        ({**mapping, "ghost": other}, "tensors missing from their files: ghost"),
        ({**mapping, NORM: "../hf/" + other}, "expected files beside it"),
        ({**mapping, NORM: "/etc/passwd"}, "expected files beside it"),
        ({**mapping, NORM: "absent.safetensors"}, "expected files beside it"),
        ({**mapping, NORM: 3}, "weight_map: expected file names"),
        ([], "weight_map: expected file names"),
        ({}, "num_hidden_layers"),
    ]:
        _write_index(hf, changed)
        assert expected in message(hf)
    (hf / mapping[NORM]).unlink()
    _write_index(hf, mapping)
    assert "expected files beside it" in message(hf)


# ---- which file a path means --------------------------------------------------------------------------------------


def test_nothing_there(tmp_path: Path) -> None:
    assert "found nothing" in message(tmp_path / "absent")
    assert "found none" in message(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(ModelConfig(**SMALL).to_hf()))
    assert "expected model.safetensors" in message(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"PK")
    assert "pickle" in message(tmp_path)
    assert "pass the directory" in message_of_file(tmp_path / "x.safetensors")


def message_of_file(path: Path) -> str:
    """Return why a file of that name is refused."""
    path.write_bytes(bytes(64))
    return message(path)


def test_tokenizer_lookup(tmp_path: Path, hf: Path, small_bin: Path) -> None:
    assert weights.load_pretrained(hf).tokenizer_path is None
    (hf / "tokenizer.bin").write_bytes(b"x")
    assert weights.load_pretrained(hf).tokenizer_path == hf / "tokenizer.bin"
    assert weights.load_pretrained(small_bin).tokenizer_path is None
    (tmp_path / "tokenizer.bin").write_bytes(b"x")
    assert weights.load_pretrained(small_bin).tokenizer_path == tmp_path / "tokenizer.bin"
    assert weights.load_pretrained(hf).tokenizer_path == hf / "tokenizer.bin"


def test_tokenizer_must_fit_the_model(tmp_path: Path, small_bin: Path) -> None:
    from anellm.tokenizer import Tokenizer

    assert weights.load_tokenizer(small_bin, ModelConfig(**SMALL)) is None
    path = tmp_path / "tokenizer.bin"
    shipped = Tokenizer.shipped()
    shipped.save(path)
    with pytest.raises(errors.DataError, match="belongs to another model") as caught:
        weights.load_tokenizer(small_bin, ModelConfig(**SMALL))
    assert str(path) in str(caught.value)
    assert str(small_bin) in str(caught.value)
    found = weights.load_tokenizer(small_bin, ModelConfig(**{**SMALL, "vocab_size": shipped.vocab_size}))
    assert found is not None
    assert found.sha256 == shipped.sha256
