"""The verb ``info``: what computes here, and which versions are in use."""

from __future__ import annotations

import contextlib
import os
import platform
import sys
from dataclasses import dataclass
from importlib import metadata
from typing import Any

from anellm import ane_auto
from anellm._ffi import lib, text
from anellm.cli import Result, Verb
from anellm.device import AneOptions, named_device, resolve_device, set_threads, why_no_ane
from anellm.errors import ConfigError, DeviceError
from anellm.machine import available_bytes, human_bytes
from anellm.options import CommonOptions, option

_PACKAGES = ("numpy", "cffi", "safetensors", "rich")


@dataclass(frozen=True, kw_only=True)
class InfoConfig(CommonOptions):
    """The options of ``info``."""

    report: bool = option(False, "print one block to paste into an issue", group="output", flag_only=True)
    ane_selftest: bool = option(
        False,
        "compile, compare and time each program on --device ane (or ane-sim); --json writes a chip for ane-sim",
        group="self-test",
        flag_only=True,
    )
    chip: str | None = option(
        None, "chip that ane-sim simulates in the self-test, or a .json file [m4]", group="self-test"
    )


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _total_bytes() -> int | None:
    """Return the machine's memory; None where the system does not tell."""
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError):
        return None


def _power() -> dict[str, Any]:
    """Return what counts energy here, and the thermal state: null where nothing does or it is not known."""
    from anellm.power import open_source

    source = open_source()
    if source is None:
        return {"source": None, "thermal_state": None}
    with contextlib.closing(source):
        reading = source.read()
    return {"source": reading.source or None, "thermal_state": reading.thermal_state}


def _names(value: str) -> list[str]:
    return [name for name in value.split(",") if name]


def collect(threads: int, device: str = "auto") -> dict[str, Any]:
    """Return everything that ``info`` shows.

    Args:
        threads: size of the thread pool.
        device: what is asked for, by a flag or the environment.
    """
    auto = ane_auto.choose(test=False)
    asked = device != "auto" or bool(os.environ.get("ANELLM_DEVICE", "").strip())
    return {
        "anellm": text(lib.anellm_version()),
        "device": named_device(device) if asked else auto.device,
        # The reason why not, or null where it can be used.
        "devices": {"cpu": None, "ane": why_no_ane(), "ane-sim": None},
        # What --device auto takes, by what is known; nothing is tested here.
        "auto": auto._asdict(),
        "cpu_variant": text(lib.anellm_cpu_variant()),
        "cpu_variants": _names(text(lib.anellm_cpu_variants())),
        "cpu_features": _names(text(lib.anellm_cpu_features())),
        "threads": threads,
        "cpus": os.cpu_count(),
        "memory_bytes": _total_bytes(),
        "memory_available_bytes": available_bytes(),
        "power": _power(),
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in _PACKAGES},
        "system": platform.system(),
        "platform": platform.platform(),
        "machine": platform.machine(),
        "environment": {
            k: v for k, v in sorted(os.environ.items()) if k.startswith("ANELLM_") or k == "OMP_NUM_THREADS"
        },
    }


def _energy_line(power: dict[str, Any]) -> str:
    counted = "not counted" if power["source"] is None else f"counted by {power['source']}"
    return counted if power["thermal_state"] is None else f"{counted}; thermal state {power['thermal_state']}"


def _lines(found: dict[str, Any]) -> list[tuple[str, str]]:
    """Return labels and values, in the order to print."""
    total, free = (
        "unknown" if found[key] is None else human_bytes(found[key])
        for key in ("memory_bytes", "memory_available_bytes")
    )
    packages = ", ".join(f"{name} {version or 'missing'}" for name, version in found["packages"].items())
    lines = [
        ("anellm", found["anellm"]),
        ("device", found["device"]),
        ("ane", "not available: " + why if (why := found["devices"]["ane"]) else "available"),
        ("auto", f"{found['auto']['device']}: {found['auto']['why']}"),
        ("cpu variant", f"{found['cpu_variant']} (of {', '.join(found['cpu_variants'])})"),
        ("cpu features", ", ".join(found["cpu_features"]) or "none that anellm uses"),
        ("threads", f"{found['threads']} (of {found['cpus']} CPUs)"),
        ("memory", f"{total}, available {free}"),
        ("energy", _energy_line(found["power"])),
        ("python", f"{found['python']} ({sys.implementation.name})"),
        ("packages", packages),
        ("platform", found["platform"]),
    ]
    lines += [("environment", f"{name}={value}") for name, value in found["environment"].items()]
    return lines


def _selftest(config: InfoConfig, found: dict[str, Any]) -> Result:
    """Test the device; the exit code is 0 if all programs are right."""
    from anellm import ane, ane_selftest

    device = resolve_device("ane" if config.device == "auto" else config.device)
    if device not in ("ane", "ane-sim"):
        raise ConfigError(f"--ane-selftest: expected --device ane or ane-sim, found {device}")
    if config.report:
        raise ConfigError("--ane-selftest, --report: expected one of the two")
    if config.chip is not None and device != "ane-sim":
        raise ConfigError(f"--chip: only for --device ane-sim, found --device {device}")
    options = AneOptions() if config.chip is None else AneOptions(chip=config.chip)
    rows, values = ane_selftest.selftest(ane.AneDevice(device, options), ane_selftest.SIZES)
    values["selftest"]["info"] = found
    if device == "ane":
        ane_auto.keep(ane_auto.identity(), ane_auto.judge(rows))
    if config.json:
        print(f"{config.json}: a chip for the simulator: anellm sim cost --preset stories110m --chip {config.json}")
    return Result(values, 0 if all(row.state == "ok" for row in rows) else DeviceError.exit_code)


def run(config: InfoConfig) -> Result:
    """Print what was found, and return it."""
    found = collect(set_threads(config.threads), config.device)
    if config.ane_selftest:
        return _selftest(config, found)
    if config.chip is not None:
        raise ConfigError("--chip: only with --ane-selftest")
    lines = _lines(found)
    if config.report:
        print("```text", *(f"{label}: {value}" for label, value in lines), "```", sep="\n")
    else:
        width = max(len(label) for label, _ in lines)
        print(*(f"{label:{width}}  {value}" for label, value in lines), sep="\n")
    return Result(found)


VERB = Verb("info", "show the device, the CPU variant and the versions in use", InfoConfig, run)
main = VERB.main

if __name__ == "__main__":
    raise SystemExit(main())
