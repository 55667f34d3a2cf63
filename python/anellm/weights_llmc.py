"""llm.c's GPT-2 files (github.com/karpathy/llm.c, train_gpt2.py), little-endian: ``gpt2_124M.bin`` and its kin.

256 int32: magic 20240326, version, max_seq_len T, vocab_size V, n_layers L, n_heads, dim C and, but for version 1, the
padded vocabulary Vp; zeros. Then the tensors: wte (Vp, C), wpe (T, C); of all layers one after the other ln_1 weight
and bias, c_attn weight (3C, C) and bias, attention's c_proj (C, C) and bias, ln_2, c_fc (4C, C) and bias, the MLP's
c_proj (C, 4C) and bias; ln_f weight and bias. Version 1 (llm.metal's, and llm.c's first) and 3 are fp32, version 5 is
bfloat16. wte is the classifier too; its rows from V on are zeros. Version 1 has none of them (Vp = V).

Matrices are (out, in), as here.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

import numpy as np

from anellm import errors, hf_layout, safeio, weights
from anellm.floats import ITEM_BYTES, decode, encode
from anellm.model_config import ModelConfig

MAGIC: Final = 20240326
HEADER_BYTES: Final = 1024
VERSIONS: Final = {1: "F32", 3: "F32", 5: "BF16"}  # -> dtype of the tensors
_FIELDS: Final = ("max_seq_len", "vocab_size", "n_layers", "n_heads", "dim", "padded_vocab_size")
_N_INTS: Final = 256
_PAD: Final = 128  # llm.c pads vocabularies to a multiple of this
_NORM_EPS: Final = 1e-5  # a constant of llm.c; the file does not carry it
_PARTS: Final = (
    "ln_1.weight", "ln_1.bias", "attn.c_attn.weight", "attn.c_attn.bias", "attn.c_proj.weight", "attn.c_proj.bias",
    "ln_2.weight", "ln_2.bias", "mlp.c_fc.weight", "mlp.c_fc.bias", "mlp.c_proj.weight", "mlp.c_proj.bias",
)  # fmt: skip
_WTE: Final = "transformer.wte.weight"

Array = np.ndarray[Any, Any]


def file_order(config: ModelConfig) -> list[str]:
    """Return the names of the tensors in the order of llm.c's files: each kind for all layers."""
    layers = [f"transformer.h.{layer}.{part}" for part in _PARTS for layer in range(config.n_layers)]
    return [_WTE, "transformer.wpe.weight", *layers, "transformer.ln_f.weight", "transformer.ln_f.bias"]


def n_values(config: ModelConfig, n_rows: int) -> int:
    """Return the number of values of all tensors, with so many rows of wte, without listing them."""
    dim = config.dim
    return (n_rows + config.max_seq_len + 2) * dim + config.n_layers * (12 * dim * dim + 13 * dim)


def file_rows(config: ModelConfig) -> int:
    """Return how many rows of wte llm.c gives a model: its vocabulary, padded to a multiple of 128."""
    return -(-config.padded_vocab_size // _PAD) * _PAD


def refuse_inexpressible(config: ModelConfig, what: str) -> None:
    """Raise where llm.c's formats have no field for what the model needs.

    Raises:
        InvalidError: naming every field.
    """
    reasons = []
    if config.arch != "gpt2":
        reasons.append(f"arch is {config.arch!r}, not 'gpt2'")
    else:
        if not config.bias:
            reasons.append("it has no biases")
        if config.gelu != "tanh":
            reasons.append(f"gelu is {config.gelu!r}, not 'tanh'")
        if config.hidden_dim != 4 * config.dim:
            reasons.append(f"hidden_dim {config.hidden_dim} is not 4 dim = {4 * config.dim}")
        if np.float32(config.norm_eps) != np.float32(_NORM_EPS):
            reasons.append(f"norm_eps {config.norm_eps:g} is not {_NORM_EPS:g}")
    if reasons:
        raise errors.InvalidError(
            f"{what} cannot express this model: {'; '.join(reasons)}. Save it as a Hugging Face directory"
        )


# ---- reading ---------------------------------------------------------------------------------------------------------


def read_ints(path: Path, what: str, magic: int) -> tuple[int, ...]:
    """Return the 256 int32 that begin a file of llm.c's, after checking the first.

    Raises:
        DataError: when there are fewer, or the magic number is another.
    """
    with path.open("rb") as file:
        data = file.read(HEADER_BYTES)
    if len(data) < HEADER_BYTES:
        raise errors.DataError(f"{path}: {what} header: expected {HEADER_BYTES} bytes, found {len(data)}")
    values = struct.unpack(f"<{_N_INTS}i", data)
    if values[0] != magic:
        raise errors.DataError(f"{path}: {what} magic: expected {magic}, found {values[0]}")
    return values


def check_zeros(path: Path, what: str, values: tuple[int, ...], first: int) -> None:
    """Check that a header's ints are zero from one on.

    Raises:
        DataError: naming the first that is not.
    """
    at = next((index for index in range(first, len(values)) if values[index]), None)
    if at is not None:
        raise errors.DataError(f"{path}: {what} header int {at}: expected 0 (padding), found {values[at]}")


def _read_header(path: Path) -> tuple[int, ModelConfig]:
    """Check the header and return version and dimensions."""
    what = "llm.c model"
    values = read_ints(path, what, MAGIC)

    def bad(field: str, expected: str, found: object) -> errors.DataError:
        return errors.DataError(f"{path}: {what} header field {field}: expected {expected}, found {found}")

    version = values[1]
    if version not in VERSIONS:
        raise bad("version", ", ".join(map(str, VERSIONS)), version)
    n_fields = len(_FIELDS) - (version == 1)
    fields = dict(zip(_FIELDS, values[2 : 2 + n_fields], strict=False))
    for field, value in fields.items():
        if value <= 0:
            raise bad(field, "a positive number", value)
    if fields["dim"] % fields["n_heads"]:
        raise bad("n_heads", f"a divisor of dim {fields['dim']}", fields["n_heads"])
    if fields.get("padded_vocab_size", fields["vocab_size"]) < fields["vocab_size"]:
        raise bad("padded_vocab_size", f"at least vocab_size {fields['vocab_size']}", fields["padded_vocab_size"])
    check_zeros(path, what, values, 2 + n_fields)
    if 4 * fields["dim"] >= 1 << 31:
        raise bad("dim", f"below {1 << 29}", fields["dim"])
    values_of = {"arch": "gpt2", "bias": True, "gelu": "tanh", "norm_eps": _NORM_EPS, **fields}
    return version, ModelConfig.from_dict(values_of, source=str(path))


def read(path: Path) -> tuple[ModelConfig, Iterator[tuple[str, Array]]]:
    """Open an llm.c model file of version 1, 3 or 5.

    Args:
        path: the file.

    Returns:
        The configuration, and an iterator of (Hugging Face name, fp32 array (out, in)) over the mapped file.

    Raises:
        DataError: on an impossible header, or a size that does not match it.
    """
    size = path.stat().st_size
    version, config = _read_header(path)
    code = VERSIONS[version]
    expected = HEADER_BYTES + ITEM_BYTES[code] * n_values(config, config.padded_vocab_size)
    if size != expected:
        what = "truncated" if size < expected else "too long, or of another format"
        raise errors.DataError(
            f"{path}: size: expected {expected} bytes for the dimensions in its header, found {size} ({what})"
        )
    return config, _read_tensors(path, config, code, weights.file_shapes(config, path))


def _read_tensors(
    path: Path, config: ModelConfig, code: str, shapes: dict[str, tuple[int, ...]]
) -> Iterator[tuple[str, Array]]:
    """Yield every tensor in the order of `weights.tensor_shapes`; fp32 ones are not copied."""
    data = np.memmap(path, dtype=np.uint8, mode="r", offset=HEADER_BYTES)
    offsets: dict[str, int] = {}
    at = 0
    for name in file_order(config):
        offsets[name] = at
        at += ITEM_BYTES[code] * math.prod(shapes[name])
    for name, shape in shapes.items():
        raw = np.asarray(data[offsets[name] : offsets[name] + ITEM_BYTES[code] * math.prod(shape)])
        array = decode(raw, code).reshape(shape)
        if name == _WTE:
            check_pad_rows(array, config, f"{path}: tensor {name}")
        yield name, array


def check_pad_rows(array: Array, config: ModelConfig, what: str) -> None:
    """Check that the rows of a table that pad the vocabulary are zeros.

    Raises:
        DataError: naming the first that is not.
    """
    rows = np.flatnonzero(array[config.vocab_size :].any(axis=1))
    if rows.size:
        raise errors.DataError(
            f"{what}: expected zeros from row {config.vocab_size} on, which pad the vocabulary, found others in row "
            f"{config.vocab_size + int(rows[0])}"
        )


# ---- writing ---------------------------------------------------------------------------------------------------------


def write(path: Path, config: ModelConfig, params: Mapping[str, Array], version: int) -> None:
    """Write an llm.c model file of version 1, 3 or 5; see `weights.save_llmc`."""
    if version not in VERSIONS:
        raise errors.InvalidError(f"version: expected one of {', '.join(map(str, VERSIONS))}, found {version!r}")
    refuse_inexpressible(config, f"llm.c version {version}")
    weights.check_params(config, params)
    hf_layout.check_padding(config, params)
    n_rows = config.vocab_size if version == 1 else file_rows(config)
    head = [MAGIC, version, config.max_seq_len, config.vocab_size, config.n_layers, config.n_heads, config.dim]
    head += [] if version == 1 else [n_rows]
    with safeio.atomic_file(path) as file:
        file.write(struct.pack(f"<{len(head)}i", *head).ljust(HEADER_BYTES, b"\0"))
        for name in file_order(config):
            array = params[name][: config.vocab_size] if name == _WTE else params[name]
            file.write(encode(name, array, VERSIONS[version]))
            if name == _WTE:
                n_pad = (n_rows - config.vocab_size) * config.dim
                file.write(bytes(ITEM_BYTES[VERSIONS[version]] * n_pad))
