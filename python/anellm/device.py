"""What computes: devices by name, and the settings of the C core that come from the environment."""

from __future__ import annotations

import functools
import os
import platform
from collections.abc import Mapping
from typing import Literal, get_args

from anellm.errors import InvalidError, UnavailableError

DEVICES = ("auto", "cpu", "ane")
Dtype = Literal["fp32", "bf16"]
DTYPES: tuple[Dtype, ...] = get_args(Dtype)  # what matrix products can multiply; in the order of enum anellm_dtype
MAX_THREADS = 256


def why_no_ane() -> str:
    """Return why the Apple Neural Engine is not used on this machine."""
    if platform.system() != "Darwin":
        return f"the Apple Neural Engine needs macOS on Apple silicon; this is {platform.system()}"
    if platform.machine() != "arm64":
        return f"the Apple Neural Engine needs Apple silicon; this Mac, or this Python, is {platform.machine()}"
    return "this version of anellm has no backend for the Apple Neural Engine: it computes on the CPU"


def resolve_device(name: str) -> str:
    """Return the device that a name stands for: "auto" takes ANELLM_DEVICE, and else the CPU.

    Raises:
        InvalidError: when there is no device of that name.
        UnavailableError: when it cannot be used on this machine; says why.
    """
    if name == "auto":
        name = os.environ.get("ANELLM_DEVICE", "").strip() or "auto"
    if name not in DEVICES:
        raise InvalidError(f"device: expected one of {', '.join(DEVICES)}, found {name!r}")
    if name == "ane":
        raise UnavailableError(f"device ane: {why_no_ane()}")
    return "cpu"


def environment_threads(environ: Mapping[str, str] = os.environ) -> int | None:
    """Return the threads that the environment asks for: ANELLM_THREADS, else OMP_NUM_THREADS; None when neither does.

    OMP_NUM_THREADS belongs to OpenMP: of a list ("4,2") the first counts, and what does not fit is left alone.

    Raises:
        InvalidError: when ANELLM_THREADS is not a number from 0 (every CPU) to 256.
    """
    ours = environ.get("ANELLM_THREADS", "").strip()
    if ours:
        if not (ours.isascii() and ours.isdecimal() and int(ours) <= MAX_THREADS):
            raise InvalidError(
                f"environment variable ANELLM_THREADS: expected a number from 0 to {MAX_THREADS}, found {ours!r}"
            )
        return int(ours)
    first = environ.get("OMP_NUM_THREADS", "").split(",")[0].strip()
    usable = first.isascii() and first.isdecimal() and 1 <= int(first) <= MAX_THREADS
    return int(first) if usable else None


@functools.cache
def configure() -> None:
    """Apply ANELLM_CPU and the environment's threads to the C core, once in a process.

    Raises:
        InvalidError: on a bad value.
        UnavailableError: when this machine cannot run the CPU variant asked for.
    """
    from anellm._ffi import check, lib

    check(lib.anellm_cpu_init())
    threads = environment_threads()
    if threads:
        check(lib.anellm_set_threads(threads))


def cpu_variant() -> str:
    """Return the tier of CPU kernels in force: "portable", "avx2", ... (docs/performance.md)."""
    from anellm._ffi import lib, text

    configure()
    return text(lib.anellm_cpu_variant())


def follow_cpu_variant(name: str) -> str | None:
    """Use the tier that a run began with, so that it goes on exactly; return why not, or None.

    ANELLM_CPU comes first: what the user forces stays in force.
    """
    from anellm._ffi import check, lib, text

    found = cpu_variant()
    if name == found:
        return None
    if os.environ.get("ANELLM_CPU", "").strip() not in ("", "auto"):
        return f"CPU kernels: the run began with {name}, ANELLM_CPU asks for {found}"
    if name not in text(lib.anellm_cpu_variants()).split(","):
        return f"CPU kernels: the run began with {name}, which this machine lacks; it goes on with {found}"
    check(lib.anellm_cpu_set_variant(name.encode()))
    return None


def set_threads(threads: int) -> int:
    """Set the size of the thread pool, which all models share; results do not depend on it.

    Args:
        threads: 1 to 256, the calling one included; 0 takes every CPU that this process may use.

    Returns:
        The size set.

    Raises:
        InvalidError: on a number out of range.
    """
    from anellm._ffi import check, lib

    configure()
    if threads == 0:
        affinity = getattr(os, "sched_getaffinity", None)
        threads = min(MAX_THREADS, len(affinity(0)) if affinity else (os.cpu_count() or 1))
    check(lib.anellm_set_threads(threads))
    return int(lib.anellm_get_threads())
