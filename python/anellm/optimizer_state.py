"""llm.c's optimizer state (github.com/karpathy/llm.c, train_gpt2.cu ``save_state``), read only: state_STEP_RANK.bin.

256 int32, little-endian: magic 20240527, version 1, number of processes, rank, whether there are fp32 master weights,
whether the data is shuffled; at 10 the step; at 20 and 22 uint64 states of the random numbers; at 30 and 32 uint64
shard and sample that come next. Then fp32: AdamW's m of all tensors in the order of the model file with the vocabulary
padded (weights_llmc.py), v, and the master weights. Where the data is shuffled, tables of its order follow: uint64
count and as many int32 of the shards, of the samples, and the state of a Mersenne Twister.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from anellm import errors
from anellm.debug_state import unpack
from anellm.model_config import ModelConfig
from anellm.weights_llmc import HEADER_BYTES, file_rows, n_values, read_ints, refuse_inexpressible

MAGIC: Final = 20240527
_WHAT: Final = "llm.c optimizer state"
_MOST_ENTRIES: Final = 1 << 31

Tensors = dict[str, npt.NDArray[Any]]


@dataclass(frozen=True, kw_only=True)
class OptimizerState:
    """What llm.c's training goes on from, besides the weights.

    Attributes:
        step: updates done.
        n_processes: processes that trained together.
        rank: the one that wrote this.
        rng_state: of its random numbers.
        rng_state_last_update: the same, as it was before the last update.
        shard: which comes next.
        sample: which of the shard comes next.
        moments_m: first moments by tensor, float32, in names and shapes as Model.moments_m has them.
        moments_v: second moments.
        master: fp32 weights, or None where there are none.
    """

    step: int
    n_processes: int
    rank: int
    rng_state: int
    rng_state_last_update: int
    shard: int
    sample: int
    moments_m: Tensors
    moments_v: Tensors
    master: Tensors | None


def read(path: str | Path, config: ModelConfig) -> OptimizerState:
    """Read an optimizer state that holds whole tensors.

    Args:
        path: the file.
        config: of the model that it belongs to, a GPT-2.

    Returns:
        Arrays over the mapped file, read-only, but for wte's where its padding is not the model's.

    Raises:
        DataError: naming file, field, expected and found; also when the file does not fit the model, or holds only a
            rank's part of each tensor (ZeRO).
        InvalidError: when the model is none that llm.c has.
    """
    path = Path(path)
    refuse_inexpressible(config, _WHAT)
    values = read_ints(path, _WHAT, MAGIC)

    def check(field: str, at: int, expected: str, *, fits: bool) -> None:
        if not fits:
            raise errors.DataError(f"{path}: {_WHAT} header field {field}: expected {expected}, found {values[at]}")

    check("version", 1, "1", fits=values[1] == 1)
    check("num_processes", 2, "1 or more", fits=values[2] >= 1)
    check("process_rank", 3, f"0 to {values[2] - 1}", fits=0 <= values[3] < values[2])
    check("use_master_weights", 4, "0 or 1", fits=values[4] in (0, 1))
    check("should_shuffle", 5, "0 or 1", fits=values[5] in (0, 1))
    check("step", 10, "0 or more", fits=values[10] >= 0)
    n_rows = file_rows(config)
    n_each = n_values(config, n_rows)
    n_parts = 3 if values[4] else 2
    _check_size(path, values, n_each, n_parts)
    floats = np.memmap(path, dtype="<f4", mode="r", offset=HEADER_BYTES, shape=(n_parts * n_each,))
    parts = [unpack(path, np.asarray(floats[i * n_each : (i + 1) * n_each]), config, n_rows) for i in range(n_parts)]
    for name, array in parts[1].items():
        if (array < 0).any():
            at = int((array < 0).reshape(-1).argmax())
            raise errors.DataError(
                f"{path}: v of {name}: expected at least 0, found {array.reshape(-1)[at]} at index {at}"
            )
    words = {at: _word(values, at) for at in (20, 22, 30, 32)}
    return OptimizerState(
        step=values[10],
        n_processes=values[2],
        rank=values[3],
        rng_state=words[20],
        rng_state_last_update=words[22],
        shard=words[30],
        sample=words[32],
        moments_m=parts[0],
        moments_v=parts[1],
        master=parts[2] if values[4] else None,
    )


def _word(values: tuple[int, ...], at: int) -> int:
    """Return the uint64 in two of the header's ints."""
    low, high = values[at], values[at + 1]
    return (low & 0xFFFFFFFF) | (high & 0xFFFFFFFF) << 32


def _check_size(path: Path, values: tuple[int, ...], n_each: int, n_parts: int) -> None:
    """Check the file's size against the model, and the tables behind the tensors where there are some."""
    size = path.stat().st_size
    expected = HEADER_BYTES + 4 * n_parts * n_each
    if values[5]:
        end = _tables_end(path, size, expected)
        if end is not None and size == end:
            return
        expected_text = f"{expected} bytes and the order of the data" if end is None else f"{end} bytes"
    else:
        if size == expected:
            return
        expected_text = f"{expected} bytes"
    why = "truncated, or of another model" if size < expected else "too long, or of another model"
    if values[2] > 1 and size < expected:
        why += f", or only the part of one of {values[2]} processes (ZeRO), which is not read"
    raise errors.DataError(f"{path}: size: expected {expected_text} for the model's shape, found {size} ({why})")


_TWISTER_BYTES: Final = 8 + 4 + 4 + 4 * 624 + 8  # llm.c's mt19937_state: seed, left, next, state, two constants


def _tables_end(path: Path, size: int, at: int) -> int | None:
    """Return where the tables of the data's order end: two of a count and as many int32, and the twister."""
    with path.open("rb") as file:
        for _ in range(2):
            if at + 8 > size:
                return None
            file.seek(at)
            (count,) = struct.unpack("<Q", file.read(8))
            if count >= _MOST_ENTRIES:
                return None
            at += 8 + 4 * count
    return at + _TWISTER_BYTES
