"""The fixtures of this folder."""

from __future__ import annotations

import shutil
import sys
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
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the macOS wheel, built once for all that look at it."""
    if not has_zig():
        pytest.skip(NO_ZIG)
    return build_wheel(tmp_path_factory.mktemp("wheel"))
