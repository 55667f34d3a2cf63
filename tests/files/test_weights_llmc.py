"""llm.c's GPT-2 files: what is read and written, and what is refused."""

from __future__ import annotations

import math
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gpt2files import SHAPE, bf16, gpt2_params, ints, llmc_bytes, rough, run_of
from hypothesis import example, given, settings
from hypothesis import strategies as st
from modelfiles import SMALL, bit_flips, cuts, message, random_params, read, same, survives

from anellm import weights
from anellm.config import ModelConfig
from anellm.errors import InvalidError, NonFiniteError

CONFIG = ModelConfig(**SHAPE)
PADDED = ModelConfig(**SHAPE, padded_vocab_size=128)
LIMIT = 4 << 20


@pytest.fixture
def small(tmp_path: Path) -> Path:
    path = tmp_path / "gpt2.bin"
    path.write_bytes(llmc_bytes(CONFIG, gpt2_params(CONFIG), 3))
    return path


# ---- what is read and written ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("version", [1, 3, 5])
def test_read(tmp_path: Path, version: int) -> None:
    shape = CONFIG if version == 1 else PADDED
    params = rough(gpt2_params(shape))
    (tmp_path / "a.bin").write_bytes(llmc_bytes(shape, params, version))
    config, found = read(tmp_path / "a.bin")
    assert config == shape
    assert same(found, params)
    assert found["transformer.h.1.attn.c_attn.weight"].shape == (24, 8)  # (out, in), as in the file


def test_another_padding_is_kept(tmp_path: Path) -> None:
    shape = ModelConfig(**SHAPE, padded_vocab_size=16)
    params = gpt2_params(shape)
    (tmp_path / "a.bin").write_bytes(llmc_bytes(shape, params, 3, rows=16))
    config, found = read(tmp_path / "a.bin")
    assert config.padded_vocab_size == 16
    assert same(found, params)


@pytest.mark.parametrize("version", [1, 3, 5])
@pytest.mark.parametrize("shape", [CONFIG, PADDED, ModelConfig(**SHAPE, padded_vocab_size=16)])
def test_write_is_byte_for_byte_what_llm_c_writes(tmp_path: Path, version: int, shape: ModelConfig) -> None:
    params = rough(gpt2_params(shape))
    weights.save_llmc(tmp_path / "a.bin", shape, params, version)
    assert (tmp_path / "a.bin").read_bytes() == llmc_bytes(shape, params, version)


def test_bfloat16_is_rounded_to_nearest_even(tmp_path: Path) -> None:
    params = gpt2_params(CONFIG)
    bits = np.array([0x3F808000, 0x3F818000, 0x3F808001, 0xBF808000], np.uint32)
    params["transformer.ln_f.bias"][:4] = bits.view(np.float32)
    weights.save_llmc(tmp_path / "a.bin", CONFIG, params, 5)
    found = read(tmp_path / "a.bin")[1]["transformer.ln_f.bias"][:4]
    assert [hex(value) for value in bf16(found)] == ["0x3f80", "0x3f82", "0x3f81", "0xbf80"]


def test_sizes_of_the_published_files() -> None:
    """Of GPT-2 124M, by the shape alone; nothing of that size is written."""
    from anellm.weights_llmc import file_rows, n_values

    config = ModelConfig.from_preset("gpt2")
    assert file_rows(config) == 50304
    assert n_values(config, 50257) == config.n_params() == 124_439_808
    assert 1024 + 4 * n_values(config, 50257) == 497_760_256  # version 1
    assert 1024 + 4 * n_values(config, 50304) == 497_904_640  # version 3
    assert 1024 + 2 * n_values(config, 50304) == 248_952_832  # version 5


def test_reading_takes_no_copy_of_what_is_mapped(tmp_path: Path) -> None:
    shape = ModelConfig(**{**SHAPE, "vocab_size": 5000})
    (tmp_path / "a.bin").write_bytes(llmc_bytes(shape, gpt2_params(shape), 1))
    for name, array in weights.load_pretrained(tmp_path / "a.bin").tensors:
        assert not array.flags.writeable, name


# ---- what is not written --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"bias": False}, "it has no biases"),
        ({"gelu": "erf"}, "gelu is 'erf', not 'tanh'"),
        ({"hidden_dim": 24}, "hidden_dim 24 is not 4 dim = 32"),
        ({"norm_eps": 1e-6}, "norm_eps 1e-06 is not 1e-05"),
    ],
)
@pytest.mark.parametrize("version", [1, 3, 5])
def test_what_the_format_cannot_express(tmp_path: Path, changes: dict[str, Any], expected: str, version: int) -> None:
    config = ModelConfig(**{**SHAPE, **changes})
    with pytest.raises(InvalidError) as caught:
        weights.save_llmc(tmp_path / "a.bin", config, gpt2_params(config), version)
    assert f"llm.c version {version} cannot express this model: {expected}. Save it as a Hugging" in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_a_llama_and_a_gpt2_are_not_mixed_up(tmp_path: Path) -> None:
    llama = ModelConfig(**SMALL)
    with pytest.raises(InvalidError, match=r"llm\.c version 3 cannot express this model: arch is 'llama', not 'gpt2'"):
        weights.save_llmc(tmp_path / "a.bin", llama, random_params(llama))
    for version in (0, 1):
        with pytest.raises(InvalidError, match=rf"llama2\.c version {version} cannot express .* arch is 'gpt2'"):
            weights.save_llama2c(tmp_path / "a.bin", CONFIG, gpt2_params(CONFIG), version)
    for version in (0, 2, 4, "3"):
        with pytest.raises(InvalidError, match="version: expected one of 1, 3, 5"):
            weights.save_llmc(tmp_path / "a.bin", CONFIG, gpt2_params(CONFIG), version)  # type: ignore[arg-type]
    assert not list(tmp_path.iterdir())


def test_params_that_do_not_fit(tmp_path: Path) -> None:
    params = gpt2_params(PADDED)
    params["transformer.wte.weight"][20, 3] = 1
    with pytest.raises(InvalidError, match="expected zeros from row 11 on, found others"):
        weights.save_llmc(tmp_path / "a.bin", PADDED, params)
    params = gpt2_params(PADDED)
    params["transformer.wpe.weight"][0, 0] = math.nan
    with pytest.raises(NonFiniteError, match="wpe"):
        weights.save_llmc(tmp_path / "a.bin", PADDED, params)
    params["transformer.wpe.weight"][0, 0] = 3.4e38
    with pytest.raises(NonFiniteError, match="does not fit BF16"):
        weights.save_llmc(tmp_path / "a.bin", PADDED, params, 5)
    del params["transformer.wpe.weight"]
    with pytest.raises(InvalidError, match=r"missing transformer\.wpe\.weight"):
        weights.save_llmc(tmp_path / "a.bin", PADDED, params)
    assert not list(tmp_path.iterdir())


# ---- what is refused ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("version", [1, 3, 5])
def test_cut_anywhere(tmp_path: Path, version: int) -> None:
    data = llmc_bytes(CONFIG, rough(gpt2_params(CONFIG)), version)
    path = tmp_path / "cut.bin"
    for length in [*range(0, 1024, 17), *cuts(0, len(data))[1:], 1024]:
        path.write_bytes(data[:length])
        found = message(path)
        assert "expected" in found, length
        assert "found" in found, length


@pytest.mark.parametrize("extra", [b"\0", bytes(4), bytes(32), bytes(4096)])
def test_extra_bytes(small: Path, extra: bytes) -> None:
    size = small.stat().st_size
    small.write_bytes(small.read_bytes() + extra)
    assert f"size: expected {size} bytes for the dimensions in its header, found {size + len(extra)}" in message(small)


def test_bit_flips(small: Path) -> None:
    """There is no checksum: of a header's bits, some of the vocabulary's size and the heads can change unseen."""
    data = small.read_bytes()
    path = small.with_name("flipped.bin")
    for damaged in bit_flips(data, 300, 32, 0):
        path.write_bytes(damaged)
        if survives(path, LIMIT):
            assert damaged[:12] + damaged[16:20] + damaged[24:] == data[:12] + data[16:20] + data[24:]
    for damaged in bit_flips(data, 100, 1024, 0, seed=1):
        path.write_bytes(damaged)
        survives(path, LIMIT)
    rows = 1024 + 4 * 8 * 11, 1024 + 4 * 8 * 128
    for at in range(rows[0], rows[1], 37):  # the rows that pad the vocabulary are looked at
        damaged = bytearray(data)
        damaged[at] ^= 1
        path.write_bytes(damaged)
        assert "expected zeros from row 11 on, which pad the vocabulary" in message(path)


@pytest.mark.parametrize(
    ("at", "value", "expected"),
    [
        (1, 0, "field version: expected 1, 3, 5, found 0"),
        (1, 2, "field version: expected 1, 3, 5, found 2"),
        (1, 4, "field version: expected 1, 3, 5, found 4"),
        (1, -3, "field version: expected 1, 3, 5, found -3"),
        (1, 1, "header int 7: expected 0 (padding), found 128"),
        (1, 5, "size: expected"),
        (2, 0, "field max_seq_len: expected a positive number, found 0"),
        (2, 7, "size: expected"),
        (3, -11, "field vocab_size: expected a positive number, found -11"),
        (3, 129, "field padded_vocab_size: expected at least vocab_size 129, found 128"),
        (3, 10, "expected zeros from row 10 on"),
        (4, 0, "field n_layers: expected a positive number, found 0"),
        (4, 2**31 - 1, "size: expected"),
        (5, 0, "field n_heads: expected a positive number, found 0"),
        (5, 3, "field n_heads: expected a divisor of dim 8, found 3"),
        (6, 0, "field dim: expected a positive number, found 0"),
        (6, 2**30, "field dim: expected below 536870912, found 1073741824"),
        (6, 10, "size: expected"),
        (7, 0, "field padded_vocab_size: expected a positive number, found 0"),
        (7, 10, "field padded_vocab_size: expected at least vocab_size 11, found 10"),
        (7, 129, "size: expected"),
        (7, 2**31 - 1, "size: expected"),
        (8, 1, "header int 8: expected 0 (padding), found 1"),
        (255, -1, "header int 255: expected 0 (padding), found -1"),
    ],
)
def test_damaged_header(small: Path, at: int, value: int, expected: str) -> None:
    data = bytearray(small.read_bytes())
    struct.pack_into("<i", data, 4 * at, value)
    small.write_bytes(data)
    assert expected in message(small)


@pytest.mark.parametrize(
    ("magic", "what"),
    [
        (20240327, "an llm.c debug state"), (20240328, "an llm.c tokenizer"), (20240520, "an llm.c token shard"),
        (20240522, "an llm.c evaluation set"), (20240527, "an llm.c optimizer state"),
        (20240803, "an llm.c Llama model"), (20240325, "llama2.c"),
    ],
)  # fmt: skip
def test_other_files_of_llm_c_are_named(small: Path, magic: int, what: str) -> None:
    data = small.read_bytes()
    small.write_bytes(struct.pack("<i", magic) + data[4:])
    assert what in message(small)


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("version", [3, 5])
def test_non_finite_weights(tmp_path: Path, value: float, version: int) -> None:
    params = rough(gpt2_params(CONFIG))
    params["transformer.h.1.mlp.c_fc.bias"][5] = value
    path = tmp_path / "a.bin"
    path.write_bytes(llmc_bytes(CONFIG, params, version))
    assert f"tensor transformer.h.1.mlp.c_fc.bias: expected finite weights, found {value} at index 5" in message(path)


@given(
    st.sampled_from([1, 3, 5, 2]),
    st.lists(
        st.one_of(st.integers(-(2**31), 2**31 - 1), st.integers(-2, 64), st.sampled_from([2**15, 2**16, 2**30])),
        min_size=6,
        max_size=6,
    ),
    st.integers(0, 3000),
)
@example(3, [1, 1, 1, 1, 1, 1], 4 * 29)
@example(3, [2**31 - 1, 2**31 - 1, 2**31 - 1, 1, 2**29 - 1, 2**31 - 1], 64)
@settings(max_examples=200)
def test_any_header(tmp_path: Path, version: int, values: list[int], n_body: int) -> None:
    """Whatever numbers stand in the header, the file is read or refused; nothing else happens."""
    (tmp_path / "any.bin").write_bytes(ints(20240326, version, *values) + bytes(n_body))
    survives(tmp_path / "any.bin", LIMIT)


@given(st.binary(max_size=300))
@settings(max_examples=100)
def test_any_bytes(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "any.bin").write_bytes(struct.pack("<i", 20240326) + data)
    assert not survives(tmp_path / "any.bin", LIMIT)


def test_order_is_each_kind_for_all_layers() -> None:
    """The helper above and the reader are two lists; this is the third, spelt out for one layer's neighbour."""
    params = gpt2_params(CONFIG)
    values = run_of(CONFIG, params, 11)
    at = (11 + 6) * 8
    np.testing.assert_array_equal(values[at : at + 8], params["transformer.h.0.ln_1.weight"])
    np.testing.assert_array_equal(values[at + 8 : at + 16], params["transformer.h.1.ln_1.weight"])
    np.testing.assert_array_equal(values[at + 16 : at + 24], params["transformer.h.0.ln_1.bias"])
    np.testing.assert_array_equal(values[-8:], params["transformer.ln_f.bias"])
