"""Small models in every format, for the tests of model files: made by hand, byte by byte."""

from __future__ import annotations

import struct
import tracemalloc
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from anellm import errors, weights
from anellm.config import ModelConfig

Params = dict[str, np.ndarray]

SMALL = {"dim": 12, "hidden_dim": 20, "n_layers": 2, "n_heads": 3, "n_kv_heads": 3, "vocab_size": 11, "max_seq_len": 8}
GQA = {**SMALL, "dim": 16, "n_heads": 4, "n_kv_heads": 2, "tie_embeddings": False}
QWEN = {**SMALL, "n_heads": 4, "n_kv_heads": 2, "head_dim": 6, "qk_norm": True, "rope_theta": 1e6, "norm_eps": 1e-6}


def random_params(config: ModelConfig, seed: int = 0) -> Params:
    """Return normal parameters."""
    rng = np.random.default_rng(seed)
    return {k: rng.standard_normal(s, dtype=np.float32) for k, s in weights.tensor_shapes(config).items()}


def read(path: Path) -> tuple[ModelConfig, Params]:
    """Read everything of a model."""
    found = weights.load_pretrained(path)
    return found.config, {name: np.array(array) for name, array in found.tensors}


def same(a: Params, b: Params) -> bool:
    """Compare to the bit, order included."""
    return list(a) == list(b) and all(a[k].shape == b[k].shape and a[k].tobytes() == b[k].tobytes() for k in a)


def message(path: Path) -> str:
    """Return why a path is refused; reading it must fail, and the message must be one that helps."""
    try:
        read(path)
    except errors.DataError as error:
        text = str(error)
    else:
        pytest.fail(f"{path} was read")
    assert path.name in text
    assert text.isprintable()  # nothing in a file can steer the terminal
    assert len(text) < 1000
    return text


def survives(path: Path, limit_bytes: int) -> bool:
    """Read a damaged file: it is read or refused, and takes little memory. Returns whether it was read."""
    tracemalloc.start()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            found = weights.load_pretrained(path)
            for _, array in found.tensors:
                assert np.isfinite(array).all()
    except errors.DataError as error:
        assert path.name in str(error)
        assert str(error).isprintable()
        return False
    else:
        return True
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < limit_bytes, f"{peak} bytes taken"


def cuts(header_bytes: int, size: int, seed: int = 0) -> list[int]:
    """Return where to cut a file: at each byte of the header, at 50 places of the body, and right before the end."""
    body = np.random.default_rng(seed).integers(header_bytes, size, 50).tolist()
    return [*range(header_bytes), *body, size - 1]


def bit_flips(data: bytes, n_header: int, header_bytes: int, n_body: int, seed: int = 0) -> Iterator[bytes]:
    """Yield copies of a file with one bit flipped in its header, then in its body."""
    rng = np.random.default_rng(seed)
    places = [*rng.integers(0, 8 * header_bytes, n_header), *rng.integers(8 * header_bytes, 8 * len(data), n_body)]
    for place in places:
        damaged = bytearray(data)
        damaged[place // 8] ^= 1 << (place % 8)
        yield bytes(damaged)


# ---- BLZT ----------------------------------------------------------------------------------------------------------

BLZT_PARTS = (
    "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.down_proj",
    "mlp.up_proj", "input_layernorm", "post_attention_layernorm",
)  # fmt: skip


def interleaved_heads(config: ModelConfig, name: str, array: np.ndarray) -> np.ndarray:
    """Return a tensor with the rows of q and k in llama2.c's order."""
    heads = {"q_proj": config.n_heads, "k_proj": config.n_kv_heads}.get(name.split(".")[-2])
    return array if heads is None else interleaved(array, heads)


def blzt_bytes(config: ModelConfig, params: Params, version: int, says: int | None = None, **changes: Any) -> bytes:
    """Return a checkpoint of the original trainer, its moments made up; it says another version, or other fields."""
    fields: dict[str, Any] = {
        "magic": 0x424C5A54, "version": version if says is None else says, "step": 120, "total_steps": 10000,
        "n_layers": config.n_layers,
        "vocab_size": config.vocab_size, "dim": config.dim, "hidden_dim": config.hidden_dim,
        "n_heads": config.n_heads, "seq_len": config.max_seq_len, "lr": 3e-4, "loss": 5.5, "cum_compile": 7.5,
        "cum_train": 1234.5, "cum_wall": 2000.0, "cum_steps": 120, "cum_batches": 12, "adam_t": 12,
    }  # fmt: skip
    rest = (config.n_kv_heads, config.head_dim, config.q_dim) if version == 4 else (0, 0, 0)
    fields |= dict(zip(("pad0", "pad1", "pad2"), rest, strict=True)) | changes
    data = struct.pack("<10i2f3d6i", *fields.values())

    def group(names: list[str]) -> bytes:
        arrays = [interleaved_heads(config, name, params[name]) for name in names]
        moments = [m for a in arrays for m in (a * np.float32(0.1), a * a)]
        return b"".join(np.ascontiguousarray(a, "<f4").tobytes() for a in [*arrays, *moments])

    for layer in range(config.n_layers):
        data += group([f"model.layers.{layer}.{part}.weight" for part in BLZT_PARTS])
    return data + group(["model.norm.weight"]) + group(["model.embed_tokens.weight"])


# ---- GGUF ----------------------------------------------------------------------------------------------------------

U8, I8, U16, I16, U32, I32, F32, BOOL, STRING, ARRAY, U64, I64, F64 = range(13)
_LAYOUT = {U8: "<B", I8: "<b", U16: "<H", I16: "<h", U32: "<I", I32: "<i", F32: "<f", BOOL: "<B", U64: "<Q", I64: "<q"}
_LAYOUT[F64] = "<d"
TYPES = {"F32": 0, "F16": 1, "Q4_0": 2, "Q4_1": 3, "Q8_0": 8, "BF16": 30}
NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def text(value: str | bytes) -> bytes:
    """Return a string as it stands in a GGUF file."""
    data = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(data)) + data


def value_bytes(kind: int, value: Any) -> bytes:
    """Return a value; an array is (type of its elements, list)."""
    if kind == STRING:
        return text(value)
    if kind == ARRAY:
        inner, items = value
        return struct.pack("<IQ", inner, len(items)) + b"".join(value_bytes(inner, item) for item in items)
    return struct.pack(_LAYOUT[kind], value)


def field(key: str | bytes, kind: int, value: Any) -> bytes:
    """Return a field."""
    return text(key) + struct.pack("<I", kind) + value_bytes(kind, value)


def info(name: str | bytes, shape: tuple[int, ...], kind: int, offset: int) -> bytes:
    """Return a tensor's description; the shape is slowest first, as NumPy's."""
    return text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape[::-1], kind, offset)


def gguf_bytes(
    fields: list[bytes],
    infos: list[bytes],
    data: bytes,
    *,
    version: int = 3,
    n_fields: int | None = None,
    n_tensors: int | None = None,
    alignment: int = 32,
) -> bytes:
    """Return a GGUF file."""
    counts = (len(infos) if n_tensors is None else n_tensors, len(fields) if n_fields is None else n_fields)
    header = b"GGUF" + struct.pack("<IQQ", version, *counts) + b"".join(fields) + b"".join(infos)
    return header + bytes(-len(header) % alignment) + data


def gguf_name(name: str) -> str:
    """Return what llama.cpp calls a tensor."""
    part = name.removesuffix(".weight")
    layer = ""
    if part.startswith("model.layers."):
        _, _, index, part = part.split(".", 3)
        layer = f"blk.{index}."
    return f"{layer}{NAMES[part]}.weight"


def interleaved(rows: np.ndarray, n_heads: int) -> np.ndarray:
    """Return rows of q or k in llama2.c's order: row j and row j + head_dim/2 of a head become 2j and 2j + 1."""
    result = np.empty_like(rows)
    head_dim = rows.shape[0] // n_heads
    for head in range(n_heads):
        for j in range(head_dim // 2):
            result[head * head_dim + 2 * j] = rows[head * head_dim + j]
            result[head * head_dim + 2 * j + 1] = rows[head * head_dim + j + head_dim // 2]
    return result


def gguf_fields(config: ModelConfig) -> dict[str, tuple[int, Any]]:
    """Return the fields of a model: key -> (type, value)."""
    arch = "qwen3" if config.qk_norm else "llama"
    return {
        "general.architecture": (STRING, arch),
        f"{arch}.context_length": (U32, config.max_seq_len),
        f"{arch}.embedding_length": (U32, config.dim),
        f"{arch}.block_count": (U32, config.n_layers),
        f"{arch}.feed_forward_length": (U32, config.hidden_dim),
        f"{arch}.attention.head_count": (U32, config.n_heads),
        f"{arch}.attention.head_count_kv": (U32, config.n_kv_heads),
        f"{arch}.attention.key_length": (U32, config.head_dim),
        f"{arch}.attention.value_length": (U32, config.head_dim),
        f"{arch}.attention.layer_norm_rms_epsilon": (F32, config.norm_eps),
        f"{arch}.rope.freq_base": (F32, config.rope_theta),
    }


def gguf_tensors(config: ModelConfig, params: Params) -> dict[str, np.ndarray]:
    """Return a model's tensors by GGUF name, rows of a Llama's q and k interleaved."""
    tensors = {}
    for name, array in params.items():
        if not config.qk_norm and name.endswith(("q_proj.weight", "k_proj.weight")):
            array = interleaved(array, config.n_heads if "q_proj" in name else config.n_kv_heads)
        tensors[gguf_name(name)] = array
    return tensors


def quantise(array: np.ndarray, kind: str) -> tuple[bytes, np.ndarray]:
    """Return a tensor as GGUF bytes of a type, and the fp32 values that these bytes stand for.

    Source: the blocks' description in ggml's ggml-common.h and FORMATS of llama.cpp's dequantize_row_* functions.
    """
    if kind == "F32":
        return array.astype("<f4").tobytes(), array
    if kind == "F16":
        return array.astype("<f2").tobytes(), array.astype("<f2").astype(np.float32)
    if kind == "BF16":
        bits = array.astype("<f4").view("<u4") >> 16
        return bits.astype("<u2").tobytes(), (bits << 16).view("<f4")
    blocks = array.reshape(-1, 32)
    out, values = [], []
    for block in blocks:
        if kind == "Q8_0":
            scale = np.float16(np.abs(block).max() / 127)
            codes = np.rint(block / np.float32(scale)).clip(-127, 127).astype(np.int8)
            out.append(scale.tobytes() + codes.tobytes())
            values.append(codes.astype(np.float32) * np.float32(scale))
            continue
        low = np.float16(block.min() if kind == "Q4_1" else 0)
        scale = np.float16((block.max() - block.min()) / 15 if kind == "Q4_1" else np.abs(block).max() / 8)
        shift = 0 if kind == "Q4_1" else 8
        codes = np.rint((block - np.float32(low)) / np.float32(scale) + shift).clip(0, 15).astype(np.uint8)
        packed = codes[:16] | codes[16:] << 4  # the lower halves hold the first 16 weights
        out.append(scale.tobytes() + (low.tobytes() if kind == "Q4_1" else b"") + packed.tobytes())
        values.append((codes.astype(np.float32) - shift) * np.float32(scale) + np.float32(low))
    return b"".join(out), np.concatenate(values).reshape(array.shape)


def write_gguf(
    path: Path,
    config: ModelConfig,
    params: Params,
    kind: str = "F32",
    extra: dict[str, tuple[int, Any]] | None = None,
) -> Params:
    """Write a model, its matrices in a type; returns the parameters that the file stands for."""
    fields = [field(key, *value) for key, value in {**gguf_fields(config), **(extra or {})}.items()]
    infos, data, stored = [], b"", {}
    for name, array in gguf_tensors(config, params).items():
        used = kind if array.ndim == 2 and array.shape[-1] % 32 == 0 else "F32"
        block, stored[name] = quantise(array, used)
        infos.append(info(name, array.shape, TYPES[used], len(data)))
        data += block + bytes(-len(block) % 32)
    path.write_bytes(gguf_bytes(fields, infos, data))
    result = {}
    for name in params:
        array = stored[gguf_name(name)]
        if not config.qk_norm and name.endswith(("q_proj.weight", "k_proj.weight")):
            n_heads = config.n_heads if "q_proj" in name else config.n_kv_heads
            order = interleaved(np.arange(array.shape[0])[:, None], n_heads)[:, 0]
            back = np.empty_like(array)
            back[order] = array
            array = back
        result[name] = array
    return result
