"""GGUF model files (llama.cpp's), Llama and Qwen3: shape, weights and tokenizer.

Names and fields: github.com/ggml-org/llama.cpp, gguf-py/gguf/constants.py. Rows of a Llama's q and k are in llama2.c's
order (RoPE rotates neighbours), those of a Qwen3 in Hugging Face's (it rotates halves).
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from anellm import errors, weights
from anellm.config import ModelConfig
from anellm.errors import DataError
from anellm.gguf_file import MAGIC, GgufFile, Tensor
from anellm.tokenizer import BOS_ID, EOS_ID, UNK_ID, Tokenizer
from anellm.tokenizer_base import BaseTokenizer
from anellm.weights_llama2c import interleaved_to_halves

__all__ = ["MAGIC", "has_tokenizer", "read", "read_tokenizer"]

_ARCHITECTURES = ("llama", "qwen3")
_TENSORS = {
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
    "mlp.down_proj": "ffn_down",
    "mlp.up_proj": "ffn_up",
}
_OUTPUT, _EMBEDDING = "output.weight", "token_embd.weight"
_TOKENS = "tokenizer.ggml.tokens"
_UNKNOWN, _CONTROL, _USER, _UNUSED = 2, 3, 4, 5  # token types; 1 is text, 6 a byte
_NEVER_MERGED = -1e30  # below what any merge scores


def gguf_name(name: str) -> str:
    """Return what a tensor is called in a GGUF file.

    Args:
        name: its Hugging Face name.
    """
    layer, part = "", name.removesuffix(".weight")
    if part.startswith("model.layers."):
        index, part = part.removeprefix("model.layers.").split(".", 1)
        layer = f"blk.{index}."
    return f"{layer}{_TENSORS[part]}.weight"


def read(path: Path) -> tuple[ModelConfig, Iterator[tuple[str, np.ndarray]]]:
    """Open a GGUF file.

    Args:
        path: the file.

    Returns:
        The configuration, and an iterator of (Hugging Face name, fp32 array), decoded one at a time.

    Raises:
        DataError: on a damaged file, another architecture, a feature or tensor type that is not supported, or tensors
            that do not fit the fields.
        UnavailableError: on quantised tensors, if the gguf package is not installed.
    """
    file = GgufFile(path)
    config = _config(file)
    shapes = weights.file_shapes(config, path)
    names = {gguf_name(name): name for name in shapes}
    for what, wrong in (("missing", names.keys() - file.tensors.keys()), ("unexpected", file.tensors.keys() - names)):
        if wrong:
            raise DataError(f"{path}: {what} tensors for its fields: {weights.name_list(wrong)}")
    for stored, name in names.items():
        if file.tensors[stored].shape != shapes[name]:
            raise DataError(
                f"{path}: tensor {stored}: shape: expected {shapes[name]} by the fields, "
                f"found {file.tensors[stored].shape}"
            )
    file.need_decoder()
    return config, _read_tensors(file, config, {name: file.tensors[stored] for stored, name in names.items()})


def _read_tensors(file: GgufFile, config: ModelConfig, tensors: dict[str, Tensor]) -> Iterator[tuple[str, np.ndarray]]:
    heads = {"q_proj": config.n_heads, "k_proj": config.n_kv_heads} if not config.qk_norm else {}
    for name, tensor in tensors.items():
        array = file.read(tensor)
        n_heads = heads.get(name.split(".")[-2], 0)
        yield name, interleaved_to_halves(array, n_heads) if n_heads else array


def _config(file: GgufFile) -> ModelConfig:
    """Return the shape that the fields describe, or say what in them is not supported."""
    arch = file.text("general.architecture")
    if arch not in _ARCHITECTURES:
        raise DataError(
            f"{file.path}: field general.architecture: expected one of {', '.join(_ARCHITECTURES)}, "
            f"found {weights.shown(arch)}"
        )
    _refuse_unsupported(file, arch)
    dim, n_heads = file.integer(f"{arch}.embedding_length"), file.integer(f"{arch}.attention.head_count")
    embedding = file.tensors.get(_EMBEDDING)
    if embedding is None:
        raise DataError(f"{file.path}: missing tensors for its fields: {_EMBEDDING}")
    vocab_size = embedding.shape[0]
    n_layers = file.integer(f"{arch}.block_count")
    if n_layers > len(file.tensors):  # before a table is made as long as the field says
        raise DataError(
            f"{file.path}: field {arch}.block_count: expected at most one a tensor ({len(file.tensors)}), "
            f"found {n_layers}"
        )
    head_dim = file.integer(f"{arch}.attention.key_length", dim // n_heads if n_heads else 0)
    for key, expected in (
        ("rope.dimension_count", head_dim),
        ("attention.value_length", head_dim),
        ("vocab_size", vocab_size),
    ):
        if file.integer(f"{arch}.{key}", expected) != expected:
            found = file.integer(f"{arch}.{key}")
            raise DataError(f"{file.path}: field {arch}.{key}: expected {expected} by other fields, found {found}")
    try:
        return ModelConfig(
            dim=dim,
            hidden_dim=file.integer(f"{arch}.feed_forward_length"),
            n_layers=n_layers,
            n_heads=n_heads,
            n_kv_heads=file.integer(f"{arch}.attention.head_count_kv", n_heads),
            head_dim=head_dim,
            vocab_size=vocab_size,
            max_seq_len=file.integer(f"{arch}.context_length"),
            norm_eps=file.number(f"{arch}.attention.layer_norm_rms_epsilon"),
            rope_theta=file.number(f"{arch}.rope.freq_base", 10000.0),
            tie_embeddings=_OUTPUT not in file.tensors,
            qk_norm=arch == "qwen3",
        )
    except DataError:
        raise
    except (errors.InvalidError, ArithmeticError) as error:
        raise DataError(f"{file.path}: {error}") from None


def _refuse_unsupported(file: GgufFile, arch: str) -> None:
    def refuse(key: str, expected: str, found: object) -> DataError:
        return DataError(f"{file.path}: field {key}: expected {expected} (not supported), found {weights.shown(found)}")

    if file.integer("split.count", 1) > 1:
        raise refuse("split.count", "the whole model in one file", file.fields["split.count"])
    scaling = f"{arch}.rope.scaling.type"
    kind = file.text(scaling)
    if kind not in (None, "none"):
        raise refuse(scaling, "none", kind)
    for key in (f"{arch}.rope.scaling.factor", f"{arch}.rope.scale_linear"):
        if kind is None and file.number(key, 1) not in (0, 1):
            raise refuse(key, "1", file.number(key))
    if "rope_freqs.weight" in file.tensors:
        raise DataError(
            f"{file.path}: tensor rope_freqs.weight: expected none (scaled rotary embeddings are not supported), "
            "found one"
        )
    for key in ("expert_count", "expert_used_count", "attention.sliding_window"):
        if file.integer(f"{arch}.{key}", 0):
            raise refuse(f"{arch}.{key}", "0", file.fields[f"{arch}.{key}"])


# ---- the tokenizer -----------------------------------------------------------------------------------------------


def has_tokenizer(path: Path) -> bool:
    """Return whether a GGUF file carries its vocabulary.

    Raises:
        DataError: when the file is damaged.
    """
    return _TOKENS in GgufFile(path).fields


def read_tokenizer(path: Path) -> BaseTokenizer:
    """Return the tokenizer in a GGUF file.

    Args:
        path: the file.

    Raises:
        DataError: when there is none, it is damaged, or of a kind that is not supported.
        UnavailableError: on a byte-level one, if the ``tokenizers`` package is not installed.
    """
    file = GgufFile(path)
    kind = file.text("tokenizer.ggml.model")
    tokens = file.strings(_TOKENS)
    if kind is None or tokens is None:
        raise DataError(f"{path}: expected a tokenizer (fields tokenizer.ggml.model and {_TOKENS}), found none")
    types = file.numbers("tokenizer.ggml.token_type")
    if types is None:
        types = np.ones(len(tokens), np.int32)
    if types.size != len(tokens):
        raise DataError(f"{path}: field tokenizer.ggml.token_type: expected {len(tokens)}, found {types.size}")
    if kind == "llama":
        return _read_sentencepiece(file, tokens, types)
    if kind == "gpt2":
        return _read_byte_level(file, tokens, types)
    raise DataError(f"{path}: field tokenizer.ggml.model: expected llama or gpt2, found {weights.shown(kind)}")


def _read_sentencepiece(file: GgufFile, tokens: list[bytes], types: np.ndarray) -> Tokenizer:
    """Return a vocabulary of pieces and scores in the form of llama2.c's tokenizer.bin."""
    scores = file.numbers("tokenizer.ggml.scores")
    found = "none" if scores is None else str(scores.size)
    if scores is None or scores.size != len(tokens):
        raise DataError(f"{file.path}: field tokenizer.ggml.scores: expected {len(tokens)}, found {found}")
    for name, expected in (("unknown", UNK_ID), ("bos", BOS_ID), ("eos", EOS_ID)):
        key = f"tokenizer.ggml.{name}_token_id"
        if file.integer(key, expected) != expected:
            raise DataError(f"{file.path}: field {key}: expected {expected}, found {file.integer(key)}")
    if not file.boolean("tokenizer.ggml.add_space_prefix", default=True):
        raise DataError(
            f"{file.path}: field tokenizer.ggml.add_space_prefix: expected true (not supported), found false"
        )
    pieces = [token.replace("\u2581".encode(), b" ") for token in tokens]
    values: list[float] = scores.tolist()
    for index in (BOS_ID, EOS_ID):  # as llama2.c's tokenizer.py writes them
        if index < len(pieces):
            pieces[index] = b"\n" + pieces[index] + b"\n"
    # Text never becomes one of these: it could only get there by a merge.
    for index in np.flatnonzero(np.isin(types, (_UNKNOWN, _CONTROL, _USER, _UNUSED))).tolist():
        if index > EOS_ID:
            values[index] = _NEVER_MERGED
    n_user = int(np.count_nonzero(types == _USER))
    if n_user:
        warnings.warn(
            f"{file.path}: {n_user} user-defined tokens of its vocabulary are not looked for in text", stacklevel=3
        )
    return Tokenizer(pieces, values, source=str(file.path))


def _read_byte_level(file: GgufFile, tokens: list[bytes], types: np.ndarray) -> BaseTokenizer:
    """Return a byte-level BPE vocabulary with its merges."""
    from anellm.tokenizer_json import JsonTokenizer

    def token_id(name: str) -> int | None:
        key = f"tokenizer.ggml.{name}_token_id"
        return file.integer(key) if key in file.fields else None

    def decoded(key: str, values: list[bytes]) -> list[str]:
        try:
            return [value.decode() for value in values]
        except UnicodeDecodeError as error:
            raise DataError(f"{file.path}: field {key}: expected UTF-8, found {error.object[:50]!r}") from None

    key = "tokenizer.ggml.merges"
    merges = file.strings(key)
    if merges is None:
        raise DataError(f"{file.path}: field {key}: expected an array of strings, found no such field")
    rule: Any = file.fields.get("tokenizer.ggml.add_bos_token")
    return JsonTokenizer.from_bpe(
        decoded(_TOKENS, tokens),
        decoded(key, merges),
        file.text("tokenizer.ggml.pre", "default") or "default",
        bos_id=token_id("bos"),
        eos_id=token_id("eos"),
        control_ids=np.flatnonzero(np.isin(types, (_UNKNOWN, _CONTROL, _UNUSED))).tolist(),
        user_ids=np.flatnonzero(types == _USER).tolist(),
        add_bos=rule if isinstance(rule, bool) else None,
        source=str(file.path),
    )
