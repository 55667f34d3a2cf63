"""What computes: devices by name, and the settings of the C core that come from the environment."""

from __future__ import annotations

import functools
import os
import platform
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, get_args

from anellm.errors import InvalidError, UnavailableError

DEVICES = ("auto", "cpu", "ane", "ane-sim")
Dtype = Literal["fp32", "bf16"]
DTYPES: tuple[Dtype, ...] = get_args(Dtype)  # what matrix products can multiply; in the order of enum anellm_dtype
MAX_THREADS = 256
NUMERICS = ("exact", "fast")
SOFTMAX = ("ane", "cpu")
FALLBACK = ("cpu", "error")
MODES = ("dynamic", "static")
QOS = ("auto", "background", "utility", "default", "user-initiated", "user-interactive")  # enum anellm_ane_qos_class


@dataclass(frozen=True, kw_only=True)
class AneOptions:
    """How a model computes on a Neural Engine, real (``ane``) or simulated (``ane-sim``).

    Attributes:
        chip: what is simulated: m1, m2, m3, m3ultra, m4, m5, m6, or the path of a ``.json`` file that describes one.
        numerics: of the simulation: "exact" is the engine's arithmetic for every product; "fast" takes an fp32 product
            where a bound proves that it makes no difference that matters.
        scaling: scale gradients by powers of two, so that the engine's sums neither lose nor overflow them, and the
            loss as well (see anellm.loss_scaler). Without it training stalls: it is there to show that.
        softmax: where attention's softmax and its causal mask are computed: "ane" or "cpu".
        fallback: what to do when a program is refused: "cpu" lets the CPU compute its part of the blocks, with a
            FallbackWarning; "error" raises a CompileError.
        mode: "dynamic": weights are inputs of programs that are compiled once; "static": each layer has programs with
            its weights in them, which are compiled again when the weights have changed. Not with softmax="cpu".
        compile_budget: programs that may be compiled in this process; more is an UnsupportedError. 0: no limit of ours.
        qos: quality of service that a real engine's calls ask macOS for, one of QOS; "auto": ANELLM_ANE_QOS, else the
            fastest by measurement, on first use.

    Raises:
        InvalidError: naming the field, what was expected and what was found.
    """

    chip: str = "m4"
    numerics: str = "fast"
    scaling: bool = True
    softmax: str = "ane"
    fallback: str = "cpu"
    mode: str = "dynamic"
    compile_budget: int = 0
    qos: str = "auto"

    def __post_init__(self) -> None:
        if not isinstance(self.chip, str) or not self.chip or "\0" in self.chip:
            raise InvalidError(f"chip: expected a name or the path of a .json file, found {self.chip!r}")
        choices = {"numerics": NUMERICS, "softmax": SOFTMAX, "fallback": FALLBACK, "mode": MODES, "qos": QOS}
        for name, known in choices.items():
            value = getattr(self, name)
            if value not in known:
                raise InvalidError(f"{name}: expected one of {', '.join(known)}, found {value!r}")
        if not isinstance(self.scaling, bool):
            raise InvalidError(f"scaling: expected true or false, found {self.scaling!r}")
        if self.mode == "static" and self.softmax == "cpu":
            raise InvalidError('softmax: expected "ane" with mode "static", found "cpu": there are no programs for it')
        budget = self.compile_budget
        if not isinstance(budget, int) or isinstance(budget, bool) or not 0 <= budget < 2**31:
            raise InvalidError(f"compile_budget: expected a number from 0 on, found {budget!r}")


def no_ane_platform() -> str | None:
    """Return why the Apple Neural Engine can be on no machine of this kind; None: it can."""
    if platform.system() != "Darwin":
        return f"the Apple Neural Engine needs macOS on Apple silicon; this is {platform.system()}"
    if platform.machine() != "arm64":
        return f"the Apple Neural Engine needs Apple silicon; this Mac, or this Python, is {platform.machine()}"
    return None


def why_no_ane() -> str | None:
    """Return why the device ``ane`` cannot be used on this machine; None: it can be opened."""
    if device_library() is None and (why := no_ane_platform()) is not None:
        return why
    from anellm.ane import AneDevice

    try:
        AneDevice("ane", AneOptions())
    except UnavailableError as error:
        return str(error)
    return None


def device_library() -> str | None:
    """Return the path of a library that is the device ``ane``; None: the built-in one is.

    ANELLM_ANE_DEVICE names it. Where there is no built-in one, ``libane_device.so`` beside the framework that
    ANELLM_ANE_FRAMEWORK names will do: tests/apple/build.sh leaves both in a folder. Such a library exports
    ``anellm_ane_device_open`` (csrc/backend/ane/device.h).
    """
    path = os.environ.get("ANELLM_ANE_DEVICE", "").strip()
    if path:
        return os.path.abspath(path)
    framework = os.environ.get("ANELLM_ANE_FRAMEWORK", "").strip()
    beside = os.path.join(os.path.dirname(os.path.abspath(framework)), "libane_device.so")
    return beside if framework and no_ane_platform() is not None and os.path.isfile(beside) else None


def named_device(name: str) -> str:
    """Return the device that a name stands for, whether it can be used here or not: see resolve_device().

    Raises:
        InvalidError: when there is no device of that name.
    """
    if name == "auto":
        name = os.environ.get("ANELLM_DEVICE", "").strip() or "auto"
    if name not in DEVICES:
        raise InvalidError(f"device: expected one of {', '.join(DEVICES)}, found {name!r}")
    return "cpu" if name == "auto" else name


def resolve_device(name: str) -> str:
    """Return the device that a name stands for: "auto" takes ANELLM_DEVICE, and else the CPU.

    The verbs ``train`` and ``evaluate`` ask anellm.ane_auto before: making a model starts no self-test.

    Raises:
        InvalidError: when there is no device of that name.
        UnavailableError: when it cannot be used on this machine; says why.
    """
    name = named_device(name)
    if name == "ane" and device_library() is None and (why := no_ane_platform()) is not None:
        raise UnavailableError(f"device ane: {why}; ane-sim simulates it")
    return name


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
    from anellm._ffi import check, lib

    found = cpu_variant()
    if name == found:
        return None
    if os.environ.get("ANELLM_CPU", "").strip() not in ("", "auto"):
        return f"CPU kernels: the run began with {name}, ANELLM_CPU asks for {found}"
    try:
        check(lib.anellm_cpu_set_variant(name.encode()))
    except (InvalidError, UnavailableError):
        return f"CPU kernels: the run began with {name}, which this machine lacks; it goes on with {found}"
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
