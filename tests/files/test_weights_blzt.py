"""Checkpoints of the original ANE trainer (BLZT): layout, what is read, what a converted model computes, refusals."""

from __future__ import annotations

import math
import struct
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from modelfiles import (
    SMALL,
    Params,
    bit_flips,
    blzt_bytes,
    cuts,
    interleaved_heads,
    message,
    random_params,
    read,
    same,
    survives,
)

from anellm import convert, train, weights
from anellm.config import ModelConfig
from anellm.data import TokenDataset
from anellm.model import Model

pytestmark = pytest.mark.filterwarnings("ignore:.*BLZT version:UserWarning")
LIMIT = 4 << 20  # of memory for files of a few kilobytes
GROUPED = {**SMALL, "n_heads": 4, "n_kv_heads": 2, "head_dim": 6}  # q_dim 24, not dim 12
SHAPES = {2: SMALL, 4: GROUPED}


@pytest.fixture(params=[2, 4])
def small(tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    """Return a valid file of each version."""
    config = ModelConfig(**SHAPES[request.param])
    path = tmp_path / "small.bin"
    path.write_bytes(blzt_bytes(config, random_params(config), request.param))
    read(path)
    return path


# ---- what is read --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("version", [2, 4])
def test_every_weight_is_read(tmp_path: Path, version: int) -> None:
    config = ModelConfig(**SHAPES[version])
    params = random_params(config)
    data = blzt_bytes(config, params, version)
    assert len(data) == 96 + 12 * config.n_params()
    assert data[:4] == b"TZLB"
    (tmp_path / "a.bin").write_bytes(data)
    found, tensors = read(tmp_path / "a.bin")
    assert found == config
    assert same(tensors, params)


def test_the_size_of_stories110m() -> None:
    """The published size, by the rule that the reader goes by."""
    assert 96 + 12 * ModelConfig.from_preset("stories110m").n_params() == 1_314_358_368


def test_places_by_hand(tmp_path: Path) -> None:
    """A file of counting numbers: the first of each tensor is its place; neighbours of q and k become halves."""
    config = ModelConfig(dim=4, hidden_dim=3, n_layers=2, n_heads=1, vocab_size=5, max_seq_len=8)
    data = np.arange(3 * config.n_params(), dtype="<f4").tobytes()
    path = tmp_path / "a.bin"
    path.write_bytes(blzt_bytes(config, random_params(config), 2)[:96] + data)
    _, tensors = read(path)
    layer = 4 * 16 + 3 * 12 + 2 * 4
    first = {
        "model.layers.0.self_attn.q_proj.weight": 0, "model.layers.0.self_attn.k_proj.weight": 16,
        "model.layers.0.self_attn.v_proj.weight": 32, "model.layers.0.self_attn.o_proj.weight": 48,
        "model.layers.0.mlp.gate_proj.weight": 64, "model.layers.0.mlp.down_proj.weight": 76,
        "model.layers.0.mlp.up_proj.weight": 88, "model.layers.0.input_layernorm.weight": 100,
        "model.layers.0.post_attention_layernorm.weight": 104, "model.layers.1.self_attn.q_proj.weight": 3 * layer,
        "model.norm.weight": 6 * layer, "model.embed_tokens.weight": 6 * layer + 12,
    }  # fmt: skip
    assert {name: tensors[name].reshape(-1)[0] for name in first} == first
    assert tensors["model.layers.0.self_attn.q_proj.weight"][:, 0].tolist() == [0, 8, 4, 12]
    assert tensors["model.layers.0.self_attn.v_proj.weight"][:, 0].tolist() == [32, 36, 40, 44]


@pytest.mark.parametrize("value", [10, 0x01020304, -1])
def test_the_first_spare_field_of_version_2_is_the_trainers_own(tmp_path: Path, value: int) -> None:
    config = ModelConfig(**SMALL)
    (tmp_path / "a.bin").write_bytes(blzt_bytes(config, random_params(config), 2, pad0=value))
    assert read(tmp_path / "a.bin")[0] == config


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    ("version", "said"),
    [(2, "its trainer left the rotary embedding out"), (4, "use anellm convert --residual-scale 0.5$")],
)
def test_what_differs_from_the_trainers_model_is_said(tmp_path: Path, version: int, said: str) -> None:
    config = ModelConfig(**SHAPES[version])
    (tmp_path / "a.bin").write_bytes(blzt_bytes(config, random_params(config), version))
    with pytest.warns(UserWarning, match=rf"a.bin: BLZT version {version}: .*{said}"):
        weights.load_pretrained(tmp_path / "a.bin")


# ---- converting ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("version", [2, 4])
@pytest.mark.parametrize("kind", ["hf", "llama2c"])
def test_convert(tmp_path: Path, version: int, kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    config = ModelConfig(**SHAPES[version])
    params = random_params(config)
    (tmp_path / "a.bin").write_bytes(blzt_bytes(config, params, version))
    words = ["--model", str(tmp_path / "a.bin"), "--out", str(tmp_path / "new" / "m"), "--format", kind]
    if kind == "llama2c" and version == 4:
        assert convert.main(words) == 2  # heads of 6 x 4 are not dim 12
        assert "head_dim 6 is not dim/n_heads" in capsys.readouterr().err
        return
    assert convert.main(words) == 0
    assert same(read(tmp_path / "new" / "m")[1], params)


def _reference(config: ModelConfig, params: Params, tokens: np.ndarray, scale: float) -> np.ndarray:
    """Return logits as training_dynamic computes them, in float64: rotated neighbours, scaled branches."""
    p = {name: interleaved_heads(config, name, array).astype(np.float64) for name, array in params.items()}
    n, hd = tokens.size, config.head_dim

    def norm(x: np.ndarray, w: np.ndarray) -> np.ndarray:
        return x / np.sqrt((x * x).mean(-1, keepdims=True) + 1e-5) * w

    def rotated(x: np.ndarray) -> np.ndarray:
        angles = np.outer(np.arange(n), 10000.0 ** (-np.arange(0, hd, 2) / hd))[:, None]
        a, b, cos, sin = x[..., ::2], x[..., 1::2], np.cos(angles), np.sin(angles)
        return np.stack([a * cos - b * sin, a * sin + b * cos], -1).reshape(x.shape)

    x = p["model.embed_tokens.weight"][tokens]
    for layer in range(config.n_layers):
        w = {name.split(".")[-2]: p[name] for name in p if name.startswith(f"model.layers.{layer}.")}
        h = norm(x, w["input_layernorm"])
        q, k, v = ((h @ w[f"{c}_proj"].T).reshape(n, -1, hd) for c in "qkv")
        k, v = (np.repeat(a, config.n_heads // config.n_kv_heads, 1) for a in (rotated(k), v))
        scores = np.einsum("ihd,jhd->hij", rotated(q), k) / math.sqrt(hd) + np.triu(np.full((n, n), -np.inf), 1)
        weight = np.exp(scores - scores.max(-1, keepdims=True))
        weight /= weight.sum(-1, keepdims=True)
        x = x + scale * np.einsum("hij,jhd->ihd", weight, v).reshape(n, -1) @ w["o_proj"].T
        h = norm(x, w["post_attention_layernorm"])
        gate = h @ w["gate_proj"].T
        x = x + scale * (gate / (1 + np.exp(-gate)) * (h @ w["up_proj"].T)) @ w["down_proj"].T
    return norm(x, p["model.norm.weight"]) @ p["model.embed_tokens.weight"].T


@pytest.mark.parametrize("scaled", [False, True])
def test_a_converted_model_computes_what_its_trainer_did(tmp_path: Path, scaled: bool) -> None:
    config = ModelConfig(**GROUPED)
    params = {name: array * np.float32(0.3) for name, array in random_params(config).items()}
    (tmp_path / "a.bin").write_bytes(blzt_bytes(config, params, 4))
    words = ["--model", str(tmp_path / "a.bin"), "--out", str(tmp_path / "hf"), "--format", "hf"]
    assert convert.main([*words, "--residual-scale", "0.5"] if scaled else words) == 0
    tokens = np.arange(8, dtype=np.int32) % config.vocab_size
    logits = Model.from_pretrained(tmp_path / "hf", device="cpu").forward(tokens[None])[0]
    with_scale, without = (_reference(config, params, tokens, scale) for scale in (0.5, 1.0))
    np.testing.assert_allclose(logits, with_scale if scaled else without, rtol=0, atol=2e-5)
    assert np.abs(with_scale - without).max() > 0.01


@pytest.mark.parametrize("scale", ["0", "-1", "nan", "x", "1e39"])
def test_a_residual_scale_that_is_none_is_refused(
    tmp_path: Path, scale: str, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--model", "m", "--out", str(tmp_path / "o"), "--format", "hf", "--residual-scale", scale]
    assert convert.main(words) == 2
    assert "--residual-scale: expected" in capsys.readouterr().err


def test_training_goes_on_from_a_checkpoint_with_the_trainers_data(tmp_path: Path) -> None:
    """Its data file is uint16 ids with nothing before them: read as it is."""
    config = ModelConfig(**SMALL)
    (tmp_path / "ckpt.bin").write_bytes(blzt_bytes(config, random_params(config), 2))
    ids = (np.arange(400) * 7 % 11).astype("<u2")
    data = tmp_path / "tinystories_data00.bin"
    data.write_bytes(ids.tobytes())
    found = TokenDataset.from_file(data, vocab_size=11)
    assert found.n_tokens == 400
    batch, targets = found.batch(1, 0, 0, 1, 400 - 1)
    assert batch[0].tolist() == ids[:-1].tolist()
    assert targets[0].tolist() == ids[1:].tolist()
    words = ["--model", str(tmp_path / "ckpt.bin"), "--data", str(data), "--out", str(tmp_path / "run"), "--steps", "2"]
    assert train.main([*words, "--seq-len", "8", "--sample-tokens", "0", "--plain"]) == 0
    assert weights.load_pretrained(tmp_path / "run").config == config


# ---- what is refused -----------------------------------------------------------------------------------------------


def test_cut_anywhere(small: Path) -> None:
    data = small.read_bytes()
    path = small.with_name("cut.bin")
    for length in cuts(96, len(data)):
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
    """There is no checksum: of a header's bits, those of counts, times and the sequence's length can change unseen."""
    data = small.read_bytes()
    path = small.with_name("flipped.bin")
    read_ = sum([survives(path, LIMIT) for damaged in bit_flips(data, 300, 96, 0) if path.write_bytes(damaged)])
    assert 0 < read_ < 210


@pytest.mark.parametrize(
    ("at", "layout", "value", "expected"),
    [
        (0, "4s", b"TZLA", "llama2.c header field"),  # without the magic it is a llama2.c file
        (0, "4s", b"BLZT", "big-endian machine"),
        (4, "i", 0, "field version: expected 2 or 4, found 0"),
        (4, "i", 3, "field version: expected 2 or 4, found 3"),
        (4, "i", 5, "field version: expected 2 or 4, found 5"),
        (4, "i", -2, "field version: expected 2 or 4, found -2"),
        (8, "i", -1, "field step: expected 0 or more, found -1"),
        (12, "i", -1, "field total_steps: expected 0 or more, found -1"),
        (16, "i", 0, "field n_layers: expected a positive number, found 0"),
        (16, "i", 3, "size: expected"),
        (16, "i", 2**31 - 1, "size: expected"),
        (20, "i", -11, "field vocab_size: expected a positive number, found -11"),
        (20, "i", 2**31 - 1, "size: expected"),
        (24, "i", 0, "field dim: expected a positive number, found 0"),
        (28, "i", -1, "field hidden_dim: expected a positive number, found -1"),
        (28, "i", 21, "size: expected"),
        (32, "i", 0, "field n_heads: expected a positive number, found 0"),
        (36, "i", 0, "field seq_len: expected a positive number, found 0"),
        (36, "i", 2**31 - 1, "max_seq_len"),
        (40, "f", math.nan, "field lr: expected a finite number from 0, found nan"),
        (40, "f", -1.0, "field lr: expected a finite number from 0, found -1.0"),
        (48, "d", math.inf, "field cum_compile: expected a finite number from 0, found inf"),
        (56, "d", -0.5, "field cum_train: expected a finite number from 0, found -0.5"),
        (64, "d", math.nan, "field cum_wall: expected a finite number from 0, found nan"),
        (72, "i", -1, "field cum_steps: expected 0 or more, found -1"),
        (76, "i", -1, "field cum_batches: expected 0 or more, found -1"),
        (80, "i", -1, "field adam_t: expected 0 or more, found -1"),
    ],
)
def test_damaged_header(small: Path, at: int, layout: str, value: Any, expected: str) -> None:
    data = bytearray(small.read_bytes())
    struct.pack_into("<" + layout, data, at, value)
    small.write_bytes(data)
    assert expected in message(small)


@pytest.mark.parametrize(
    ("version", "changes", "expected"),
    [
        (2, {"n_heads": 5}, "field n_heads: expected a divisor of dim 12 that leaves an even head_dim, found 5"),
        (2, {"n_heads": 4}, "field n_heads: expected a divisor of dim 12 that leaves an even head_dim, found 4"),
        (2, {"pad1": 1}, "field pad1: expected 0, found 1"),
        (2, {"pad2": -1}, "field pad2: expected 0, found -1"),
        (4, {"pad0": 0}, "field kv_heads: expected a positive number, found 0"),
        (4, {"pad0": 3}, "field kv_heads: expected a divisor of n_heads 4, found 3"),
        (4, {"pad0": 1}, "size: expected"),
        (4, {"pad1": 5}, "field head_dim: expected an even number, found 5"),
        (4, {"pad2": 12}, "field q_dim: expected n_heads x head_dim = 24, found 12"),
        (4, {"says": 2}, "field pad1: expected 0, found 6"),  # what belongs to version 4
    ],
)
def test_fields_that_belong_to_a_version(tmp_path: Path, version: int, changes: dict[str, int], expected: str) -> None:
    config = ModelConfig(**SHAPES[version])
    (tmp_path / "a.bin").write_bytes(blzt_bytes(config, random_params(config), version, **changes))
    assert expected in message(tmp_path / "a.bin")


def test_a_version_2_file_that_says_4_is_refused(tmp_path: Path) -> None:
    config = ModelConfig(**SMALL)
    (tmp_path / "a.bin").write_bytes(blzt_bytes(config, random_params(config), 2, says=4))
    assert "field kv_heads: expected a positive number, found 0" in message(tmp_path / "a.bin")


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_non_finite_weights(small: Path, value: float) -> None:
    data = bytearray(small.read_bytes())
    struct.pack_into("<f", data, 96, value)
    small.write_bytes(data)
    assert "tensor model.layers.0.self_attn.q_proj.weight: expected finite weights" in message(small)


def test_moments_are_not_looked_at(small: Path) -> None:
    before = read(small)[1]
    data = bytearray(small.read_bytes())
    struct.pack_into("<f", data, len(data) - 4, math.nan)
    small.write_bytes(data)
    assert same(read(small)[1], before)


@given(
    st.sampled_from([2, 4, 3, 0]),
    st.lists(
        st.one_of(st.integers(-(2**31), 2**31 - 1), st.integers(-2, 64), st.sampled_from([2**15, 2**16, 2**30])),
        min_size=9,
        max_size=9,
    ),
    st.integers(0, 3000),
)
@example(4, [1, 1, 2, 1, 1, 1, 1, 2, 2], 12 * 23)
@example(2, [2**31 - 1, 2**31 - 1, 2**31 - 2, 2**31 - 1, 1, 2**31 - 1, 0, 0, 0], 64)
@settings(max_examples=200)
def test_any_header(tmp_path: Path, version: int, values: list[int], n_body: int) -> None:
    """Whatever numbers stand in the header, the file is read or refused; nothing else happens."""
    header = struct.pack("<4s3i6i2f3d6i", b"TZLB", version, 0, 0, *values[:6], 0, 0, 0, 0, 0, 0, 0, 0, *values[6:])
    (tmp_path / "any.bin").write_bytes(header + bytes(n_body))
    survives(tmp_path / "any.bin", LIMIT)


@given(st.binary(max_size=300))
@settings(max_examples=100)
def test_any_bytes(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "any.bin").write_bytes(b"TZLB" + data)
    survives(tmp_path / "any.bin", LIMIT)


def test_reading_takes_no_copy_of_what_is_mapped(tmp_path: Path) -> None:
    config = ModelConfig(**{**SMALL, "vocab_size": 5000})
    (tmp_path / "a.bin").write_bytes(blzt_bytes(config, random_params(config), 2))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name, array in weights.load_pretrained(tmp_path / "a.bin").tensors:
            rotated = name.endswith(("q_proj.weight", "k_proj.weight"))
            assert array.flags.writeable == rotated
            assert array.dtype == np.float32
