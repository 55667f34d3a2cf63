"""Cross-build for macOS with zig: needs a Python with ziglang, setuptools and cffi, this one or ANELLM_ZIG_PYTHON's."""

from __future__ import annotations

import functools
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
STUBS = Path(__file__).resolve().parent / "macstub"
PYTHON = os.environ.get("ANELLM_ZIG_PYTHON") or sys.executable
NEEDED = "import cffi, setuptools, ziglang"
NO_ZIG = f'no zig to cross-build with: {PYTHON} -c "{NEEDED}" fails'
ZIG_CC = [PYTHON, "-m", "ziglang", "cc", "-target", "aarch64-macos.14.0", "-std=gnu11"]


@functools.cache
def has_zig() -> bool:
    return subprocess.run([PYTHON, "-c", NEEDED], capture_output=True, check=False).returncode == 0


def build_wheel(folder: Path) -> None:
    """Leave the macOS arm64 wheel in the folder. Warnings are errors, so that a build is a test already."""
    command = ["bash", STUBS / "wheel.sh", folder]
    environment = os.environ | {"PYTHON": PYTHON}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
