"""What a training step takes on a chip: evaluations of its programs, and the CPU's part (docs/simulator.md, Cost).

The time of a program is that of the simulator's clock, from the constants of the chip's profile. The CPU's part has one
unknown per kind of core, how fast it passes over memory; it is fitted to one published step each. The other published
steps are held against the model, and residuals are shown.
"""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from typing import Any, Final

import numpy as np

from anellm.config import ModelConfig
from anellm.device import MODES
from anellm.errors import DataError
from anellm.mil import AneProgram, AneSurface, ane_programs
from anellm.sim_chips import Chip, load_chip
from anellm.sim_device import Simulator

SCHEMA: Final = 1
TIME_CONSTANTS: Final = (
    "dispatch_us", "weight_gb_s", "activation_gb_s", "elementwise_gb_s", "io_gb_s", "conv_tflops", "matmul_tflops",
    "operand_bytes", "large_operand_factor", "idle_after_s", "idle_us",
)  # fmt: skip
_COMPUTING: Final = {"conv_tflops": 0.0, "matmul_tflops": 0.0}  # 0: takes no time
_MOVING: Final = {"weight_gb_s": 0.0, "activation_gb_s": 0.0, "elementwise_gb_s": 0.0, "io_gb_s": 0.0}

# Bytes that the CPU moves, fp32 unless said, each tensor read and written once.
_SURFACE_BYTES: Final = 6  # a value into or out of a surface: 4 in fp32, 2 in fp16
_ROW_BYTES: Final = 88  # (N, dim) in a layer: 2 norms, done again backward (8 each), 2 sums (12), 2 norms backward (16)
_HIDDEN_BYTES: Final = 12  # (N, gate_up_dim) in a layer: the activation's backward, half as many dact and act
_LOGIT_BYTES: Final = 12  # (N, vocabulary): softmax reads twice, its gradient is written
_SCORE_BYTES: Final = 10  # (N, heads, Tp) in fp16 with the softmax on the CPU: 2 forward, 3 backward
_UPDATE_BYTES: Final = 28  # a parameter in AdamW: 4 read, 3 written


@dataclass(frozen=True)
class Evaluation:
    """Time of one evaluation in ms; computing and moving overlap inside each product.

    Attributes:
        dispatch: of the call.
        computing: what products would take if moving took no time.
        moving: what tensors would take if computing took no time.
        ms: all together.
    """

    dispatch: float
    computing: float
    moving: float
    ms: float


@dataclass(frozen=True)
class Recipe:
    """How a trainer works.

    Attributes:
        vocab_size: tokens that the classifier tells apart.
        accumulation: micro-steps per update of the weights.
        constant_weights: weights are part of the programs, not inputs: those of mode ``static``.
        recompiled: programs with weights are compiled again for each update, and that is counted.
        pipelined: the engine's forward of the next micro-step runs beside the CPU's part of this one.
    """

    vocab_size: int
    accumulation: int = 10
    constant_weights: bool = False
    recompiled: bool = False
    pipelined: bool = False

    @property
    def mode(self) -> str:
        """Return the mode of its programs."""
        return "static" if self.constant_weights else "dynamic"


@dataclass(frozen=True)
class Machine:
    """A product: an engine and a CPU.

    Attributes:
        name: what the tables call it.
        chip: its engine.
        cores: kind of core, for the rate of passes over memory.
        sgemm_tflops: fp32 matrix products on the CPU.
        sgemm_source: where that comes from.
        changes: constants in which the engine differs from the chip's profile: value and source.
    """

    name: str
    chip: Chip
    cores: str
    sgemm_tflops: float
    sgemm_source: str
    changes: Mapping[str, Mapping[str, Any]]


@dataclass(frozen=True)
class Step:
    """Time of a micro-step in ms.

    Attributes:
        forward: evaluations of the forward pass.
        backward: evaluations of the backward pass.
        products: the classifier's products on the CPU.
        exposed: weight gradients on the CPU, as far as they last longer than the evaluations that they run beside.
        passes: memory that the CPU moves: surfaces, norms, sums, softmax of the loss, optimizer.
        compiling: programs with new weights, divided among the micro-steps of an update.
        ms: all together.
    """

    forward: float
    backward: float
    products: float
    exposed: float
    passes: float
    compiling: float
    ms: float


class _Priced:
    """A chip as a key: equal where its constants are."""

    def __init__(self, chip: Chip) -> None:
        self.chip = chip
        self._key = (chip.name, tuple(sorted(chip.constants.items())))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Priced) and self._key == other._key

    def __hash__(self) -> int:
        return hash(self._key)


def changed(chip: Chip, values: Mapping[str, float]) -> Chip:
    """Return a chip with other constants."""
    return dataclasses.replace(chip, constants={**chip.constants, **values})


@functools.lru_cache(maxsize=1024)
def _modelled_ms(mil: str, files: tuple[tuple[str, bytes], ...], chip: _Priced) -> float:
    simulator = Simulator(chip.chip, numerics="fast")
    compiled = simulator.compile(mil, dict(files))
    before = simulator.counters()["modelled_ms"]
    compiled.run({port.name: np.zeros(port.shape, port.dtype) for port in compiled.inputs()})
    after = simulator.counters()["modelled_ms"]
    compiled.close()
    simulator.close()
    return after - before


def _clock_ms(program: AneProgram, chip: Chip) -> float:
    """Return the modelled time of an evaluation in the middle of a run. Zeros are as slow as other values.

    How sums are rounded takes no time in the model, but does where it is computed exactly: left out.
    """
    steady = changed(chip, {"idle_us": 0.0, "slow_after_evaluations": 0.0, "mac_tile": 0})
    return _modelled_ms(program.mil, tuple(sorted(program.files.items())), _Priced(steady))


def evaluation(program: AneProgram, chip: Chip) -> Evaluation:
    """Return what one evaluation takes on a chip."""
    dispatch = chip.constants["dispatch_us"] / 1e3
    parts = (_clock_ms(program, changed(chip, other)) - dispatch for other in (_MOVING, _COMPUTING))
    computing, moving = (max(part, 0.0) for part in parts)
    return Evaluation(dispatch, computing, moving, _clock_ms(program, chip))


def engine_ms(programs: Sequence[AneProgram], chip: Chip, n_layers: int) -> tuple[float, float]:
    """Return the engine's time of a micro-step in ms, forward and backward."""
    times = [0.0, 0.0]
    for program in programs:
        times[program.backward] += n_layers * program.evaluations * _clock_ms(program, chip)
    return times[0], times[1]


def compiling_ms(programs: Sequence[AneProgram], chip: Chip, n_layers: int, recipe: Recipe) -> float:
    """Return what a micro-step's part of compiling, loading and unloading takes: of programs with weights in them."""
    if not recipe.recompiled:
        return 0.0
    each = sum(chip.constants[key] for key in ("compile_ms", "load_ms", "unload_ms"))
    return n_layers * sum(bool(program.weights) for program in programs) * each / recipe.accumulation


def _field_values(surfaces: Sequence[AneSurface], *, weights: bool) -> int:
    fields = (field for surface in surfaces for field in surface.fields)
    return sum(f.channels * f.columns for f in fields if f.kind.startswith("weights") == weights)


def cpu_bytes(config: ModelConfig, programs: Sequence[AneProgram], rows: int, recipe: Recipe) -> float:
    """Return the memory that the CPU moves in a micro-step, in bytes; rows is B T."""
    surfaces = [surface for program in programs for surface in (program.input, program.output)]
    per_layer = _SURFACE_BYTES * float(_field_values(surfaces, weights=False))
    per_layer += rows * (_ROW_BYTES * config.dim + _HIDDEN_BYTES * config.gate_up_dim)
    if any(program.softmax == "cpu" for program in programs):
        scores = max((f.channels * f.columns for s in surfaces for f in s.fields if f.kind == "scores"), default=0)
        per_layer += _SCORE_BYTES * scores
    per_layer += _SURFACE_BYTES * _field_values(surfaces, weights=True) / recipe.accumulation
    update = _UPDATE_BYTES * config.n_params() / recipe.accumulation
    return config.n_layers * per_layer + _LOGIT_BYTES * rows * recipe.vocab_size + update


def block_params(config: ModelConfig) -> int:
    """Return the number of weights in the matrices of all layers."""
    attention = config.dim * (2 * config.q_dim + 2 * config.kv_dim)
    return config.n_layers * (attention + config.dim * (config.gate_up_dim + config.hidden_dim))


def step(
    config: ModelConfig, programs: Sequence[AneProgram], rows: int, machine: Machine, recipe: Recipe, gb_s: float
) -> Step:
    """Return what a micro-step takes.

    Args:
        config: the model.
        programs: those that it evaluates.
        rows: tokens of a micro-step, B T.
        machine: what it runs on.
        recipe: how.
        gb_s: how fast the CPU passes over memory, in GB/s.
    """
    forward, backward = engine_ms(programs, machine.chip, config.n_layers)
    compiling = compiling_ms(programs, machine.chip, config.n_layers, recipe)
    flops_per_ms = machine.sgemm_tflops * 1e9
    products = 6.0 * rows * config.dim * recipe.vocab_size / flops_per_ms  # forward, its input's and weight's gradient
    exposed = max(0.0, 2.0 * rows * block_params(config) / flops_per_ms - forward - backward)
    passes = cpu_bytes(config, programs, rows, recipe) / (gb_s * 1e6)
    cpu = products + exposed + passes
    ms = compiling + backward + (max(forward, cpu) if recipe.pipelined else forward + cpu)
    return Step(forward, backward, products, exposed, passes, compiling, ms)


# ---- published steps -------------------------------------------------------------------------------------------------


@functools.cache
def _data() -> dict[str, Any]:
    text = (resources.files("anellm") / "data" / "steps.json").read_text(encoding="utf-8")
    values: dict[str, Any] = json.loads(text)
    return values


def machine(name: str) -> Machine:
    """Return a product of data/steps.json."""
    entry = _data()["machines"][name]
    changes = entry["changes"]
    chip = changed(load_chip(entry["chip"]), {key: change["value"] for key, change in changes.items()})
    sgemm = entry["sgemm_tflops"]
    return Machine(name, chip, entry["cores"], sgemm["value"], sgemm["source"], changes)


def machine_of(chip: Chip) -> Machine:
    """Return a chip with the CPU that belongs to it; with M4's, if it is one of your own."""
    known = _data()["machines"]
    cpu = machine(chip.name if chip.name in known else "m4")
    return dataclasses.replace(cpu, name=chip.name, chip=chip, changes={})


def recipe_of(name: str) -> Recipe:
    """Return a recipe of data/steps.json."""
    return Recipe(**{key: value for key, value in _data()["recipes"][name].items() if key != "source"})


@dataclass(frozen=True)
class Comparison:
    """A published time beside the modelled one.

    Attributes:
        machine: the product.
        recipe: name of the recipe.
        part: ``step``; ``engine`` or ``forward``: its evaluations, or those of the forward pass.
        role: ``fitted``, ``held``, or ``check`` for the engine's part.
        published: from, to, in ms.
        modelled: in ms.
        residual: modelled over the middle of what is published, less 1.
        source: who published it.
    """

    machine: str
    recipe: str
    part: str
    role: str
    published: tuple[float, float]
    modelled: float
    residual: float
    source: str


@dataclass(frozen=True)
class Fit:
    """The fitted rates, and what the model says about all that is published.

    There are as many rates as fitted steps, so those are met exactly: only the others say something.

    Attributes:
        gb_s: kind of core -> how fast it passes over memory, in GB/s.
        fitted_on: kind of core -> what was fitted.
        steps: whole micro-steps.
        engine: the engine's part alone, which has no fitted constant.
    """

    gb_s: dict[str, float]
    fitted_on: dict[str, str]
    steps: tuple[Comparison, ...]
    engine: tuple[Comparison, ...]


def _compare(entry: Mapping[str, Any], modelled: float) -> Comparison:
    low, high = entry["ms"]
    residual = modelled / (0.5 * (low + high)) - 1.0
    part, role = entry.get("part", "step"), entry.get("role", "check")
    return Comparison(entry["machine"], entry["recipe"], part, role, (low, high), modelled, residual, entry["source"])


@functools.cache
def fit() -> Fit:
    """Return the rates fitted to the published steps that are marked so, and all comparisons.

    Raises:
        DataError: when a published step is shorter than its part without passes over memory.
    """
    shape = _data()["shape"]
    config, rows = ModelConfig.from_preset(shape["preset"]), shape["batch_size"] * shape["seq_len"]
    programs = {
        mode: [
            program
            for program in ane_programs(config, shape["batch_size"], shape["seq_len"], mode=mode)
            if program.used(training=True, softmax="ane", mode=mode)
        ]
        for mode in MODES
    }
    gb_s: dict[str, float] = {}
    fitted_on: dict[str, str] = {}

    @functools.cache
    def unit(machine_name: str, recipe_name: str) -> Step:
        """At 1 GB/s: of all parts, only the passes depend on it, and are inverse to it."""
        recipe = recipe_of(recipe_name)
        return step(config, programs[recipe.mode], rows, machine(machine_name), recipe, 1.0)

    for entry in _data()["steps"]:
        if entry["role"] != "fitted":
            continue
        at, cores = unit(entry["machine"], entry["recipe"]), machine(entry["machine"]).cores
        left = 0.5 * sum(entry["ms"]) - (at.ms - at.passes)
        if left <= 0.0:
            raise DataError(f"steps.json: {entry['machine']}: {-left:.1f} ms too short for its engine and products")
        gb_s[cores] = at.passes / left
        fitted_on[cores] = f"{entry['machine']} {entry['recipe']}, {entry['ms'][0]:g} ms"

    def modelled(entry: Mapping[str, Any]) -> float:
        at, recipe = unit(entry["machine"], entry["recipe"]), recipe_of(entry["recipe"])
        cpu = at.products + at.exposed + at.passes / gb_s[machine(entry["machine"]).cores]
        return at.backward + (max(at.forward, cpu) if recipe.pipelined else at.forward + cpu)

    def engine(entry: Mapping[str, Any]) -> float:
        at = unit(entry["machine"], entry["recipe"])
        return at.forward if entry["part"] == "forward" else at.forward + at.backward

    steps = tuple(_compare(entry, modelled(entry)) for entry in _data()["steps"])
    return Fit(gb_s, fitted_on, steps, tuple(_compare(entry, engine(entry)) for entry in _data()["engine"]))
