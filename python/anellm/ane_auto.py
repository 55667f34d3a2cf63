"""What ``--device auto`` stands for where there may be a Neural Engine: the engine, once a self-test has passed on it.

The engine is reached through a private framework. Nobody is defaulted onto it before a small version of
``info --ane-selftest`` has passed on this machine, under this build of its system, with this version of anellm. The
test runs in a process of its own: should the framework crash or hang, that is a result like another. The result is
kept in the user's cache folder, whatever it is, so there is one test for each of these.

``python -m anellm.ane_auto`` is that process.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import platform
import signal
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NamedTuple, TypeVar

from anellm import safeio, saferead
from anellm.device import AneOptions, device_library, no_ane_platform
from anellm.errors import AnellmError, DataError, UnavailableError, UnsupportedError
from anellm.options import DeviceOptions

if TYPE_CHECKING:
    from anellm.ane_selftest import Size, Tested
    from anellm.config import ModelConfig

C = TypeVar("C", bound=DeviceOptions)
Say = Callable[[str], None]

LIMIT_SECONDS: Final = 60  # the test takes a few; a compile service that hangs does not come back
_FORMAT: Final = 1
_FROM_OUTSIDE: Final = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)  # no framework ends a process by these
_LONGEST: Final = 600  # characters of a reason
_AGAIN: Final = "`anellm info --ane-selftest` tests again"


class Outcome(NamedTuple):
    """What a self-test came to.

    Attributes:
        passed: whether every program was right.
        why: the first that was not, or what else happened; "" when passed.
        cached: whether it was found in the cache.
    """

    passed: bool
    why: str
    cached: bool = False


class Choice(NamedTuple):
    """What "auto" stands for.

    Attributes:
        device: "ane" or "cpu".
        why: the reason, in words.
    """

    device: str
    why: str


# ---- the cache -------------------------------------------------------------------------------------------------------


def cache_folder() -> Path | None:
    """Return the folder for what can be found out again: ANELLM_CACHE_DIR, else the user's; None without a home."""
    own = os.environ.get("ANELLM_CACHE_DIR", "").strip()
    if own:
        return Path(own).absolute()
    try:
        if platform.system() == "Darwin":
            return Path.home() / "Library" / "Caches" / "anellm"
        base = os.environ.get("XDG_CACHE_HOME", "")  # relative paths in it are to be ignored, says its specification
        return (Path(base) if os.path.isabs(base) else Path.home() / ".cache") / "anellm"
    except RuntimeError:
        return None


def _sysctl(name: str) -> str:
    """Return a text that the macOS kernel has under a name; "" where it has none."""
    import ctypes

    try:
        found = ctypes.create_string_buffer(256)
        size = ctypes.c_size_t(len(found))
        status = ctypes.CDLL(None).sysctlbyname(name.encode(), found, ctypes.byref(size), None, ctypes.c_size_t(0))
    except (AttributeError, OSError):
        return ""
    return found.value.decode(errors="replace") if status == 0 else ""


def system_name() -> str:
    """Return the system with its build, e.g. ``macOS 15.1 (24B83)``."""
    if platform.system() == "Darwin":
        return f"macOS {platform.mac_ver()[0] or 'of unknown version'} ({_sysctl('kern.osversion') or 'unknown build'})"
    return f"{platform.system()} {platform.release()}"


def identity() -> dict[str, Any]:
    """Return what a result holds for: another value of any of these needs another test."""
    from anellm import __version__

    library, stamp = device_library(), None
    if library is not None:
        with contextlib.suppress(OSError):
            found = os.stat(library)
            stamp = [found.st_size, found.st_mtime_ns]
    return {
        "anellm": __version__,
        "system": system_name(),
        "kernel": platform.version(),
        "machine": platform.machine(),
        "chip": _sysctl("machdep.cpu.brand_string"),
        "library": library,
        "library_stamp": stamp,
        "framework": os.environ.get("ANELLM_ANE_FRAMEWORK") or None,
    }


def _place(key: Mapping[str, Any]) -> Path | None:
    folder = cache_folder()
    if folder is None:
        return None
    return folder / f"ane-selftest-{hashlib.sha256(safeio.json_bytes(key)).hexdigest()[:16]}.json"


def _plain(text: str) -> str:
    """Return a text as one line of a limited length that is safe to print."""
    line = " ".join("".join(c if c.isprintable() else " " for c in text).split())
    return line if len(line) <= _LONGEST else line[:_LONGEST] + "..."


def recall(key: Mapping[str, Any]) -> Outcome | None:
    """Return the result that is kept for a key; None when there is none, or what is there is damaged or foreign."""
    path = _place(key)
    try:
        if path is None:
            return None
        found = saferead.read_json(path, DataError, 1 << 16)
    except (OSError, AnellmError):
        return None
    passed, why = found.get("passed"), found.get("why")
    if found.get("format") != _FORMAT or found.get("key") != key:
        return None
    if not isinstance(passed, bool) or not isinstance(why, str) or passed == bool(why):
        return None
    return Outcome(passed, _plain(why), cached=True)


def keep(key: Mapping[str, Any], outcome: Outcome) -> None:
    """Keep a result; where that cannot be, the next process tests again."""
    path = _place(key)
    values = {"format": _FORMAT, "key": key, "passed": outcome.passed, "why": outcome.why}
    values["tested"] = time.strftime("%Y-%m-%dT%H:%M:%S%z")
    with contextlib.suppress(OSError, AnellmError):
        if path is not None:
            safeio.make_directory(path.parent)
            safeio.write_bytes(path, safeio.json_bytes(values))


# ---- the test --------------------------------------------------------------------------------------------------------


def test_size() -> Size:
    """Return what is tested: the programs that training takes by default, of a small model with all its variations."""
    from anellm.ane_selftest import SMALL, Size
    from anellm.mil import ane_programs

    programs = ane_programs(SMALL.config, SMALL.B, SMALL.T)
    return Size("small", SMALL, tuple(p.name for p in programs if p.used(training=True, softmax="ane")))


def judge(rows: Sequence[Tested]) -> Outcome:
    """Return what the rows of a self-test come to; those of other sizes and programs than test_size() do not count."""
    size = test_size()
    rows = [row for row in rows if row.size == size.name and row.program in size.only]
    for row in rows:
        if row.state == "refused":
            return Outcome(False, _plain(f"program {row.program} refused at {row.stage}: {row.refusal}"))
        if row.state != "ok":
            worst = row.worst
            how = f"{worst.bad} values infinite or not written" if worst.error is None else f"{worst.error:.2%} off"
            return Outcome(False, _plain(f"program {row.program} wrong: {worst.name}: {how}"))
    if len(rows) < len(size.only):
        return Outcome(False, f"{len(rows)} of {len(size.only)} programs were tested")
    return Outcome(True, "")


def _child() -> None:
    """Test the device, up to the first program that is not right; name each before it is tried."""
    from anellm.ane import AneDevice
    from anellm.ane_reference import program_inputs
    from anellm.ane_selftest import check_program

    rows: list[Tested] = []
    try:
        device = AneDevice("ane", AneOptions())
        size = test_size()
        values = program_inputs(size.batch)
        for program in size.programs():
            print(f"program {program.name}", flush=True)
            rows.append(check_program(device, None, program, size, values, 1))
            if rows[-1].state != "ok":
                break
        outcome = judge(rows)
    except AnellmError as error:
        outcome = Outcome(False, _plain(str(error)))
    print(json.dumps({"passed": outcome.passed, "why": outcome.why}), flush=True)


def _last_words(lines: list[str], errors: list[str]) -> str:
    """Return where a process ended that did not say how, and what it said last."""
    programs = [line for line in lines if line.startswith("program ")]
    where = f" in {programs[-1]}" if programs else ""
    return where + (f": {errors[-1]}" if errors else "")


def _judge_child(code: int | None, output: str, errors: str) -> Outcome:
    """Return what a process came to; code: None when it was ended at the limit."""
    lines = [line for line in output.splitlines() if line.strip()]
    words = _last_words(lines, [line for line in errors.splitlines() if line.strip()])
    if code is None:
        return Outcome(False, _plain(f"no end after {LIMIT_SECONDS} s{words}"))
    if code < 0:
        name = signal.Signals(-code).name if -code in set(signal.Signals) else f"signal {-code}"
        return Outcome(False, _plain(f"the process that tested it was ended by {name}{words}"))
    if code == 0 and lines:
        with contextlib.suppress(ValueError, KeyError, TypeError):
            found = json.loads(lines[-1])
            passed, why = found["passed"], found["why"]
            if isinstance(passed, bool) and isinstance(why, str) and passed != bool(why):
                return Outcome(passed, _plain(why))
    return Outcome(False, _plain(f"the process that tested it ended with code {code}{words}"))


def run_selftest() -> Outcome:
    """Test the engine in a process of its own, for LIMIT_SECONDS at most.

    Raises:
        OSError: when no process can be started, or somebody ended it.
    """
    import subprocess
    import tempfile

    if not sys.executable:
        raise FileNotFoundError("no Python to start")
    root = str(Path(__file__).resolve().parents[1])
    paths = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH", "")]))
    with tempfile.TemporaryFile() as output, tempfile.TemporaryFile() as errors:
        # -P: nothing in the folder where the user happens to be is imported.
        child = subprocess.Popen(
            [sys.executable, "-P", "-m", "anellm.ane_auto"],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=errors,
            env={**os.environ, "PYTHONPATH": paths},
        )
        code: int | None = None
        try:
            code = child.wait(LIMIT_SECONDS)
        except subprocess.TimeoutExpired:
            pass
        finally:
            if child.returncode is None:
                child.kill()
                # One that is stuck inside the kernel does not even end then: it is not waited for.
                with contextlib.suppress(subprocess.TimeoutExpired):
                    child.wait(5)
        texts = []
        for file in (output, errors):
            file.seek(0)
            texts.append(file.read(1 << 20).decode(errors="replace"))
    if code is not None and -code in _FROM_OUTSIDE:
        raise InterruptedError(f"its process was ended by {signal.Signals(-code).name}")
    return _judge_child(code, *texts)


# ---- the choice ------------------------------------------------------------------------------------------------------


def choose(*, test: bool, say: Say | None = None) -> Choice:
    """Return what "auto" stands for on this machine.

    Args:
        test: run the self-test when its result is not known; else the CPU is the answer then.
        say: told before a test that takes seconds.
    """
    why = no_ane_platform()
    if why is not None and device_library() is None:
        return Choice("cpu", why)
    key = identity()
    outcome, system = recall(key), key["system"]
    if outcome is None and test:
        if say is not None:
            say(f"testing the Neural Engine, once on {system}: some seconds, {LIMIT_SECONDS} at most")
        try:
            outcome = run_selftest()
        except OSError as error:
            return Choice("cpu", f"the Neural Engine's self-test could not be run: {error.strerror or error}")
        keep(key, outcome)
    if outcome is None:
        return Choice("cpu", f"the Neural Engine's self-test has not run on {system}: `anellm train` runs it first")
    known = ", as known from before" if outcome.cached else ""
    if outcome.passed:
        return Choice("ane", f"the Neural Engine's self-test passed on {system}{known}")
    return Choice("cpu", f"the Neural Engine's self-test failed on {system}{known}: {outcome.why}; {_AGAIN}")


def _check_model(choice: Choice, shape: ModelConfig, batch_size: int, seq_len: int, *, training: bool) -> Choice:
    """Return the CPU in place of an engine that a model cannot be on."""
    from anellm.ane import check_usable
    from anellm.model import memory

    if choice.device != "ane":
        return choice
    try:
        memory(shape, batch_size, seq_len, training=training, ane=AneOptions())
        check_usable("ane", None)
    except (UnsupportedError, UnavailableError) as error:
        return Choice("cpu", _plain(str(error)))
    return choice


def settle(
    config: C,
    shape: ModelConfig,
    batch_size: int,
    seq_len: int,
    *,
    training: bool,
    stay: str | None = None,
    test: bool = True,
    say: Say | None = None,
) -> C:
    """Return a config that says "ane" where it said "auto" and the engine is what computes.

    Where there can be no engine, nothing is done, and nothing is said.

    Args:
        config: the options.
        shape: the model.
        batch_size: sequences (B) in a forward pass.
        seq_len: tokens (T) in each.
        training: whether backward passes follow.
        stay: why it is to be the CPU, whatever the engine can do; None: it need not.
        test: as for choose().
        say: is told what was chosen, and why.
    """
    if config.device != "auto" or os.environ.get("ANELLM_DEVICE", "").strip():
        return config
    if no_ane_platform() is not None and device_library() is None:
        return config
    if stay is not None:
        choice = Choice("cpu", stay)
    else:
        choice = _check_model(choose(test=test, say=say), shape, batch_size, seq_len, training=training)
    if say is not None:
        say(f"{choice.device}: {choice.why}")
    return dataclasses.replace(config, device="ane") if choice.device == "ane" else config


if __name__ == "__main__":
    _child()
