"""The verb ``mil``: the programs that a model runs on a Neural Engine, as text.

>>> for program in ane_programs(ModelConfig.from_preset("stories110m"), batch_size=1, seq_len=256):
...     print(program.name, program.input.shape, program.output.shape)
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

import numpy as np

from anellm import safeio, weights
from anellm._ffi import check, ffi, lib, text
from anellm.cli import Result, Verb
from anellm.config import ModelConfig, preset_names
from anellm.device import MODES
from anellm.errors import ConfigError, InvalidError
from anellm.machine import human_bytes, human_count
from anellm.model import _c_config as c_config
from anellm.options import option

_WHATS: Final = ("dump",)
_SOFTMAX: Final = ("ane", "cpu")
_BLOB_DATA: Final = 128  # where the numbers of a weight file of one chunk start
# Weight files of static programs that are a layer's matrices: the matrix, and whether it is transposed.
MATRICES: Final = {
    **{name: (name, False) for name in ("wqkv", "wo", "w1", "w3", "w2")},
    **{f"{name}_t": (name, True) for name in ("wqkv", "wo", "w1", "w3", "w2")},
    **{name: (name, False) for name in ("q_norm", "k_norm", "bqkv", "b1")},
}
MANIFEST: Final = "programs.json"
_KINDS: Final = {
    lib.ANELLM_ANE_FIELD_ROWS: "rows",
    lib.ANELLM_ANE_FIELD_WEIGHTS: "weights",
    lib.ANELLM_ANE_FIELD_WEIGHTS_T: "weights_transposed",
    lib.ANELLM_ANE_FIELD_SCORES: "scores",
}


@dataclass(frozen=True)
class AneField:
    """A place in a surface.

    Attributes:
        name: its name in the documentation.
        channel: its first channel.
        column: its first column.
        channels: how many channels.
        columns: how many columns.
        kind: ``rows``: (B*T, channels) of the model, channel first, column b*Tp + t; ``weights``: channel = row of the
            model's (out, in) matrix; ``weights_transposed``: channel = column; ``scores``: channel h*Tp + i, column
            b*Tp + j for query i and key j of head h.
    """

    name: str
    channel: int
    column: int
    channels: int
    columns: int
    kind: str

    @property
    def slices(self) -> tuple[slice, slice]:
        """Return where it stands in a (channels, width) array."""
        return slice(self.channel, self.channel + self.channels), slice(self.column, self.column + self.columns)


@dataclass(frozen=True)
class AneSurface:
    """The input or output of a program: fp16 [1, channels, 1, width]."""

    channels: int
    width: int
    bytes: int
    fields: tuple[AneField, ...]

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """Return the shape of the tensor."""
        return 1, self.channels, 1, self.width

    def __getitem__(self, name: str) -> AneField:
        return next(field for field in self.fields if field.name == name)


@dataclass(frozen=True)
class AneProgram:
    """A program of a model.

    Attributes:
        name: its name.
        backward: evaluated in the backward pass; else in the forward pass.
        softmax: ``ane`` or ``cpu`` where it is only used with the softmax there; ``any``.
        evaluations: per layer and micro-step, where it is used.
        flops: of an evaluation: two for each multiply-add of its products.
        input: its one input, ``a_input0``.
        output: its one output, ``z_output0``.
        mil: its text.
        files: content of its weight files, by the path that the text uses.
        mode: ``dynamic``, ``static``, or ``any``.
    """

    name: str
    backward: bool
    softmax: str
    evaluations: int
    flops: float
    input: AneSurface
    output: AneSurface
    mil: str
    files: dict[str, bytes]
    mode: str = "dynamic"

    def used(self, *, training: bool, softmax: str, mode: str = "dynamic") -> bool:
        """Return whether a model evaluates it."""
        return (training or not self.backward) and self.softmax in ("any", softmax) and self.mode in ("any", mode)

    @property
    def weights(self) -> tuple[str, ...]:
        """Return the weight files that are a layer's matrices."""
        return tuple(path for path in self.files if Path(path).stem in MATRICES)


def _mode_name(mode: int) -> str:
    return "any" if mode < 0 else MODES[mode]


def _surface(io: Any) -> AneSurface:
    fields = (io.fields[i] for i in range(io.n_fields))
    return AneSurface(
        io.channels,
        io.width,
        io.bytes,
        tuple(AneField(text(f.name), f.channel, f.column, f.channels, f.columns, _KINDS[f.kind]) for f in fields),
    )


def bake(files: Mapping[str, bytes], matrices: Mapping[str, np.ndarray]) -> dict[str, bytes]:
    """Return weight files of a static program with a layer's weights in them.

    Args:
        files: of the program as ane_programs() returns it.
        matrices: wqkv, wo, w1, w3, w2 as the model has them, (out, in); q_norm, k_norm with q/k-norm; of a GPT-2 no w3,
            and bqkv, b1 with biases.

    Raises:
        InvalidError: when one has another size than the program's.
    """
    found = dict(files)
    for path, data in files.items():
        if Path(path).stem not in MATRICES:
            continue
        name, transposed = MATRICES[Path(path).stem]
        matrix = np.asarray(matrices[name])
        values = (matrix.T if transposed else matrix).astype(np.float16).tobytes()
        if len(values) != len(data) - _BLOB_DATA:
            n = (len(data) - _BLOB_DATA) // 2
            raise InvalidError(f"{name}: expected {n} numbers, found {matrix.size}")
        found[path] = data[:_BLOB_DATA] + values
    return found


def layer_prefix(config: ModelConfig, layer: int) -> str:
    """Return what the names of a layer's tensors begin with."""
    return f"{'transformer.h' if config.arch == 'gpt2' else 'model.layers'}.{layer}."


def layer_matrices(config: ModelConfig, params: Mapping[str, np.ndarray], layer: int) -> dict[str, np.ndarray]:
    """Return what bake() takes, of a layer of a model by the names of its tensors."""
    at = layer_prefix(config, layer)
    if config.arch == "gpt2":
        names = {"wqkv": "attn.c_attn", "wo": "attn.c_proj", "w1": "mlp.c_fc", "w2": "mlp.c_proj"}
        found = {name: params[f"{at}{tensor}.weight"] for name, tensor in names.items()}
        if config.bias:
            found |= {"bqkv": params[f"{at}attn.c_attn.bias"], "b1": params[f"{at}mlp.c_fc.bias"]}
        return found
    qkv = [params[f"{at}self_attn.{name}_proj.weight"] for name in "qkv"]
    found = {"wqkv": np.concatenate(qkv), "wo": params[f"{at}self_attn.o_proj.weight"]}
    found |= {w: params[f"{at}mlp.{name}_proj.weight"] for w, name in (("w1", "gate"), ("w3", "up"), ("w2", "down"))}
    if config.qk_norm:
        found |= {f"{name}_norm": params[f"{at}self_attn.{name}_norm.weight"] for name in "qk"}
    return found


def _program(index: int, config: Any, batch_size: int, seq_len: int, info: Any) -> AneProgram:
    shape = index, config, batch_size, seq_len
    mil = ffi.new("char[]", info.mil_bytes)
    check(lib.anellm_ane_describe_text(*shape, mil, info.mil_bytes))
    files = {}
    for i in range(info.n_files):
        data = ffi.new("char[]", info.file_bytes[i])
        check(lib.anellm_ane_describe_file(*shape, i, data, info.file_bytes[i]))
        files[text(info.file_paths[i])] = bytes(ffi.buffer(data))
    return AneProgram(
        text(info.name),
        bool(info.backward),
        {0: "ane", 1: "cpu"}.get(info.softmax_cpu, "any"),
        int(info.evaluations),
        float(info.flops),
        _surface(info.input),
        _surface(info.output),
        bytes(ffi.buffer(mil)).decode("ascii"),
        files,
        _mode_name(info.mode),
    )


def ane_programs(config: ModelConfig, batch_size: int, seq_len: int, *, mode: str = "dynamic") -> list[AneProgram]:
    """Return all programs of a model's shape, of either kind of softmax.

    Args:
        config: the model.
        batch_size: sequences of a micro-step.
        seq_len: tokens of a sequence; programs see it rounded up to a multiple of 32.
        mode: ``dynamic``: weights are inputs; ``static``: they are constants, zeros here (see bake()).

    Raises:
        InvalidError: on a size that is not positive.
        UnsupportedError: when a dimension is beyond what any chip takes; names it and the limit.
    """
    if mode not in MODES:
        raise InvalidError(f"mode: expected one of {', '.join(MODES)}, found {mode!r}")
    c, info, its_mode = c_config(config), ffi.new("anellm_ane_program_info *"), ffi.new("int32_t *")
    found: list[AneProgram] = []
    index = -1
    while (status := lib.anellm_ane_program_mode(index := index + 1, its_mode)) != lib.ANELLM_RANGE:
        check(status)
        if _mode_name(its_mode[0]) in ("any", mode):
            check(lib.anellm_ane_describe(index, c, batch_size, seq_len, info))
            found.append(_program(index, c, batch_size, seq_len, info))
    return found


# ---- the verb --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class MilConfig:
    """The options of ``mil``."""

    what: str = option("dump", "what to do", choices=_WHATS, positional=True, group="what")
    preset: str | None = option(None, "shape of the model", choices=tuple(preset_names()), group="model")
    model: str | None = option(
        None, "run, checkpoint or Hugging Face directory, llama2.c .bin or GGUF file, for its shape", group="model"
    )
    batch_size: int = option(1, "sequences of a micro-step", low=1, high=2**16, group="model")
    seq_len: int | None = option(
        None, "tokens of a sequence [256, or what the model has]", low=1, high=2**16, group="model"
    )
    training: bool = option(True, "programs of the backward pass too", group="model")
    ane_softmax: str = option("ane", "where the softmax of attention is computed", choices=_SOFTMAX, group="model")
    ane_mode: str = option("dynamic", "weights as inputs, or as constants of each layer", choices=MODES, group="model")
    layer: int = option(0, "whose weights static programs of --model have", low=0, high=2**16, group="model")
    out: str | None = option(None, "folder to write", group="output")
    overwrite: bool = option(False, "write into a folder that is not empty", group="output", flag_only=True)
    json: str | None = option(None, "write the result to this file as JSON", group="output", flag_only=True)


_DEFAULT_SEQ_LEN = 256


def _shape(config: MilConfig) -> tuple[str, ModelConfig, dict[str, np.ndarray] | None]:
    """Return the model's name and shape, and the matrices that static programs have; None: zeros."""
    if (config.preset is None) == (config.model is None):
        raise ConfigError("--preset, --model: expected one of the two")
    if config.ane_mode == "static" and config.ane_softmax == "cpu":
        raise ConfigError("--ane-softmax: expected ane with --ane-mode static, found cpu")
    if config.preset is not None:
        return config.preset, ModelConfig.from_preset(config.preset), None
    source = weights.load_pretrained(str(config.model))
    if config.ane_mode != "static":
        return str(config.model), source.config, None
    if config.layer >= source.config.n_layers:
        raise ConfigError(f"--layer: expected 0 to {source.config.n_layers - 1}, found {config.layer}")
    start = layer_prefix(source.config, config.layer)
    params = {name: array for name, array in source.tensors if name.startswith(start)}
    return str(config.model), source.config, layer_matrices(source.config, params, config.layer)


def _manifest_surface(surface: AneSurface) -> dict[str, Any]:
    fields = {f.name: {k: v for k, v in vars(f).items() if k != "name"} for f in surface.fields}
    return {"shape": list(surface.shape), "dtype": "fp16", "surface_bytes": surface.bytes, "fields": fields}


def _manifest(name: str, shape: ModelConfig, config: MilConfig, seq_len: int, programs: list[AneProgram]) -> Any:
    return {
        "model": name,
        "config": shape.to_dict(),
        "batch_size": config.batch_size,
        "seq_len": seq_len,
        "padded_seq_len": -(-seq_len // 32) * 32,
        "softmax": config.ane_softmax,
        "mode": config.ane_mode,
        "programs": [
            {
                "name": p.name,
                "mil": f"{p.name}.mil",
                "pass": "backward" if p.backward else "forward",
                "evaluations_per_layer": p.evaluations,
                "flops": p.flops,
                "input": _manifest_surface(p.input),
                "output": _manifest_surface(p.output),
                "weights": {path: len(data) for path, data in p.files.items()},
                "matrices": list(p.weights),
            }
            for p in programs
        ],
    }


def _write(out: Path, programs: list[AneProgram], manifest: Any) -> int:
    """Write programs, their weight files (several may share one) and the manifest; return the number of bytes."""
    files: dict[Path, bytes] = {}
    for program in programs:
        files[out / f"{program.name}.mil"] = program.mil.encode()
        for path, data in program.files.items():
            target = out / path.removeprefix("@model_path/")
            if files.setdefault(target, data) != data:
                raise AssertionError(f"{target}: two programs with different content")
    safeio.make_directory(out / "weights")
    for target, data in files.items():
        safeio.write_bytes(target, data)
    safeio.write_bytes(out / MANIFEST, safeio.json_bytes(manifest))
    return sum(map(len, files.values()))


def run(config: MilConfig) -> Result:
    """Write the programs, and print a line about each."""
    name, shape, matrices = _shape(config)
    if config.out is None or not config.out:
        raise ConfigError("--out: needed, and not given")
    out = Path(config.out)
    if out.exists() and not out.is_dir():
        raise ConfigError(f"--out {out}: expected a directory or nothing, found a file")
    if out.is_dir() and any(out.iterdir()) and not config.overwrite:
        raise ConfigError(f"--out {out}: not empty: --overwrite writes into it all the same")
    seq_len = config.seq_len if config.seq_len is not None else min(_DEFAULT_SEQ_LEN, shape.max_seq_len)
    found = ane_programs(shape, config.batch_size, seq_len, mode=config.ane_mode)
    used = [p for p in found if p.used(training=config.training, softmax=config.ane_softmax, mode=config.ane_mode)]
    if matrices is not None:
        used = [replace(p, files=bake(p.files, matrices)) for p in used]
    manifest = _manifest(name, shape, config, seq_len, used)
    n_bytes = _write(out, used, manifest)
    for p in used:
        sizes = f"{p.input.channels} x {p.input.width} -> {p.output.channels} x {p.output.width}"
        constants = ", ".join(Path(path).stem for path in p.files) or "-"
        print(f"{p.name:16} {sizes:30} {human_count(int(p.flops)):>8} FLOPs  {constants}")
    print(f"{out}: {len(used)} programs, {human_bytes(n_bytes)}; {MANIFEST} says what lies where")
    return Result(manifest)


VERB = Verb("mil", "write the programs that a model runs on a Neural Engine", MilConfig, run)
main = VERB.main

if __name__ == "__main__":
    raise SystemExit(main())
