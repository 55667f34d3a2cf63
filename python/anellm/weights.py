"""Read and write pretrained models: Hugging Face directories, llama2.c and llm.c files; GGUF and BLZT (read only).

This is the front door: it finds out what a path is, and hands over to `weights_hf`, `weights_llama2c`, `weights_llmc`,
`weights_gguf` or `weights_blzt`. Tensors travel as (Hugging Face name, fp32 array) one at a time, from a memory-mapped
file, so a model is never in memory twice.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from anellm import checkpoint, errors, tokens

if TYPE_CHECKING:
    from anellm.config import ModelConfig
    from anellm.tokenizer_base import BaseTokenizer

_SHOWN = 100  # characters of a name in a message
_CHUNK = 1 << 20  # elements looked at in one go, so that a check needs no copy of the tensor

LLAMA2C_VERSIONS = {"llama2c": 0, "llama2c-v1": 1}  # format as users name it -> version of the file
LLMC_VERSIONS = {"llmc": 3, "llmc-v1": 1, "llmc-v5": 5}
FORMATS = ("hf", *LLAMA2C_VERSIONS, *LLMC_VERSIONS)  # that can be written

# llm.c's files, by the int32 that they begin with.
LLMC_KINDS = {**tokens.LLMC_OTHERS, **dict.fromkeys(tokens.LLMC, "an llm.c token shard")}
# What other formats start with, to name them instead of calling their header damaged.
_FOREIGN_MAGIC = {
    b"PK\x03\x04": "a PyTorch (pickle) file",
    b"BLZT": "a checkpoint of the ANE training examples from a big-endian machine",
}


@dataclass(frozen=True)
class Pretrained:
    """A model file whose headers have been checked and whose tensors have not been read yet.

    Attributes:
        config: the model's dimensions.
        tensors: yields every tensor once as (name, fp32 array (rows, columns) or (dim,)), in the order of
            `tensor_shapes`; raises DataError at a tensor with a non-finite value. Arrays may be read-only views of
            the mapped file: copy what you keep.
        source: the file or directory it is read from, for messages.
        tokenizer_path: the tokenizer file that belongs to it (a GGUF file is its own), or None.
    """

    config: ModelConfig
    tensors: Iterator[tuple[str, np.ndarray]]
    source: str
    tokenizer_path: Path | None


def tensor_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Return the name and shape of every tensor of a model, in the order of the core.

    Args:
        config: the model's dimensions.

    Returns:
        Hugging Face names with shapes: (out, in) for matrices, (dim,) or (head_dim,) for norms.
    """
    from anellm.model import tensor_table

    return {tensor.name: tensor.shape for tensor in tensor_table(config)}


def file_shapes(config: ModelConfig, source: str | Path) -> dict[str, tuple[int, ...]]:
    """Return `tensor_shapes` of a configuration that was read from a file.

    Raises:
        DataError: when the core cannot hold such a model.
    """
    try:
        return tensor_shapes(config)
    except errors.InvalidError as error:
        raise errors.DataError(f"{source}: {error}") from None


def first_nonfinite(array: np.ndarray) -> int | None:
    """Return the flat index of the first inf or NaN of an array, or None."""
    flat = array.reshape(-1)
    for start in range(0, flat.size, _CHUNK):
        bad = ~np.isfinite(flat[start : start + _CHUNK])
        if bad.any():
            return start + int(bad.argmax())
    return None


def checked(tensors: Iterator[tuple[str, np.ndarray]], source: str) -> Iterator[tuple[str, np.ndarray]]:
    """Pass tensors on, refusing non-finite values.

    Raises:
        DataError: at the first tensor that holds inf or NaN.
    """
    for name, array in tensors:
        at = first_nonfinite(array)
        if at is not None:
            value = float(array.reshape(-1)[at])
            raise errors.DataError(f"{source}: tensor {name}: expected finite weights, found {value} at index {at}")
        yield name, array


def check_params(config: ModelConfig, params: Mapping[str, np.ndarray]) -> dict[str, tuple[int, ...]]:
    """Check that parameters fit a configuration before anything is written.

    Args:
        config: the model's dimensions.
        params: fp32 arrays by Hugging Face name.

    Returns:
        `tensor_shapes(config)`.

    Raises:
        InvalidError: on a missing or additional name, a wrong shape or dtype.
        NonFiniteError: on inf or NaN.
    """
    shapes = tensor_shapes(config)
    for what, names in (("missing", shapes.keys() - params.keys()), ("unexpected", params.keys() - shapes.keys())):
        if names:
            raise errors.InvalidError(f"params: {what} {name_list(names)}")
    for name, shape in shapes.items():
        array = params[name]
        if array.shape != shape or array.dtype != np.float32:
            raise errors.InvalidError(
                f"params[{name!r}]: expected float32 of shape {shape}, found {array.dtype} of shape {array.shape}"
            )
        at = first_nonfinite(array)
        if at is not None:
            raise errors.NonFiniteError(f"params[{name!r}]: {array.reshape(-1)[at]} at index {at}: not written")
    return shapes


def name_list(names: Iterable[str], limit: int = 4) -> str:
    """Return names in order, cut after a few, for a message."""
    ordered = sorted(names)
    more = f" and {len(ordered) - limit} more" if len(ordered) > limit else ""
    return ", ".join(shown(name) for name in ordered[:limit]) + more


def shown(value: object) -> str:
    """Return something from a file as it may stand in a message: short, and without control characters."""
    text = str(value)
    text = text if len(text) <= _SHOWN else text[:_SHOWN] + "..."
    return text if text.isprintable() else ascii(text)


def resolve(path: str | Path) -> Path:
    """Return the model that a path means: itself, or the best (else the newest) checkpoint of a training run.

    Args:
        path: a .bin or .gguf file, a Hugging Face or checkpoint directory (it has a config.json), or a run directory.

    Raises:
        DataError: when there is no model at that path.
    """
    path = Path(path)
    if not path.exists():
        raise errors.DataError(
            f"{path}: expected a model (.bin or .gguf file, Hugging Face or run directory), found nothing"
        )
    target = checkpoint.resolve_model_path(path)
    if target.is_file() or (target / "config.json").is_file():
        return target
    raise errors.DataError(
        f"{path}: expected a model file, config.json with model.safetensors, or a run with checkpoints, "
        "found none of them"
    )


def find_tokenizer(model_path: str | Path) -> Path | None:
    """Return the tokenizer file that belongs to a model path; None if there is none.

    That is the GGUF file itself, else what lies beside the weights, else what lies in the run.

    Args:
        model_path: what `load_pretrained` was given.
    """
    return _tokenizer_of(resolve(model_path))


def _tokenizer_of(target: Path) -> Path | None:
    from anellm.tokenizer import find_tokenizer_file

    if target.is_file() and _is_gguf(target):
        from anellm import weights_gguf

        if weights_gguf.has_tokenizer(target):
            return target
    folder = target.parent if target.is_file() else target
    places = [folder]
    if (folder / checkpoint.MANIFEST).is_file():
        places.append(folder.resolve().parent)  # a checkpoint's run
    return next((path for place in places if (path := find_tokenizer_file(place)) is not None), None)


def load_tokenizer(
    model_path: str | Path, config: ModelConfig, explicit: str | Path | None = None
) -> BaseTokenizer | None:
    """Return the tokenizer to use with a model: the one named, else the one that belongs to the model's path.

    Args:
        model_path: what `load_pretrained` was given.
        config: the model's dimensions.
        explicit: a tokenizer file of any kind, or None to look beside the model.

    Returns:
        The tokenizer, or None when none is named and none is found, and default_tokenizer() knows none.

    Raises:
        DataError: when the tokenizer has more tokens than the model knows, or its file is damaged.
    """
    from anellm.tokenizer import load_tokenizer_file

    path = Path(explicit) if explicit is not None else find_tokenizer(model_path)
    if path is None:
        return default_tokenizer(config)
    tokenizer = load_tokenizer_file(path)
    if tokenizer.vocab_size > config.vocab_size:
        raise errors.DataError(
            f"{path}: vocab_size: expected at most the {config.vocab_size} of {model_path}, "
            f"found {tokenizer.vocab_size}: this tokenizer belongs to another model"
        )
    return tokenizer


def default_tokenizer(config: ModelConfig) -> BaseTokenizer | None:
    """Return the tokenizer of a model that none lies beside: GPT-2's, for a GPT-2 with its vocabulary; else None."""
    from anellm.tokenizer_json import GPT2_VOCAB_SIZE, JsonTokenizer

    return JsonTokenizer.gpt2() if (config.arch, config.vocab_size) == ("gpt2", GPT2_VOCAB_SIZE) else None


def load_pretrained(path: str | Path) -> Pretrained:
    """Open a pretrained model of any format that anellm reads.

    Headers, names, shapes, dtypes and sizes are checked now, values while the tensors are read.

    Args:
        path: a llama2.c .bin file (version 0, 1 or 2), an llm.c model (version 1, 3 or 5), a GGUF file, a BLZT
            checkpoint of the original ANE trainer, a Hugging Face directory (config.json and safetensors), a checkpoint
            directory, or a run directory (its best checkpoint, else its newest).

    Returns:
        The configuration and an iterator over the tensors.

    Raises:
        DataError: when the path holds no model, or a damaged one.
        UnavailableError: when a quantised GGUF file needs a package that is not installed.
    """
    from anellm import weights_blzt, weights_gguf, weights_hf, weights_llama2c, weights_llmc

    target = resolve(path)
    tokenizer = _tokenizer_of(target)
    if target.is_dir():
        config, tensors = weights_hf.read(target)
    elif _is_gguf(target):
        config, tensors = weights_gguf.read(target)
    elif _magic(target) == weights_blzt.MAGIC:
        config, tensors = weights_blzt.read(target)
    elif _magic(target) == weights_llmc.MAGIC.to_bytes(4, "little"):
        config, tensors = weights_llmc.read(target)
    else:
        _refuse_foreign(target)
        config, tensors = weights_llama2c.read(target)
    return Pretrained(config, checked(tensors, str(target)), str(target), tokenizer)


def _magic(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(4)


def _is_gguf(path: Path) -> bool:
    return _magic(path) == b"GGUF"


def _refuse_foreign(path: Path) -> None:
    """Name a file of another format instead of calling it a damaged llama2.c file."""
    if path.suffix == ".safetensors":
        raise errors.DataError(f"{path}: pass the directory that holds it together with its config.json")
    magic = _magic(path)
    found = _FOREIGN_MAGIC.get(magic) or LLMC_KINDS.get(int.from_bytes(magic, "little"))
    if found:
        raise errors.DataError(f"{path}: expected a llama2.c, llm.c or GGUF model, found {found}")


def save_hf(
    directory: str | Path,
    config: ModelConfig,
    params: Mapping[str, np.ndarray],
    dtype: str = "float32",
    max_shard_bytes: int | None = None,
) -> None:
    """Write a Hugging Face directory: config.json and model.safetensors, or several files of weights and their index.

    Args:
        directory: created when missing; a model that is in it is replaced, other files stay.
        config: the model's dimensions.
        params: fp32 arrays by Hugging Face name.
        dtype: "float32", "float16" or "bfloat16" (rounded to nearest even).
        max_shard_bytes: tensor bytes in a file, at least 1; a tensor is never split. None: 5 GB, as transformers does.

    Raises:
        InvalidError: when the parameters do not fit the configuration, or the dtype is unknown.
        NonFiniteError: on inf or NaN, or a value that the dtype cannot hold.
    """
    from anellm import weights_hf

    limit = weights_hf.MAX_SHARD_BYTES if max_shard_bytes is None else max_shard_bytes
    weights_hf.write(Path(directory), config, params, dtype, limit)


def save_llmc(path: str | Path, config: ModelConfig, params: Mapping[str, np.ndarray], version: int = 3) -> None:
    """Write an llm.c model file.

    Args:
        path: the file, replaced when it exists.
        config: a GPT-2's dimensions.
        params: fp32 arrays by Hugging Face name.
        version: 1 (llm.metal's), 3 (fp32, the vocabulary padded to a multiple of 128) or 5 (as 3, in bfloat16).

    Raises:
        InvalidError: when the format cannot express the model, or the parameters do not fit the configuration.
        NonFiniteError: on inf or NaN, or a value that bfloat16 cannot hold.
    """
    from anellm import weights_llmc

    weights_llmc.write(Path(path), config, params, version)


def save(
    path: str | Path,
    config: ModelConfig,
    params: Mapping[str, np.ndarray],
    kind: str = "hf",
    dtype: str = "float32",
    max_shard_bytes: int | None = None,
) -> None:
    """Write a model in one of FORMATS; see save_hf(), save_llama2c() and save_llmc().

    Args:
        path: a directory for "hf", a file for the others.
        config: the model's dimensions.
        params: fp32 arrays by Hugging Face name.
        kind: the format.
        dtype: of the weights, for "hf".
        max_shard_bytes: tensor bytes in one file, for "hf".

    Raises:
        InvalidError: on an unknown format or dtype, or a model that the format cannot express.
        NonFiniteError: on inf or NaN, or a value that the dtype cannot hold.
    """
    if kind not in FORMATS:
        raise errors.InvalidError(f"format: expected one of {', '.join(FORMATS)}, found {kind!r}")
    if kind == "hf":
        save_hf(path, config, params, dtype, max_shard_bytes)
        return
    if dtype != "float32" or max_shard_bytes is not None:
        what = "dtype" if dtype != "float32" else "max_shard_bytes"
        raise errors.InvalidError(f"{what}: format {kind} is one file of {file_dtype(kind)}; use hf")
    if kind in LLMC_VERSIONS:
        save_llmc(path, config, params, LLMC_VERSIONS[kind])
    else:
        save_llama2c(path, config, params, LLAMA2C_VERSIONS[kind])


def file_dtype(kind: str) -> str:
    """Return what weights in a file of a format other than "hf" are."""
    return "bfloat16" if kind == "llmc-v5" else "float32"


def save_llama2c(path: str | Path, config: ModelConfig, params: Mapping[str, np.ndarray], version: int = 0) -> None:
    """Write a llama2.c file in fp32.

    Args:
        path: the file, replaced when it exists.
        config: the model's dimensions.
        params: fp32 arrays by Hugging Face name.
        version: 0 (what run.c reads) or 1 (with a magic number).

    Raises:
        InvalidError: when the format cannot express the model, or the parameters do not fit the configuration.
        NonFiniteError: on inf or NaN.
    """
    from anellm import weights_llama2c

    weights_llama2c.write(Path(path), config, params, version)
