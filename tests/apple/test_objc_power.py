"""csrc/core/power_apple.m on Linux: GNUstep, a strict fake of libIOReport, and training that says what it took."""

from __future__ import annotations

import shutil
import subprocess
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
    build(built, "power", library, str(source), FLAGS="-w")
    for step in STEPS:
        done = drive(built, tmp_path / "tmp", step, POWER_LIBRARY=str(built / library))
        if done.returncode != 0 or "without pool" in done.stderr:
            return
    pytest.fail(f"nothing notices {mutant.name}")
