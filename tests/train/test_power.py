"""Energy and heat: what counts them, what a run makes of it, and that nothing is lost where nothing is known."""

from __future__ import annotations

import io
import json
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from anellm import info, power, train
from anellm._ffi import check, ffi, lib
from anellm.errors import InvalidError, UnavailableError
from anellm.power import (
    EnergyRun,
    NativeSource,
    PowermetricsSource,
    RaplSource,
    Reading,
    describe_energy,
    open_source,
    powermetrics_watts,
    split_plists,
)

# ---- powercap ----------------------------------------------------------------------------------------------------


def counter(root: Path, folder: str, name: str, count: int, limit: int = 1_000_000) -> Path:
    """Write one of the system's folders, or what it counts."""
    path = root / folder
    path.mkdir(parents=True, exist_ok=True)
    for file, value in (("name", name), ("energy_uj", count), ("max_energy_range_uj", limit)):
        (path / file).write_text(f"{value}\n")
    return path


@pytest.fixture
def powercap(tmp_path: Path) -> Path:
    """Return the folders of a machine with two packages, whose parts must not be counted twice."""
    root = tmp_path / "powercap"
    counter(root, "intel-rapl:0", "package-0", 900_000)
    counter(root, "intel-rapl:0:0", "core", 10)
    counter(root, "intel-rapl:0:1", "dram", 5_000)
    counter(root, "intel-rapl:1", "package-1", 100_000)
    counter(root, "intel-rapl:2", "psys", 10)
    counter(root, "intel-rapl-mmio:0", "package-0", 10)
    (root / "dtpm").mkdir()
    return root


def test_powercap(powercap: Path) -> None:
    source = RaplSource(powercap)
    assert source.read() == Reading("rapl", {"cpu": 0.0, "dram": 0.0}, None)
    counter(powercap, "intel-rapl:0", "package-0", 950_000)
    counter(powercap, "intel-rapl:0:0", "core", 999_999)
    counter(powercap, "intel-rapl:0:1", "dram", 25_000)
    counter(powercap, "intel-rapl:2", "psys", 999_999)
    assert source.read().joules == pytest.approx({"cpu": 0.05, "dram": 0.02})
    counter(powercap, "intel-rapl:0", "package-0", 30_000)  # begins again behind its range
    counter(powercap, "intel-rapl:1", "package-1", 101_000)
    assert source.read().joules == pytest.approx({"cpu": 0.05 + 0.08 + 0.001, "dram": 0.02})


@pytest.mark.parametrize("damage", ["energy_uj", "max_energy_range_uj", "name"])
def test_powercap_that_cannot_be_read(damage: str, tmp_path: Path) -> None:
    with pytest.raises(OSError, match="no energy counters"):
        RaplSource(tmp_path / "nowhere")
    path = counter(tmp_path, "intel-rapl:0", "package-0", 1)
    (path / damage).unlink()
    with pytest.raises(OSError, match="no energy counters"):
        RaplSource(tmp_path)
    (path / damage).write_text("many")
    with pytest.raises(OSError, match="no energy counters"):
        RaplSource(tmp_path)
    counter(tmp_path, "intel-rapl:1", "package-1", 1)
    assert RaplSource(tmp_path).read().joules == {"cpu": 0.0}


# ---- powermetrics ------------------------------------------------------------------------------------------------

PLIST = """<?xml version="1.0" encoding="UTF-8"?>
<!DOCTYPE plist PUBLIC "-//Apple//DTD PLIST 1.0//EN" "http://www.apple.com/DTDs/PropertyList-1.0.dtd">
<plist version="1.0">
<dict>
<key>is_delta</key><true/>
<key>elapsed_ns</key><integer>503112417</integer>
<key>timestamp</key><date>2025-01-02T03:04:05Z</date>
<key>processor</key>
<dict>
<key>clusters</key><array><dict><key>name</key><string>E-Cluster</string></dict></array>
<key>ane_energy</key><integer>125</integer>
<key>cpu_energy</key><integer>1000</integer>
<key>cpu_power</key><real>{cpu}</real>
<key>gpu_power</key><real>500.5</real>
<key>ane_power</key><integer>250</integer>
<key>combined_power</key><real>2750.5</real>
</dict>
</dict>
</plist>
"""


def test_powermetrics_watts() -> None:
    assert powermetrics_watts(PLIST.format(cpu=2000).encode()) == {"cpu": 2.0, "gpu": 0.5005, "ane": 0.25}
    without = PLIST.format(cpu="1.5").replace("gpu_power", "other").replace("ane_power", "third")
    assert powermetrics_watts(without.encode()) == {"cpu": 0.0015}


@pytest.mark.parametrize(
    "bad",
    [
        b"",
        b"Second underflow occured.",
        b"bplist00\x00",
        PLIST.format(cpu=1).encode()[:300],
        PLIST.format(cpu=1).replace("processor", "other").encode(),
        PLIST.format(cpu="nan").replace("gpu_power", "g").replace("ane_power", "a").encode(),
        PLIST.format(cpu=-1).replace("gpu_power", "g").replace("ane_power", "a").encode(),
        PLIST.format(cpu="much").encode(),
        PLIST.format(cpu=1).replace("2025-01-02", "some day").encode(),
        PLIST.format(cpu=1).replace("?>", '?><!DOCTYPE a [<!ENTITY b "c">]>').encode(),
        b"<plist version='1.0'><array/></plist>",
        b"<plist version='1.0'><dict><key>processor</key><array/></dict></plist>",
    ],
)
def test_what_is_no_plist_of_powermetrics(bad: bytes) -> None:
    assert powermetrics_watts(bad) is None


class Drops(io.RawIOBase):
    """A pipe that gives few bytes at a time."""

    def __init__(self, data: bytes, size: int) -> None:
        self._parts = iter([data[i : i + size] for i in range(0, len(data), size)])

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: object) -> int:
        part = next(self._parts, b"")
        memoryview(buffer)[: len(part)] = part  # type: ignore[arg-type]
        return len(part)


@pytest.mark.parametrize("size", [7, 64, 100_000])
def test_split_plists(size: int) -> None:
    plists = [PLIST.format(cpu=n).encode() for n in (1, 2, 3)]
    stream = io.BufferedReader(Drops(b"\0".join(plists), size))
    assert [part.strip() for part in split_plists(stream) if part.strip()] == [part.strip() for part in plists]
    endless = io.BufferedReader(Drops(b"x" * (3 << 20), 1 << 16))
    assert list(split_plists(endless)) == []


SCRIPT = """
import sys, time
for cpu in (2000, 4000):
    sys.stdout.write({plist!r}.replace("CPU", str(cpu)) + "\\0")
    sys.stdout.flush()
    time.sleep(0.05)
{end}
"""


def wait_for(source: PowermetricsSource, name: str) -> Reading:
    for _ in range(500):
        if (reading := source.read()).source == name:
            return reading
        time.sleep(0.01)
    pytest.fail(f"no reading of {name!r}")


@pytest.mark.parametrize(
    "end", ["time.sleep(600)", "import signal; signal.signal(15, signal.SIG_IGN)\ntime.sleep(600)"]
)
def test_powermetrics_is_read_and_ended(end: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(power, "_PATIENCE", 0.2)
    script = SCRIPT.format(plist=PLIST.format(cpu="CPU"), end=end)
    source = PowermetricsSource((sys.executable, "-c", script))
    first = wait_for(source, "powermetrics")
    time.sleep(0.1)
    second = source.read()
    for unit, least, most in (("cpu", 2.0, 4.0), ("gpu", 0.5005, 0.5005), ("ane", 0.25, 0.25)):
        assert second.joules[unit] > first.joules[unit] >= 0
        ratio = (second.joules[unit] - first.joules[unit]) / (second.joules["ane"] - first.joules["ane"]) / 4
        assert least - 1e-6 <= ratio <= most + 1e-6
    process = source._process
    assert process.poll() is None
    source.close()
    source.close()
    assert process.poll() is not None


def test_powermetrics_that_ends(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="nowhere"):
        PowermetricsSource((str(tmp_path / "nowhere"),))
    source = PowermetricsSource((sys.executable, "-c", "print('powermetrics must be invoked as the superuser')"))
    source._thread.join(10)
    assert source.read() == Reading("", {}, None)
    source.close()


# ---- which -------------------------------------------------------------------------------------------------------


@pytest.fixture
def _on(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("ANELLM_POWER", "ANELLM_ANE_DEVICE", "ANELLM_DEBUG"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.usefixtures("_on")
def test_open_source(powercap: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(power, "POWERCAP", powercap / "none")
    if sys.platform == "linux":
        assert open_source() is None
        monkeypatch.setattr(power, "POWERCAP", powercap)
        assert isinstance(open_source(), RaplSource)
    monkeypatch.setenv("ANELLM_POWER", "off")
    assert open_source() is None


class Fixed:
    """A source that says what it is told to."""

    def __init__(self, *readings: Reading | Exception) -> None:
        self.readings = list(readings)
        self.closed = 0

    def read(self) -> Reading:
        found = self.readings.pop(0) if len(self.readings) > 1 else self.readings[0]
        if isinstance(found, Exception):
            raise found
        return found

    def close(self) -> None:
        self.closed += 1


@pytest.mark.usefixtures("_on")
@pytest.mark.parametrize(
    ("source", "user", "expected"), [("ioreport", 0, False), ("process", 0, True), ("", 501, False)]
)
def test_powermetrics_is_for_root_without_ioreport(
    source: str, user: int, expected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    native = Fixed(Reading(source, {"cpu": 1.0} if source else {}, "fair"))
    tool = Fixed(Reading("", {}, None), Reading("powermetrics", {"cpu": 7.0}, None))
    monkeypatch.setattr(sys, "platform", "darwin")
    monkeypatch.setattr(os, "geteuid", lambda: user)
    monkeypatch.setattr(power, "NativeSource", lambda _library: native)
    monkeypatch.setattr(power, "PowermetricsSource", lambda: tool)
    found = open_source()
    assert found is not None
    assert (found is native) is not expected
    if expected:
        assert found.read() == native.readings[0]  # until the tool speaks
        assert found.read() == Reading("powermetrics", {"cpu": 7.0}, "fair")
        found.close()
        assert (native.closed, tool.closed) == (1, 1)
    if expected:

        def missing() -> None:
            raise FileNotFoundError

        monkeypatch.setattr(power, "PowermetricsSource", missing)
        assert open_source() is native


def test_the_c_core(tmp_path: Path) -> None:
    with pytest.raises(InvalidError, match="power is NULL"):
        check(lib.anellm_power_open(ffi.NULL, ffi.NULL))
    with pytest.raises(InvalidError, match="power is NULL"):
        check(lib.anellm_power_read(ffi.NULL, ffi.new("anellm_power_reading *")))
    lib.anellm_power_close(ffi.NULL)
    with pytest.raises(UnavailableError, match="energy counters: .*nowhere"):
        NativeSource(str(tmp_path / "nowhere.so"))
    if sys.platform != "darwin":
        with pytest.raises(UnavailableError, match="macOS only"):
            NativeSource()
        with pytest.raises(UnavailableError, match="exports no anellm_power_library_open"):
            NativeSource("libm.so.6")


# ---- a run -------------------------------------------------------------------------------------------------------


def seconds(*times: float) -> Iterator[float]:
    return iter(times)


def test_only_steps_are_counted() -> None:
    clock = iter([0.0, 2.0, 10.0, 11.0, 20.0, 24.0])
    readings = [({"cpu": j, "ane": j / 2}, t) for j, t in zip((0, 8, 100, 106, 1000, 1002), "nnfnnc", strict=True)]
    names = {"n": "nominal", "f": "fair", "c": "critical"}
    energy = EnergyRun(Fixed(*(Reading("ioreport", j, names[t]) for j, t in readings)), lambda: next(clock))
    energy.begin_step()
    energy.begin_step()  # the stretch goes on
    assert energy.step_values(100, logged=False) == {}
    energy.pause()  # an evaluation
    energy.pause()
    energy.begin_step()
    assert energy.step_values(50, logged=True) == {
        "watts": pytest.approx((8 + 6) * 1.5 / 3),
        "watts_cpu": pytest.approx(14 / 3),
        "watts_ane": pytest.approx(7 / 3),
        "joules_per_token": pytest.approx(21 / 150),
        "power_source": "ioreport",
        "thermal_state": "nominal",
    }
    energy.begin_step()
    assert energy.step_values(10, logged=True)["watts"] == pytest.approx(3 / 4)
    summary = energy.summary()
    assert summary == {
        "joules": pytest.approx(24),
        "watts": pytest.approx(24 / 7),
        "watts_cpu": pytest.approx(16 / 7),
        "watts_ane": pytest.approx(8 / 7),
        "joules_per_token": pytest.approx(24 / 160),
        "power_source": "ioreport",
        "worst_thermal_state": "critical",
    }
    assert describe_energy(summary) == (
        "24 J in the steps, 3.43 W (cpu 2.29, ane 1.14; ioreport), 0.15 J a token, thermal state up to critical"
    )


def test_what_is_not_known_is_left_out() -> None:
    nothing = EnergyRun(None)
    nothing.begin_step()
    assert nothing.step_values(5, logged=True) == {}
    assert (nothing.summary(), describe_energy({})) == ({}, "")
    warm = EnergyRun(Fixed(Reading("", {}, "serious")))
    warm.begin_step()
    assert warm.step_values(5, logged=True) == {"thermal_state": "serious"}
    assert warm.summary() == {"worst_thermal_state": "serious"}
    assert describe_energy(warm.summary()) == "thermal state up to serious"


@pytest.mark.parametrize("error", [OSError("gone"), ValueError("no number"), UnavailableError("no more")])
def test_a_source_that_fails_is_given_up(error: Exception) -> None:
    source = Fixed(Reading("rapl", {"cpu": 0.0}, None), error)
    energy = EnergyRun(source)
    energy.begin_step()
    assert energy.step_values(5, logged=True) == {}
    assert source.closed == 1
    energy.begin_step()
    assert energy.step_values(5, logged=True) == {}
    energy.close()
    assert source.closed == 1


def test_another_source_in_between() -> None:
    """What powermetrics and the process say does not subtract."""
    process, tool = Reading("process", {"cpu": 5.0}, None), Reading("powermetrics", {"cpu": 9.0}, None)
    energy = EnergyRun(Fixed(process, tool, tool, tool._replace(joules={"cpu": 12.0})), seconds(0, 1, 2, 4).__next__)
    energy.begin_step()
    assert energy.step_values(5, logged=True) == {}
    energy.begin_step()
    assert energy.step_values(5, logged=True)["watts"] == pytest.approx(1.5)


@pytest.mark.usefixtures("_on")
def test_train_and_info(
    powercap: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The verbs, with counters that grow by 3 J each time that they are read."""
    if sys.platform != "linux":
        pytest.skip("powercap is Linux'")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(power, "POWERCAP", powercap)
    count = power._Counter._count

    def grows(self: power._Counter) -> int:
        path = self._path
        path.write_text(str((int(path.read_text()) + 1_000_000) % 10_000_000))
        return count(self)

    for path in powercap.glob("*/max_energy_range_uj"):
        path.write_text("10000000")
    monkeypatch.setattr(power._Counter, "_count", grows)
    small = [
        "--preset",
        "stories260k",
        "--batch-size",
        "2",
        "--seq-len",
        "16",
        "--eval-interval",
        "0",
        "--sample-tokens",
        "0",
    ]
    assert train.main([*small, "--steps", "4", "--log-interval", "2", "--out", "r", "--json", "o.json"]) == 0
    assert "energy: " in capsys.readouterr().out
    steps = [json.loads(line) for line in Path("r/metrics.jsonl").read_text().splitlines()]
    steps = [record for record in steps if record["kind"] == "step"]
    assert [record["step"] for record in steps if "watts" in record] == [1, 2, 4]
    for record in steps:
        if "watts" in record:
            assert record["power_source"] == "rapl"
            assert record["watts"] == pytest.approx(record["watts_cpu"] + record["watts_dram"])
            assert record["joules_per_token"] == pytest.approx(3 / 32 if record["step"] < 3 else 3 / 64)
    summary = json.loads(Path("o.json").read_text())
    assert summary["joules"] == pytest.approx(9.0)
    assert summary["joules_per_token"] == pytest.approx(9 / 128)
    assert info.main(["--json", "i.json"]) == 0
    assert "counted by rapl" in capsys.readouterr().out
    assert json.loads(Path("i.json").read_text())["power"] == {"source": "rapl", "thermal_state": None}
