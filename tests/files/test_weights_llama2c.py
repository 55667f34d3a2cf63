"""llama2.c files of versions 1 and 2: layout, what is read, and what is refused."""

from __future__ import annotations

import math
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from modelfiles import GQA, SMALL, Params, bit_flips, cuts, interleaved, message, random_params, read, same, survives

from anellm import errors, weights
from anellm.config import ModelConfig

LIMIT = 4 << 20  # of memory for files of a few kilobytes
PARTS = (
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.v_proj",
    "self_attn.o_proj",
    "mlp.gate_proj",
    "mlp.down_proj",
    "mlp.up_proj",
)


def long_header(version: int, config: ModelConfig, group_size: int = 0) -> bytes:
    """Return the 256 bytes in front."""
    values = (config.dim, config.hidden_dim, config.n_layers, config.n_heads, config.n_kv_heads, config.vocab_size)
    header = struct.pack("<4si7iB", b"24ka", version, *values, config.max_seq_len, config.tie_embeddings)
    return (header + (struct.pack("<i", group_size) if version == 2 else b"")).ljust(256, b"\0")


def in_order(config: ModelConfig, params: Params) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Return norms and matrices in the order of the file, rows of q and k interleaved."""

    def layers(part: str) -> list[np.ndarray]:
        found = [params[f"model.layers.{i}.{part}.weight"] for i in range(config.n_layers)]
        heads = {"self_attn.q_proj": config.n_heads, "self_attn.k_proj": config.n_kv_heads}.get(part)
        return found if heads is None else [interleaved(a, heads) for a in found]

    norms = [*layers("input_layernorm"), *layers("post_attention_layernorm"), params["model.norm.weight"]]
    matrices = [params["model.embed_tokens.weight"], *(a for part in PARTS for a in layers(part))]
    return norms, matrices if config.tie_embeddings else [*matrices, params["lm_head.weight"]]


def v2_bytes(config: ModelConfig, params: Params, group_size: int) -> bytes:
    """Return a Q8_0 file, as export.py makes it: the scale is the group's largest weight / 127."""
    norms, matrices = in_order(config, params)
    data = b"".join(a.tobytes() for a in norms)
    for array in matrices:
        groups = array.reshape(-1, group_size)
        scales = (np.abs(groups).max(1) / np.float32(127)).astype(np.float32)
        codes = np.rint(groups / np.where(scales == 0, 1, scales)[:, None]).astype(np.int8)
        data += codes.tobytes() + scales.astype("<f4").tobytes()
    return long_header(2, config, group_size) + data


V2 = {**GQA, "vocab_size": 13}


@pytest.fixture(params=[1, 2])
def small(tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    """Return a valid file of each version."""
    config = ModelConfig(**(SMALL if request.param == 1 else V2))
    path = tmp_path / "small.bin"
    params = random_params(config)
    if request.param == 1:
        weights.save_llama2c(path, config, params, version=1)
    else:
        path.write_bytes(v2_bytes(config, params, 4))
    read(path)
    return path


# ---- what is written and read --------------------------------------------------------------------------------------


@pytest.mark.parametrize("values", [SMALL, GQA])
def test_v1_layout(tmp_path: Path, values: dict[str, Any]) -> None:
    config = ModelConfig(**values)
    params = random_params(config)
    weights.save_llama2c(tmp_path / "a.bin", config, params, version=1)
    norms, matrices = in_order(config, params)
    expected = long_header(1, config) + b"".join(a.tobytes() for a in [*norms, *matrices])
    assert (tmp_path / "a.bin").read_bytes() == expected
    found, tensors = read(tmp_path / "a.bin")
    assert found == config
    assert same(tensors, params)


def test_v1_written_file_is_the_original(data_dir: Path, tmp_path: Path) -> None:
    original = data_dir / "weights" / "stories260K" / "stories260K.v1.bin"
    config, params = read(original)
    weights.save_llama2c(tmp_path / "new.bin", config, params, version=1)
    assert (tmp_path / "new.bin").read_bytes() == original.read_bytes()


@pytest.mark.parametrize("group_size", [1, 2, 4])
@pytest.mark.parametrize("tied", [True, False])
def test_v2(tmp_path: Path, group_size: int, tied: bool) -> None:
    """Group sizes 1 and 2 put scales at odd places; a group of zeros has a scale of zero."""
    config = ModelConfig(**{**V2, "tie_embeddings": tied, "vocab_size": 13})
    params = random_params(config)
    params["model.embed_tokens.weight"][3] = 0
    (tmp_path / "a.bin").write_bytes(v2_bytes(config, params, group_size))
    found, tensors = read(tmp_path / "a.bin")
    assert found == config
    assert list(tensors) == list(params)
    for name, array in params.items():
        if array.ndim == 1:
            assert np.array_equal(tensors[name], array)
            continue
        # Groups lie within rows, so the order of rows does not matter.
        groups = array.reshape(-1, group_size)
        scales = (np.abs(groups).max(1, keepdims=True) / np.float32(127)).astype(np.float32)
        codes = np.rint(groups / np.where(scales == 0, 1, scales)).astype(np.float32)
        assert np.array_equal(tensors[name], (codes * scales).reshape(array.shape)), name
        assert np.abs(tensors[name] - array).max() <= 0.51 * scales.max()


def test_v2_of_a_real_model(data_dir: Path) -> None:
    """Decoded by hand: the embedding is the first matrix, then comes its scale for each 4 weights."""
    path = data_dir / "weights" / "stories260K" / "stories260K.v2_gs4.bin"
    data = path.read_bytes()
    at = 256 + 4 * (2 * 5 * 64 + 64)
    codes = np.frombuffer(data, np.int8, 512 * 64, at).reshape(-1, 4)
    scales = np.frombuffer(data, "<f4", codes.shape[0], at + codes.size)
    _, tensors = read(path)
    expected = (codes.astype(np.float32) * scales[:, None]).reshape(512, 64)
    assert np.array_equal(tensors["model.embed_tokens.weight"], expected)


@pytest.mark.parametrize("version", [2, 3, -1])
def test_versions_that_are_not_written(tmp_path: Path, version: int) -> None:
    config = ModelConfig(**SMALL)
    with pytest.raises(errors.InvalidError, match="version: expected 0 or 1"):
        weights.save_llama2c(tmp_path / "a.bin", config, random_params(config), version=version)
    assert not list(tmp_path.iterdir())


# ---- what is refused -----------------------------------------------------------------------------------------------


def test_cut_anywhere(small: Path) -> None:
    data = small.read_bytes()
    path = small.with_name("cut.bin")
    for length in cuts(256, len(data)):
        path.write_bytes(data[:length])
        found = message(path)
        assert "expected" in found, length
        assert "found" in found, length


@pytest.mark.parametrize("extra", [b"\0", bytes(4), bytes(4096)])
def test_extra_bytes(small: Path, extra: bytes) -> None:
    size = small.stat().st_size
    small.write_bytes(small.read_bytes() + extra)
    assert f"size: expected {size} bytes for the dimensions in its header, found {size + len(extra)}" in message(small)


def test_bit_flips(small: Path) -> None:
    data = small.read_bytes()
    path = small.with_name("flipped.bin")
    read_ = sum([survives(path, LIMIT) for damaged in bit_flips(data, 500, 256, 100) if path.write_bytes(damaged)])
    assert 0 < read_ < 200  # only flips of weights and of the longest sequence can be read


@pytest.mark.parametrize(
    ("at", "layout", "value", "expected"),
    [
        (0, "4s", b"24kb", "llama2.c header field"),  # without the magic it is a file of version 0
        (4, "i", 0, "field version: expected 1 or 2, found 0"),
        (4, "i", 3, "field version: expected 1 or 2, found 3"),
        (4, "i", -1, "field version: expected 1 or 2, found -1"),
        (8, "i", 0, "field dim: expected a positive number, found 0"),
        (8, "i", 7, "expected a divisor of dim 7"),
        (8, "i", 2**31 - 1, "expected a divisor of dim"),
        (12, "i", -1, "field hidden_dim: expected a positive number, found -1"),
        (12, "i", 2**31 - 4, "size: expected"),
        (16, "i", 2**31 - 1, "size: expected"),
        (20, "i", 5, "field n_heads: expected a divisor"),
        (24, "i", 0, "field n_kv_heads: expected a positive number, found 0"),
        (24, "i", 7, "field n_kv_heads: expected a divisor"),
        (28, "i", -11, "field vocab_size: expected a positive number, found -11"),
        (28, "i", -(2**31), "field vocab_size: expected a positive number, found -2147483648"),
        (28, "i", 2**31 - 1, "size: expected"),
        (32, "i", 0, "field seq_len: expected a positive number, found 0"),
        (32, "i", 2**31 - 1, "max_seq_len"),
        (36, "B", 2, "field shared_classifier: expected 0 or 1, found 2"),
        (36, "B", 255, "field shared_classifier: expected 0 or 1, found 255"),
        (41, "B", 1, "header byte 41: expected 0 (padding), found 1"),
        (255, "B", 9, "header byte 255: expected 0 (padding), found 9"),
    ],
)
def test_damaged_header(small: Path, at: int, layout: str, value: Any, expected: str) -> None:
    data = bytearray(small.read_bytes())
    struct.pack_into("<" + layout, data, at, value)
    small.write_bytes(data)
    assert expected in message(small)


@pytest.mark.parametrize(
    ("group_size", "expected"),
    [
        (0, "field group_size: expected a positive number, found 0"),
        (-4, "field group_size: expected a positive number, found -4"),
        (-(2**31), "field group_size: expected a positive number"),
        (5, "field group_size: expected a divisor of dim 16, found 5"),
        (8, "field group_size: expected a divisor of hidden_dim 20, found 8"),
        (2**31 - 1, "field group_size: expected a divisor of dim 16"),
        (2, "size: expected"),
    ],
)
def test_damaged_group_size(tmp_path: Path, group_size: int, expected: str) -> None:
    config = ModelConfig(**V2)
    data = bytearray(v2_bytes(config, random_params(config), 4))
    struct.pack_into("<i", data, 37, group_size)
    (tmp_path / "small.bin").write_bytes(data)
    assert expected in message(tmp_path / "small.bin")


def test_group_size_does_not_belong_into_version_1(tmp_path: Path) -> None:
    config = ModelConfig(**SMALL)
    weights.save_llama2c(tmp_path / "a.bin", config, random_params(config), version=1)
    data = bytearray((tmp_path / "a.bin").read_bytes())
    struct.pack_into("<i", data, 37, 4)
    (tmp_path / "a.bin").write_bytes(data)
    assert "header byte 37: expected 0 (padding), found 4" in message(tmp_path / "a.bin")


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_non_finite(small: Path, value: float) -> None:
    data = bytearray(small.read_bytes())
    struct.pack_into("<f", data, 256 + 4 * 3, value)
    small.write_bytes(data)
    assert "tensor model.layers.0.input_layernorm.weight: expected finite weights" in message(small)


def test_v2_non_finite_scale(tmp_path: Path) -> None:
    config = ModelConfig(**V2)
    data = bytearray(v2_bytes(config, random_params(config), 4))
    data[-4:] = struct.pack("<f", math.inf)
    (tmp_path / "a.bin").write_bytes(data)
    assert "tensor lm_head.weight: expected finite weights, found" in message(tmp_path / "a.bin")


@given(
    st.integers(-1, 3),
    st.lists(
        st.one_of(st.integers(-(2**31), 2**31 - 1), st.integers(-2, 64), st.sampled_from([2**15, 2**16, 2**30])),
        min_size=7,
        max_size=7,
    ),
    st.integers(0, 2),
    st.one_of(st.integers(-(2**31), 2**31 - 1), st.integers(0, 8)),
    st.integers(0, 3000),
)
@example(1, [2, 1, 1, 1, 1, 1, 1], 1, 0, 4 * 26)
@example(2, [2**31 - 2, 2**31 - 1, 2**31 - 1, 1, 1, 2**31 - 1, 2**31 - 1], 0, 1, 64)
@settings(max_examples=200)
def test_any_header(tmp_path: Path, version: int, values: list[int], shared: int, group: int, n_body: int) -> None:
    """Whatever numbers stand in the header, the file is read or refused; nothing else happens."""
    header = struct.pack("<4si7iB", b"24ka", version, *values, shared)
    header += struct.pack("<i", group) if version == 2 else b""
    (tmp_path / "any.bin").write_bytes(header.ljust(256, b"\0") + bytes(n_body))
    survives(tmp_path / "any.bin", LIMIT)


@given(st.binary(max_size=300))
@settings(max_examples=100)
def test_any_bytes(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "any.bin").write_bytes(b"24ka" + data)
    survives(tmp_path / "any.bin", LIMIT)
