"""A whole training step, also on each rung of its ladder, a decoded token, a loaded model."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from anellm import bench_anellm, bench_decode, bench_load, bench_step, bench_step_ladder
from anellm._ffi import check, lib, text
from anellm.bench import BenchConfig, job_of
from anellm.bench_step_ladder import Rung
from anellm.config import ModelConfig
from anellm.model import Model


def test_step(benchmark, shape: ModelConfig, batch: tuple[int, int], threads: int, tmp_path: Path) -> None:
    options = BenchConfig(batch_size=batch[0], threads=threads)
    job = dataclasses.replace(job_of(options), shape=shape, seq_len=batch[1])
    step, _ = bench_anellm.start(bench_step.step_job(job, tmp_path))
    benchmark.extra_info["flops"] = shape.flops_per_token(batch[1]) * batch[0] * batch[1]
    benchmark(step)


# Naive loops take half a minute for a step of 124 million parameters: of the ladder, this shape has what takes seconds.
_LADDER = ModelConfig.from_preset("gpt2", dim=128, n_layers=2, n_heads=4, vocab_size=2048, max_seq_len=64)


@pytest.mark.parametrize("rung", bench_step_ladder.rungs(lib.anellm_get_threads())[0], ids=lambda rung: rung.name)
def test_step_ladder(benchmark, rung: Rung, tmp_path: Path) -> None:
    """A step of 4 x 64 tokens on each rung of bench step-ladder."""
    options = BenchConfig(preset="gpt2", batch_size=4, seq_len=64, dtype=rung.dtype, threads=rung.threads)
    job = dataclasses.replace(job_of(options), shape=_LADDER)
    before = text(lib.anellm_cpu_variant()), lib.anellm_get_threads()
    try:
        check(lib.anellm_cpu_set_variant(rung.variant.encode()))
        step, _ = bench_anellm.start(bench_step.step_job(job, tmp_path))
        benchmark.group = "step 4x64"
        benchmark.extra_info.update(
            variant=rung.variant, dtype=rung.dtype, threads=rung.threads, flops=256 * _LADDER.flops_per_token(64)
        )
        benchmark.pedantic(step, rounds=3, warmup_rounds=1)
    finally:
        check(lib.anellm_cpu_set_variant(before[0].encode()))
        check(lib.anellm_set_threads(before[1]))


@pytest.mark.parametrize("weights", ["fp32", "bf16", "int8"])
def test_decode(benchmark, shape: ModelConfig, weights: str) -> None:
    model = Model(shape)
    if weights != "fp32":
        model.compress(weights, release=True)
    benchmark.extra_info["bytes_per_token"] = bench_decode.weight_bytes(model)
    benchmark.pedantic(lambda: bench_decode.decode_once(model, 32), rounds=5, warmup_rounds=1)


@pytest.mark.parametrize("name", bench_load.FORMATS)
def test_load(benchmark, shape: ModelConfig, name: str, tmp_path: Path) -> None:
    path = tmp_path / "model"
    bench_load.FORMATS[name](Model(shape), path)
    benchmark.extra_info["bytes"] = bench_load.size(path)
    benchmark(Model.from_pretrained, path)
