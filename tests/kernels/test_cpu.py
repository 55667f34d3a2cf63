"""Feature detection, and forcing a tier of kernels by call and by environment variable."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from reference import assert_refused

from anellm._ffi import check, ffi, lib, text

KNOWN = ("portable", "neon", "vdsp", "avx2", "avx512", "avx512bf16", "amx", "naive")
VARIANTS = text(lib.anellm_cpu_variants()).split(",")

PROBE = """
from anellm._anellm import ffi, lib
status = lib.anellm_cpu_init()
said = ffi.string(lib.anellm_last_error()).decode() if status else ""
print(status, ffi.string(lib.anellm_cpu_variant()).decode(), said, sep="|")
"""


def probe(value: str | None) -> tuple[int, str, str]:
    """Return anellm_cpu_init's status, the tier in force and the message, in a process with ANELLM_CPU=value."""
    env = {k: v for k, v in os.environ.items() if k != "ANELLM_CPU"}
    if value is not None:
        env["ANELLM_CPU"] = value
    run = subprocess.run([sys.executable, "-c", PROBE], env=env, capture_output=True, text=True, check=True)
    status, tier, said = run.stdout.rstrip("\n").split("|")
    return int(status), tier, said


def test_bf16_dot_products_are_best_where_there_is_no_amx_at_all() -> None:
    features = text(lib.anellm_cpu_features()).split(",")
    if "amx_permitted" in features:
        assert VARIANTS[0] == "amx"
    elif "avx512bf16" in features:
        assert VARIANTS[0] == ("avx512" if "amx_bf16" in features else "avx512bf16")
    assert ("amx" in VARIANTS) == ("amx_permitted" in features)


def test_portable_is_always_there_and_last() -> None:
    assert VARIANTS[-1] == "portable"
    assert set(VARIANTS) <= set(KNOWN)
    assert len(set(VARIANTS)) == len(VARIANTS)


def test_each_tier_can_be_forced_and_auto_is_the_best(tier: str) -> None:
    assert text(lib.anellm_cpu_variant()) == tier
    check(lib.anellm_cpu_set_variant(b"auto"))
    assert text(lib.anellm_cpu_variant()) == VARIANTS[0]


def test_naive_is_in_force_only_where_it_is_named(variant: str) -> None:
    assert "naive" not in VARIANTS
    check(lib.anellm_cpu_set_variant(b"naive"))
    assert text(lib.anellm_cpu_variant()) == "naive"
    check(lib.anellm_cpu_set_variant(b"auto"))
    assert text(lib.anellm_cpu_variant()) == VARIANTS[0]


def test_an_unknown_tier_names_the_known_ones(variant: str) -> None:
    for name in (b"", b"sse9", b"AVX2", b"auto ", b"x" * 4000):
        assert_refused(lib.anellm_cpu_set_variant(name), lib.ANELLM_INVALID, "anellm_cpu_set_variant", "auto", *KNOWN)
        assert text(lib.anellm_cpu_variant()) == variant
    assert_refused(lib.anellm_cpu_set_variant(ffi.NULL), lib.ANELLM_INVALID, "name is NULL")


@pytest.mark.parametrize("name", [name for name in KNOWN if name not in (*VARIANTS, "naive")])
def test_a_tier_that_is_not_here_says_why(variant: str, name: str) -> None:
    has = name in text(lib.anellm_cpu_features()).split(",")
    words = ("this build",) if has else ("feature", name)
    assert_refused(lib.anellm_cpu_set_variant(name.encode()), lib.ANELLM_UNAVAILABLE, name, *words)
    assert text(lib.anellm_cpu_variant()) == variant


@pytest.mark.skipif(not Path("/proc/cpuinfo").exists(), reason="no /proc/cpuinfo to compare with")
def test_features_agree_with_the_kernel() -> None:
    found = set(filter(None, text(lib.anellm_cpu_features()).split(",")))
    flags = set(Path("/proc/cpuinfo").read_text(encoding="utf-8").split())
    if platform.machine() != "x86_64":
        assert ("neon" in found) == (platform.machine() == "aarch64")
        return
    needs = {
        "avx2": {"avx2", "fma", "f16c", "avx"},
        "avx512": {"avx512f", "avx512bw", "avx512dq", "avx512vl"},
        "avx512bf16": {"avx512_bf16"},
        "amx_bf16": {"amx_tile", "amx_bf16"},
    }
    assert "amx_permitted" not in found or "amx_bf16" in found  # what the system says is not in the flags
    assert found - {"amx_permitted", "vdsp"} == {name for name, needed in needs.items() if needed <= flags}


@pytest.mark.parametrize("value", [None, "", "auto"])
def test_environment_default_is_the_best(value: str | None) -> None:
    assert probe(value) == (lib.ANELLM_OK, VARIANTS[0], "")


@pytest.mark.parametrize("value", [*VARIANTS, "naive"])
def test_environment_forces_a_tier(value: str) -> None:
    assert probe(value) == (lib.ANELLM_OK, value, "")


def test_a_bad_environment_is_reported_and_acts_as_auto() -> None:
    status, tier, said = probe("fastest")
    assert (status, tier) == (lib.ANELLM_INVALID, VARIANTS[0])
    assert "ANELLM_CPU" in said
    assert '"fastest"' in said
    assert all(name in said for name in KNOWN)
    missing = next(name for name in KNOWN if name not in (*VARIANTS, "naive"))
    status, tier, said = probe(missing)
    assert (status, tier) == (lib.ANELLM_UNAVAILABLE, VARIANTS[0])
    assert "ANELLM_CPU" in said
    assert missing in said


def test_importing_leaves_subnormals_alone() -> None:
    """No part of the C core may be built with -ffast-math, which makes the whole process flush them to zero."""
    tiny = np.array([1e-45, 1e-40], dtype=np.float32)
    assert (tiny * np.float32(1.0) > 0).all()
    assert not np.isfinite(np.float32(np.nan) * tiny).any()
