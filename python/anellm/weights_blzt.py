"""Checkpoints of the original ANE trainer (github.com/maderix/ANE), magic BLZT, little-endian; read only.

96 bytes: int32 magic 0x424C5A54, version, step, total_steps, n_layers, vocab_size, dim, hidden_dim, n_heads, seq_len;
float32 learning rate and loss; three float64 times; int32 cum_steps, cum_batches, adam_t; then three int32. Version 2
(train_large) has as many key heads as heads, and in the first of the three what some trainers keep there; version 4
(training_dynamic) has n_kv_heads, head_dim and q_dim.

Then fp32. Per layer wq (q_dim, dim), wk and wv (kv_dim, dim), wo (dim, q_dim), w1 (hidden, dim), w2 (dim, hidden), w3
(hidden, dim), attention norm (dim,), ffn norm (dim,); then AdamW's m and v of each in this order, m and v in turn.
Behind all layers final norm, its m and v; embedding (V, dim), its m and v. There is no checksum. Moments are not read.

The classifier is the embedding. As in llama2.c, RoPE rotates neighbours, with theta 10000.
"""

from __future__ import annotations

import math
import struct
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import numpy as np

from anellm import errors, weights
from anellm.config import ModelConfig
from anellm.weights_llama2c import interleaved_to_halves

MAGIC: Final = b"TZLB"
VERSIONS: Final = (2, 4)
_HEADER = struct.Struct("<4s9i2f3d6i")
_FIELDS: Final = (
    "magic", "version", "step", "total_steps", "n_layers", "vocab_size", "dim", "hidden_dim", "n_heads", "seq_len",
    "lr", "loss", "cum_compile", "cum_train", "cum_wall", "cum_steps", "cum_batches", "adam_t",
)  # fmt: skip
_COUNTS: Final = ("step", "total_steps", "cum_steps", "cum_batches", "adam_t")
_NUMBERS: Final = ("lr", "cum_compile", "cum_train", "cum_wall")
_PARTS: Final = (
    "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj",
    "mlp.gate_proj", "mlp.down_proj", "mlp.up_proj", "input_layernorm", "post_attention_layernorm",
)  # fmt: skip
_NORM_EPS, _ROPE_THETA = 1e-5, 10000.0  # constants of the trainer
_WITH_MOMENTS: Final = 3  # a tensor, its m and its v


def _read_header(path: Path) -> tuple[int, ModelConfig]:
    """Check the header and return version and dimensions."""
    with path.open("rb") as file:
        data = file.read(_HEADER.size)
    if len(data) < _HEADER.size:
        raise errors.DataError(f"{path}: BLZT header: expected {_HEADER.size} bytes, found {len(data)}")
    magic, *values = _HEADER.unpack(data)
    fields = dict(zip(_FIELDS, (magic, *values), strict=False))

    def check(field: str, expected: str, *, fits: bool) -> None:
        if not fits:
            raise errors.DataError(f"{path}: BLZT header field {field}: expected {expected}, found {fields[field]}")

    if magic != MAGIC:
        raise errors.DataError(f"{path}: BLZT magic: expected {MAGIC!r}, found {magic!r}")
    check("version", " or ".join(map(str, VERSIONS)), fits=fields["version"] in VERSIONS)
    rest = ("kv_heads", "head_dim", "q_dim") if fields["version"] == 4 else ("pad0", "pad1", "pad2")
    fields |= dict(zip(rest, values[-3:], strict=True))
    sizes = ["n_layers", "vocab_size", "dim", "hidden_dim", "n_heads", "seq_len"]
    for field in sizes + (list(rest) if fields["version"] == 4 else []):
        check(field, "a positive number", fits=fields[field] > 0)
    for field in _COUNTS:
        check(field, "0 or more", fits=fields[field] >= 0)
    for field in _NUMBERS:
        check(field, "a finite number from 0", fits=math.isfinite(fields[field]) and fields[field] >= 0)
    dim, n_heads = fields["dim"], fields["n_heads"]
    if fields["version"] == 4:
        n_kv_heads, head_dim = fields["kv_heads"], fields["head_dim"]
        check("kv_heads", f"a divisor of n_heads {n_heads}", fits=n_heads % n_kv_heads == 0)
        check("head_dim", "an even number", fits=head_dim % 2 == 0)
        check("q_dim", f"n_heads x head_dim = {n_heads * head_dim}", fits=fields["q_dim"] == n_heads * head_dim)
    else:
        check("pad1", "0", fits=fields["pad1"] == 0)
        check("pad2", "0", fits=fields["pad2"] == 0)
        whole = dim % n_heads == 0 and (dim // n_heads) % 2 == 0
        check("n_heads", f"a divisor of dim {dim} that leaves an even head_dim", fits=whole)
        n_kv_heads, head_dim = n_heads, dim // n_heads
    return fields["version"], ModelConfig(
        dim=dim,
        hidden_dim=fields["hidden_dim"],
        n_layers=fields["n_layers"],
        n_heads=n_heads,
        n_kv_heads=n_kv_heads,
        head_dim=head_dim,
        vocab_size=fields["vocab_size"],
        max_seq_len=fields["seq_len"],
        norm_eps=_NORM_EPS,
        rope_theta=_ROPE_THETA,
        tie_embeddings=True,
    )


def _warn(path: Path, version: int, config: ModelConfig) -> None:
    """Say in what the trainer's model is not the one that the weights are read into."""
    if version == 2:
        text = "its trainer left the rotary embedding out, so this model computes something else until it is trained on"
    else:
        scale = float(np.float32(1.0 / math.sqrt(2.0 * config.n_layers)))
        text = (
            "weights are as they stand in the file. If its trainer multiplied what layers add by 1/sqrt(2 n_layers), "
            f"which is its default, use anellm convert --residual-scale {scale:.9g}"
        )
    warnings.warn(f"{path}: BLZT version {version}: {text}", stacklevel=4)


def read(path: Path) -> tuple[ModelConfig, Iterator[tuple[str, np.ndarray]]]:
    """Open a checkpoint of version 2 or 4.

    Args:
        path: the file.

    Returns:
        The configuration, and an iterator of (Hugging Face name, fp32 array) over the mapped file.

    Raises:
        DataError: on an impossible header, or a size that does not match it.
    """
    size = path.stat().st_size
    version, config = _read_header(path)
    expected = _HEADER.size + 4 * _WITH_MOMENTS * config.n_params()
    if size != expected:
        what = "truncated" if size < expected else "too long, or of another format"
        raise errors.DataError(
            f"{path}: size: expected {expected} bytes for the dimensions in its header, found {size} ({what})"
        )
    shapes = weights.file_shapes(config, path)
    _warn(path, version, config)
    return config, _read_tensors(path, config, shapes)


def _read_tensors(
    path: Path, config: ModelConfig, shapes: dict[str, tuple[int, ...]]
) -> Iterator[tuple[str, np.ndarray]]:
    """Yield every tensor in the order of `weights.tensor_shapes`; only q and k are copied."""
    data = np.memmap(path, dtype="<f4", mode="r", offset=_HEADER.size)
    offsets: dict[str, int] = {}
    at = 0
    for layer in range(config.n_layers):
        start = at
        for part in _PARTS:
            name = f"model.layers.{layer}.{part}.weight"
            offsets[name] = at
            at += math.prod(shapes[name])
        at += (_WITH_MOMENTS - 1) * (at - start)
    for name in ("model.norm.weight", "model.embed_tokens.weight"):
        offsets[name] = at
        at += _WITH_MOMENTS * math.prod(shapes[name])
    for name, shape in shapes.items():
        array = np.asarray(data[offsets[name] : offsets[name] + math.prod(shape)]).reshape(shape)
        heads = {"q_proj": config.n_heads, "k_proj": config.n_kv_heads}.get(name.split(".")[-2], 0)
        yield name, interleaved_to_halves(array, heads) if heads else array
