"""Devices by name: libraries that export anellm_ane_device_open."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from anellm._ffi import check, ffi, lib, text
from anellm.device import device_library
from anellm.errors import InvalidError, UnavailableError, UnsupportedError
from anellm.sim import load_chip

CSRC = Path(__file__).parents[2] / "csrc"
LIBRARY = """
#include "backend/ane/device.h"
static int counters(anellm_ane *device, anellm_ane_counters *out) {
    (void)device;
    *out = (anellm_ane_counters){.compiles = 42};
    return ANELLM_OK;
}
static void close_it(anellm_ane *device) { (void)device; }
static const struct anellm_ane_table table = {.name = "test", .close = close_it, .counters = counters};
static struct anellm_ane device = {&table};
int anellm_ane_device_open(anellm_ane **out, const anellm_ane_profile *profile) {
    if (profile->max_rank != 5) return ANELLM_UNAVAILABLE;
    *out = &device;
    return ANELLM_OK;
}
"""


def opened(name: str) -> object:
    out = ffi.new("anellm_ane **")
    check(lib.anellm_ane_open(out, name.encode(), load_chip("m4").c_profile(), ffi.NULL))
    return out[0]


def test_a_device_in_a_library(tmp_path: Path) -> None:
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        pytest.skip("no C compiler")
    source, library = tmp_path / "device.c", tmp_path / "device.so"
    source.write_text(LIBRARY)
    subprocess.run([compiler, "-shared", "-fPIC", f"-I{CSRC}", str(source), "-o", str(library)], check=True)
    device = opened(str(library))
    counters = ffi.new("anellm_ane_counters *")
    check(lib.anellm_ane_get_counters(device, counters))
    assert counters.compiles == 42
    with pytest.raises(UnsupportedError, match='"test" is no simulator'):
        check(lib.anellm_sim_idle(device, 1.0))
    with pytest.raises(UnsupportedError, match='"test" has no quality of service'):
        check(lib.anellm_ane_set_qos(device, 21))
    with pytest.raises(UnsupportedError, match='"test" has no quality of service'):
        check(lib.anellm_ane_get_qos(device, ffi.new("anellm_ane_qos *")))
    with pytest.raises(InvalidError, match="qos is 64; it must be 0 to 63, or -1"):
        check(lib.anellm_ane_set_qos(device, 64))
    with pytest.raises(InvalidError, match="device is NULL"):
        check(lib.anellm_ane_set_qos(ffi.NULL, 21))
    with pytest.raises(InvalidError, match="qos is NULL"):
        check(lib.anellm_ane_get_qos(device, ffi.NULL))
    lib.anellm_ane_close(device)
    source.write_text("int nothing;")
    subprocess.run([compiler, "-shared", "-fPIC", str(source), "-o", str(tmp_path / "other.so")], check=True)
    with pytest.raises(UnavailableError, match="exports no anellm_ane_device_open"):
        opened(str(tmp_path / "other.so"))


def test_unknown_devices() -> None:
    with pytest.raises(UnavailableError, match='no Neural Engine device "gpu"'):
        opened("gpu")
    with pytest.raises(UnavailableError, match="nowhere"):
        opened("/nowhere/device.so")


def test_null_and_ranges() -> None:
    """Every entry names the argument that is wrong, and touches nothing."""
    device = opened("sim")
    null = ffi.NULL
    out, surface, n = ffi.new("anellm_ane_program **"), ffi.new("anellm_ane_surface **"), ffi.new("int64_t *")
    calls = [
        lambda: lib.anellm_ane_open(null, b"sim", load_chip("m4").c_profile(), null),
        lambda: lib.anellm_ane_open(ffi.new("anellm_ane **"), null, load_chip("m4").c_profile(), null),
        lambda: lib.anellm_ane_open(ffi.new("anellm_ane **"), b"sim", null, null),
        lambda: lib.anellm_ane_get_counters(device, null),
        lambda: lib.anellm_ane_get_error(null, null),
        lambda: lib.anellm_ane_compile(device, out, null, 5, null, 0),
        lambda: lib.anellm_ane_compile(device, out, b"x", -1, null, 0),
        lambda: lib.anellm_ane_compile(device, out, b"x", 1, null, 2),
        lambda: lib.anellm_ane_load(null),
        lambda: lib.anellm_ane_surface_create(device, surface, 0),
        lambda: lib.anellm_ane_count_ports(null, 0, 0, n),
        lambda: lib.anellm_sim_count_findings(null, n),
        lambda: lib.anellm_sim_get_op(0, null),
    ]
    for call in calls:
        with pytest.raises(InvalidError):
            check(call())
        assert text(lib.anellm_last_error()).startswith("anellm_")
    check(lib.anellm_ane_surface_create(device, surface, 64))
    assert lib.anellm_ane_surface_base(surface[0]) == null  # not locked
    assert lib.anellm_ane_surface_unlock(surface[0]) == lib.ANELLM_INVALID
    lib.anellm_ane_surface_free(surface[0])
    lib.anellm_ane_surface_free(null)
    lib.anellm_ane_close(device)
    lib.anellm_ane_close(null)


def test_the_library_beside_a_framework(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ANELLM_ANE_DEVICE", raising=False)
    monkeypatch.setenv("ANELLM_ANE_FRAMEWORK", str(tmp_path / "framework.so"))
    monkeypatch.setattr("platform.system", lambda: "Linux")
    assert device_library() is None
    (tmp_path / "libane_device.so").touch()
    assert device_library() == str(tmp_path / "libane_device.so")
    monkeypatch.setattr("platform.system", lambda: "Darwin")
    monkeypatch.setattr("platform.machine", lambda: "arm64")
    assert device_library() is None  # the built-in one takes another framework
    monkeypatch.setenv("ANELLM_ANE_DEVICE", str(tmp_path / "other.so"))
    assert device_library() == str(tmp_path / "other.so")
    monkeypatch.delenv("ANELLM_ANE_DEVICE")
    monkeypatch.setattr("platform.system", lambda: "Linux")
    monkeypatch.setenv("ANELLM_ANE_FRAMEWORK", " ")
    monkeypatch.chdir(tmp_path)
    assert device_library() is None
