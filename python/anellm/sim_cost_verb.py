"""``anellm sim cost``: what one MIL program, or a training step of a model, takes on a chip."""

from __future__ import annotations

import dataclasses
from typing import Any

from anellm import weights
from anellm.cli import Result
from anellm.config import ModelConfig
from anellm.errors import ConfigError
from anellm.mil import ane_programs
from anellm.sim_chips import Chip, load_chip
from anellm.sim_cost import (
    SCHEMA,
    TIME_CONSTANTS,
    Comparison,
    Evaluation,
    Fit,
    Machine,
    Recipe,
    Step,
    evaluation,
    fit,
    machine_of,
    step,
)
from anellm.sim_cost import machine as known_machine

_DEFAULT_SEQ_LEN = 256
_WITHIN = 0.2


def _shape(preset: str, checkpoint: str) -> tuple[str, ModelConfig]:
    if preset:
        return preset, ModelConfig.from_preset(preset)
    return checkpoint, weights.load_pretrained(checkpoint).config


def _programs(priced: list[tuple[Any, Evaluation]], n_layers: int) -> list[dict[str, Any]]:
    """Print the programs and return them for ``--json``."""
    print(f"{'program':16} {'per step':>8} {'ms':>8} {'dispatch':>9} {'computing':>9} {'moving':>8} {'ms/step':>8}")
    entries = []
    for program, time in priced:
        times = n_layers * program.evaluations
        print(
            f"{program.name:16} {times:8d} {time.ms:8.4f} {time.dispatch:9.4f} {time.computing:9.4f} "
            f"{time.moving:8.4f} {times * time.ms:8.2f}"
        )
        entries.append(
            {
                "name": program.name,
                "pass": "backward" if program.backward else "forward",
                "evaluations_per_step": times,
                "flops": program.flops,
                "ms": time.ms,
                "dispatch_ms": time.dispatch,
                "computing_ms": time.computing,
                "moving_ms": time.moving,
                "ms_per_step": times * time.ms,
            }
        )
    print("computing and moving overlap inside each product: ms is less than the sum of the three")
    return entries


def _step(found: Step) -> dict[str, float]:
    """Print the parts of a step and return them for ``--json``."""
    engine = found.forward + found.backward
    rows = {
        "engine, forward": found.forward,
        "engine, backward": found.backward,
        "classifier on the CPU": found.products,
        "weight gradients beyond the engine's time": found.exposed,
        "passes of the CPU over memory": found.passes,
        "compiling programs with new weights": found.compiling,
        "step": found.ms,
    }
    print()
    for name, ms in rows.items():
        print(f"{name:42} {ms:9.2f} ms {100 * ms / found.ms:5.1f} %")
    return {
        "engine_forward_ms": found.forward,
        "engine_backward_ms": found.backward,
        "engine_ms": engine,
        "classifier_ms": found.products,
        "exposed_weight_gradients_ms": found.exposed,
        "cpu_passes_ms": found.passes,
        "compiling_ms": found.compiling,
        "ms": found.ms,
        "engine_share": engine / found.ms,
    }


def _compared(title: str, entries: tuple[Comparison, ...]) -> list[dict[str, Any]]:
    print(f"\n{title:26} {'part':8} {'role':7} {'published':>11} {'modelled':>9} {'residual':>9}  source")
    found = []
    for entry in entries:
        low, high = entry.published
        published = f"{low:g}" if low == high else f"{low:g}-{high:g}"
        far = " *" if entry.role != "fitted" and abs(entry.residual) > _WITHIN else ""
        print(
            f"{entry.machine + ', ' + entry.recipe:26} {entry.part:8} {entry.role:7} {published:>11} "
            f"{entry.modelled:9.1f} {round(100 * entry.residual, 1) + 0.0:+8.1f}%  {entry.source}{far}"
        )
        found.append({**dataclasses.asdict(entry), "within_20_percent": abs(entry.residual) <= _WITHIN})
    return found


def _constants(machine: Machine, rates: Fit) -> dict[str, Any]:
    chip = machine.chip
    found = {key: {"value": chip.constants[key], "source": chip.sources[key]} for key in TIME_CONSTANTS}
    found["sgemm_tflops"] = {"value": machine.sgemm_tflops, "source": machine.sgemm_source}
    for cores, gb_s in rates.gb_s.items():
        used = "; used here" if cores == machine.cores else ""
        found[f"cpu_gb_s_{cores}"] = {"value": gb_s, "source": f"fitted to {rates.fitted_on[cores]}{used}"}
    print(f"\n{'constant of ' + chip.name:22} {'value':>10}  source")
    for key, entry in found.items():
        print(f"{key:22} {entry['value']:10.6g}  {entry['source']}")
    return found


def _machines(names: list[str]) -> dict[str, Any]:
    """Print in what the products of the tables differ from profiles."""
    found: dict[str, Any] = {}
    print(f"\n{'product':10} {'engine':8} {'passes as':9} constants of its own")
    for name in names:
        product = known_machine(name)
        own = {**product.changes, "sgemm_tflops": {"value": product.sgemm_tflops, "source": product.sgemm_source}}
        texts = (f"{key} {entry['value']:g} ({entry['source']})" for key, entry in own.items())
        print(f"{name:10} {product.chip.name:8} {product.cores:9} {'; '.join(texts)}")
        found[name] = {"chip": product.chip.name, "cores": product.cores, "constants": own}
    return found


def cost_of_model(
    chip_name: str, preset: str, checkpoint: str, batch_size: int, seq_len: int | None, softmax: str, mode: str
) -> Result:
    """Print what a training step of a model takes, beside what is published.

    Args:
        chip_name: a chip, or a ``.json`` file.
        preset: a preset's name; empty if checkpoint is given.
        checkpoint: a model file, for its shape.
        batch_size: sequences of a micro-step.
        seq_len: tokens of a sequence; None: 256, or what the model has.
        softmax: where attention's softmax is: ``ane`` or ``cpu``.
        mode: ``dynamic``: weights are inputs; ``static``: they are constants of programs of each layer.

    Raises:
        ConfigError: on an unknown preset or chip.
        DataError: on a damaged file.
        UnsupportedError: when a dimension is beyond what any chip takes.
        CompileError: when a program does not compile for this chip.
    """
    if preset and checkpoint:
        raise ConfigError("--preset, --checkpoint: expected one of the two")
    if mode == "static" and softmax == "cpu":
        raise ConfigError("--ane-softmax: expected ane with --ane-mode static, found cpu")
    chip: Chip = load_chip(chip_name)
    name, config = _shape(preset, checkpoint)
    length = seq_len if seq_len is not None else min(_DEFAULT_SEQ_LEN, config.max_seq_len)
    found = ane_programs(config, batch_size, length, mode=mode)
    used = [p for p in found if p.used(training=True, softmax=softmax, mode=mode)]
    is_static = mode == "static"
    machine, rates = machine_of(chip), fit()
    recipe = Recipe(vocab_size=config.vocab_size, constant_weights=is_static, recompiled=is_static)
    kind = f"{mode} programs, softmax on the {softmax.upper()}"
    print(f"{name} on {chip.name}, batch size {batch_size}, {length} tokens, {kind}\n")
    programs = _programs([(program, evaluation(program, chip)) for program in used], config.n_layers)
    parts = _step(step(config, used, batch_size * length, machine, recipe, rates.gb_s[machine.cores]))
    print(
        f"a micro-step; {recipe.accumulation} for one update of the weights, whose time is divided among them; "
        "weight gradients run beside the engine"
    )
    published = _compared("published steps", rates.steps)
    engine = _compared("published parts", rates.engine)
    print(
        "* more than 20 % off. All of stories110m, 1 x 256 tokens. There are as many fitted constants as fitted steps,"
    )
    print("which are therefore met exactly: only what is held says something.")
    constants = _constants(machine, rates)
    machines = _machines(list(dict.fromkeys(entry.machine for entry in rates.steps + rates.engine)))
    return Result(
        {
            "schema": SCHEMA,
            "model": name,
            "config": config.to_dict(),
            "chip": chip.name,
            "batch_size": batch_size,
            "seq_len": length,
            "softmax": softmax,
            "mode": mode,
            "recipe": dataclasses.asdict(recipe),
            "programs": programs,
            "step": parts,
            "published": published,
            "published_engine": engine,
            "constants": constants,
            "machines": machines,
        }
    )
