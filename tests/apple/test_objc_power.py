"""csrc/core/power_apple.m on Linux: GNUstep, a strict fake of libIOReport, and training that says what it took."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from objc_mutants import POWER_MUTANTS, Mutant, mutate
from objc_tools import HERE, PACKAGES, SANITIZERS, VALGRIND, build, environment, has_sanitizers

SOURCE = HERE.parents[1] / "csrc" / "core" / "power_apple.m"
# "none" fails nowhere; the others leave nothing but what the process takes.
STEPS = ("none", "group", "subscription", "samples", "empty", "parts", "raise")


def drive(built: Path, tmp: Path, step: str, *checker: str, **more: str) -> subprocess.CompletedProcess[str]:
    """Run the driver; more is environment."""
    own = {"POWER_LIBRARY": str(built / "libpower.so"), "ANELLM_IOREPORT": str(built / "libIOReport.so")}
    env = environment(built, tmp, **(own | more))
    command = [*checker, str(built / "power_driver"), step]
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=120, check=False)


@pytest.mark.parametrize("step", STEPS)
def test_driver(step: str, built: Path, tmp_path: Path) -> None:
    done = drive(built, tmp_path / "tmp", step)
    assert (done.returncode, done.stdout) == (0, "ok\n"), done.stderr
    assert "without pool" not in done.stderr


@pytest.mark.parametrize("step", ["none", "samples"])
def test_valgrind(step: str, built: Path, tmp_path: Path) -> None:
    if shutil.which("valgrind") is None:
        pytest.skip(f"needs valgrind: {PACKAGES}")
    done = drive(built, tmp_path / "tmp", step, *VALGRIND)
    assert done.returncode == 0, done.stderr
    assert "definitely lost" not in done.stderr


def test_sanitizers(built: Path, tmp_path: Path) -> None:
    """Addresses, undefined behaviour, leaks."""
    if not has_sanitizers():
        pytest.skip(f"needs clang's sanitizers: {PACKAGES}")
    out = build(tmp_path / "asan", FLAGS=SANITIZERS, OBJECTS=str(built / "objects"))
    more = {
        "ASAN_OPTIONS": "detect_leaks=1,fast_unwind_on_malloc=0",
        "LSAN_OPTIONS": f"suppressions={HERE / 'lsan.supp'},print_suppressions=0",
        "UBSAN_OPTIONS": "print_stacktrace=1",
    }
    done = drive(out, tmp_path / "tmp", "none", **more)
    assert (done.returncode, done.stdout) == (0, "ok\n"), done.stderr


@pytest.mark.parametrize("mutant", POWER_MUTANTS, ids=lambda mutant: mutant.name)
def test_mutants(mutant: Mutant, built: Path, tmp_path: Path) -> None:
    source, library = tmp_path / f"{mutant.name}.m", f"libpower_{mutant.name}.so"
    source.write_text(mutate(SOURCE.read_text(), mutant))
    build(built, "power", library, str(source), FLAGS="-w -O0 -g0")
    for step in STEPS:
        done = drive(built, tmp_path / "tmp", step, POWER_LIBRARY=str(built / library))
        if done.returncode != 0 or "without pool" in done.stderr:
            return
    pytest.fail(f"nothing notices {mutant.name}")


def test_training(built: Path, tmp_path: Path) -> None:
    """What the fake machine takes is in the metrics, whatever computes: 1.875 W of 2 s a sample."""
    more = {"ANELLM_IOREPORT": str(built / "libIOReport.so"), "SHIM_THERMAL": "1", "ANELLM_POWER": ""}
    env = environment(built, tmp_path / "tmp", **more)
    size = ["--preset", "tiny", "--steps", "3", "--batch-size", "1", "--seq-len", "32", "--eval-interval", "0"]
    for device in ("ane", "cpu"):
        more_flags = ["--device", device, "--out", device, "--json", f"{device}.json", "--sample-tokens", "0"]
        command = [sys.executable, "-m", "anellm.train", *size, *more_flags]
        done = subprocess.run(command, env=env, cwd=tmp_path, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        assert "ioreport), 0.0781 J a token, thermal state up to fair\n" in done.stdout
        records = [json.loads(line) for line in (tmp_path / device / "metrics.jsonl").read_text().splitlines()]
        logged = [record for record in records if record["kind"] == "step" and "watts" in record]
        assert [record["step"] for record in logged] == [1, 3]
        for record, steps in zip(logged, (1, 2), strict=True):
            assert record["joules_per_token"] == pytest.approx(3.75 / 32 / steps)
            assert record["watts_ane"] == pytest.approx(record["watts"] * 0.25 / 1.875)
            assert (record["power_source"], record["thermal_state"]) == ("ioreport", "fair")
        found = json.loads((tmp_path / f"{device}.json").read_text())
        assert found["joules"] == pytest.approx(7.5)
        assert found["worst_thermal_state"] == "fair"


def test_info(built: Path, tmp_path: Path) -> None:
    env = environment(built, tmp_path / "tmp", ANELLM_IOREPORT="/nowhere/IOReport", ANELLM_POWER="", SHIM_THERMAL="3")
    command = [sys.executable, "-m", "anellm.info"]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=True)
    assert "\nenergy        not counted; thermal state critical\n" in done.stdout
