"""The llama2.c model file, version 0 (github.com/karpathy/llama2.c, `run.c` and `legacy_export` in `export.py`).

Layout, little-endian: seven int32 (dim, hidden_dim, n_layers, n_heads, n_kv_heads, vocab_size, seq_len; a negative
vocab_size says that the classifier is a tensor of its own), then fp32: embedding (V, dim); for all layers attention
norm (L, dim), wq (L, dim, dim), wk and wv (L, kv_dim, dim), wo (L, dim, dim), ffn norm (L, dim), w1 (L, hidden, dim),
w2 (L, dim, hidden), w3 (L, hidden, dim); final norm (dim,); RoPE cosines and sines (seq_len, head_dim/2) each, which
readers recompute; and the classifier (V, dim) if it is separate.

RoPE rotates neighbours (2i, 2i+1) there and halves (i, i + head_dim/2) here, so rows of q and k change places.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np

from anellm import errors, safeio, weights
from anellm.config import ModelConfig

_HEADER = struct.Struct("<7i")
_FIELDS = ("dim", "hidden_dim", "n_layers", "n_heads", "n_kv_heads", "vocab_size", "seq_len")
_NORM_EPS, _ROPE_THETA = 1e-5, 10000.0  # constants of run.c; the file does not carry them
_LAYER_BLOCKS = (
    "input_layernorm",
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.v_proj",
    "self_attn.o_proj",
    "post_attention_layernorm",
    "mlp.gate_proj",
    "mlp.down_proj",
    "mlp.up_proj",
)


def _blocks(config: ModelConfig) -> list[list[str]]:
    """Return the tensor names in file order, one list a block (the RoPE tables come before `lm_head.weight`)."""
    layers = [[f"model.layers.{i}.{part}.weight" for i in range(config.n_layers)] for part in _LAYER_BLOCKS]
    return [["model.embed_tokens.weight"], *layers, ["model.norm.weight"]]


def _interleaved_to_halves(rows: np.ndarray, n_heads: int) -> np.ndarray:
    """Reorder the rows of a q or k matrix (n_heads * head_dim, dim) from rotated neighbours to rotated halves."""
    out, dim = rows.shape
    pairs = rows.reshape(n_heads, out // n_heads // 2, 2, dim)
    return pairs.transpose(0, 2, 1, 3).reshape(out, dim)


def _halves_to_interleaved(rows: np.ndarray, n_heads: int) -> np.ndarray:
    """Undo `_interleaved_to_halves`."""
    out, dim = rows.shape
    halves = rows.reshape(n_heads, 2, out // n_heads // 2, dim)
    return halves.transpose(0, 2, 1, 3).reshape(out, dim)


def _rotated_heads(name: str, config: ModelConfig) -> int:
    """Return the number of heads whose rows change places in this tensor, 0 for none."""
    if name.endswith("q_proj.weight"):
        return config.n_heads
    return config.n_kv_heads if name.endswith("k_proj.weight") else 0


def _read_config(path: Path, header: bytes) -> ModelConfig:
    """Check the header's dimensions and return them."""

    def bad(field: str, expected: str, found: object) -> errors.DataError:
        return errors.DataError(f"{path}: llama2.c header field {field}: expected {expected}, found {found}")

    values = dict(zip(_FIELDS, _HEADER.unpack(header), strict=True))
    for field, value in values.items():
        separate = field == "vocab_size" and -(2**31) < value < 0
        if value <= 0 and not separate:
            raise bad(field, "a positive number", value)
    dim, n_heads, n_kv_heads = values["dim"], values["n_heads"], values["n_kv_heads"]
    if dim % n_heads or (dim // n_heads) % 2:
        raise bad("n_heads", f"a divisor of dim {dim} that leaves an even head_dim", n_heads)
    if n_heads % n_kv_heads:
        raise bad("n_kv_heads", f"a divisor of n_heads {n_heads}", n_kv_heads)
    return ModelConfig(
        dim=dim,
        hidden_dim=values["hidden_dim"],
        n_layers=values["n_layers"],
        n_heads=n_heads,
        n_kv_heads=n_kv_heads,
        head_dim=dim // n_heads,
        vocab_size=abs(values["vocab_size"]),
        max_seq_len=values["seq_len"],
        norm_eps=_NORM_EPS,
        rope_theta=_ROPE_THETA,
        tie_embeddings=values["vocab_size"] > 0,
    )


def _expected_bytes(config: ModelConfig) -> int:
    """Return the exact size of a file with these dimensions, without listing its tensors."""
    dim, hidden, kv_dim = config.dim, config.hidden_dim, config.n_kv_heads * config.head_dim
    layer = 2 * dim + 2 * dim * dim + 2 * kv_dim * dim + 3 * hidden * dim
    tables = config.max_seq_len * config.head_dim
    classifiers = 1 if config.tie_embeddings else 2
    return _HEADER.size + 4 * (classifiers * config.vocab_size * dim + config.n_layers * layer + dim + tables)


def read(path: Path) -> tuple[ModelConfig, Iterator[tuple[str, np.ndarray]]]:
    """Open a llama2.c v0 file.

    Args:
        path: the file.

    Returns:
        The configuration, and an iterator of (Hugging Face name, fp32 array) over the mapped file.

    Raises:
        DataError: on impossible dimensions, or a size that does not match them.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        header = file.read(_HEADER.size)
    if len(header) < _HEADER.size:
        raise errors.DataError(f"{path}: llama2.c header: expected {_HEADER.size} bytes, found {len(header)}")
    config = _read_config(path, header)
    expected = _expected_bytes(config)
    if size != expected:
        what = "truncated" if size < expected else "too long, or of another format"
        raise errors.DataError(
            f"{path}: size: expected {expected} bytes for the dimensions in its header, found {size} ({what})"
        )
    return config, _read_tensors(path, config)


def _read_tensors(path: Path, config: ModelConfig) -> Iterator[tuple[str, np.ndarray]]:
    """Yield every tensor in the order of `weights.tensor_shapes`; only q and k are copied."""
    shapes = weights.tensor_shapes(config)
    data = np.memmap(path, dtype="<f4", mode="r", offset=_HEADER.size)
    offsets: dict[str, int] = {}
    at = 0
    for block in _blocks(config):
        for name in block:
            offsets[name] = at
            at += int(np.prod(shapes[name], dtype=np.int64))
    offsets["lm_head.weight"] = at + config.max_seq_len * config.head_dim  # behind the two RoPE tables
    for name, shape in shapes.items():
        count = int(np.prod(shape, dtype=np.int64))
        array = np.asarray(data[offsets[name] : offsets[name] + count]).reshape(shape)
        heads = _rotated_heads(name, config)
        yield name, _interleaved_to_halves(array, heads) if heads else array


def _refuse_inexpressible(config: ModelConfig) -> None:
    """Raise where version 0 has no field for what the model needs."""
    reasons = []
    if config.arch != "llama":
        reasons.append(f"arch is {config.arch!r}, not 'llama'")
    if config.qk_norm:
        reasons.append("it has no q/k norm weights")
    if config.n_heads * config.head_dim != config.dim:
        reasons.append(f"head_dim {config.head_dim} is not dim/n_heads = {config.dim / config.n_heads:g}")
    if config.rope_theta != _ROPE_THETA:
        reasons.append(f"rope_theta {config.rope_theta:g} is not {_ROPE_THETA:g}")
    if np.float32(config.norm_eps) != np.float32(_NORM_EPS):
        reasons.append(f"norm_eps {config.norm_eps:g} is not {_NORM_EPS:g}")
    if reasons:
        raise errors.InvalidError(
            f"llama2.c version 0 cannot express this model: {'; '.join(reasons)}. Save it as a Hugging Face directory"
        )


def _write_rope_tables(file: safeio.NewFile, config: ModelConfig) -> None:
    """Write cos and sin of position * theta^(-2i/head_dim), (max_seq_len, head_dim/2) each (arXiv:2104.09864)."""
    exponents = np.arange(0, config.head_dim, 2, dtype=np.float64) / config.head_dim
    angles = np.outer(np.arange(config.max_seq_len, dtype=np.float64), _ROPE_THETA**-exponents)
    file.write(np.cos(angles).astype("<f4").tobytes())
    file.write(np.sin(angles).astype("<f4").tobytes())


def write(path: Path, config: ModelConfig, params: Mapping[str, np.ndarray]) -> None:
    """Write a llama2.c v0 file; see `weights.save_llama2c`."""
    _refuse_inexpressible(config)
    weights.check_params(config, params)
    vocab = config.vocab_size if config.tie_embeddings else -config.vocab_size
    header = _HEADER.pack(
        config.dim,
        config.hidden_dim,
        config.n_layers,
        config.n_heads,
        config.n_kv_heads,
        vocab,
        config.max_seq_len,
    )
    with safeio.atomic_file(path) as file:
        file.write(header)
        for block in _blocks(config):
            for name in block:
                heads = _rotated_heads(name, config)
                array = _halves_to_interleaved(params[name], heads) if heads else params[name]
                file.write(np.ascontiguousarray(array, dtype="<f4").data)
        _write_rope_tables(file, config)
        if not config.tie_embeddings:
            file.write(np.ascontiguousarray(params["lm_head.weight"], dtype="<f4").data)
