"""The fixtures of this folder."""

from __future__ import annotations

import fcntl
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from objc_tools import PACKAGES, build
from zig_tools import NO_ZIG, build_wheel, has_zig


@pytest.fixture(scope="session")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of the libraries and the driver, or skip."""
    if not sys.platform.startswith("linux"):
        pytest.skip("GNUstep stands in for macOS on Linux")
    missing = [name for name in ("bash", "clang", "gcc") if shutil.which(name) is None]
    if not Path("/usr/include/GNUstep/Foundation/Foundation.h").exists():
        missing.append("GNUstep")
    if missing:
        pytest.skip(f"needs {', '.join(missing)}: {PACKAGES}")
    return build(tmp_path_factory.mktemp("objc"))


@pytest.fixture(scope="session")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, Callable[[Path], object]], Path]:
    """Return a function that fills a folder once for all processes of pytest-xdist, and returns it."""
    own = tmp_path_factory.getbasetemp()
    root = own.parent if "PYTEST_XDIST_WORKER" in os.environ else own

    def fill_once(name: str, fill: Callable[[Path], object]) -> Path:
        folder, filled = root / f"shared-{name}", root / f"shared-{name}.filled"
        with (root / f"shared-{name}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not filled.exists():
                shutil.rmtree(folder, ignore_errors=True)  # of a process that failed
                folder.mkdir()
                fill(folder)
                filled.touch()
        return folder

    return fill_once


@pytest.fixture(scope="session")
def wheel(shared: Callable[[str, Callable[[Path], object]], Path]) -> Path:
    """Return the macOS wheel, built once for all that look at it."""
    if not has_zig():
        pytest.skip(NO_ZIG)
    (found,) = shared("wheel", build_wheel).glob("*.whl")
    return found
