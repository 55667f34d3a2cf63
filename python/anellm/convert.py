"""The verb ``convert``: write a model in another format, read it back, and compare."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from anellm import checkpoint, floats, hf_layout, safeio, weights, weights_hf
from anellm._ffi import lib
from anellm.cli import Result, Verb
from anellm.config import ModelConfig
from anellm.device import set_threads
from anellm.errors import ConfigError, DataError
from anellm.inputs import check_fits
from anellm.machine import human_bytes
from anellm.model import Model, memory
from anellm.options import CommonOptions, option
from anellm.tokenizer import TOKENIZER_FILES, load_tokenizer_file
from anellm.tokenizer_base import BaseTokenizer
from anellm.tokenizer_json import CONFIG_NAME

_SEED, _STREAM = 1, 0x636F6E76  # of the tokens on which logits are compared; ASCII "conv"
_BATCH, _LONGEST = 2, 64


@dataclass(frozen=True, kw_only=True)
class ConvertConfig(CommonOptions):
    """The options of ``convert``."""

    model: str | None = option(
        None, "run, checkpoint or Hugging Face directory, llama2.c, llm.c, GGUF or BLZT file", group="model"
    )
    tokenizer: str | None = option(None, "tokenizer to copy [the one of the model]", group="model")
    out: str | None = option(None, "directory (hf) or file to write", group="output")
    format: str | None = option(None, "format to write", choices=weights.FORMATS, group="output")
    dtype: str = option("float32", "type of the weights, for hf", choices=tuple(floats.DTYPES), group="output")
    max_shard_bytes: int = option(
        weights_hf.MAX_SHARD_BYTES, "most bytes of weights in one file, for hf", low=1, high=2**62, group="output"
    )
    residual_scale: float = option(
        1.0,
        "multiply o_proj and down_proj by this: for a BLZT checkpoint whose trainer scaled what layers add",
        above=0,
        high=2**64,
        group="output",
    )
    overwrite: bool = option(False, "replace what is there", group="output", flag_only=True)
    verify: bool = option(True, "read back what was written and compare it", group="output", flag_only=True)


def _check(config: ConvertConfig) -> tuple[str, Path, str]:
    """Return model, target and format, or say what is wrong with them."""
    if config.model is None or config.out is None or config.format is None:
        missing = next(name for name in ("model", "out", "format") if getattr(config, name) is None)
        raise ConfigError(f"--{missing}: needed, and not given")
    if config.format != "hf" and config.dtype != "float32":
        raise ConfigError(f"--dtype {config.dtype}: a {config.format} file holds {weights.file_dtype(config.format)}")
    out = Path(config.out)
    if config.format == "hf":
        if out.exists() and not out.is_dir():
            raise ConfigError(f"--out {out}: expected a directory or nothing, found a file")
        if (out / checkpoint.MANIFEST).exists() or (out / "config.toml").exists():
            raise ConfigError(f"--out {out}: a training run or checkpoint: choose another directory")
        if out.is_dir() and any(out.iterdir()) and not config.overwrite:
            raise ConfigError(f"--out {out}: not empty: --overwrite replaces the model in it")
    else:
        safeio.check_replaceable(out)
        if (out.parent / checkpoint.MANIFEST).exists():
            raise ConfigError(f"--out {out}: inside a checkpoint: choose another place")
        if out.exists() and not config.overwrite:
            raise ConfigError(f"--out {out}: exists: --overwrite replaces it")
    return config.model, out, config.format


def _check_tokenizer(folder: Path, tokenizer: BaseTokenizer, *, overwrite: bool) -> list[Path]:
    """Check that a tokenizer can be written to a folder, and return the files of another that have to go.

    Raises:
        ConfigError: when another tokenizer is there, and may not be replaced.
    """
    files = tokenizer.files()
    before = TOKENIZER_FILES[: TOKENIZER_FILES.index(tokenizer.file_name)]  # these would be found instead of it
    shadows = [folder / name for name in (*before, CONFIG_NAME) if name not in files and (folder / name).exists()]
    if tokenizer.file_name == TOKENIZER_FILES[0]:
        shadows = []
    for path in [*shadows, *(folder / name for name in files)]:
        safeio.check_replaceable(path)
        same = path.name in files and path.exists() and path.read_bytes() == files[path.name]
        if path.exists() and not same and not overwrite:
            raise ConfigError(f"{path}: another tokenizer is there: --overwrite replaces it")
    return shadows


def _write_tokenizer(folder: Path, tokenizer: BaseTokenizer, shadows: list[Path]) -> list[Path]:
    """Write a tokenizer's files and return their paths; files that are there with the same content stay as they are."""
    for path in shadows:
        safeio.remove(path)
    for name, data in tokenizer.files().items():
        path = folder / name
        if not path.exists() or path.read_bytes() != data:
            safeio.write_bytes(path, data)
    return [folder / name for name in tokenizer.files()]


def _scale_residuals(model: Model, scale: float) -> None:
    """Multiply what writes to the residual stream."""
    for name, array in model.params.items():
        if name.endswith(("o_proj.weight", "down_proj.weight", "c_proj.weight", "c_proj.bias")):
            np.multiply(array, np.float32(scale), out=array)
    model.weights_changed()


def _fixed_tokens(config: ModelConfig) -> np.ndarray:
    """Return the (B, T) int32 tokens on which logits are compared: the same for every model of a vocabulary."""
    count = min(_LONGEST, config.max_seq_len)
    ids = [lib.anellm_rng_u64(_SEED, _STREAM, i) % config.vocab_size for i in range(_BATCH * count)]
    return np.array(ids, np.int32).reshape(_BATCH, count)


def _compare(model: Model, out: Path, dtype: str) -> float:
    """Read back what was written, and compare it with the model; the model's weights become those that were read.

    Returns:
        The largest difference of a logit on the fixed tokens.

    Raises:
        DataError: when a dimension differs, or a weight is not the model's rounded to the dtype.
    """
    tokens = _fixed_tokens(model.config)
    before = model.forward(tokens)
    found = weights.load_pretrained(out)
    table, n_rows = hf_layout.EMBEDDINGS[model.config.arch], model.config.vocab_size
    for field, value in model.config.to_dict().items():
        other = getattr(found.config, field)
        if field == "padded_vocab_size":
            continue  # formats pad a vocabulary or do not; the rows behind it are zeros
        if other != value and not (field == "norm_eps" and np.float32(other) == np.float32(value)):
            raise DataError(f"{out}: {field}: expected {value} as in the source, found {other}: do not use this file")
    for name, tensor in found.tensors:
        array, kept = (tensor[:n_rows], model.params[name][:n_rows]) if name == table else (tensor, model.params[name])
        expected = floats.rounded(name, kept, dtype)
        if not np.array_equal(array, expected):
            at = int(np.flatnonzero(array.reshape(-1) != expected.reshape(-1))[0])
            raise DataError(
                f"{out}: tensor {name}: expected {expected.reshape(-1)[at]} at index {at} as in the source "
                f"({dtype}), found {array.reshape(-1)[at]}: do not use this file"
            )
        kept[...] = array
    model.weights_changed()
    return float(np.abs(model.forward(tokens) - before).max())


def _written(out: Path) -> list[Path]:
    """Return the files of weights."""
    if out.is_file():
        return [out]
    return sorted(p for p in out.iterdir() if p.name.startswith("model") and p.suffix in (".safetensors", ".json"))


def run(config: ConvertConfig) -> Result:
    """Convert, and print and return what was written and how it differs."""
    start = time.perf_counter()
    path, out, kind = _check(config)
    set_threads(config.threads)
    shape = weights.load_pretrained(path).config
    tokenizer = weights.load_tokenizer(path, shape, config.tokenizer)
    folder = out if kind == "hf" else out.parent
    shadows = [] if tokenizer is None else _check_tokenizer(folder, tokenizer, overwrite=config.overwrite)
    check_fits(memory(shape, _BATCH, min(_LONGEST, shape.max_seq_len), training=False))
    model = Model.from_pretrained(path, device=config.device)
    if config.residual_scale != 1.0:
        _scale_residuals(model, config.residual_scale)
    dtype = config.dtype if kind == "hf" else weights.file_dtype(kind)
    if kind == "hf":
        weights.save_hf(out, model.config, model.params, dtype, config.max_shard_bytes)
    else:
        safeio.make_directory(folder)
        weights.save(out, model.config, model.params, kind)
    kept = [] if tokenizer is None else _write_tokenizer(folder, tokenizer, shadows)
    files = _written(out)
    n_bytes = sum(file.stat().st_size for file in files)
    print(f"{out}: {kind}, {dtype}, {human_bytes(n_bytes)} in {len(files)} file{'s' if len(files) > 1 else ''}")
    print(f"tokenizer: {', '.join(str(file) for file in kept) or 'none'}")
    difference = None
    if config.verify:
        difference = _compare(model, out, dtype)
        if tokenizer is not None and load_tokenizer_file(kept[0]).sha256 != tokenizer.sha256:
            raise DataError(f"{kept[0]}: expected the source's tokenizer, found another: do not use this file")
        print(f"read back: every weight is the source's{'' if dtype == 'float32' else ', rounded'}; ", end="")
        print(f"largest difference of a logit {difference:.3g}")
    values = {
        "model": path,
        "out": str(out),
        "format": kind,
        "dtype": dtype,
        "residual_scale": config.residual_scale,
        "n_params": model.n_params(),
        "files": {str(file): file.stat().st_size for file in files},
        "tokenizer": str(kept[0]) if kept else None,
        "verified": config.verify,
        "max_logit_difference": difference,
        "seconds": time.perf_counter() - start,
    }
    return Result(values)


VERB = Verb("convert", "write a model in another format, read it back and compare", ConvertConfig, run)
main = VERB.main

if __name__ == "__main__":
    raise SystemExit(main())
