"""Options and fixtures of the benchmarks: ``pytest benchmarks --benchmark-json b.json``."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from anellm._ffi import check, lib, text
from anellm.config import ModelConfig
from anellm.device import set_threads


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--preset", default="stories110m", help="shape of the model")
    parser.addoption("--batch-size", type=int, default=1)
    parser.addoption("--seq-len", type=int, default=256)
    parser.addoption("--threads", type=int, default=0, help="0: all this process may use")


@pytest.fixture(scope="session")
def shape(request: pytest.FixtureRequest) -> ModelConfig:
    return ModelConfig.from_preset(request.config.getoption("--preset"))


@pytest.fixture(scope="session")
def batch(request: pytest.FixtureRequest) -> tuple[int, int]:
    """Return (B, T)."""
    return request.config.getoption("--batch-size"), request.config.getoption("--seq-len")


@pytest.fixture(scope="session", autouse=True)
def threads(request: pytest.FixtureRequest) -> int:
    return set_threads(request.config.getoption("--threads"))


@pytest.fixture
def tier(request: pytest.FixtureRequest) -> Iterator[str]:
    """Force a tier of kernels, and put back what was in force."""
    before = text(lib.anellm_cpu_variant())
    check(lib.anellm_cpu_set_variant(request.param.encode()))
    yield request.param
    check(lib.anellm_cpu_set_variant(before.encode()))
