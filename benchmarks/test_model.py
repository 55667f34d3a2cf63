"""A whole training step, a decoded token, a loaded model."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from anellm import bench_anellm, bench_decode, bench_load, bench_step
from anellm.bench import BenchConfig, job_of
from anellm.config import ModelConfig
from anellm.model import Model


def test_step(benchmark, shape: ModelConfig, batch: tuple[int, int], threads: int, tmp_path: Path) -> None:
    options = BenchConfig(batch_size=batch[0], threads=threads)
    job = dataclasses.replace(job_of(options), shape=shape, seq_len=batch[1])
    step, _ = bench_anellm.start(bench_step.step_job(job, tmp_path))
    benchmark.extra_info["flops"] = shape.flops_per_token(batch[1]) * batch[0] * batch[1]
    benchmark(step)


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
