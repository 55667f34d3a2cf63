"""The NEON kernels and the C drivers, cross-compiled for arm64 and run by qemu's user-mode emulator.

Needs ``qemu-aarch64-static`` and a cross compiler: ``aarch64-linux-gnu-gcc`` (Debian: qemu-user-static,
gcc-aarch64-linux-gnu, libc6-dev-arm64-cross), or zig: a Python with PyPI's ``ziglang``, this one or the one that
ANELLM_ZIG_PYTHON names.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
TABLE = ROOT / "csrc" / "kernels" / "table.inc"
QEMU = shutil.which("qemu-aarch64-static") or shutil.which("qemu-aarch64")


def compiler() -> str | None:
    """Return the command of a C compiler for arm64 Linux."""
    if found := shutil.which("aarch64-linux-gnu-gcc"):
        return found
    python = os.environ.get("ANELLM_ZIG_PYTHON") or sys.executable
    if subprocess.run([python, "-c", "import ziglang"], capture_output=True, check=False).returncode == 0:
        return f"{python} -m ziglang cc -target aarch64-linux-musl"
    return None


pytestmark = [
    pytest.mark.skipif(not TABLE.is_file(), reason=f"no C source at {TABLE.parent}"),
    pytest.mark.skipif(QEMU is None, reason="no qemu-aarch64-static on PATH (Debian: qemu-user-static)"),
    pytest.mark.skipif(compiler() is None, reason="no aarch64-linux-gnu-gcc on PATH, and no ziglang"),
    pytest.mark.slow,
]


@pytest.fixture(scope="module")
def programs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build the core and its drivers for arm64; that it compiles without warnings is a test of its own."""
    folder = tmp_path_factory.mktemp("arm64")
    script = ROOT / "tests" / "apple" / "arm64" / "build.sh"
    environment = os.environ | {"CC": compiler() or ""}
    done = subprocess.run(["bash", script, folder], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    return folder


def emulate(program: Path) -> str:
    done = subprocess.run([QEMU or "", program], capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    return done.stdout


def test_every_neon_kernel_agrees_with_the_portable_one(programs: Path) -> None:
    output = emulate(programs / "variants")
    assert output.startswith("features: neon; tiers: neon,portable\n")
    listed = re.findall(r"^ANELLM_VARIANT\((\w+), neon, ANELLM_CPU_NEON\)$", TABLE.read_text("utf-8"), re.MULTILINE)
    checked = dict(re.findall(r"^ok +(\w+)__neon \((\d+) checks\)$", output, re.MULTILINE))
    assert sorted(checked) == sorted([*listed, "layout"])
    assert min(map(int, checked.values())) > 50
    assert " 0 failures" in output


@pytest.mark.parametrize("name", sorted(path.stem for path in (ROOT / "tests" / "native").glob("test_*.c")))
def test_the_native_drivers_pass_on_arm64(programs: Path, name: str) -> None:
    emulate(programs / name)
