"""Fixtures of the kernel tests: the tier of kernels in force, and the number of threads."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from anellm._ffi import check, lib, text


@pytest.fixture(params=text(lib.anellm_cpu_variants()).split(","))
def variant(request: pytest.FixtureRequest) -> Iterator[str]:
    """Force each tier of kernels that this machine can run, and put back what was in force."""
    before = text(lib.anellm_cpu_variant())
    check(lib.anellm_cpu_set_variant(request.param.encode()))
    yield request.param
    check(lib.anellm_cpu_set_variant(before.encode()))


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    """Put back the number of threads after each test."""
    before = lib.anellm_get_threads()
    yield
    check(lib.anellm_set_threads(before))
