"""Fixtures and settings shared by all tests."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

# Derandomised, so that a failure in one run is a failure in every run.
settings.register_profile(
    "anellm",
    derandomize=True,
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
settings.load_profile("anellm")

os.environ["ANELLM_POWER"] = "off"  # what a machine takes is in its metrics; tests that want it turn it on


@pytest.fixture(autouse=True, scope="session")
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Keep what tests find out of the user's cache folder."""
    os.environ["ANELLM_CACHE_DIR"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """Return the folder of reference data that is not shipped with the project, or skip."""
    value = os.environ.get("ANELLM_TEST_DATA")
    if not value:
        pytest.skip("ANELLM_TEST_DATA is not set: it names the folder of reference weights, tokenizers and texts")
    path = Path(value)
    if not path.is_dir():
        pytest.fail(f"ANELLM_TEST_DATA={value}: no such folder")
    return path
