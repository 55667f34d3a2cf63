"""The verb ``plan``: what training with weights in the programs of a Neural Engine would take. No device is touched."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Final

from anellm import weights
from anellm.activation_checkpoint import SavedLayers, check_policy, saved_layers
from anellm.cli import Result, Verb
from anellm.config import ModelConfig, preset_names
from anellm.errors import ConfigError
from anellm.machine import human_bytes, human_count
from anellm.options import option
from anellm.pipeline import COMPILE_LIMIT, HEADROOM, CompileBudget, PipelinePlan, plan
from anellm.pipeline_forecast import (
    RESTART_MS,
    Workload,
    flops_forecast,
    memory_forecast,
    restarts_in_a_step,
    time_forecast,
)
from anellm.pipeline_schedule import Action, Run, Schedule, ScheduleState, runs
from anellm.sim_chips import Chip, chip_names, load_chip

SCHEMA: Final = 1
_DEFAULT_SEQ_LEN: Final = 256
_MOST_ACTIONS: Final = 1_000_000
PUBLISHED: Final = "published for Stories110M on M4: 7.6 s to compile its 72, 4.3 times what m4's constants say"
_CONSTANTS: Final = ("compile_ms", "cached_compile_ms", "load_ms", "dispatch_us", "conv_tflops", "weight_gb_s")


@dataclass(frozen=True, kw_only=True)
class PlanConfig:
    """The options of ``plan``."""

    preset: str | None = option(None, "shape of the model", choices=tuple(preset_names()), group="model")
    model: str | None = option(
        None, "run, checkpoint or Hugging Face directory, llama2.c .bin or GGUF file, for its shape", group="model"
    )
    batch_size: int = option(1, "sequences of a micro-batch", low=1, high=2**16, group="step")
    seq_len: int | None = option(
        None, "tokens of a sequence [256, or what the model has]", low=1, high=2**16, group="step"
    )
    gradient_accumulation_steps: int = option(10, "micro-batches of a step", low=1, high=2**16, group="step")
    activation_checkpoint: str = option(
        "all", "what forward keeps for backward: all, boundary, sqrt, every:N or none", group="step"
    )
    steps: int = option(2, "steps of the trace", low=1, high=2**16, group="step")
    budget: int = option(COMPILE_LIMIT, "programs that a process can compile", low=1, high=2**31 - 1, group="machine")
    headroom: float = option(HEADROOM, "part of the budget that is left alone, between 0 and 1", group="machine")
    chip: str = option("m4", f"{', '.join(chip_names())}, or a .json file", group="machine")
    json: str | None = option(None, "write the result to this file as JSON", group="output", flag_only=True)


def _workload(config: PlanConfig) -> tuple[str, Workload]:
    """Return the model's name and the step."""
    if (config.preset is None) == (config.model is None):
        raise ConfigError("--preset, --model: expected one of the two")
    if config.preset is not None:
        name, shape = config.preset, ModelConfig.from_preset(config.preset)
    else:
        name = str(config.model)
        shape = weights.load_pretrained(name).config
    seq_len = config.seq_len if config.seq_len is not None else min(_DEFAULT_SEQ_LEN, shape.max_seq_len)
    if seq_len > shape.max_seq_len:
        raise ConfigError(f"--seq-len: expected at most the model's max_seq_len {shape.max_seq_len}, found {seq_len}")
    check_policy(config.activation_checkpoint, "--activation-checkpoint")
    found = plan(shape, CompileBudget(config.budget, config.headroom))
    saved = saved_layers(shape.n_layers, config.activation_checkpoint, found.boundaries)
    micro = config.gradient_accumulation_steps
    if config.steps * 4 * len(found.groups) * (micro + 1) > _MOST_ACTIONS:
        raise ConfigError(f"--steps, --gradient-accumulation-steps: expected at most {_MOST_ACTIONS} actions")
    return name, Workload(shape, found, saved, config.batch_size, seq_len, micro)


# ---- what is printed -------------------------------------------------------------------------------------------------


def _numbers(values: Iterable[int]) -> str:
    """Return ascending numbers as text, neighbours taken together: ``0, 5, 30-31``."""
    ranges: list[list[int]] = []
    for value in values:
        if ranges and value == ranges[-1][1] + 1:
            ranges[-1][1] = value
        else:
            ranges.append([value, value])
    return ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in ranges) or "-"


def _show_plan(found: PipelinePlan, saved: SavedLayers, policy: str) -> None:
    budget = found.budget
    print(f"a process compiles {budget.usable} programs at most: {budget.limit} less {100 * budget.headroom:g} %")
    print(f"{'group':>5} {'layers':>9} {'programs':>9} {'with weights':>13} {'without':>8}")
    for i, group in enumerate(found.groups):
        layers = _numbers(range(group.start, group.end))
        print(f"{i:5d} {layers:>9} {group.programs:9d} {group.weight_kernels:13d} {group.static_kernels:8d}")
    if len(found.groups) > 1:
        print(f"restarts: {found.restarts_per_step} a step; one less in the first of a run")
    else:
        steps = found.steps_per_process
        print(f"restarts: 1 {'a step' if steps == 1 else f'in {steps} steps'}; none before the first of a run")
    print(
        f"activation checkpoint {policy}: keeps inputs of {len(saved.inputs)} layers ({_numbers(saved.inputs)}), "
        f"all activations of {len(saved.full)} ({_numbers(saved.full)}), room for those of {saved.buffer_layers}; "
        f"{len(saved.recomputed)} forward passes of a layer again"
    )


def _show_rows(title: str, rows: Mapping[str, float], total: str, texts: Mapping[str, str]) -> None:
    """Print rows with their share of the sum."""
    whole = sum(rows.values())
    print(f"\n{title}")
    for name, value in rows.items():
        print(f"  {name:42} {texts[name]:>12} {100 * value / whole:5.1f} %")
    print(f"  {'total':42} {total:>12}")


def _show_run(run: Run, found: PipelinePlan, previous: int | None) -> None:
    """Print a line of the trace."""
    step = f"step {run.step}" if run.step != previous else ""
    text = " + ".join(run.kinds)
    if run.group >= 0:
        group = found.groups[run.group]
        text += f" group {run.group}"
        if run.micros is None:
            text += f": layers {_numbers(range(group.start, group.end))}, {group.programs} programs"
        else:
            text += f", micro-batches {run.micros[0]}-{run.micros[1]}"
    print(f"  {step:10} {text}")


def _show_trace(load: Workload, steps: int) -> None:
    print("\ntrace")
    previous: int | None = None
    for run in runs(Schedule(load.plan, load.accumulation).trace(steps)):
        _show_run(run, load.plan, previous)
        previous = run.step


def _constants(chip: Chip) -> dict[str, Any]:
    found = {key: {"value": chip.constants[key], "source": chip.sources[key]} for key in _CONSTANTS}
    found["restart_ms"] = {"value": RESTART_MS, "source": "Q16: MX, OR; the original's exec(), of a C program"}
    return found


def _entry(state: ScheduleState, action: Action) -> dict[str, Any]:
    """Return an action for ``--json``."""
    group, micro = (value if value >= 0 else None for value in (action.group, action.micro))
    return {"step": state.step, "kind": action.kind, "group": group, "micro": micro}


def run(config: PlanConfig) -> Result:
    """Print and return the plan, what it takes, and what would be done."""
    chip = load_chip(config.chip)
    name, load = _workload(config)
    found, saved = load.plan, load.saved
    print(
        f"{name} on {chip.name}: {load.config.n_layers} layers, {human_count(load.config.n_params())} parameters; "
        f"{load.accumulation} micro-batches of {load.batch_size} x {load.seq_len} tokens a step"
    )
    print("a forecast for programs that hold their weights\n")
    _show_plan(found, saved, config.activation_checkpoint)
    sizes, flops, times = memory_forecast(load), flops_forecast(load), time_forecast(load, chip)
    total_bytes, total_flops, step_ms = sum(sizes.values()), sum(flops.values()), sum(times.values())
    on_engine = sum(value for key, value in flops.items() if key.startswith("engine"))
    byte_texts = {key: human_bytes(value) for key, value in sizes.items()}
    _show_rows("memory", sizes, human_bytes(total_bytes), byte_texts)
    _show_rows(
        "operations of matrix products in a step",
        flops,
        human_count(total_flops),
        {key: human_count(value) for key, value in flops.items()},
    )
    print(f"  on the engine {100 * on_engine / total_flops:.1f} %")
    _show_rows(
        f"time of a step on {chip.name}, average of a long run",
        times,
        f"{step_ms:.1f} ms",
        {key: f"{value:.1f} ms" for key, value in times.items()},
    )
    print(f"  {1e3 * load.tokens / step_ms:.0f} tokens/s, {total_flops / step_ms / 1e9:.3f} TFLOPS")
    print(f"  compiling at {chip.constants['compile_ms']:g} ms a program, a restart at {RESTART_MS:g} ms")
    print(f"  ({PUBLISHED})")
    _show_trace(load, config.steps)
    trace = Schedule(found, load.accumulation).trace(config.steps)
    return Result(
        {
            "schema": SCHEMA,
            "model": name,
            "config": load.config.to_dict(),
            "n_params": load.config.n_params(),
            "chip": chip.name,
            "batch_size": load.batch_size,
            "seq_len": load.seq_len,
            "gradient_accumulation_steps": load.accumulation,
            "budget": {**dataclasses.asdict(found.budget), "usable": found.budget.usable},
            "groups": [{**dataclasses.asdict(group), "programs": group.programs} for group in found.groups],
            "programs": found.programs,
            "restarts_per_step": found.restarts_per_step,
            "restarts_per_step_average": restarts_in_a_step(found),
            "steps_per_process": found.steps_per_process,
            "restarts": found.restarts(config.steps),
            "activation_checkpoint": {
                "policy": config.activation_checkpoint,
                "inputs": list(saved.inputs),
                "full": list(saved.full),
                "recomputed": list(saved.recomputed),
                "buffer_layers": saved.buffer_layers,
            },
            "memory_bytes": {**sizes, "total": total_bytes},
            "flops": {**flops, "total": total_flops, "engine": on_engine},
            "model_flops": load.tokens * load.config.flops_per_token(load.seq_len),
            "time_ms": {**times, "total": step_ms},
            "constants": _constants(chip),
            "trace": [_entry(state, action) for state, action in trace],
        }
    )


VERB = Verb("plan", "forecast training with weights in the programs: groups, restarts, memory, time", PlanConfig, run)
main = VERB.main

if __name__ == "__main__":
    raise SystemExit(main())
