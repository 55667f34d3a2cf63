"""Energy and heat of the machine, where they can be known: what a run took, for metrics.jsonl and its summary.

Nothing here is a reason for a run to stop: what is missing or fails is left out.
"""

from __future__ import annotations

import contextlib
import io
import os
import plistlib
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Final, NamedTuple, Protocol, cast
from xml.parsers.expat import ExpatError

from anellm._ffi import Handle, check, ffi, lib, text
from anellm.device import device_library
from anellm.errors import AnellmError

UNITS: Final = ("cpu", "gpu", "ane", "dram")
THERMAL_STATES: Final = ("nominal", "fair", "serious", "critical")  # in the order of enum anellm_thermal
POWERCAP: Final = Path("/sys/class/powercap")
_POWERMETRICS: Final = ("/usr/bin/powermetrics", "--samplers", "cpu_power", "-i", "500", "-f", "plist")
_MAX_PLIST: Final = 1 << 20
_PATIENCE = 5.0  # seconds for a child process to end


class Reading(NamedTuple):
    """What is known at a moment.

    Attributes:
        source: what counts the energy: "ioreport", "powermetrics", "rapl" (all of the machine), or "process" (the CPU's
            for this process alone); "" where nothing does.
        joules: what each of UNITS took since the source was opened, those that are counted.
        thermal_state: one of THERMAL_STATES; None where it is not known.
    """

    source: str
    joules: Mapping[str, float]
    thermal_state: str | None


class Source(Protocol):
    """What counts energy."""

    def read(self) -> Reading:
        """Return what is known now.

        Raises:
            AnellmError, OSError, ValueError: when it stopped counting.
        """
        ...

    def close(self) -> None:
        """Stop counting; calling it again does nothing."""
        ...


# ---- sources ---------------------------------------------------------------------------------------------------------


class NativeSource:
    """The C core's: IOReport, the process' own count, and the thermal state, on macOS."""

    def __init__(self, library: str | None = None) -> None:
        """Open it.

        Args:
            library: a library that counts in its place; for tests.

        Raises:
            UnavailableError: when the C core counts nothing on this system.
        """
        out = ffi.new("anellm_power **")
        check(lib.anellm_power_open(out, ffi.NULL if library is None else library.encode()))
        self._handle = Handle(out[0], lib.anellm_power_close, "power")

    def read(self) -> Reading:
        """Return what is known now."""
        found = ffi.new("anellm_power_reading *")
        check(lib.anellm_power_read(self._handle.pointer, found))
        joules = {unit: float(getattr(found, unit)) for unit in UNITS if getattr(found, unit) >= 0}
        known = 0 <= found.thermal < len(THERMAL_STATES)
        return Reading(text(found.source), joules, THERMAL_STATES[found.thermal] if known else None)

    def close(self) -> None:
        """Free it."""
        self._handle.close()


class _Counter:
    """A count in a file, of microjoules; it begins again at 0 behind its range."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / "energy_uj"
        self._range = int((folder / "max_energy_range_uj").read_text(encoding="ascii"))
        self._last = self._count()
        self.joules = 0.0

    def _count(self) -> int:
        return int(self._path.read_text(encoding="ascii"))

    def read(self) -> float:
        now = self._count()
        self.joules += (now - self._last if now >= self._last else now + self._range - self._last) * 1e-6
        self._last = now
        return self.joules


class RaplSource:
    """Linux' powercap folders: the packages, and their memory where it counts apart.

    Since Linux 5.10 only root reads them, unless the system's owner lets others. A part of a package (cores, uncore) is
    in the package's count, and "psys" has the packages in its own.
    """

    def __init__(self, root: Path | None = None) -> None:
        """Find the counters.

        Args:
            root: the folder of the counters; None: the system's.

        Raises:
            OSError, ValueError: when there is none that can be read.
        """
        root = POWERCAP if root is None else root
        self._counters: dict[str, list[_Counter]] = {}
        for folder in sorted(root.glob("intel-rapl:*")):  # AMD's are called so too
            with contextlib.suppress(OSError, ValueError):
                name = (folder / "name").read_text(encoding="ascii").strip()
                unit = "cpu" if name.startswith("package") else "dram" if name == "dram" else None
                if unit is not None:
                    counter = _Counter(folder)
                    self._counters.setdefault(unit, []).append(counter)
        if not self._counters:
            raise FileNotFoundError(f"no energy counters can be read in {root}")

    def read(self) -> Reading:
        """Return what is known now."""
        joules = {unit: sum(counter.read() for counter in found) for unit, found in self._counters.items()}
        return Reading("rapl", joules, None)

    def close(self) -> None:
        """Do nothing."""


def split_plists(stream: io.BufferedReader) -> Iterator[bytes]:
    """Yield the property lists that powermetrics writes: a NUL stands before each but the first."""
    rest = b""
    while chunk := stream.read1(1 << 16):
        *whole, rest = (rest + chunk).split(b"\0")
        yield from whole
        if rest.rstrip().endswith(b"</plist>"):
            yield rest
            rest = b""
        if len(rest) > _MAX_PLIST:
            return


def powermetrics_watts(plist: bytes) -> dict[str, float] | None:
    """Return the watts of each unit that a property list of powermetrics names; None when it is none."""
    try:
        processor = plistlib.loads(plist.strip())["processor"]
        found = {unit: processor.get(f"{unit}_power") for unit in ("cpu", "gpu", "ane")}
    except (ExpatError, ValueError, LookupError, TypeError, AttributeError, OverflowError):
        return None  # plistlib lets through what its parsers raise
    known = {unit: mw / 1e3 for unit, mw in found.items() if isinstance(mw, int | float) and 0 <= mw < 1e7}
    return known or None


class PowermetricsSource:
    """Apple's tool, for root: what it last said is taken to hold until it says something else."""

    def __init__(self, command: tuple[str, ...] = _POWERMETRICS) -> None:
        """Start it.

        Raises:
            OSError: when it cannot be started.
        """
        self._process = subprocess.Popen(  # noqa: S603  Apple's tool, by its full path
            command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, start_new_session=True
        )  # a session of its own: Ctrl-C is for the run, which stops it afterwards
        self._lock = threading.Lock()
        self._watts: dict[str, float] = {}
        self._since = time.monotonic()
        self._joules: dict[str, float] = {}
        self._thread = threading.Thread(target=self._listen, name="powermetrics", daemon=True)
        self._thread.start()

    def _listen(self) -> None:
        for plist in split_plists(cast("io.BufferedReader", self._process.stdout)):
            watts = powermetrics_watts(plist)
            if watts is not None:
                with self._lock:
                    self._count_on()
                    self._watts = watts
        with self._lock:
            self._count_on()
            self._watts = {}

    def _count_on(self) -> None:
        now = time.monotonic()
        for unit, watts in self._watts.items():
            self._joules[unit] = self._joules.get(unit, 0.0) + watts * (now - self._since)
        self._since = now

    def read(self) -> Reading:
        """Return what is known now; nothing until the tool has spoken, or after it has ended."""
        with self._lock:
            self._count_on()
            return Reading("powermetrics" if self._watts else "", dict(self._joules) if self._watts else {}, None)

    def close(self) -> None:
        """End it."""
        if self._process.poll() is None:
            self._process.terminate()
        try:
            self._process.wait(timeout=_PATIENCE)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._thread.join(timeout=_PATIENCE)
        if self._process.stdout is not None:
            self._process.stdout.close()


class _WithPowermetrics:
    """The C core's thermal state, with powermetrics' energy."""

    def __init__(self, native: Source, other: Source) -> None:
        self._native, self._other = native, other

    def read(self) -> Reading:
        energy = self._other.read()
        native = self._native.read()
        return energy._replace(thermal_state=native.thermal_state) if energy.source else native

    def close(self) -> None:
        self._other.close()
        self._native.close()


def open_source() -> Source | None:
    """Return what counts energy here; None where nothing does, or ANELLM_POWER is "off".

    On macOS that is IOReport; where it says nothing powermetrics, for root; else the process' own count.
    """
    if os.environ.get("ANELLM_POWER", "").strip() == "off":
        return None
    with contextlib.suppress(AnellmError):
        native = NativeSource(device_library())
        if native.read().source != "ioreport" and sys.platform == "darwin" and os.geteuid() == 0:
            with contextlib.suppress(OSError):
                return _WithPowermetrics(native, PowermetricsSource())
        return native
    with contextlib.suppress(OSError, ValueError):
        return RaplSource()
    return None


# ---- a run -----------------------------------------------------------------------------------------------------------


class _Sums:
    """Energy and time of some stretches, and the tokens trained on in them."""

    def __init__(self) -> None:
        self.joules: dict[str, float] = {}
        self.seconds = 0.0
        self.tokens = 0

    def add(self, joules: Mapping[str, float], seconds: float) -> None:
        for unit, value in joules.items():
            self.joules[unit] = self.joules.get(unit, 0.0) + value
        self.seconds += seconds

    def values(self) -> dict[str, float]:
        """Return the means that a record names."""
        if not self.joules or self.seconds <= 0:
            return {}
        total = sum(self.joules.values())
        watts = {"watts": total / self.seconds}
        watts |= {f"watts_{unit}": self.joules[unit] / self.seconds for unit in UNITS if unit in self.joules}
        return watts | ({"joules_per_token": total / self.tokens} if self.tokens else {})


class EnergyRun:
    """What a run's steps took. What lies between them (evaluations, samples, checkpoints) is not counted."""

    def __init__(self, source: Source | None, clock: Callable[[], float] = time.monotonic) -> None:
        """Begin with nothing.

        Args:
            source: what counts; it is closed by close(). None: nothing is ever known.
            clock: seconds; for tests.
        """
        self._source, self._clock = source, clock
        self._begun: tuple[Reading, float] | None = None  # the stretch that is open
        self._since_log, self._all = _Sums(), _Sums()
        self._name = ""
        self._worst: str | None = None

    def _read(self) -> Reading | None:
        if self._source is None:
            return None
        try:
            return self._source.read()
        except (AnellmError, OSError, ValueError):
            self.close()
            return None

    def begin_step(self) -> None:
        """Go on counting."""
        if self._begun is None and (reading := self._read()) is not None:
            self._begun = reading, self._clock()

    def pause(self) -> Reading | None:
        """Count up to now, until the next step begins; return what was read."""
        if self._begun is None:
            return None
        (before, start), self._begun = self._begun, None
        reading, seconds = self._read(), self._clock() - start
        if reading is None:
            return None
        state = reading.thermal_state
        if state is not None and (
            self._worst is None or THERMAL_STATES.index(state) > THERMAL_STATES.index(self._worst)
        ):
            self._worst = state
        if reading.source and reading.source == before.source:
            self._name = reading.source
            both = reading.joules.keys() & before.joules.keys()
            joules = {unit: max(0.0, reading.joules[unit] - before.joules[unit]) for unit in both}
            for sums in (self._since_log, self._all):
                sums.add(joules, seconds)
        return reading

    def step_values(self, tokens: int, *, logged: bool) -> dict[str, Any]:
        """Return what metrics.jsonl says about a step besides: means since the last step that was logged.

        Args:
            tokens: trained on in the step.
            logged: whether this one is.
        """
        if self._source is None:
            return {}
        self._since_log.tokens += tokens
        self._all.tokens += tokens
        if not logged:
            return {}
        reading = self.pause()
        values: dict[str, Any] = dict(self._since_log.values())
        if values:
            values["power_source"] = self._name
        if reading is not None and reading.thermal_state is not None:
            values["thermal_state"] = reading.thermal_state
        self._since_log = _Sums()
        return values

    def summary(self) -> dict[str, Any]:
        """Return what the run's summary says, over the steps of this process; nothing where nothing is known."""
        self.pause()
        values: dict[str, Any] = dict(self._all.values())
        if values:
            values = {"joules": sum(self._all.joules.values()), **values, "power_source": self._name}
        return values | ({} if self._worst is None else {"worst_thermal_state": self._worst})

    def close(self) -> None:
        """Stop counting; calling it again does nothing."""
        source, self._source, self._begun = self._source, None, None
        if source is not None:
            source.close()


def describe_energy(summary: Mapping[str, Any]) -> str:
    """Return EnergyRun.summary() in a line; "" where nothing is known."""
    parts = []
    if "watts" in summary:
        each = ", ".join(f"{u} {summary[f'watts_{u}']:.2f}" for u in UNITS if f"watts_{u}" in summary)
        of = "this process' CPU time" if summary["power_source"] == "process" else each
        parts.append(
            f"{summary['joules']:.4g} J in the steps, {summary['watts']:.2f} W ({of}; {summary['power_source']})"
        )
    if "joules_per_token" in summary:
        parts.append(f"{summary['joules_per_token']:.3g} J a token")
    if summary.get("worst_thermal_state", "nominal") != "nominal":
        parts.append(f"thermal state up to {summary['worst_thermal_state']}")
    return ", ".join(parts)
