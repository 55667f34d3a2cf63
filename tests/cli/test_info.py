"""The verb info: what it says is so."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from anellm import info
from anellm._ffi import lib, text


def collect(tmp_path: Path, *args: str) -> dict[str, Any]:
    """Run the verb and return what --json wrote."""
    path = tmp_path / "info.json"
    assert info.main([*args, "--json", str(path)]) == 0
    return json.loads(path.read_text())


def test_values(tmp_path: Path) -> None:
    found = collect(tmp_path)
    assert found["device"] == "cpu"
    assert found["cpu_variant"] == text(lib.anellm_cpu_variant())
    assert found["cpu_variant"] in found["cpu_variants"]
    assert found["cpu_variants"][-1] == "portable"
    assert found["python"] == platform.python_version()
    assert found["packages"]["numpy"] == np.__version__
    assert all(found["packages"].values())
    assert found["memory_bytes"] is None or found["memory_bytes"] >= (found["memory_available_bytes"] or 0) > 0
    assert found["threads"] >= 1


def test_threads(tmp_path: Path) -> None:
    before = lib.anellm_get_threads()
    assert collect(tmp_path, "--threads", "3")["threads"] == 3
    lib.anellm_set_threads(before)


@pytest.mark.parametrize(
    ("system", "machine", "expected"),
    [
        ("Linux", "x86_64", "the Apple Neural Engine needs macOS on Apple silicon; this is Linux"),
        ("Darwin", "x86_64", "needs Apple silicon; this Mac, or this Python, is x86_64"),
        ("Darwin", "arm64", "needs macOS on Apple silicon"),  # what the C core of another system says
    ],
)
def test_why_no_ane(system: str, machine: str, expected: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "system", lambda: system)
    monkeypatch.setattr(platform, "machine", lambda: machine)
    why = info.why_no_ane()
    assert why is not None
    assert expected in why


def test_lines_and_report(capsys: pytest.CaptureFixture[str]) -> None:
    assert info.main([]) == 0
    plain = capsys.readouterr().out
    assert info.main(["--report"]) == 0
    report = capsys.readouterr().out.splitlines()
    assert (report[0], report[-1]) == ("```text", "```")
    labels = [line.split(":")[0] for line in report[1:-1]]
    assert labels[:10] == [
        "anellm", "device", "ane", "auto", "cpu variant", "cpu features", "threads", "memory", "energy", "python",
    ]  # fmt: skip
    assert all(label in plain for label in labels)
    assert (info.why_no_ane() or "available") in plain


@pytest.mark.parametrize("command", [["anellm.info"], ["anellm", "info"]])
def test_environment(command: list[str], tmp_path: Path) -> None:
    """The variables that change what anellm does are obeyed, and shown."""
    env = {**os.environ, "ANELLM_CPU": "portable", "ANELLM_THREADS": "2", "ANELLM_DEVICE": "cpu"}
    path = tmp_path / "out.json"
    words = [sys.executable, "-m", *command, "--json", str(path)]
    done = subprocess.run(words, capture_output=True, text=True, env=env, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    found = json.loads(path.read_text())
    assert (found["cpu_variant"], found["threads"]) == ("portable", 2)
    assert found["environment"]["ANELLM_CPU"] == "portable"
    assert "ANELLM_CPU=portable" in done.stdout


def test_refusals(capsys: pytest.CaptureFixture[str]) -> None:
    for args, expected in [(["--threads", "0x"], "--threads"), (["--reprot"], "--report"), (["x"], "unexpected")]:
        assert info.main(args) == 2
        assert expected in capsys.readouterr().err
