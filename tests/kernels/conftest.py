"""Fixtures of the kernel tests: the tier of kernels in force, and the number of threads."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from anellm._ffi import check, lib, text

TIERS = text(lib.anellm_cpu_variants()).split(",")
# The others have the kernels of avx512, but for the engine of the bf16 product.
FP32_TIERS = [tier for tier in TIERS if tier not in {"avx512bf16", "amx"}]
# naive has but an fp32 product, and is not among the tiers that are listed.
ENGINES = [("naive", "fp32")] + [(tier, "fp32") for tier in FP32_TIERS] + [(tier, "bf16") for tier in TIERS]


@contextmanager
def forced(tier: str) -> Iterator[None]:
    """Force a tier of kernels, and put back what was in force."""
    before = text(lib.anellm_cpu_variant())
    check(lib.anellm_cpu_set_variant(tier.encode()))
    try:
        yield
    finally:
        check(lib.anellm_cpu_set_variant(before.encode()))


@pytest.fixture(params=FP32_TIERS)
def variant(request: pytest.FixtureRequest) -> Iterator[str]:
    """Force each tier of kernels that this machine can run and that differs in fp32."""
    with forced(request.param):
        yield request.param


@pytest.fixture(params=TIERS)
def tier(request: pytest.FixtureRequest) -> Iterator[str]:
    """Force each tier of kernels that this machine can run."""
    with forced(request.param):
        yield request.param


@pytest.fixture(params=ENGINES, ids="-".join)
def product(request: pytest.FixtureRequest) -> Iterator[str]:
    """Force each engine of the two matrix products; the value is "fp32" or "bf16"."""
    tier, dtype = request.param
    with forced(tier):
        yield dtype


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    """Put back the number of threads after each test."""
    before = lib.anellm_get_threads()
    yield
    check(lib.anellm_set_threads(before))
