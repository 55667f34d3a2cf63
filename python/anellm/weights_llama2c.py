"""llama2.c model files (github.com/karpathy/llama2.c, `run.c`, `runq.c` and `export.py`), little-endian.

Version 0 has no magic: seven int32 (dim, hidden_dim, n_layers, n_heads, n_kv_heads, vocab_size, seq_len; a negative
vocab_size says that the classifier is a tensor of its own), then fp32: embedding (V, dim); for all layers attention
norm (L, dim), wq (L, dim, dim), wk and wv (L, kv_dim, dim), wo (L, dim, dim), ffn norm (L, dim), w1 (L, hidden, dim),
w2 (L, dim, hidden), w3 (L, hidden, dim); final norm (dim,); RoPE cosines and sines (seq_len, head_dim/2) each, which
readers recompute; and the classifier (V, dim) if it is separate.

Versions 1 and 2 begin with 256 bytes: magic "24ka", int32 version, the seven int32 (vocab_size positive), one byte
that says whether the classifier is shared, in version 2 an int32 group size (at byte 37, not aligned), zeros. Then
fp32: both norms of all layers, the final norm; then embedding, wq, wk, wv, wo, w1, w2, w3 and the separate classifier:
as fp32 in version 1, in version 2 (Q8_0) each tensor as int8 values followed by one fp32 scale a group.

RoPE rotates neighbours (2i, 2i+1) there and halves (i, i + head_dim/2) here, so rows of q and k change places.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from anellm import errors, safeio, weights
from anellm.config import ModelConfig

MAGIC = b"24ka"
_HEADER = struct.Struct("<7i")
_FIELDS = ("dim", "hidden_dim", "n_layers", "n_heads", "n_kv_heads", "vocab_size", "seq_len")
_LONG_HEADER = struct.Struct("<4si7iB")  # versions 1 and 2; version 2 goes on with the group size
_LONG_HEADER_BYTES = 256
_GROUP_SIZE = struct.Struct("<i")
_NORM_EPS, _ROPE_THETA = 1e-5, 10000.0  # constants of run.c; the file does not carry them
_ATTENTION_NORM, _MLP_NORM = "input_layernorm", "post_attention_layernorm"
_MATRICES = (
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.v_proj",
    "self_attn.o_proj",
    "mlp.gate_proj",
    "mlp.down_proj",
    "mlp.up_proj",
)
_EMBEDDING, _FINAL_NORM, _CLASSIFIER = "model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"
_CHUNK = 1 << 18  # groups dequantised in one go


@dataclass(frozen=True)
class _Header:
    """A checked header.

    Attributes:
        version: 0, 1 or 2.
        config: the model's dimensions.
        group_size: weights that share a scale in version 2, else 0.
        start: where the tensors begin, in bytes.
    """

    version: int
    config: ModelConfig
    group_size: int
    start: int


def _names(version: int, config: ModelConfig) -> list[str]:
    """Return the tensor names in file order (in version 0 the RoPE tables come before the classifier)."""

    def layers(part: str) -> list[str]:
        return [f"model.layers.{i}.{part}.weight" for i in range(config.n_layers)]

    if version == 0:
        parts = (_ATTENTION_NORM, *_MATRICES[:4], _MLP_NORM, *_MATRICES[4:])
        names = [_EMBEDDING, *(name for part in parts for name in layers(part)), _FINAL_NORM]
    else:
        names = [*layers(_ATTENTION_NORM), *layers(_MLP_NORM), _FINAL_NORM, _EMBEDDING]
        names += [name for part in _MATRICES for name in layers(part)]
    return names if config.tie_embeddings else [*names, _CLASSIFIER]


def interleaved_to_halves(rows: np.ndarray, n_heads: int) -> np.ndarray:
    """Reorder the rows of a q or k matrix (n_heads * head_dim, dim) from rotated neighbours to rotated halves."""
    out, dim = rows.shape
    pairs = rows.reshape(n_heads, out // n_heads // 2, 2, dim)
    return pairs.transpose(0, 2, 1, 3).reshape(out, dim)


def halves_to_interleaved(rows: np.ndarray, n_heads: int) -> np.ndarray:
    """Undo `interleaved_to_halves`."""
    out, dim = rows.shape
    halves = rows.reshape(n_heads, 2, out // n_heads // 2, dim)
    return halves.transpose(0, 2, 1, 3).reshape(out, dim)


def _rotated_heads(name: str, config: ModelConfig) -> int:
    """Return the number of heads whose rows change places in this tensor, 0 for none."""
    if name.endswith("q_proj.weight"):
        return config.n_heads
    return config.n_kv_heads if name.endswith("k_proj.weight") else 0


def _read_config(path: Path, values: tuple[int, ...], *, tied: bool | None) -> ModelConfig:
    """Check the seven dimensions and return them; ``tied`` None: the sign of vocab_size says it."""

    def bad(field: str, expected: str, found: object) -> errors.DataError:
        return errors.DataError(f"{path}: llama2.c header field {field}: expected {expected}, found {found}")

    fields = dict(zip(_FIELDS, values, strict=True))
    for field, value in fields.items():
        separate = tied is None and field == "vocab_size" and -(2**31) < value < 0
        if value <= 0 and not separate:
            raise bad(field, "a positive number", value)
    dim, n_heads, n_kv_heads = fields["dim"], fields["n_heads"], fields["n_kv_heads"]
    if dim % n_heads or (dim // n_heads) % 2:
        raise bad("n_heads", f"a divisor of dim {dim} that leaves an even head_dim", n_heads)
    if n_heads % n_kv_heads:
        raise bad("n_kv_heads", f"a divisor of n_heads {n_heads}", n_kv_heads)
    return ModelConfig(
        dim=dim,
        hidden_dim=fields["hidden_dim"],
        n_layers=fields["n_layers"],
        n_heads=n_heads,
        n_kv_heads=n_kv_heads,
        head_dim=dim // n_heads,
        vocab_size=abs(fields["vocab_size"]),
        max_seq_len=fields["seq_len"],
        norm_eps=_NORM_EPS,
        rope_theta=_ROPE_THETA,
        tie_embeddings=fields["vocab_size"] > 0 if tied is None else tied,
    )


def _read_header(path: Path) -> _Header:
    """Check the header of a file of any version."""
    with path.open("rb") as file:
        data = file.read(_LONG_HEADER_BYTES)
    if data[:4] != MAGIC:
        if len(data) < _HEADER.size:
            raise errors.DataError(f"{path}: llama2.c header: expected {_HEADER.size} bytes, found {len(data)}")
        return _Header(0, _read_config(path, _HEADER.unpack_from(data), tied=None), 0, _HEADER.size)
    if len(data) < _LONG_HEADER_BYTES:
        raise errors.DataError(f"{path}: llama2.c header: expected {_LONG_HEADER_BYTES} bytes, found {len(data)}")
    _, version, *values, shared = _LONG_HEADER.unpack_from(data)
    if version not in (1, 2):
        raise errors.DataError(f"{path}: llama2.c header field version: expected 1 or 2, found {version}")
    if shared not in (0, 1):
        raise errors.DataError(f"{path}: llama2.c header field shared_classifier: expected 0 or 1, found {shared}")
    config = _read_config(path, tuple(values), tied=shared == 1)
    used, group_size = _LONG_HEADER.size, 0
    if version == 2:
        (group_size,) = _GROUP_SIZE.unpack_from(data, used)
        used += _GROUP_SIZE.size
        _check_group_size(path, group_size, config)
    at = next((i for i in range(used, _LONG_HEADER_BYTES) if data[i]), None)
    if at is not None:
        raise errors.DataError(f"{path}: llama2.c header byte {at}: expected 0 (padding), found {data[at]}")
    return _Header(version, config, group_size, _LONG_HEADER_BYTES)


def _check_group_size(path: Path, group_size: int, config: ModelConfig) -> None:
    """Refuse groups that do not divide every row.

    runq.c also quantises activations of length dim and hidden_dim in these groups, and computes nonsense where a part
    is left over; export.py only looks at dim.
    """
    if group_size <= 0:
        raise errors.DataError(
            f"{path}: llama2.c header field group_size: expected a positive number, found {group_size}"
        )
    for field in ("dim", "hidden_dim"):
        if getattr(config, field) % group_size:
            raise errors.DataError(
                f"{path}: llama2.c header field group_size: expected a divisor of {field} {getattr(config, field)}, "
                f"found {group_size}"
            )


def _expected_bytes(header: _Header) -> int:
    """Return the exact size of a file with these dimensions, without listing its tensors."""
    config = header.config
    dim, hidden, kv_dim = config.dim, config.hidden_dim, config.n_kv_heads * config.head_dim
    norms = 2 * config.n_layers * dim + dim
    classifiers = 1 if config.tie_embeddings else 2
    matrices = config.n_layers * (2 * dim * dim + 2 * kv_dim * dim + 3 * hidden * dim)
    matrices += classifiers * config.vocab_size * dim
    if header.version == 2:
        return header.start + 4 * norms + matrices + 4 * (matrices // header.group_size)
    tables = config.max_seq_len * config.head_dim if header.version == 0 else 0
    return header.start + 4 * (norms + matrices + tables)


def read(path: Path) -> tuple[ModelConfig, Iterator[tuple[str, np.ndarray]]]:
    """Open a llama2.c file of version 0, 1 or 2.

    Args:
        path: the file.

    Returns:
        The configuration, and an iterator of (Hugging Face name, fp32 array) over the mapped file.

    Raises:
        DataError: on impossible dimensions, or a size that does not match them.
    """
    size = path.stat().st_size
    header = _read_header(path)
    expected = _expected_bytes(header)
    if size != expected:
        what = "truncated" if size < expected else "too long, or of another format"
        raise errors.DataError(
            f"{path}: size: expected {expected} bytes for the dimensions in its header, found {size} ({what})"
        )
    return header.config, _read_tensors(path, header, weights.file_shapes(header.config, path))


def _read_tensors(path: Path, header: _Header, shapes: dict[str, tuple[int, ...]]) -> Iterator[tuple[str, np.ndarray]]:
    """Yield every tensor in the order of `weights.tensor_shapes`; of fp32 files only q and k are copied."""
    config = header.config
    data = np.memmap(path, dtype=np.uint8, mode="r")
    offsets: dict[str, int] = {}
    at = header.start
    for name in _names(header.version, config):
        if header.version == 0 and name == _CLASSIFIER:
            at += 4 * config.max_seq_len * config.head_dim  # the two RoPE tables
        offsets[name] = at
        at += _stored_bytes(shapes[name], header.group_size)
    for name, shape in shapes.items():
        raw = np.asarray(data[offsets[name] : offsets[name] + _stored_bytes(shape, header.group_size)])
        quantised = header.group_size > 0 and len(shape) == 2
        array = _dequantise(raw, shape, header.group_size) if quantised else raw.view("<f4").reshape(shape)
        heads = _rotated_heads(name, config)
        yield name, interleaved_to_halves(array, heads) if heads else array


def _stored_bytes(shape: tuple[int, ...], group_size: int) -> int:
    """Return the bytes of a tensor; group_size 0: fp32. Norms are never quantised."""
    count = int(np.prod(shape, dtype=np.int64))
    return count + 4 * (count // group_size) if group_size and len(shape) == 2 else 4 * count


def _dequantise(raw: np.ndarray, shape: tuple[int, ...], group_size: int) -> np.ndarray:
    """Return int8 values times the fp32 scale of their group (runq.c `dequantize`)."""
    n_groups = int(np.prod(shape, dtype=np.int64)) // group_size
    values = raw[: n_groups * group_size].view(np.int8).reshape(n_groups, group_size)
    scales = np.frombuffer(raw[n_groups * group_size :].tobytes(), "<f4")  # copied: their place is not aligned
    array = np.empty((n_groups, group_size), np.float32)
    for start in range(0, n_groups, _CHUNK):
        part = slice(start, start + _CHUNK)
        with np.errstate(invalid="ignore", over="ignore"):  # what is not finite is refused by `weights.checked`
            np.multiply(values[part], scales[part, None], out=array[part])
    return array.reshape(shape)


def _refuse_inexpressible(config: ModelConfig, version: int) -> None:
    """Raise where the format has no field for what the model needs."""
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
            f"llama2.c version {version} cannot express this model: {'; '.join(reasons)}. "
            "Save it as a Hugging Face directory"
        )


def _write_rope_tables(file: safeio.NewFile, config: ModelConfig) -> None:
    """Write cos and sin of position * theta^(-2i/head_dim), (max_seq_len, head_dim/2) each (arXiv:2104.09864)."""
    exponents = np.arange(0, config.head_dim, 2, dtype=np.float64) / config.head_dim
    angles = np.outer(np.arange(config.max_seq_len, dtype=np.float64), _ROPE_THETA**-exponents)
    file.write(np.cos(angles).astype("<f4").tobytes())
    file.write(np.sin(angles).astype("<f4").tobytes())


def _header_bytes(version: int, config: ModelConfig) -> bytes:
    """Return the header of a file of version 0 or 1."""
    signed = config.vocab_size if config.tie_embeddings or version else -config.vocab_size
    values = (
        config.dim,
        config.hidden_dim,
        config.n_layers,
        config.n_heads,
        config.n_kv_heads,
        signed,
        config.max_seq_len,
    )
    if version == 0:
        return _HEADER.pack(*values)
    return _LONG_HEADER.pack(MAGIC, version, *values, config.tie_embeddings).ljust(_LONG_HEADER_BYTES, b"\0")


def write(path: Path, config: ModelConfig, params: Mapping[str, np.ndarray], version: int) -> None:
    """Write a llama2.c file of version 0 or 1; see `weights.save_llama2c`."""
    if version not in (0, 1):
        raise errors.InvalidError(f"version: expected 0 or 1, found {version!r}")
    _refuse_inexpressible(config, version)
    weights.check_params(config, params)
    with safeio.atomic_file(path) as file:
        file.write(_header_bytes(version, config))
        for name in _names(version, config):
            if version == 0 and name == _CLASSIFIER:
                _write_rope_tables(file, config)
            heads = _rotated_heads(name, config)
            array = halves_to_interleaved(params[name], heads) if heads else params[name]
            file.write(np.ascontiguousarray(array, dtype="<f4").data)
        if version == 0 and config.tie_embeddings:
            _write_rope_tables(file, config)
