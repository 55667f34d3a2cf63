"""The verb ``bench``: how fast this machine trains and decodes, next to its limits and to what else is installed."""

from __future__ import annotations

import importlib
import sys
from dataclasses import dataclass
from typing import Any

from anellm import bench_llmc
from anellm.bench_peers import parse_compare
from anellm.bench_timing import BenchJob
from anellm.cli import Result, Verb
from anellm.compress import WEIGHTS
from anellm.config import ModelConfig, preset_names
from anellm.device import DTYPES, named_device, set_threads
from anellm.errors import ConfigError
from anellm.options import CommonOptions, option

# What to measure -> the module whose run() measures it.
WHATS = {
    "step": "anellm.bench_step",
    "kernels": "anellm.bench_kernels",
    "decode": "anellm.bench_decode",
    "load": "anellm.bench_load",
    "matmul-ladder": "anellm.bench_ladder",
    "step-ladder": "anellm.bench_step_ladder",
}
_DRAWN = ("matmul-ladder", "step-ladder")


@dataclass(frozen=True, kw_only=True)
class BenchConfig(CommonOptions):
    """The options of ``bench``."""

    what: str = option("step", "what to measure", choices=tuple(WHATS), positional=True, group="what")
    preset: str = option("stories110m", "shape of the model", choices=tuple(preset_names()), group="shape")
    vocab_size: int | None = option(
        None, "rows of its embedding table [the preset's]", low=2, high=2**31 - 1, group="shape"
    )
    batch_size: int = option(1, "sequences in a step", low=1, high=2**20, group="shape")
    seq_len: int = option(256, "tokens in a sequence", low=1, high=2**24, group="shape")
    dtype: str = option("fp32", "numbers that the matrix products multiply", choices=DTYPES, group="shape")
    weights: str = option("fp32", "format of the weights, for decode", choices=WEIGHTS, group="shape")
    tokens: int = option(128, "tokens to decode", low=1, high=2**24, group="shape")

    steps: int = option(
        5, "timed steps of each contender in a round; in kernels 20 ms each", low=1, high=2**20, group="timing"
    )
    rounds: int = option(4, "rounds, in which the contenders take turns", low=1, high=2**20, group="timing")

    compare: str = option("", "peers to run in the same turns, separated by commas: torch, jax, numpy", group="peers")
    torch_python: str | None = option(None, "a Python that has PyTorch [this one]", group="peers")
    jax_python: str | None = option(None, "a Python that has JAX [this one]", group="peers")
    runc: str | None = option(None, "llama2.c's program `run`, for decode", group="peers")

    llmc: str | None = option(None, "llm.c's built program `train_gpt2`, for step and step-ladder", group="peers")

    figure: str | None = option(None, "where a ladder is drawn [WHAT.svg]", group="output", flag_only=True)


def check_llmc(config: BenchConfig, shape: ModelConfig) -> None:
    """Refuse what cannot be compared with llm.c's program, before anything is measured.

    Raises:
        ConfigError: naming the flag.
    """
    if config.what not in ("step", "step-ladder"):
        raise ConfigError(f"--llmc: only for step and step-ladder, found {config.what}")
    bench_llmc.check_program(str(config.llmc))
    bench_llmc.check_shape(shape, config.batch_size, config.seq_len)


def job_of(config: BenchConfig) -> BenchJob:
    """Return what to measure, with every choice made.

    Raises:
        ConfigError: on an unknown peer, a sequence beyond the model's longest, a drawing that is no SVG, or a program
            that cannot be run.
    """
    if named_device(config.device) != "cpu":
        raise ConfigError(f"--device: bench measures the CPU, found {config.device}")
    compare = parse_compare(config.compare)
    changes: dict[str, Any] = {} if config.vocab_size is None else {"vocab_size": config.vocab_size}
    shape = ModelConfig.from_preset(config.preset, **changes)
    if config.seq_len > shape.max_seq_len:
        raise ConfigError(
            f"--seq-len: expected at most the model's longest, {shape.max_seq_len}, found {config.seq_len}"
        )
    if shape.arch != "llama" and "jax" in compare:
        raise ConfigError(f"--compare: jax has only a Llama here, found --preset {config.preset}")
    figure = f"{config.what}.svg" if config.figure is None else config.figure
    if not figure.endswith(".svg"):
        raise ConfigError(f"--figure: expected a name that ends in .svg, found {figure!r}")
    if config.figure is not None and config.what not in _DRAWN:
        raise ConfigError(f"--figure: only for {' and '.join(_DRAWN)}, found {config.what}")
    if config.what == "step-ladder" and config.dtype != "fp32":
        raise ConfigError(f"--dtype: step-ladder measures fp32 and, where the CPU has it, bf16; found {config.dtype}")
    if config.llmc is not None:
        check_llmc(config, shape)
    if config.runc is not None and config.what != "decode":
        raise ConfigError(f"--runc: only for decode, found {config.what}")
    return BenchJob(
        what=config.what,
        preset=config.preset,
        shape=shape,
        batch_size=config.batch_size,
        seq_len=config.seq_len,
        dtype=config.dtype,
        weights=config.weights,
        threads=set_threads(config.threads),
        steps=config.steps,
        rounds=config.rounds,
        tokens=config.tokens,
        compare=compare,
        pythons={
            "torch": config.torch_python or sys.executable,
            "jax": config.jax_python or sys.executable,
            "numpy": sys.executable,
        },
        runc=config.runc,
        llmc=config.llmc,
        figure=figure,
    )


def run(config: BenchConfig) -> Result:
    """Measure, print, and return the figures."""
    job = job_of(config)
    values: dict[str, Any] = importlib.import_module(WHATS[config.what]).run(job)
    return Result(values)


VERB = Verb("bench", "measure speed and memory, and compare with what else is installed", BenchConfig, run)
main = VERB.main

if __name__ == "__main__":
    raise SystemExit(main())
