"""Kills, power failures and refusals at every operation: nothing complete is lost, and training goes on exactly."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

if not sys.platform.startswith("linux"):
    pytest.skip("the trials look into /proc", allow_module_level=True)


def trial(name: str, *arguments: Any) -> dict[str, Any]:
    """Do a trial of crash.py in a process of its own; return what it counted."""
    words = [json.dumps(value) for value in arguments]
    one_thread = {"ANELLM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, str(Path(__file__).parent / "crash.py"), name, *words],
        env={**os.environ, **one_thread},
        capture_output=True,
        text=True,
        check=False,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def test_a_crash_at_every_operation() -> None:
    assert trial("crashes")["trials"] > 200


def test_a_crash_while_going_on_from_crashes() -> None:
    assert trial("crashes_twice", 1, 20)["deaths"] > 40


def test_power_failures_lose_nothing_that_was_reported() -> None:
    assert trial("lost_writes")["outcomes"] > 200


@pytest.mark.parametrize("operation", ["fsync", "fsync_dir"])
def test_a_missing_sync_would_be_noticed(operation: str) -> None:
    with pytest.raises(AssertionError, match="event"):
        trial("lost_writes", 2, 1, operation)


@pytest.mark.parametrize(
    ("code", "stride"), [(errno.ENOSPC, 1), (errno.EIO, 4), (errno.EMFILE, 5), (errno.EINTR, 11), (errno.EROFS, 11)]
)
def test_a_refusal_at_every_operation(code: int, stride: int) -> None:
    assert trial("refusals", code, stride)["trials"] > 200 // stride


def test_sigkill_at_random() -> None:
    """ANELLM_TEST_KILLS says how often; a few unless it does."""
    n = int(os.environ.get("ANELLM_TEST_KILLS", "6"))
    found = trial("kills", n, 7)
    assert found["kills"] == n
    assert found["steps"] > n
