"""The whole macOS arm64 wheel, cross-built with zig against stub headers and a whitelist of Apple's symbols.

Needs a Python with ziglang, setuptools and cffi: this one, or the one that ANELLM_ZIG_PYTHON names.
"""

from __future__ import annotations

import re
import subprocess
import zipfile
from pathlib import Path

import pytest
from macho import CPU_ARM64, DYLIB, MachO, extension
from zig_tools import NO_ZIG, ROOT, STUBS, ZIG_CC, has_zig

HERE = Path(__file__).resolve().parent

pytestmark = [
    pytest.mark.skipif(not (ROOT / "csrc").is_dir(), reason=f"no C source in {ROOT}"),
    pytest.mark.skipif(not has_zig(), reason=NO_ZIG),
    pytest.mark.slow,
]


@pytest.fixture(scope="module")
def library(wheel: Path) -> MachO:
    return extension(wheel)


def test_the_wheel_is_one_for_all_pythons_of_the_platform(wheel: Path) -> None:
    assert re.fullmatch(r"anellm-[\d.]+-cp311-abi3-macosx_14_0_arm64\.whl", wheel.name)
    with zipfile.ZipFile(wheel) as archive:
        (metadata,) = (name for name in archive.namelist() if name.endswith(".dist-info/WHEEL"))
        text = archive.read(metadata).decode()
    assert "Root-Is-Purelib: false" in text
    assert "Tag: cp311-abi3-macosx_14_0_arm64" in text


def test_the_wheel_holds_the_package_and_nothing_else(wheel: Path) -> None:
    package = ROOT / "python" / "anellm"
    files = [*package.glob("*.py"), *package.glob("py.typed"), *(p for p in package.glob("data/**/*") if p.is_file())]
    expected = {path.relative_to(package.parent).as_posix() for path in files} | {"anellm/_anellm.abi3.so"}
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    info = {name for name in names if ".dist-info/" in name}
    assert names - info == expected
    assert {name.split(".dist-info/")[1] for name in info} == {
        "METADATA",
        "RECORD",
        "WHEEL",
        "entry_points.txt",
        "licenses/LICENSE",
        "licenses/NOTICE",
        "top_level.txt",
    }


def test_the_extension_is_for_apple_silicon(library: MachO) -> None:
    assert (library.cpu, library.kind, library.minimum) == (CPU_ARM64, DYLIB, "14.0")
    assert library.exports - {"__mh_dylib_header", "___dso_handle"} == {"_PyInit__anellm"}


def test_the_imports_are_the_reviewed_ones(library: MachO) -> None:
    lines = (HERE / "imports.txt").read_text(encoding="utf-8").splitlines()
    reviewed = [line for line in lines if line and not line.startswith("#")]
    assert reviewed == sorted(reviewed), "imports.txt is not sorted"
    found = library.listing()
    new, gone = sorted(set(found) - set(reviewed)), sorted(set(reviewed) - set(found))
    assert not new, f"imports that nobody has reviewed: {new}"
    assert not gone, f"imports.txt lists what is not imported any more: {gone}"


def test_what_no_library_has_is_pythons(library: MachO) -> None:
    """A misspelt function, or one missing in macstub's .tbd files, would be looked up in the process as well."""
    rest = [name for name, where in library.imports.items() if where == "process"]
    assert rest
    assert [name for name in rest if not name.startswith(("_Py", "__Py"))] == []


# ---- static analysis of the Objective-C ------------------------------------------------------------------------------


def analyse(source: Path, folder: Path) -> list[str]:
    """Return the static analyzer's warnings. It looks after retain and release among other things."""
    flags = [
        "-fno-objc-arc",
        "--analyze",
        "-Xclang",
        "-analyzer-output=text",
        f"-I{ROOT / 'csrc'}",
        f"-I{STUBS / 'include'}",
    ]
    done = subprocess.run([*ZIG_CC, *flags, source], cwd=folder, capture_output=True, text=True, check=False)
    lines = done.stderr.splitlines()
    # zig wants to move an object file, which an analysis does not make, and says that it failed to
    assert [line for line in lines if ": error:" in line and "failed to rename" not in line] == []
    return [line for line in lines if ": warning:" in line and not line.startswith("zig:")]


LEAK = """#import <Foundation/Foundation.h>
NSUInteger anellm_leak(const char *text);
NSUInteger anellm_leak(const char *text) {
    NSString *copy = [[NSString alloc] initWithUTF8String:text];
    return [copy length];
}
"""


def test_the_analyzer_finds_a_leak(tmp_path: Path) -> None:
    source = tmp_path / "leak.m"
    source.write_text(LEAK, encoding="utf-8")
    (warning,) = analyse(source, tmp_path)
    assert "Potential leak of an object" in warning
    source.write_text(LEAK.replace("return [copy length];", "[copy autorelease];\n    return [copy length];"), "utf-8")
    assert analyse(source, tmp_path) == []


@pytest.mark.parametrize("source", sorted((ROOT / "csrc").rglob("*.m")), ids=lambda path: path.name)
def test_the_analyzer_finds_nothing(tmp_path: Path, source: Path) -> None:
    assert analyse(source, tmp_path) == []
