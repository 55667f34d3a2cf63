"""llm.c's debug state (github.com/karpathy/llm.c, train_gpt2.py ``write_state``): what a GPT-2 gives for a batch.

256 int32, little-endian: magic 20240327, version, B, T, zeros. Then int32 tokens (B, T) and targets (B, T); fp32 logits
(B, T, V), without the vocabulary's padding; fp32 loss, the mean over B * T; fp32 gradients of all tensors in the order
of the model file (weights_llmc.py). In version 2 wte's gradient has the rows that pad the vocabulary, which are zeros;
in version 1 (llm.metal's) it has none.

V, L and so on are not in the file: it goes with a model.
"""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from anellm import errors, hf_layout, safeio, weights
from anellm.model_config import ModelConfig
from anellm.weights_llmc import (
    HEADER_BYTES,
    check_pad_rows,
    check_zeros,
    file_order,
    file_rows,
    n_values,
    read_ints,
    refuse_inexpressible,
)

MAGIC: Final = 20240327
VERSIONS: Final = (1, 2)
_WHAT: Final = "llm.c debug state"
_WTE: Final = hf_layout.EMBEDDINGS["gpt2"]


@dataclass(frozen=True, kw_only=True)
class DebugState:
    """A batch, and what a model gives for it.

    Attributes:
        tokens: (B, T) int32, each below vocab_size.
        targets: (B, T) int32, each below vocab_size.
        logits: (B, T, vocab_size) float32.
        loss: mean cross-entropy in nats.
        grads: gradient of the loss by tensor, float32, in names and shapes as Model.grads has them.
    """

    tokens: npt.NDArray[np.int32]
    targets: npt.NDArray[np.int32]
    logits: npt.NDArray[np.float32]
    loss: float
    grads: dict[str, npt.NDArray[np.float32]]


def read(path: str | Path, config: ModelConfig) -> DebugState:
    """Read a debug state of version 1 or 2.

    Args:
        path: the file.
        config: of the model that it belongs to, a GPT-2.

    Returns:
        Arrays over the mapped file, read-only, but for wte's gradient where its padding is not the model's.

    Raises:
        DataError: naming file, field, expected and found; also when the file does not fit the model.
        InvalidError: when the model is none that llm.c has.
    """
    path = Path(path)
    refuse_inexpressible(config, _WHAT)
    values = read_ints(path, _WHAT, MAGIC)
    version, B, T = values[1:4]
    if version not in VERSIONS:
        raise errors.DataError(f"{path}: {_WHAT} header field version: expected 1 or 2, found {version}")
    for field, value, most in (("B", B, (1 << 31) - 1), ("T", T, config.max_seq_len)):
        if not 1 <= value <= most:
            raise errors.DataError(f"{path}: {_WHAT} header field {field}: expected 1 to {most}, found {value}")
    check_zeros(path, _WHAT, values, 4)
    n_before = B * T * (2 + config.vocab_size) + 1  # ids, logits and loss
    n_rows = _rows(path, config, version, HEADER_BYTES + 4 * n_before)
    data = np.memmap(path, dtype=np.uint8, mode="r", offset=HEADER_BYTES)
    ids = np.asarray(data[: 8 * B * T]).view("<i4").reshape(2, B, T)
    for name, part in (("tokens", ids[0]), ("targets", ids[1])):
        _check_ids(path, name, part, config.vocab_size)
    floats = np.asarray(data[8 * B * T :]).view("<f4")
    n_logits = B * T * config.vocab_size
    logits, loss = floats[:n_logits], floats[n_logits]
    _check_finite(path, "logits", logits)
    _check_finite(path, "loss", floats[n_logits : n_logits + 1])
    grads = unpack(path, floats[n_logits + 1 :], config, n_rows)
    return DebugState(
        tokens=ids[0],
        targets=ids[1],
        logits=logits.reshape(B, T, config.vocab_size),
        loss=float(loss),
        grads=grads,
    )


def _rows(path: Path, config: ModelConfig, version: int, n_before: int) -> int:
    """Return how many rows wte's gradient has: in version 2 as llm.c pads them, or as the model at hand has them.

    Args:
        path: the file.
        config: of the model.
        version: of the file.
        n_before: bytes before the gradients.
    """
    size = path.stat().st_size
    rows = (config.vocab_size,) if version == 1 else (file_rows(config), config.padded_vocab_size)
    sizes = {n_before + 4 * n_values(config, n_rows): n_rows for n_rows in rows}
    if size not in sizes:
        what = "truncated, or of another model" if size < max(sizes) else "too long, or of another model"
        raise errors.DataError(
            f"{path}: size: expected {' or '.join(map(str, sizes))} bytes for the model's shape, found {size} ({what})"
        )
    return sizes[size]


def unpack(path: Path, values: npt.NDArray[Any], config: ModelConfig, n_rows: int) -> dict[str, npt.NDArray[Any]]:
    """Cut a run of fp32 values into tensors, in the order of the core.

    Args:
        path: the file, for messages.
        values: what n_values() counts, in llm.c's order.
        config: of the model.
        n_rows: rows of wte in the file; it gets as many as the model has.

    Raises:
        DataError: on inf or NaN, or padding that is not zero.
    """
    shapes = weights.tensor_shapes(config)
    found: dict[str, npt.NDArray[Any]] = {}
    at = 0
    for name in file_order(config):
        shape = (n_rows, config.dim) if name == _WTE else shapes[name]
        array = values[at : at + math.prod(shape)].reshape(shape)
        at += array.size
        _check_finite(path, name, array)
        if name == _WTE:
            check_pad_rows(array, config, f"{path}: {name}")
            if n_rows != config.padded_vocab_size:
                array = hf_layout.padded(array[: config.vocab_size], config.padded_vocab_size)
        found[name] = array
    return {name: found[name] for name in shapes}


def _check_ids(path: Path, what: str, ids: npt.NDArray[Any], vocab_size: int) -> None:
    bad = (ids < 0) | (ids >= vocab_size)
    if bad.any():
        at = int(bad.reshape(-1).argmax())
        raise errors.DataError(
            f"{path}: {what}: expected ids from 0 to {vocab_size - 1}, found {ids.reshape(-1)[at]} at index {at}"
        )


def _check_finite(path: Path, what: str, array: npt.NDArray[Any]) -> None:
    at = weights.first_nonfinite(array)
    if at is not None:
        raise errors.DataError(f"{path}: {what}: expected finite numbers, found {array.reshape(-1)[at]} at index {at}")


def write(path: str | Path, state: DebugState, config: ModelConfig, version: int = 2) -> None:
    """Write a debug state.

    Args:
        path: the file, replaced when it exists.
        state: what to write.
        config: of the model, a GPT-2.
        version: 2, or 1 for llm.metal.

    Raises:
        InvalidError: on another version, a model that llm.c has none of, or arrays that do not fit it.
        NonFiniteError: on inf or NaN.
    """
    if version not in VERSIONS:
        raise errors.InvalidError(f"version: expected 1 or 2, found {version!r}")
    refuse_inexpressible(config, _WHAT)
    _check_state(state, config)
    n_rows = config.vocab_size if version == 1 else file_rows(config)
    B, T = state.tokens.shape
    with safeio.atomic_file(path) as file:
        file.write(struct.pack("<4i", MAGIC, version, B, T).ljust(HEADER_BYTES, b"\0"))
        for ids in (state.tokens, state.targets):
            file.write(np.ascontiguousarray(ids, "<i4").data)
        file.write(np.ascontiguousarray(state.logits, "<f4").data)
        file.write(struct.pack("<f", state.loss))
        for name in file_order(config):
            array = state.grads[name][: config.vocab_size] if name == _WTE else state.grads[name]
            file.write(np.ascontiguousarray(array, "<f4").data)
            if name == _WTE:
                file.write(bytes(4 * (n_rows - config.vocab_size) * config.dim))


def _check_state(state: DebugState, config: ModelConfig) -> None:
    shape = state.tokens.shape
    if len(shape) != 2 or not 1 <= shape[1] <= config.max_seq_len or shape[0] < 1:
        raise errors.InvalidError(f"tokens: expected (B, T) with T from 1 to {config.max_seq_len}, found {shape}")
    for name, ids in (("tokens", state.tokens), ("targets", state.targets)):
        if ids.shape != shape or ids.dtype != np.int32:
            raise errors.InvalidError(f"{name}: expected int32 of shape {shape}, found {ids.dtype} {ids.shape}")
        if ids.min() < 0 or ids.max() >= config.vocab_size:
            raise errors.InvalidError(f"{name}: expected ids from 0 to {config.vocab_size - 1}, found others")
    wanted = (*shape, config.vocab_size)
    if state.logits.shape != wanted or state.logits.dtype != np.float32:
        raise errors.InvalidError(
            f"logits: expected float32 of shape {wanted}, found {state.logits.dtype} {state.logits.shape}"
        )
    for name, value in (("logits", state.logits), ("loss", np.array([state.loss], np.float32))):
        if weights.first_nonfinite(value) is not None:
            raise errors.NonFiniteError(f"{name}: inf or NaN: not written")
    weights.check_params(config, state.grads)
    hf_layout.check_padding(config, state.grads)
