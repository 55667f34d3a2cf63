"""llm.c's debug and optimizer states: what is read and written, and what is refused."""

from __future__ import annotations

import math
import struct
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gpt2files import SHAPE, gpt2_params, ints, optimizer_bytes, state_bytes
from hypothesis import given, settings
from hypothesis import strategies as st
from modelfiles import SMALL, bit_flips, same

from anellm import debug_state, optimizer_state
from anellm.config import ModelConfig
from anellm.errors import DataError, InvalidError, NonFiniteError

CONFIG = ModelConfig(**SHAPE)
PADDED = ModelConfig(**SHAPE, padded_vocab_size=128)
N_BEFORE = 1024 + 4 * (2 * 6 + 6 * 11 + 1)  # of a debug state's gradients

READERS: dict[str, tuple[Callable[[Path, ModelConfig], object], bytes]] = {
    "debug": (debug_state.read, state_bytes(PADDED, 1)),
    "debug v1": (debug_state.read, state_bytes(PADDED, 1, version=1)),
    "optimizer": (optimizer_state.read, optimizer_bytes(PADDED)),
    "optimizer shuffled": (optimizer_state.read, optimizer_bytes(PADDED, shuffle=True)),
}


def refusal(tmp_path: Path, kind: str, data: bytes, config: ModelConfig = PADDED) -> str:
    path = tmp_path / "state.bin"
    path.write_bytes(data)
    with pytest.raises(DataError) as caught:
        READERS[kind][0](path, config)
    text = str(caught.value)
    assert text.startswith(f"{path}: ")
    assert "expected" in text
    assert "found" in text
    assert text.isprintable()
    return text


# ---- debug state ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "version", "rows"),
    [(CONFIG, 1, None), (PADDED, 1, None), (CONFIG, 2, 128), (PADDED, 2, 128), (CONFIG, 2, 11)],
)
def test_debug_state(tmp_path: Path, config: ModelConfig, version: int, rows: int | None) -> None:
    path = tmp_path / "state.bin"
    path.write_bytes(state_bytes(config, 5, version, rows))
    found = debug_state.read(path, config)
    rng = np.random.default_rng(5)
    ids = rng.integers(0, 11, (2, 2, 3))
    np.testing.assert_array_equal(found.tokens, ids[0])
    np.testing.assert_array_equal(found.targets, ids[1])
    np.testing.assert_array_equal(found.logits, rng.standard_normal((2, 3, 11)).astype(np.float32))
    assert found.loss == 2.5
    assert same(found.grads, gpt2_params(config, 5))  # names, order and shapes of the model, padded as it is


@pytest.mark.parametrize("config", [CONFIG, PADDED])
@pytest.mark.parametrize("version", [1, 2])
def test_debug_state_is_written_byte_for_byte(tmp_path: Path, config: ModelConfig, version: int) -> None:
    path, again = tmp_path / "state.bin", tmp_path / "again.bin"
    path.write_bytes(state_bytes(config, 7, version))
    debug_state.write(again, debug_state.read(path, config), config, version)
    assert again.read_bytes() == path.read_bytes()


def test_size_of_the_published_debug_state() -> None:
    from anellm.weights_llmc import n_values

    config = ModelConfig.from_preset("gpt2")
    assert 1024 + 4 * (2 * 4 * 64 + 4 * 64 * 50257 + 1 + n_values(config, 50304)) == 549_369_860


def good() -> debug_state.DebugState:
    rng = np.random.default_rng(1)
    return debug_state.DebugState(
        tokens=rng.integers(0, 11, (2, 3), dtype=np.int32),
        targets=rng.integers(0, 11, (2, 3), dtype=np.int32),
        logits=rng.standard_normal((2, 3, 11), dtype=np.float32),
        loss=2.0,
        grads=gpt2_params(PADDED),
    )


def nonzero_padding() -> dict[str, np.ndarray]:
    grads = gpt2_params(PADDED)
    grads["transformer.wte.weight"][100] = 1
    return grads


@pytest.mark.parametrize(
    ("changes", "error", "expected"),
    [
        ({"tokens": np.zeros(6, np.int32)}, InvalidError, r"tokens: expected \(B, T\) with T from 1 to 6"),
        ({"tokens": np.zeros((1, 7), np.int32)}, InvalidError, r"tokens: expected \(B, T\) with T from 1 to 6"),
        ({"tokens": np.zeros((2, 3), np.int64)}, InvalidError, "tokens: expected int32"),
        ({"targets": np.zeros((2, 2), np.int32)}, InvalidError, r"targets: expected int32 of shape \(2, 3\)"),
        ({"targets": np.full((2, 3), 11, np.int32)}, InvalidError, "targets: expected ids from 0 to 10"),
        ({"tokens": np.full((2, 3), -1, np.int32)}, InvalidError, "tokens: expected ids from 0 to 10"),
        (
            {"logits": np.zeros((2, 3, 128), np.float32)},
            InvalidError,
            r"logits: expected float32 of shape \(2, 3, 11\)",
        ),
        ({"logits": np.full((2, 3, 11), np.inf, np.float32)}, NonFiniteError, "logits: inf or NaN"),
        ({"loss": math.nan}, NonFiniteError, "loss: inf or NaN"),
        ({"grads": gpt2_params(CONFIG)}, InvalidError, r"wte.*expected float32 of shape \(128, 8\)"),
        ({"grads": {}}, InvalidError, "missing"),
        ({"grads": nonzero_padding()}, InvalidError, "expected zeros from row 11 on"),
    ],
)
def test_a_state_that_does_not_fit_is_not_written(
    tmp_path: Path, changes: dict[str, Any], error: type[Exception], expected: str
) -> None:
    with pytest.raises(error, match=expected):
        debug_state.write(tmp_path / "s.bin", replace(good(), **changes), PADDED)
    assert not list(tmp_path.iterdir())


def test_wrong_versions_and_models(tmp_path: Path) -> None:
    for version in (0, 3, "2"):
        with pytest.raises(InvalidError, match="version: expected 1 or 2, found"):
            debug_state.write(tmp_path / "s.bin", good(), PADDED, version)  # type: ignore[arg-type]
    bare = ModelConfig(**{**SHAPE, "bias": False})
    (tmp_path / "state.bin").write_bytes(state_bytes(PADDED, 1))
    for config in (bare, ModelConfig(**SMALL)):
        with pytest.raises(InvalidError, match=r"llm\.c debug state cannot express this model"):
            debug_state.read(tmp_path / "state.bin", config)
        with pytest.raises(InvalidError, match=r"llm\.c debug state cannot express this model"):
            debug_state.write(tmp_path / "s.bin", good(), config)
        with pytest.raises(InvalidError, match=r"llm\.c optimizer state cannot express this model"):
            optimizer_state.read(tmp_path / "state.bin", config)


def edited(data: bytes, at: int, layout: str, value: Any) -> bytes:
    changed = bytearray(data)
    struct.pack_into("<" + layout, changed, at, value)
    return bytes(changed)


@pytest.mark.parametrize(
    ("at", "layout", "value", "expected"),
    [
        (0, "i", 20240326, "magic: expected 20240327, found 20240326"),
        (4, "i", 0, "field version: expected 1 or 2, found 0"),
        (4, "i", 3, "field version: expected 1 or 2, found 3"),
        (4, "i", 1, "size: expected"),
        (8, "i", 0, "field B: expected 1 to 2147483647, found 0"),
        (8, "i", 3, "size: expected"),
        (8, "i", 2**31 - 1, "truncated, or of another model"),
        (12, "i", -1, "field T: expected 1 to 6, found -1"),
        (12, "i", 7, "field T: expected 1 to 6, found 7"),
        (16, "i", 5, "header int 4: expected 0 (padding), found 5"),
        (1024, "i", 11, "tokens: expected ids from 0 to 10, found 11 at index 0"),
        (1024 + 20, "i", -1, "tokens: expected ids from 0 to 10, found -1 at index 5"),
        (1024 + 24, "i", 2**30, "targets: expected ids from 0 to 10, found 1073741824 at index 0"),
        (1024 + 48, "f", math.nan, "logits: expected finite numbers, found nan at index 0"),
        (N_BEFORE - 4, "f", math.inf, "loss: expected finite numbers, found inf at index 0"),
        (N_BEFORE, "f", math.nan, "transformer.wte.weight: expected finite numbers, found nan at index 0"),
        (N_BEFORE + 4 * 8 * 11, "f", 1.0, "transformer.wte.weight: expected zeros from row 11 on"),
    ],
)
def test_damaged_debug_state(tmp_path: Path, at: int, layout: str, value: Any, expected: str) -> None:
    assert expected in refusal(tmp_path, "debug", edited(READERS["debug"][1], at, layout, value))


# ---- optimizer state ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("config", [CONFIG, PADDED])
@pytest.mark.parametrize("master", [True, False])
@pytest.mark.parametrize("shuffle", [True, False])
def test_optimizer_state(tmp_path: Path, config: ModelConfig, master: bool, shuffle: bool) -> None:
    path = tmp_path / "state_00000040_00000.bin"
    path.write_bytes(optimizer_bytes(config, master=master, shuffle=shuffle))
    found = optimizer_state.read(path, config)
    assert (found.step, found.n_processes, found.rank, found.shard, found.sample) == (40, 1, 0, 3, 9)
    assert (found.rng_state, found.rng_state_last_update) == ((1 << 32) + (1 << 32) - 2, 7)
    assert same(found.moments_m, gpt2_params(config, 1))
    assert same(found.moments_v, {name: np.abs(array) for name, array in gpt2_params(config, 2).items()})
    assert found.master is None if not master else same(found.master, gpt2_params(config, 3))


N_EACH = (len(optimizer_bytes(PADDED)) - 1024) // 3


@pytest.mark.parametrize(
    ("at", "layout", "value", "expected"),
    [
        (0, "i", 1, "magic: expected 20240527, found 1"),
        (4, "i", 2, "field version: expected 1, found 2"),
        (8, "i", 0, "field num_processes: expected 1 or more, found 0"),
        (12, "i", 1, "field process_rank: expected 0 to 0, found 1"),
        (12, "i", -1, "field process_rank: expected 0 to 0, found -1"),
        (16, "i", 2, "field use_master_weights: expected 0 or 1, found 2"),
        (16, "i", 0, "size: expected"),
        (20, "i", -1, "field should_shuffle: expected 0 or 1, found -1"),
        (20, "i", 1, "bytes and the order of the data"),
        (40, "i", -1, "field step: expected 0 or more, found -1"),
        (1024, "f", math.nan, "transformer.wte.weight: expected finite numbers"),
        (1024 + 4 * 8 * 11, "f", 2.0, "transformer.wte.weight: expected zeros from row 11 on"),
        (1024 + N_EACH, "f", -1.0, "v of transformer.wte.weight: expected at least 0, found -1.0 at index 0"),
        (1024 + 3 * N_EACH - 4, "f", math.inf, "transformer.ln_f.bias: expected finite numbers"),
    ],
)
def test_damaged_optimizer_state(tmp_path: Path, at: int, layout: str, value: Any, expected: str) -> None:
    assert expected in refusal(tmp_path, "optimizer", edited(READERS["optimizer"][1], at, layout, value))


def test_a_part_of_several_processes_is_named(tmp_path: Path) -> None:
    data = optimizer_bytes(PADDED, processes=2)
    half = data[: 1024 + (len(data) - 1024) // 2]
    assert "only the part of one of 2 processes (ZeRO), which is not read" in refusal(tmp_path, "optimizer", half)
    (tmp_path / "whole.bin").write_bytes(data)  # without ZeRO each process has everything
    assert optimizer_state.read(tmp_path / "whole.bin", PADDED).n_processes == 2


def test_damaged_tables_of_the_order(tmp_path: Path) -> None:
    data = READERS["optimizer shuffled"][1]
    tables = len(data) - 2520 - 8 - 12 - 8 - 8
    for at, value in ((tables, 3), (tables, 2**62), (tables + 16, 4), (tables + 16, 2**31)):
        assert "size: expected" in refusal(tmp_path, "optimizer shuffled", edited(data, at, "Q", value))


# ---- both -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", READERS)
def test_cut_anywhere(tmp_path: Path, kind: str) -> None:
    data = READERS[kind][1]
    places = np.random.default_rng(0).integers(1024, len(data), 40).tolist()
    for length in [0, 3, 4, 8, 1020, 1023, 1024, 1028, *places, len(data) - 4, len(data) - 1]:
        refusal(tmp_path, kind, data[:length])
    for extra in (b"\0", bytes(4), bytes(3000)):
        refusal(tmp_path, kind, data + extra)


@pytest.mark.parametrize("kind", READERS)
def test_bit_flips(tmp_path: Path, kind: str) -> None:
    reader, data = READERS[kind]
    path = tmp_path / "state.bin"
    for damaged in bit_flips(data, 100, 64, 50):
        path.write_bytes(damaged)
        try:
            reader(path, PADDED)
        except DataError as error:
            assert str(error).startswith(str(path))


@pytest.mark.parametrize("kind", READERS)
def test_another_models_state(tmp_path: Path, kind: str) -> None:
    for changes in ({"dim": 12}, {"n_layers": 3}, {"max_seq_len": 7}, {"vocab_size": 140}):
        other = ModelConfig(**{**SHAPE, **changes})
        assert "of another model" in refusal(tmp_path, kind, READERS[kind][1], other)


def test_missing_files(tmp_path: Path) -> None:
    for reader, _ in READERS.values():
        with pytest.raises((DataError, FileNotFoundError)):
            reader(tmp_path / "absent", PADDED)


@given(
    st.sampled_from([(20240327, debug_state.read), (20240527, optimizer_state.read)]),
    st.lists(st.one_of(st.integers(-(2**31), 2**31 - 1), st.integers(-1, 8)), min_size=11, max_size=11),
    st.integers(0, 6000),
)
@settings(max_examples=150)
def test_any_header(tmp_path: Path, kind: tuple[int, Any], values: list[int], n_body: int) -> None:
    path = tmp_path / "state.bin"
    path.write_bytes(ints(kind[0], *values) + bytes(n_body))
    with pytest.raises(DataError):
        kind[1](path, PADDED)
