"""Hugging Face model directories: config.json with model.safetensors, whole or sharded.

safetensors (github.com/huggingface/safetensors): a little-endian u64 with the header's length, a JSON header of
{name: {dtype, shape, data_offsets: [begin, end]}} with an optional __metadata__ of strings, then the tensors' bytes,
row-major, without gaps. The header is parsed here, because a reader that is handed any file must refuse duplicate
names and overlapping tensors by name, and because BF16 has no NumPy type.
"""

from __future__ import annotations

import contextlib
import json
import math
import re
import shutil
import struct
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from anellm import errors, hf_layout, safeio, weights
from anellm.config import ModelConfig
from anellm.floats import DTYPES, ITEM_BYTES, decode, encode

WEIGHTS_NAME = "model.safetensors"
INDEX_NAME = "model.safetensors.index.json"
CONFIG_NAME = "config.json"
MAX_SHARD_BYTES = 5_000_000_000  # what transformers' save_pretrained long took for its default
_MAX_HEADER_BYTES = 100_000_000  # the limit of the safetensors library
_MAX_JSON_BYTES = 64 << 20
_MAX_DIMS = 8
_MAX_NAME = 200  # characters of a file name: no system takes much longer ones
_BUFFER_BYTES = {**ITEM_BYTES, "BOOL": 1, "U8": 1}  # of tables that are not read
_SHARD_NAMES = re.compile(r"model-\d{5}-of-\d{5}\.safetensors")
_TIED_HEAD = "lm_head.weight"
_CHUNK = 1 << 20


@dataclass(frozen=True)
class _Entry:
    """One tensor of a safetensors file: where it lies, checked against the file's size."""

    path: Path
    dtype: str
    shape: tuple[int, ...]
    begin: int  # from the start of the file
    n_bytes: int


def _parse_json(data: bytes, path: Path, what: str) -> dict[str, Any]:
    """Parse a JSON object that names nothing twice."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result = dict(pairs)
        if len(result) != len(pairs):
            names = [name for name, _ in pairs]
            twice = {name for name in names if names.count(name) > 1} if len(names) < 10_000 else {"names"}
            raise errors.DataError(f"{path}: {what}: duplicate {weights.name_list(twice)}")
        return result

    try:
        value = json.loads(data, object_pairs_hook=unique)
    except errors.DataError:
        raise
    except (ValueError, RecursionError) as error:
        raise errors.DataError(f"{path}: {what}: expected JSON, found {error}") from None
    if not isinstance(value, dict):
        raise errors.DataError(f"{path}: {what}: expected a JSON object, found {type(value).__name__}")
    return value


def _read_json(path: Path) -> dict[str, Any]:
    """Read a small JSON file."""
    size = path.stat().st_size
    if size > _MAX_JSON_BYTES:
        raise errors.DataError(f"{path}: size: expected at most {_MAX_JSON_BYTES} bytes of JSON, found {size}")
    return _parse_json(path.read_bytes(), path, "content")


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**63


def _entry(path: Path, name: str, info: object, data_start: int, size: int) -> _Entry:
    """Check one tensor's description."""

    def bad(field: str, expected: str, found: object) -> errors.DataError:
        return errors.DataError(
            f"{path}: tensor {weights.shown(name)}: {field}: expected {expected}, found {weights.shown(found)}"
        )

    if not isinstance(info, dict):
        raise bad("description", "an object", info)
    dtype, shape, offsets = info.get("dtype"), info.get("shape"), info.get("data_offsets")
    item_bytes = _BUFFER_BYTES if hf_layout.is_buffer(name) else ITEM_BYTES
    if not isinstance(dtype, str) or dtype not in item_bytes:
        raise bad("dtype", "F32, F16 or BF16", dtype)
    if not isinstance(shape, list) or len(shape) > _MAX_DIMS or not all(_is_count(n) for n in shape):
        raise bad("shape", "a list of sizes", shape)
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(_is_count(n) for n in offsets):
        raise bad("data_offsets", "two offsets", offsets)
    begin, end = offsets
    n_bytes = math.prod(shape) * item_bytes[dtype]
    if end - begin != n_bytes:
        raise bad(
            "data_offsets",
            f"{n_bytes} bytes for {dtype} of shape {weights.shown(shape)}",
            f"{end - begin} bytes",
        )
    if data_start + end > size:
        raise bad("data_offsets", f"an end within the {size - data_start} bytes of data", end)
    return _Entry(path, dtype, tuple(shape), data_start + begin, n_bytes)


def read_header(path: Path) -> dict[str, _Entry]:
    """Read and check the header of one safetensors file.

    Args:
        path: the file.

    Returns:
        The tensors by name.

    Raises:
        DataError: on a short file, a header that does not fit or parse, a dtype other than F32, F16 and BF16, a name
            used twice, tensors that overlap or leave gaps, or bytes after the last.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        prefix = file.read(8)
        if len(prefix) < 8:
            raise errors.DataError(f"{path}: header length: expected 8 bytes, found {len(prefix)}")
        (length,) = struct.unpack("<Q", prefix)
        limit = min(size - 8, _MAX_HEADER_BYTES)
        if length > limit:
            raise errors.DataError(f"{path}: header length: expected at most {limit}, found {length}")
        header = _parse_json(file.read(length), path, "header")
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise errors.DataError(f"{path}: __metadata__: expected strings by name, found something else")
    data_start = 8 + length
    entries = {name: _entry(path, name, info, data_start, size) for name, info in header.items()}
    at, before = data_start, "the header"
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].begin, item[1].n_bytes)):
        if entry.begin != at:
            what = "overlaps" if entry.begin < at else "leaves a gap behind"
            raise errors.DataError(
                f"{path}: tensor {weights.shown(name)}: data_offsets: expected to begin at {at - data_start}, "
                f"found {entry.begin - data_start} ({what} {weights.shown(before)})"
            )
        at, before = at + entry.n_bytes, name
    if at != size:
        raise errors.DataError(f"{path}: size: expected {at} bytes by its header, found {size}")
    return entries


def _collect(directory: Path) -> dict[str, _Entry]:
    """Return the tensors of a directory, from its one file or from the shards that its index names."""
    whole, index = directory / WEIGHTS_NAME, directory / INDEX_NAME
    if whole.is_file():
        return read_header(whole)
    if not index.is_file():
        pickled = sorted(p.name for p in directory.glob("pytorch_model*.bin"))
        found = f"{pickled[0]} (a pickle, which can run code: convert it to safetensors)" if pickled else "neither"
        raise errors.DataError(f"{directory}: expected {WEIGHTS_NAME} or {INDEX_NAME}, found {found}")
    weight_map = _read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(v, str) for v in weight_map.values()):
        raise errors.DataError(f"{index}: weight_map: expected file names by tensor, found something else")
    entries: dict[str, _Entry] = {}
    for shard in sorted(set(weight_map.values())):
        path = directory / shard
        if len(shard) > _MAX_NAME or Path(shard).name != shard or not path.is_file():
            raise errors.DataError(f"{index}: weight_map: expected files beside it, found {weights.shown(shard)}")
        for name, entry in read_header(path).items():
            if weight_map.get(name) != shard:
                raise errors.DataError(
                    f"{path}: tensor {weights.shown(name)}: expected in "
                    f"{weights.shown(weight_map.get(name, 'no file'))} by the index"
                )
            entries[name] = entry
    missing = weight_map.keys() - entries.keys()
    if missing:
        raise errors.DataError(f"{index}: weight_map: tensors missing from their files: {weights.name_list(missing)}")
    return entries


def _fp32(entry: _Entry, data: np.ndarray) -> np.ndarray:
    """Return a tensor as fp32: a view of the mapped file where it is fp32 already, else a converted copy."""
    return decode(data[entry.begin : entry.begin + entry.n_bytes], entry.dtype).reshape(entry.shape)


def _map(path: Path) -> np.ndarray:
    """Map a file of at least one byte for reading."""
    return np.memmap(path, dtype=np.uint8, mode="r")


def read(directory: Path) -> tuple[ModelConfig, Iterator[tuple[str, np.ndarray]]]:
    """Open a Hugging Face directory.

    Args:
        directory: holds config.json and model.safetensors, or shards and their index.

    Returns:
        The configuration, and an iterator of (name, fp32 array) over the mapped files.

    Raises:
        DataError: on a damaged file, or tensors that do not fit config.json.
    """
    config_path = directory / CONFIG_NAME
    fields = _read_json(config_path)
    try:
        config = ModelConfig.from_hf(fields, str(config_path))
    except errors.DataError:
        raise
    except (errors.AnellmError, TypeError, OverflowError) as error:
        raise errors.DataError(f"{config_path}: {error}") from None
    entries = _collect(directory)
    if config.n_layers > len(entries):  # before a table is made as long as config.json says
        key = "n_layer" if config.arch == "gpt2" else "num_hidden_layers"
        raise errors.DataError(
            f"{config_path}: {key}: expected at most one a tensor ({len(entries)}), found {config.n_layers}"
        )
    shapes = weights.file_shapes(config, config_path)
    entries = _named(directory, config, entries)
    tied_head = entries.pop(_TIED_HEAD, None) if config.tie_embeddings else None
    stored = hf_layout.stored_shapes(config, shapes)
    missing = {name for name in stored.keys() - entries.keys() if not hf_layout.optional(config, name)}
    for what, wrong in (("missing", missing), ("unexpected", entries.keys() - stored.keys())):
        if wrong:
            raise errors.DataError(f"{directory}: {what} tensors for its config.json: {weights.name_list(wrong)}")
    for name, shape in stored.items():
        if name in entries and entries[name].shape != shape:
            raise errors.DataError(
                f"{entries[name].path}: tensor {name}: shape: expected {shape} by config.json, "
                f"found {entries[name].shape}"
            )
    if tied_head is not None:
        _compare_tied_head(tied_head, entries[hf_layout.EMBEDDINGS[config.arch]], config)
    zeros = {name: entry for name, entry in entries.items() if name not in shapes}
    for name, array in _read_tensors(zeros):
        hf_layout.check_zero_biases(config, {name: array}, str(directory), errors.DataError)
    return config, (
        (name, hf_layout.own(name, array, config))
        for name, array in _read_tensors({name: entries[name] for name in shapes})
    )


def _named(directory: Path, config: ModelConfig, entries: dict[str, _Entry]) -> dict[str, _Entry]:
    """Return the tensors by their full names, without the tables that are computed here."""
    named: dict[str, _Entry] = {}
    for name, entry in entries.items():
        if hf_layout.is_buffer(name):
            continue
        full = hf_layout.full_name(name, config)
        if full in named:
            raise errors.DataError(
                f"{directory}: tensor {weights.shown(full)}: expected once, found it with and without its prefix"
            )
        named[full] = entry
    return named


def _compare_tied_head(head: _Entry, embedding: _Entry, config: ModelConfig) -> None:
    """Warn when a tied model carries a classifier of its own: it is ignored, as transformers does."""
    same = head.shape == embedding.shape and head.dtype == embedding.dtype
    if same:
        a = _map(head.path)[head.begin : head.begin + head.n_bytes]
        b = _map(embedding.path)[embedding.begin : embedding.begin + embedding.n_bytes]
        same = all(np.array_equal(a[i : i + _CHUNK], b[i : i + _CHUNK]) for i in range(0, a.size, _CHUNK))
    if not same:
        warnings.warn(
            f"{head.path}: {_TIED_HEAD} differs from {hf_layout.EMBEDDINGS[config.arch]}, but tie_word_embeddings is "
            "true: ignored",
            stacklevel=4,
        )


def _read_tensors(entries: dict[str, _Entry]) -> Iterator[tuple[str, np.ndarray]]:
    """Yield the tensors in order; each file is mapped once."""
    maps: dict[Path, np.ndarray] = {}
    for name, entry in entries.items():
        if entry.path not in maps:
            maps[entry.path] = _map(entry.path)
        yield name, _fp32(entry, maps[entry.path])


def write_safetensors(file: safeio.NewFile, tensors: Mapping[str, np.ndarray], code: str = "F32") -> None:
    """Write fp32 tensors in the safetensors format, converting one at a time and copying none that stays fp32.

    Args:
        file: a new file.
        tensors: fp32 arrays by name.
        code: "F32", "F16" or "BF16": the dtype in the file, rounded to nearest even.

    Raises:
        NonFiniteError: when a value does not fit the dtype.

    Source: the format's description at github.com/huggingface/safetensors: u64 header length, JSON header, data.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for name, array in tensors.items():
        n_bytes = array.size * ITEM_BYTES[code]
        header[name] = {"dtype": code, "shape": list(array.shape), "data_offsets": [at, at + n_bytes]}
        at += n_bytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # so that the data is aligned when the file is mapped
    file.write(struct.pack("<Q", len(text)) + text)
    for name, array in tensors.items():
        file.write(encode(name, array, code))


def _shards(tensors: Mapping[str, np.ndarray], code: str, max_bytes: int) -> list[dict[str, np.ndarray]]:
    """Fill files in order, each with at most ``max_bytes`` of tensors; a larger tensor has a file of its own."""
    shards: list[dict[str, np.ndarray]] = [{}]
    used = 0
    for name, array in tensors.items():
        n_bytes = array.size * ITEM_BYTES[code]
        if shards[-1] and used + n_bytes > max_bytes:
            shards.append({})
            used = 0
        shards[-1][name] = array
        used += n_bytes
    return shards


def write(
    directory: Path, config: ModelConfig, params: Mapping[str, np.ndarray], dtype: str, max_shard_bytes: int
) -> None:
    """Write a Hugging Face directory; see `weights.save_hf`."""
    if dtype not in DTYPES:
        raise errors.InvalidError(f"dtype: expected one of {', '.join(DTYPES)}, found {dtype!r}")
    if max_shard_bytes < 1:
        raise errors.InvalidError(f"max_shard_bytes: expected at least 1, found {max_shard_bytes}")
    code = DTYPES[dtype]
    names_of_all = weights.check_params(config, params)
    hf_layout.check_padding(config, params)
    tensors = hf_layout.stored(config, {name: params[name] for name in names_of_all})
    shards = _shards(tensors, code, max_shard_bytes)
    names = [f"model-{i:05}-of-{len(shards):05}.safetensors" for i in range(1, len(shards) + 1)]
    index = None
    if len(shards) == 1:
        names = [WEIGHTS_NAME]
    else:
        weight_map = {name: file for file, shard in zip(names, shards, strict=True) for name in shard}
        total = sum(array.size for array in tensors.values()) * ITEM_BYTES[code]
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    with _new_model(directory) as folder:
        for name, shard in zip(names, shards, strict=True):
            with folder.file(name) as file:
                write_safetensors(file, shard, code)
        if index is not None:
            folder.write_bytes(INDEX_NAME, safeio.json_bytes(index))
        folder.write_bytes(CONFIG_NAME, safeio.json_bytes({**config.to_hf(), "torch_dtype": dtype}))


@contextlib.contextmanager
def _new_model(directory: Path) -> Iterator[safeio.NewDirectory]:
    """Write a model's files beside their place, and move them there when all of them are complete.

    A directory that is there keeps its other files. Its config.json goes first and the new one comes last, so that a
    kill in between leaves a directory that is refused, never the shape of one model with the weights of another.

    Raises:
        InvalidError: when something other than a regular file is in the way.
        OSError: from the system; up to the last moment the old model is untouched.
    """
    if not directory.exists():
        safeio.make_directory(directory.absolute().parent)
        with safeio.atomic_directory(directory) as folder:
            yield folder
        return
    folder = safeio.NewDirectory(directory / f"{safeio.TMP}model-{safeio._mark()}")
    try:
        yield folder
        safeio.fsync_dir(folder.path)
        old = [p for p in sorted(directory.iterdir()) if p.name == WEIGHTS_NAME or _SHARD_NAMES.fullmatch(p.name)]
        first = [directory / CONFIG_NAME, directory / INDEX_NAME]
        for path in (*first, *old):
            safeio.check_replaceable(path)
        for path in (*first, *(path for path in old if path.name not in folder.files)):
            if path.exists():
                safeio.remove(path)
        for name in folder.files:  # config.json is the last of them
            safeio.rename(folder.path / name, directory / name)
        safeio.fsync_dir(directory)
    finally:
        shutil.rmtree(folder.path, ignore_errors=True)
