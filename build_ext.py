"""Build anellm._anellm, the C core under cffi (API mode, one abi3 binary for Python 3.11 and newer).

setuptools runs this through ``cffi_modules`` in setup.py. The C declarations are not written twice: the part of
``csrc/anellm.h`` between its cffi markers is the cdef, verbatim.

On macOS the Objective-C sources are built as well, and Apple's frameworks are linked.

Environment:
    ANELLM_CFLAGS   extra flags for compiler and linker, e.g. ``-fsanitize=address,undefined -g -O1``
    ANELLM_TARGET   the system to build for if it is not this one: ``darwin``, with a cross compiler in ``CC`` and
                    ``LDSHARED`` (tests/apple/macstub/wheel.sh)
"""

from __future__ import annotations

import os
import shlex
import sys
from pathlib import Path

from cffi import FFI
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
CSRC = ROOT / "csrc"
DARWIN = os.environ.get("ANELLM_TARGET", sys.platform) == "darwin"
FRAMEWORKS = ("Accelerate", "CoreFoundation", "Foundation", "IOSurface")

# -ffast-math and -Ofast are forbidden: loading such a library flushes NumPy's subnormals in the whole process.
COMPILE_ARGS = [
    "-std=gnu11",
    "-O3",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-ffp-contract=fast",
    "-fvisibility=hidden",
    "-pthread",
    "-Wall",
    "-Wextra",
]
LINK_ARGS = ["-pthread"]
if DARWIN:
    LINK_ARGS += [word for name in FRAMEWORKS for word in ("-framework", name)]


def cdef() -> str:
    """Return the part of csrc/anellm.h between its cffi markers."""
    text = (CSRC / "anellm.h").read_text(encoding="utf-8")
    start, end = "/* cffi:begin */", "/* cffi:end */"
    if text.count(start) != 1 or text.count(end) != 1:
        raise SystemExit(f"csrc/anellm.h must contain {start} and {end} exactly once")
    return text.split(start)[1].split(end)[0]


def sources() -> list[str]:
    """Return every source of the core, relative to this folder (setuptools wants relative paths)."""
    suffixes = {".c", ".m"} if DARWIN else {".c"}
    found = (p.relative_to(ROOT).as_posix() for p in CSRC.rglob("*") if p.suffix in suffixes)
    return sorted(name for name in found if not name.startswith("csrc/fuzz/"))  # those have a main of their own


def headers() -> list[str]:
    return sorted(p.relative_to(ROOT).as_posix() for p in CSRC.rglob("*") if p.suffix in {".h", ".inc"})


class BuildExt(build_ext):
    """Rebuild when a header changes: setuptools looks at ``depends``, which cffi does not fill in."""

    def build_extension(self, ext):  # type: ignore[no-untyped-def]
        ext.depends = [*ext.depends, *headers(), "build_ext.py"]
        super().build_extension(ext)

    def build_extensions(self):  # type: ignore[no-untyped-def]
        """Compile Objective-C with retain and release written out: an extension has one list of flags for all files."""
        compile_one = self.compiler._compile

        def with_flags_of_the_file(obj, src, ext, cc_args, extra_postargs, pp_opts):
            flags = [*extra_postargs, "-fno-objc-arc"] if ext == ".m" else extra_postargs
            return compile_one(obj, src, ext, cc_args, flags, pp_opts)

        self.compiler._compile = with_flags_of_the_file
        super().build_extensions()


extra = shlex.split(os.environ.get("ANELLM_CFLAGS", ""))
ffibuilder = FFI()
ffibuilder.cdef(cdef())
ffibuilder.set_source(
    "anellm._anellm",
    '#include "anellm.h"',
    sources=sources(),
    include_dirs=["csrc"],
    extra_compile_args=[*COMPILE_ARGS, *extra],
    extra_link_args=[*LINK_ARGS, *extra],
    libraries=["objc"] if DARWIN else ["m", "dl"],
    py_limited_api=True,
    define_macros=[("Py_LIMITED_API", "0x030b0000"), ("_GNU_SOURCE", None)],
)

if __name__ == "__main__":
    ffibuilder.compile(verbose=True)
