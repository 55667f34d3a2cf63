"""info --ane-selftest over csrc/backend/ane/device_ane.m, GNUstep and the fake framework."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

from objc_tools import environment, left_in, run_python

SELFTEST = """
from anellm import ane_selftest, info
from anellm.ane_reference import Batch
from anellm.ane_selftest import Size

shape = ModelConfig(dim=32, hidden_dim=64, n_layers=1, n_heads=2, n_kv_heads=1, head_dim=16, vocab_size=48,
                    max_seq_len=40)
ane_selftest.SIZES = (Size("small", Batch(shape, 2, 33)), Size("one", Batch(shape, 1, 32), ("wo_fwd",)))
step = sys.argv[1]
if step:
    fake().fake_ane_fail(step.encode(), 3, 1, 0)
code = info.main(["--ane-selftest", "--json", os.environ["TMP"] + ".json"])
gc.collect()
assert (fake().fake_ane_live(), files()) == (0, [])
print("exit code", code)
"""


def test_the_selftest(built: Path, tmp_path: Path) -> None:
    """All is well, and equal to the simulator; a refusal is a row of its own, and everything is freed."""
    tmp = tmp_path / "tmp"
    lines = run_python(SELFTEST, environment(built, tmp), "").splitlines()
    assert lines[0].startswith("ane, Apple M4, h16g, macOS 15.1; nearest chip: m4; times are real")
    rows = lines[2:16]
    for row in rows:
        assert re.match(r"\w+ +(small|one) +ok +\S+ +\S+ +0\.00\d+ +(1\.0|0\.9999)\d+ +0\.000000$", row), row
    assert "14 programs: 14 ok, 0 wrong, 0 refused" in lines
    assert lines[-1] == "exit code 0"
    assert "quality of service: default (21)" in lines
    found = json.loads(Path(f"{tmp}.json").read_text())
    assert found["selftest"]["qos"] == {"value": 21, "measured": False, "us": {}}
    assert (found["name"], found["architecture"]) == ("m4-tested", "h16g")
    measured = found["selftest"]["measured"]
    assert measured.keys() >= {"dispatch_us", "compile_ms", "cached_compile_ms", "load_ms"}
    assert all(value > 0 for value in measured.values())
    source = found["constants"]["compile_ms"]["source"]
    assert source == "measured by --ane-selftest on ane, Apple M4, h16g, macOS 15.1"
    for step, stage, words in (
        ("compile", "compile", r"com\.apple\.appleneuralengine\.compiler, code 1: .*ANECCompile\(\) FAILED"),
        ("load", "load", r"com\.apple\.appleneuralengine, code 6: .*0x20004"),
        ("evaluate", "evaluate", r"com\.apple\.appleneuralengine, code 8: .*Program Inference error"),
        ("surface", "evaluate", "no NSError, code 0: "),
        ("unload", "unload", r"com\.apple\.appleneuralengine, code [0-9]+: "),
    ):
        lines = run_python(SELFTEST, environment(built, tmp), step).splitlines()
        refused = [line for line in lines if "refused at" in line]
        assert len(refused) == 1
        assert re.match(rf"\w+ +small +refused at {stage}: {words}", refused[0]), refused
        assert "14 programs: 13 ok, 0 wrong, 1 refused" in lines
        assert lines[-1] == "exit code 5"
    assert left_in(tmp) == []


def test_auto(built: Path, tmp_path: Path) -> None:
    """A self-test in a process of its own, then training; an old system leaves it to the CPU."""
    size = ["--preset", "stories260k", "--steps", "1", "--batch-size", "1", "--seq-len", "32", "--eval-interval", "0"]

    def auto(name: str, **more: str) -> tuple[str, str]:
        env = environment(built, tmp_path / "tmp", **more) | {"ANELLM_CACHE_DIR": str(tmp_path / "cache" / name)}
        command = [sys.executable, "-m", "anellm.train", *size, "--out", str(tmp_path / f"{name}-run")]
        done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=120, check=False)
        assert (done.returncode, done.stderr) == (0, "")
        chosen = [line for line in done.stdout.splitlines() if line.startswith(("auto", "device"))]
        assert len(chosen) == 3
        assert len(list((tmp_path / "cache" / name).iterdir())) == 1
        return chosen[1], chosen[2]

    passed, device = auto("good")
    assert re.fullmatch("auto    ane: the Neural Engine's self-test passed on .*", passed)
    assert device.startswith("device  ane (")
    assert left_in(tmp_path / "tmp") == []
    old, device = auto("old", SHIM_MACOS="14.7.1")
    assert "self-test failed on" in old
    assert "need macOS 15 or newer, on macOS 14.7.1" in old
    assert device.startswith("device  cpu (")


def test_the_measured_qos_is_told(built: Path, tmp_path: Path) -> None:
    tmp = tmp_path / "tmp"
    small = 'Size("small", Batch(shape, 2, 33)), '
    assert small in SELFTEST
    less = SELFTEST.replace(small, small.replace("))", '), ("wo_bwd",))'))
    script = "fake().fake_ane_slow_down(17, 3000)\n" + less
    lines = run_python(script, environment(built, tmp, ANELLM_ANE_QOS=""), "").splitlines()
    (told,) = (line for line in lines if line.startswith("quality of service"))
    assert re.fullmatch(
        r"quality of service: utility \(17\), measured: background \d{4,} us, utility \d+ us, default \d{4,} us, "
        r"user-initiated \d{4,} us, user-interactive \d{4,} us",
        told,
    ), told
    qos = json.loads(Path(f"{tmp}.json").read_text())["selftest"]["qos"]
    assert (qos["value"], qos["measured"], len(qos["us"])) == (17, True, 5)


def test_what_macos_has_is_not_timed_as_a_compile(built: Path, tmp_path: Path) -> None:
    tmp = tmp_path / "tmp"
    twice = "fake().fake_ane_keep(1)\n" + SELFTEST + "\ninfo.main(['--ane-selftest', '--json', sys.argv[2]])\n"
    again = tmp_path / "again.json"
    lines = run_python(twice, environment(built, tmp), "", str(again)).splitlines()
    assert sum(line.startswith("14 were not compiled: macOS had them from before") for line in lines) == 1
    assert lines[-2:] == ["14 programs: 14 ok, 0 wrong, 0 refused", lines[-1]]
    first, second = (json.loads(path.read_text())["selftest"] for path in (Path(f"{tmp}.json"), again))
    assert [row["cached"] for row in first["programs"]] == [False] * 14
    assert [row["cached"] for row in second["programs"]] == [True] * 14
    assert "compile_ms" in first["measured"]
    assert "compile_ms" not in second["measured"]
    assert second["measured"]["cached_compile_ms"] > 0
