"""The vdsp variants, which call Apple's Accelerate, over a shim with the functions they use: on any machine with a C
compiler, the kernel tests run with tier vdsp, and the model's with nothing else in force.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from cffi import FFI

ROOT = Path(__file__).resolve().parents[2]
CSRC = ROOT / "csrc"
STUBS = ROOT / "tests" / "apple" / "macstub" / "include"
SHIM = ROOT / "tests" / "apple" / "accelerate" / "accelerate.c"
DRIVER = ROOT / "tests" / "apple" / "arm64"
CC = os.environ.get("CC", "cc").split()
INCLUDE = Path(sysconfig.get_path("include"))
FLAGS = ["-std=gnu11", "-O2", "-fPIC", "-pthread", "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=fast"]
DEFINES = ["-D_GNU_SOURCE", "-DANELLM_ACCELERATE_SHIM", "-DACCELERATE_NEW_LAPACK", f"-I{CSRC}", f"-I{STUBS}"]
WARNINGS = ["-Wall", "-Wextra", "-Wshadow", "-Wvla", "-Wconversion", "-Werror"]

pytestmark = [
    pytest.mark.skipif(not CSRC.is_dir(), reason=f"no C source at {CSRC}"),
    pytest.mark.skipif(sys.platform == "darwin", reason="this machine has Accelerate: the kernel tests run over it"),
    pytest.mark.skipif(shutil.which(CC[0]) is None, reason=f"no C compiler {CC[0]}"),
    pytest.mark.slow,
]


def run(command: list[object], **settings: object) -> str:
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True, check=False, **settings)
    assert done.returncode == 0, f"{command}\n{done.stdout[-4000:]}{done.stderr[-4000:]}"
    return done.stdout


@pytest.fixture(scope="module")
def objects(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Compile the core and the shim, warnings as errors."""
    folder = tmp_path_factory.mktemp("objects")
    sources = [path for path in sorted(CSRC.rglob("*.c")) if CSRC / "fuzz" not in path.parents]

    def compile_one(source: Path) -> Path:
        target = folder / (source.relative_to(ROOT).as_posix().replace("/", "-") + ".o")
        run([*CC, *FLAGS, *DEFINES, *WARNINGS, "-c", source, "-o", target])
        return target

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return list(pool.map(compile_one, [*sources, SHIM]))


@pytest.fixture(scope="module")
def library(objects: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with the package, its extension made of these objects."""
    if not (INCLUDE / "Python.h").is_file():
        pytest.skip(f"no Python.h in {INCLUDE}")
    folder = tmp_path_factory.mktemp("library")
    package = folder / "anellm"
    shutil.copytree(ROOT / "python" / "anellm", package, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    text = (CSRC / "anellm.h").read_text(encoding="utf-8")
    ffi = FFI()
    ffi.cdef(text.split("/* cffi:begin */")[1].split("/* cffi:end */")[0])
    ffi.set_source("anellm._anellm", '#include "anellm.h"', py_limited_api=True)
    ffi.emit_c_code(str(folder / "extension.c"))
    extension = package / "_anellm.abi3.so"
    limited = ["-DPy_LIMITED_API=0x030b0000", f"-I{INCLUDE}", "-w"]
    command = [*CC, *FLAGS, *DEFINES, *limited, "-shared", folder / "extension.c", *objects, "-o", extension]
    run([*command, "-lm", "-ldl"])
    return folder


def run_pytest(library: Path, *arguments: str, **environment: str) -> dict[str, int]:
    """Run tests over the library; return how many passed, failed, ..."""
    settings = os.environ | {"PYTHONPATH": str(library)} | environment
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *arguments]
    output = run(command, cwd=ROOT, env=settings)
    return {word: int(n) for n, word in re.findall(r"(\d+) (passed|failed|skipped|deselected)", output)}


def test_the_library_offers_the_tier(library: Path) -> None:
    code = "from anellm._anellm import ffi, lib; print(ffi.string(lib.anellm_cpu_variants()).decode())"
    tiers = run([sys.executable, "-c", code], env=os.environ | {"PYTHONPATH": str(library)}).strip().split(",")
    assert tiers[-2:] == ["vdsp", "portable"] or tiers[-3:] == ["vdsp", "neon", "portable"]


def test_every_vdsp_kernel_agrees_with_the_portable_one(objects: list[Path], tmp_path: Path) -> None:
    program = tmp_path / "variants"
    drivers = sorted(DRIVER.glob("variants*.c"))
    run([*CC, *FLAGS, *DEFINES, *WARNINGS, *drivers, *objects, "-o", program, "-lm", "-ldl"])
    output = run([program])
    table = (CSRC / "kernels" / "table.inc").read_text(encoding="utf-8")
    listed = re.findall(r"^ANELLM_VARIANT\((\w+), vdsp, ANELLM_CPU_VDSP\)$", table, re.MULTILINE)
    assert sorted(re.findall(r"^ok +(\w+)__vdsp ", output, re.MULTILINE)) == sorted(listed)
    assert " 0 failures" in output


def test_the_kernel_tests_pass_with_tier_vdsp(library: Path) -> None:
    found = run_pytest(library, "tests/kernels", "-k", "vdsp")
    assert found["passed"] > 100
    assert "skipped" not in found


def test_the_model_tests_pass_with_nothing_else(library: Path) -> None:
    tests = ("tests/model/test_model.py", "tests/golden/test_torch_goldens.py")
    # the shim's products are slow, and these two have large ones
    rest = "not another_thread_is_busy and not chunked_classifier"
    found = run_pytest(library, *tests, "-k", rest, ANELLM_CPU="vdsp")
    assert found["passed"] > 20
