"""The verb ``sim``: run and check MIL programs on a simulated Neural Engine, on any machine.

anellm sim run MODEL.mil --weights DIR --input x=x.npy --output OUT
anellm sim lint MODEL.mil --weights DIR --chip m3
anellm sim cost MODEL.mil --chip m5
anellm sim cost --preset stories110m --chip m4
anellm sim ops
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from anellm._ffi import ffi, lib, text
from anellm.ane_device import WEIGHTS_PATH, DeviceFailure, Finding, Port, Program, Surface
from anellm.cli import Result, Verb
from anellm.config import preset_names
from anellm.device import MODES, set_threads
from anellm.errors import AnellmError, CompileError, ConfigError, DataError, InvalidError
from anellm.options import CommonOptions, option
from anellm.saferead import read_regular
from anellm.sim_chips import Chip, chip_names, load_chip
from anellm.sim_cost_verb import cost_of_model
from anellm.sim_device import MACS, NUMERICS, ROWS, Simulator

__all__ = [
    "Chip",
    "DeviceFailure",
    "Finding",
    "Port",
    "Program",
    "SimConfig",
    "Simulator",
    "Surface",
    "chip_names",
    "load_chip",
    "op_table",
    "read_weights",
]  # fmt: skip

_MAX_MIL_BYTES = 1 << 28
_MAX_FILE_BYTES = 1 << 34
_WHATS = ("run", "lint", "cost", "ops")


@dataclass(frozen=True, kw_only=True)
class SimConfig(CommonOptions):
    """The options of ``sim``."""

    what: str = option("ops", "what to do", choices=_WHATS, positional=True, group="what")
    model: str = option("", "file of MIL text", positional=True, group="what")
    preset: str | None = option(
        None, "for cost: a training step of a model of this shape", choices=tuple(preset_names()), group="what"
    )
    checkpoint: str | None = option(
        None,
        "for cost: the same for a run, checkpoint or Hugging Face directory, llama2.c .bin or GGUF file",
        group="what",
    )
    batch_size: int | None = option(None, "for a step: sequences [1]", low=1, high=2**16, group="what")
    seq_len: int | None = option(
        None, "for a step: tokens of a sequence [256, or what the model has]", low=1, high=2**16, group="what"
    )
    ane_softmax: str | None = option(
        None, "for a step: where the softmax of attention is computed [ane]", choices=("ane", "cpu"), group="what"
    )
    ane_mode: str | None = option(
        None, "for a step: weights as inputs, or as constants of each layer [dynamic]", choices=MODES, group="what"
    )
    weights: str = option("", "folder of the files that @model_path/weights/ names", group="what")
    input: str = option("", "NAME=x.npy for each input; the flag may be repeated", group="what")
    function: int = option(0, "which function of the program, from 0", low=0, high=2**20, group="what")
    output: str = option("", "folder for one .npy file per output [none are written]", group="output")
    chip: str = option("m4", f"{', '.join(chip_names())}, or a .json file", group="simulator")
    numerics: str = option(
        "exact", "fast may use fp32 where it provably does not matter", choices=tuple(NUMERICS), group="simulator"
    )
    mac: str = option("q15.16", "how products are summed", choices=tuple(MACS), group="simulator")
    rows: str = option("error", "rows that are no multiple of 16 elements", choices=tuple(ROWS), group="simulator")
    strict: bool = option(False, "refuse also what only some sources report as refused", group="simulator")
    lenient_blobs: bool = option(False, "read damaged weight files on every chip", group="simulator")


def read_weights(folder: Path) -> dict[str, bytes]:
    """Return the weight files of a folder, by the path that MIL text gives them.

    Raises:
        DataError: when it is no folder, or holds what is no regular file.
    """
    if not folder.is_dir():
        raise DataError(f"{folder}: expected a folder of weight files")
    files = sorted(path for path in folder.rglob("*") if not path.is_dir())
    return {
        WEIGHTS_PATH + path.relative_to(folder).as_posix(): read_regular(path, DataError, _MAX_FILE_BYTES)
        for path in files
    }


def op_table() -> list[dict[str, Any]]:
    """Return the ops: name, whether they are computed, parameters, evidence."""

    def entries() -> Iterator[dict[str, Any]]:
        info = ffi.new("anellm_sim_op_info *")
        index = 0
        while lib.anellm_sim_get_op(index, info) == lib.ANELLM_OK:
            yield {
                "op": text(info.name),
                "computed": bool(info.computed),
                "parameters": text(info.parameters),
                "evidence": text(info.evidence),
            }
            index += 1

    return list(entries())


def _read_arrays(words: str) -> dict[str, np.ndarray]:
    """Return the arrays of ``a=a.npy,b=b.npy``."""
    arrays: dict[str, np.ndarray] = {}
    for word in filter(None, words.split(",")):
        name, equals, path = word.partition("=")
        if not equals or not name or not path:
            raise ConfigError(f"--input: expected NAME=x.npy, found {word!r}")
        if name in arrays:
            raise ConfigError(f"--input: {name} is given twice")
        try:
            arrays[name] = np.load(path, allow_pickle=False)
        except (ValueError, EOFError) as error:
            raise DataError(f"{path}: expected a .npy file without pickled objects: {error}") from None
        if not isinstance(arrays[name], np.ndarray):
            raise DataError(f"{path}: expected a .npy file with one array")
    return arrays


def _open(config: SimConfig) -> tuple[Simulator, bytes, dict[str, bytes]]:
    if not config.model:
        raise ConfigError(f"sim {config.what}: expected a file of MIL text")
    if config.output and config.what != "run":
        raise ConfigError(f"--output: only for run, found {config.what}")
    simulator = Simulator(
        config.chip,
        numerics=config.numerics,
        mac=config.mac,
        rows=config.rows,
        strict=config.strict,
        lenient_blobs=config.lenient_blobs,
    )
    mil = read_regular(Path(config.model), DataError, _MAX_MIL_BYTES, follow=True)
    return simulator, mil, read_weights(Path(config.weights)) if config.weights else {}


def _shown(findings: list[Finding], model: str) -> list[dict[str, Any]]:
    for finding in findings:
        print(f"{model}:{finding}")
    return [{"rule": f.rule, "line": f.line, "column": f.column, "times": f.times, "text": f.text} for f in findings]


def _run(config: SimConfig) -> Result:
    simulator, mil, weights = _open(config)
    arrays = _read_arrays(config.input)
    try:
        program = simulator.compile(mil, weights)
    except CompileError as error:  # which begins with line and column
        raise CompileError(f"{config.model}:{error}") from None
    outputs = program.run(arrays, config.function)
    values: dict[str, Any] = {}
    for name, array in outputs.items():
        wide = array.astype(np.float64)
        finite = np.isfinite(wide)
        values[name] = {
            "shape": list(array.shape),
            "absmax": float(np.abs(wide[finite]).max(initial=0.0)),
            "mean": float(wide[finite].mean()) if finite.any() else None,
            "infinite": int((~finite).sum()),
        }
        print(f"{name}: {array.dtype} {array.shape}, absmax {values[name]['absmax']:.6g}, infinite {(~finite).sum()}")
        if config.output:
            folder = Path(config.output)
            folder.mkdir(parents=True, exist_ok=True)
            np.save(folder / f"{name}.npy", array, allow_pickle=False)
    findings = _shown(program.findings(), config.model)
    return Result({"outputs": values, "findings": findings, "counters": simulator.counters()})


def _lint(config: SimConfig) -> Result:
    simulator, mil, weights = _open(config)
    try:
        program = simulator.compile(mil, weights)
    except AnellmError as error:
        failure = simulator.failure()
        if not failure.detail:
            raise
        print(f"{config.model}:{failure.detail}", file=sys.stderr)
        return Result({"error": failure.detail, "text": failure.text, "code": failure.code}, error.exit_code)
    findings = _shown(program.findings(), config.model)
    for i, port in enumerate(program.inputs(config.function)):
        print(f"input {i}: {port.name} {port.dtype} {port.shape}")
    for i, port in enumerate(program.outputs(config.function)):
        print(f"output {i}: {port.name} {port.dtype} {port.shape}")
    return Result({"findings": findings})


def _cost_of_model(config: SimConfig) -> Result:
    if config.model:
        raise ConfigError("sim cost: expected a file of MIL text or the shape of a model, found both")
    unset = SimConfig()
    for name in ("weights", "input", "output", "function", "numerics", "mac", "rows", "strict", "lenient_blobs"):
        if getattr(config, name) != getattr(unset, name):
            raise ConfigError(f"--{name.replace('_', '-')}: only with a file of MIL text")
    return cost_of_model(
        config.chip,
        config.preset or "",
        config.checkpoint or "",
        config.batch_size or 1,
        config.seq_len,
        config.ane_softmax or "ane",
        config.ane_mode or "dynamic",
    )


def _cost(config: SimConfig) -> Result:
    if config.preset or config.checkpoint:
        return _cost_of_model(config)
    if not config.model:
        raise ConfigError("sim cost: expected a file of MIL text, --preset or --checkpoint")
    simulator, mil, weights = _open(config)
    program = simulator.compile(mil, weights)
    simulator.idle(simulator.chip.constants["idle_after_s"] + 1.0)
    zeros = {port.name: np.zeros(port.shape, port.dtype) for port in program.inputs(config.function)}
    times = [simulator.counters()["modelled_ms"]]
    for _ in range(2):
        program.run(zeros, config.function)
        times.append(simulator.counters()["modelled_ms"])
    first, next_ms = times[1] - times[0], times[2] - times[1]
    print(f"{config.chip}: {next_ms:.4f} ms an evaluation; {first:.1f} ms the first after a pause")
    return Result({"chip": config.chip, "ms": next_ms, "first_ms": first})


def _ops(config: SimConfig) -> Result:
    if config.model or config.input or config.output:
        raise ConfigError("sim ops takes no file")
    table = op_table()
    for entry in table:
        state = "computed" if entry["computed"] else "refused"
        words = entry["parameters"]
        print(f"{entry['op']:32} {state:9} {words}{'; ' if words else ''}{entry['evidence']}")
    return Result({"ops": table})


def run(config: SimConfig) -> Result:
    """Do what ``config.what`` says."""
    set_threads(config.threads)
    for name in ("preset", "checkpoint"):
        if getattr(config, name) and config.what != "cost":
            raise ConfigError(f"--{name}: only for cost, found {config.what}")
    for name in ("batch_size", "seq_len", "ane_softmax", "ane_mode"):
        if getattr(config, name) is not None and not (config.preset or config.checkpoint):
            raise ConfigError(f"--{name.replace('_', '-')}: only with --preset or --checkpoint")
    if config.model and "\0" in config.model:
        raise InvalidError("model: expected a path without NUL characters")
    return {"run": _run, "lint": _lint, "cost": _cost, "ops": _ops}[config.what](config)


def _join_inputs(argv: Sequence[str]) -> list[str]:
    """Return the arguments with every ``--input`` joined into one, so that it may be repeated."""
    words, inputs, expecting = [], [], False
    for word in argv:
        if expecting:
            inputs.append(word)
            expecting = False
        elif word == "--input":
            expecting = True
        elif word.startswith("--input="):
            inputs.append(word.removeprefix("--input="))
        else:
            words.append(word)
    if expecting:
        words.append("--input")
    return [*words, "--input", ",".join(inputs)] if inputs else words


class _SimVerb(Verb[SimConfig]):
    def main(self, argv: Sequence[str] | None = None) -> int:
        """Run the verb; ``--input`` may be given more than once."""
        return super().main(_join_inputs(sys.argv[1:] if argv is None else argv))


VERB = _SimVerb("sim", "run and check programs for the Neural Engine on a simulated one", SimConfig, run)
main = VERB.main

if __name__ == "__main__":
    raise SystemExit(main())
