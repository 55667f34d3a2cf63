"""Every operation in every tier, at the shapes of a training step."""

from __future__ import annotations

import functools

import pytest

from anellm import bench_kernels
from anellm.bench_kernels import Case, tiers
from anellm.config import ModelConfig


@functools.lru_cache(maxsize=1)
def find(name: str, index: int, shape: ModelConfig, B: int, T: int) -> Case:
    """Return the case of a name (of several with the same one that of an index); only the last one stays in memory."""
    found = (case for case in bench_kernels.cases(shape, B, T) if case.kernel == name)
    return next(case for i, case in enumerate(found) if i == index)


def names() -> list[tuple[str, int]]:
    """Return every case's name, and which of that name it is, at a shape that costs nothing."""
    seen: dict[str, int] = {}
    for case in bench_kernels.cases(ModelConfig.from_preset("stories260k", vocab_size=64), 1, 4):
        seen[case.kernel] = seen.get(case.kernel, 0) + 1
    return [(name, i) for name, count in seen.items() for i in range(count)]


@pytest.mark.parametrize("tier", tiers(), indirect=True)
@pytest.mark.parametrize(("name", "index"), names())
def test_kernel(benchmark, name: str, index: int, tier: str, shape: ModelConfig, batch: tuple[int, int]) -> None:
    case = find(name, index, shape, *batch)
    benchmark.group = f"{name} {case.shape}"
    benchmark.extra_info.update(variant=tier, flops=case.flops, bytes=case.n_bytes)
    benchmark(case.run)
