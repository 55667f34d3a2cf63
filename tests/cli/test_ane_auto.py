"""--device auto where there may be a Neural Engine: the self-test, what is kept of it, and what is said."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from anellm import ane_auto, ane_selftest, evaluate, info, metrics, train
from anellm.ane_auto import Choice, Outcome

CSRC = Path(__file__).parents[2] / "csrc"
# The simulator as the engine of this machine, or what ENGINE says is wrong with it.
LIBRARY = """
#include "backend/ane/device.h"
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>
static struct anellm_ane_host host;
static struct anellm_ane_table table;
static int left;
static int compile(anellm_ane *device, anellm_ane_program **program, const char *mil, int64_t mil_bytes,
                   const anellm_ane_file *files, int64_t n_files);
static struct anellm_ane_table first;
static int compile(anellm_ane *device, anellm_ane_program **program, const char *mil, int64_t mil_bytes,
                   const anellm_ane_file *files, int64_t n_files) {
    const char *engine = getenv("ENGINE");
    if (left-- == 0) {
        if (strcmp(engine, "crashes") == 0) {
            fputs("the framework\\033[31m says goodbye\\n", stderr);
            abort();
        }
        if (strcmp(engine, "hangs") == 0) sleep(100);
        if (strcmp(engine, "exits") == 0) exit(7);
        if (strcmp(engine, "is ended") == 0) raise(SIGTERM);
        if (strcmp(engine, "refuses") == 0) return host.fail(ANELLM_COMPILE, "no, thank you");
    }
    return first.compile(device, program, mil, mil_bytes, files, n_files);
}
void anellm_ane_device_host(const struct anellm_ane_host *given) { host = *given; }
int anellm_ane_device_open(anellm_ane **out, const anellm_ane_profile *profile) {
    const anellm_sim_options options = {.numerics = 1};
    const char *engine = getenv("ENGINE"), *after = getenv("AFTER");
    if (engine != NULL && strcmp(engine, "is missing") == 0) return host.fail(ANELLM_UNAVAILABLE, "no engine in here");
    const int status = host.open(out, "sim", profile, &options);
    if (status != ANELLM_OK || engine == NULL) return status;
    left = after == NULL ? 0 : atoi(after);
    first = *(*out)->table;
    table = first;
    table.compile = compile;
    (*out)->table = &table;
    return ANELLM_OK;
}
"""
SMALL = ["--preset", "stories260k", "--batch-size", "2", "--seq-len", "16", "--eval-interval", "0", "--sample-tokens"]
SMALL += ["0", "--steps", "2", "--plain"]


@pytest.fixture(scope="session")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a library that is an engine, or skip."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        pytest.skip("no C compiler")
    folder = tmp_path_factory.mktemp("engine")
    (folder / "engine.c").write_text(LIBRARY)
    command = [compiler, "-shared", "-fPIC", f"-I{CSRC}", str(folder / "engine.c"), "-o", str(folder / "engine.so")]
    subprocess.run(command, check=True)
    return folder / "engine.so"


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Work in a folder of our own, with a cache of our own, which is not there yet."""
    monkeypatch.chdir(tmp_path)
    for name in ("ANELLM_DEBUG", "ANELLM_DEVICE", "ANELLM_ANE_DEVICE", "ANELLM_ANE_FRAMEWORK", "ENGINE", "AFTER"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("ANELLM_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(ane_auto, "system_name", lambda: "macOS 15.1 (24B83)")
    return tmp_path / "cache"


@pytest.fixture
def engine(library: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Return what sets the engine of this machine."""
    monkeypatch.setenv("ANELLM_ANE_DEVICE", str(library))

    def be(fault: str, after: int = 0) -> None:
        monkeypatch.setenv("ENGINE", fault)
        monkeypatch.setenv("AFTER", str(after))

    return be


@pytest.fixture
def tests(monkeypatch: pytest.MonkeyPatch) -> list[Outcome]:
    """Return what self-tests come to, as they are run; nothing is tested."""
    found: list[Outcome] = []

    def run() -> Outcome:
        found.append(Outcome(True, ""))
        return found[-1]

    monkeypatch.setattr(ane_auto, "run_selftest", run)
    return found


# ---- where there is no engine ----------------------------------------------------------------------------------------


def test_nothing_happens_without_an_engine(
    cache: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tests: list[Outcome]
) -> None:
    monkeypatch.setattr("platform.system", lambda: "Linux")
    assert train.main([*SMALL, "--out", "r"]) == 0
    out = capsys.readouterr()
    assert "auto" not in out.out
    assert out.err == ""
    assert info.main(["--json", "i.json"]) == 0
    assert "auto          cpu: the Apple Neural Engine needs macOS on Apple silicon" in capsys.readouterr().out
    assert json.loads(Path("i.json").read_text())["auto"]["device"] == "cpu"
    assert tests == []
    assert not cache.exists()
    assert tomllib.loads(Path("r/config.toml").read_text())["device"] == "auto"


def test_import_brings_nothing_along() -> None:
    script = "import anellm, sys; anellm.Model; print([m for m in sys.modules if m.startswith('anellm.ane')])"
    assert subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout == "[]\n"


# ---- the test itself -------------------------------------------------------------------------------------------------


def test_it_passes_once(
    cache: Path, engine: Callable[..., None], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A process of its own tests; its result serves the next ones, as it does info and a dry run."""
    assert train.main([*SMALL, "--dry-run"]) == 0
    out = capsys.readouterr().out
    assert "auto    cpu: the Neural Engine's self-test has not run on macOS 15.1 (24B83): `anellm train` runs" in out
    assert info.main([]) == 0
    assert "auto          cpu: the Neural Engine's self-test has not run" in capsys.readouterr().out
    assert not cache.exists()
    assert train.main([*SMALL, "--out", "r"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[:2] == [
        "auto    testing the Neural Engine, once on macOS 15.1 (24B83): some seconds, 60 at most",
        "auto    ane: the Neural Engine's self-test passed on macOS 15.1 (24B83)",
    ]
    assert any(line.startswith("device  ane (") for line in lines)
    assert tomllib.loads(Path("r/config.toml").read_text())["device"] == "ane"
    (file,) = cache.iterdir()
    kept = json.loads(file.read_text())
    assert (kept["passed"], kept["why"]) == (True, "")
    assert kept["key"]["system"] == "macOS 15.1 (24B83)"

    def fail() -> Outcome:
        raise AssertionError("tested again")

    monkeypatch.setattr(ane_auto, "run_selftest", fail)
    assert train.main([*SMALL, "--out", "s"]) == 0
    assert "auto    ane: the Neural Engine's self-test passed on macOS 15.1 (24B83), as known from before\n" in (
        capsys.readouterr().out
    )
    assert train.main([*SMALL, "--quiet", "--dry-run", "--json", "d.json"]) == 0
    assert info.main(["--json", "i.json"]) == 0
    out = capsys.readouterr().out
    assert "device        ane\n" in out
    assert "auto          ane: the Neural Engine's self-test passed" in out
    runs = [[record["loss"] for record in metrics.read(Path(run)) if record["kind"] == "step"] for run in ("r", "s")]
    assert runs[0] == runs[1]


@pytest.mark.parametrize(
    ("fault", "after", "why"),
    [
        ("refuses", 1, "program ffn_fwd refused at compile: no, thank you"),
        (
            "crashes",
            2,
            "the process that tested it was ended by SIGABRT in program ffn_bwd_w2: the framework [31m says",
        ),
        ("hangs", 0, "no end after 2 s"),
        ("exits", 0, "the process that tested it ended with code 7 in program attn_fwd"),
        ("is missing", 0, "no engine in here"),
    ],
)
def test_it_fails_once(
    fault: str, after: int, why: str, cache: Path, engine: Callable[..., None], monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """Whatever happens there happens to another process, and is known from then on."""
    if fault == "hangs":
        monkeypatch.setattr(ane_auto, "LIMIT_SECONDS", 2)
    engine(fault, after)
    found = ane_auto.choose(test=True)
    assert found.device == "cpu"
    assert found.why.startswith(f"the Neural Engine's self-test failed on macOS 15.1 (24B83): {why}")
    assert found.why.endswith("; `anellm info --ane-selftest` tests again")
    assert found.why.isprintable()
    monkeypatch.setattr(ane_auto, "run_selftest", lambda: pytest.fail("tested again"))
    again = ane_auto.choose(test=True)
    assert again == Choice("cpu", found.why.replace("(24B83)", "(24B83), as known from before"))
    if fault != "crashes":
        return
    assert train.main([*SMALL, "--out", "r"]) == 0
    out = capsys.readouterr().out
    assert f"auto    cpu: {again.why}\n" in out
    assert "device  cpu (" in out


def test_a_full_test_is_kept_as_well(
    engine: Callable[..., None], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    size = ane_auto.test_size()
    monkeypatch.setattr(ane_selftest, "SIZES", (ane_selftest.Size(size.name, size.batch),))
    monkeypatch.setattr(ane_selftest, "_SECONDS", 0)
    monkeypatch.setattr(ane_selftest, "_simulated", lambda *_: None)
    ane_auto.keep(ane_auto.identity(), Outcome(False, "something long ago"))
    assert ane_auto.choose(test=False).device == "cpu"
    engine("refuses", 8)  # attn_scores: nothing that training takes by default
    assert info.main(["--ane-selftest"]) == 5
    assert ane_auto.choose(test=False).device == "ane"
    engine("refuses", 7)
    assert info.main(["--ane-selftest"]) == 5
    assert "program qkv_bwd refused at compile: no, thank you" in ane_auto.choose(test=False).why
    capsys.readouterr()


def test_it_cannot_be_started(engine: Callable[..., None], cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """That says nothing about the engine: it is not kept."""
    for executable, why in (("", "no Python to start"), ("/nowhere/python", "No such file or directory")):
        monkeypatch.setattr(sys, "executable", executable)
        found = ane_auto.choose(test=True)
        assert found.device == "cpu"
        assert found.why == f"the Neural Engine's self-test could not be run: {why}"
    assert not cache.exists()


def test_somebody_ends_it(engine: Callable[..., None], cache: Path) -> None:
    """Nor does that."""
    engine("is ended")
    why = "the Neural Engine's self-test could not be run: its process was ended by SIGTERM"
    assert ane_auto.choose(test=True) == Choice("cpu", why)
    assert not cache.exists()


def test_an_interrupt_ends_it(engine: Callable[..., None], cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    children: list[Any] = []
    whole = subprocess.Popen.wait

    def wait(self: Any, timeout: float | None = None) -> int:
        if not children:
            children.append(self)
            raise KeyboardInterrupt
        return whole(self, timeout)

    engine("hangs")
    monkeypatch.setattr(subprocess.Popen, "wait", wait)
    with pytest.raises(KeyboardInterrupt):
        ane_auto.choose(test=True)
    assert children[0].returncode == -9
    assert not cache.exists()


def test_the_process_imports_nothing_from_where_the_user_is(engine: Callable[..., None], tmp_path: Path) -> None:
    for name in ("json.py", "anellm.py", "numpy.py"):
        (tmp_path / name).write_text("raise SystemExit(3)")
    assert ane_auto.run_selftest() == Outcome(True, "")


@pytest.mark.parametrize(
    ("code", "output", "errors", "why"),
    [
        (0, "", "", "ended with code 0"),
        (0, "program a\nnonsense", "", "ended with code 0 in program a"),
        (0, '{"passed": true, "why": "but"}', "", "ended with code 0"),
        (0, '{"passed": 1, "why": ""}', "", "ended with code 0"),
        (0, '{"passed": true}', "", "ended with code 0"),
        (0, "[1]", "", "ended with code 0"),
        (1, '{"passed": true, "why": ""}', "Traceback\nValueError: x\n", "ended with code 1: ValueError: x"),
        (-11, "program a\nprogram b\n", "", "was ended by SIGSEGV in program b"),
        (-99, "", "", "was ended by signal 99"),
        (None, "", "", "no end after 60 s"),
    ],
)
def test_what_a_process_comes_to(code: int | None, output: str, errors: str, why: str) -> None:
    found = ane_auto._judge_child(code, output, errors)
    assert not found.passed
    assert found.why.endswith(why)


def test_rows_are_judged() -> None:
    size = ane_auto.test_size()
    assert size.only == (
        "attn_fwd", "ffn_fwd", "ffn_bwd_w2", "ffn_bwd_w13", "wo_bwd", "sdpa_bwd1", "sdpa_bwd2", "qkv_bwd"
    )  # fmt: skip
    rows = [ane_selftest.Tested(program=name, size=size.name, state="ok") for name in size.only]
    other = [
        ane_selftest.Tested(program="attn_fwd", size="stories110m"),
        ane_selftest.Tested(program="wo_fwd", size=size.name),
    ]
    assert ane_auto.judge(rows + other) == Outcome(True, "")
    assert ane_auto.judge(rows[1:]) == Outcome(False, "7 of 8 programs were tested")
    rows[3].state, rows[3].outputs = "wrong", [ane_selftest.Output("dx", 0.031, 0.99, 0, None)]
    assert ane_auto.judge(rows).why == "program ffn_bwd_w13 wrong: dx: 3.10% off"
    rows[3].outputs.append(ane_selftest.Output("dy", None, None, 7, None))
    assert ane_auto.judge(rows).why == "program ffn_bwd_w13 wrong: dy: 7 values infinite or not written"


# ---- the cache -------------------------------------------------------------------------------------------------------


def kept_file(cache: Path) -> Path:
    ane_auto.keep(ane_auto.identity(), Outcome(True, ""))
    (file,) = cache.iterdir()
    return file


@pytest.mark.parametrize(
    "change",
    [
        lambda values: None,
        lambda values: values | {"format": 2},
        lambda values: values | {"passed": "yes"},
        lambda values: values | {"passed": False},
        lambda values: values | {"why": "passed, and why"},
        lambda values: values | {"why": None},
        lambda values: values | {"key": values["key"] | {"system": "macOS 15.2 (24C101)"}},
        lambda values: {key: value for key, value in values.items() if key != "key"},
        lambda values: [values],
    ],
)
def test_damaged_results_do_not_count(change: Callable[[Any], Any], cache: Path) -> None:
    file = kept_file(cache)
    assert ane_auto.recall(ane_auto.identity()) == Outcome(True, "", cached=True)
    values = change(json.loads(file.read_text()))
    file.write_text("{" if values is None else json.dumps(values))
    assert ane_auto.recall(ane_auto.identity()) is None
    kept_file(cache)
    assert ane_auto.recall(ane_auto.identity()) == Outcome(True, "", cached=True)


def test_what_is_printed_of_a_result_is_harmless(cache: Path) -> None:
    file = kept_file(cache)
    values = json.loads(file.read_text()) | {"passed": False, "why": "a\x1b[2J\nb" + "x" * 5000}
    file.write_text(json.dumps(values))
    found = ane_auto.recall(ane_auto.identity())
    assert found is not None
    assert found.why.startswith("a [2J b")
    assert found.why.isprintable()
    assert len(found.why) < 700


def test_folders_that_cannot_be_used(
    engine: Callable[..., None], tests: list[Outcome], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file, a special file, a link to nowhere, no rights, no home: it is tested again, and that is all."""
    (tmp_path / "file").write_text("")
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "link").symlink_to(tmp_path / "link")
    (tmp_path / "taken").mkdir()
    monkeypatch.setenv("ANELLM_CACHE_DIR", str(tmp_path / "taken"))
    place = ane_auto._place(ane_auto.identity())
    assert place is not None
    place.mkdir()
    for number, folder in enumerate(("file", "fifo", "link", "taken", "file/deeper", "/proc/nowhere/x"), 1):
        monkeypatch.setenv("ANELLM_CACHE_DIR", folder if folder.startswith("/") else str(tmp_path / folder))
        assert ane_auto.choose(test=True).device == "ane"
        assert len(tests) == number, folder
    monkeypatch.setenv("ANELLM_CACHE_DIR", "")
    monkeypatch.setenv("XDG_CACHE_HOME", "")

    def homeless() -> Path:
        raise RuntimeError("no home")

    monkeypatch.setattr(Path, "home", homeless)
    assert ane_auto.cache_folder() is None
    assert ane_auto.choose(test=True).device == "ane"
    assert ane_auto.choose(test=False).device == "cpu"


def test_where_the_cache_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ANELLM_CACHE_DIR", "here")
    assert ane_auto.cache_folder() == tmp_path / "here"
    monkeypatch.delenv("ANELLM_CACHE_DIR")
    monkeypatch.setenv("HOME", "/home/u")
    for system, xdg, expected in (
        ("Darwin", "/x", "/home/u/Library/Caches/anellm"),
        ("Linux", "/x", "/x/anellm"),
        ("Linux", "relative", "/home/u/.cache/anellm"),
        ("Linux", "", "/home/u/.cache/anellm"),
    ):
        monkeypatch.setattr("platform.system", lambda system=system: system)
        monkeypatch.setenv("XDG_CACHE_HOME", xdg)
        assert ane_auto.cache_folder() == Path(expected)


def test_what_a_result_holds_for(
    engine: Callable[..., None], library: Path, tests: list[Outcome], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def choose() -> int:
        assert ane_auto.choose(test=True).device == "ane"
        return len(tests)

    assert [choose(), choose()] == [1, 1]
    monkeypatch.setattr(ane_auto, "system_name", lambda: "macOS 15.1 (24B91)")
    assert [choose(), choose()] == [2, 2]
    monkeypatch.setattr(ane_auto, "_sysctl", lambda name: f"Apple {name}")
    assert [choose(), choose()] == [3, 3]
    monkeypatch.setattr("anellm.__version__", "0.1.1")
    assert [choose(), choose()] == [4, 4]
    shutil.copy(library, tmp_path / "other.so")
    monkeypatch.setenv("ANELLM_ANE_DEVICE", str(tmp_path / "other.so"))
    assert [choose(), choose()] == [5, 5]
    os.utime(tmp_path / "other.so", ns=(1, 1))
    assert [choose(), choose()] == [6, 6]
    monkeypatch.setenv("ANELLM_ANE_FRAMEWORK", "/another")
    assert [choose(), choose()] == [7, 7]
    monkeypatch.setenv("ANELLM_ANE_DEVICE", str(library))
    monkeypatch.setattr("anellm.__version__", "0.1.0")
    monkeypatch.delenv("ANELLM_ANE_FRAMEWORK")
    assert choose() == 7  # each is kept: this is the third


def test_the_name_of_a_system(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    assert ane_auto._sysctl("no.such.name") == ""
    monkeypatch.setattr("platform.system", lambda: "Darwin")
    monkeypatch.setattr("platform.mac_ver", lambda: ("15.1", ("", "", ""), "arm64"))
    monkeypatch.setattr(ane_auto, "_sysctl", {"kern.osversion": "24B83"}.get)
    assert ane_auto.system_name() == "macOS 15.1 (24B83)"
    monkeypatch.setattr(ane_auto, "_sysctl", lambda name: "")
    assert ane_auto.system_name() == "macOS 15.1 (unknown build)"


# ---- what is chosen --------------------------------------------------------------------------------------------------


def test_who_asks_for_a_device_is_not_tested(
    engine: Callable[..., None], tests: list[Outcome], capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    for number, device in enumerate(("ane", "cpu", "ane-sim")):
        assert train.main([*SMALL, "--steps", "1", "--device", device, "--out", f"r{number}"]) == 0
        assert "auto" not in capsys.readouterr().out
        monkeypatch.setenv("ANELLM_DEVICE", device)
        assert train.main([*SMALL, "--dry-run"]) == 0
        assert "auto" not in capsys.readouterr().out
        monkeypatch.delenv("ANELLM_DEVICE")
    assert tests == []


def test_what_the_engine_cannot_have(
    engine: Callable[..., None], tests: list[Outcome], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert train.main([*SMALL, "--dtype", "bf16", "--out", "b"]) == 0
    assert "auto    cpu: --dtype bf16 is for it alone\n" in capsys.readouterr().out
    assert tests == []
    # Attention over more columns than any chip has.
    argv = ["--preset", "stories260k", "--dry-run", "--batch-size", "4096", "--seq-len", "512"]
    assert train.main(argv) == 0
    assert ane_auto.choose(test=True).device == "ane"
    capsys.readouterr()
    assert train.main(argv) == 0
    assert "auto    cpu: Neural Engine program attn_fwd: batch size times" in capsys.readouterr().out
    engine("is missing")  # since it was tested
    assert train.main([*SMALL, "--out", "m"]) == 0
    assert "auto    cpu: no engine in here\n" in capsys.readouterr().out


def test_a_run_stays_where_it_began(
    engine: Callable[..., None], tests: list[Outcome], capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    assert train.main([*SMALL, "--device", "cpu", "--out", "c"]) == 0
    assert train.main([*SMALL, "--out", "a"]) == 0
    assert len(tests) == 1
    capsys.readouterr()
    assert train.main(["--resume", "--out", "c", "--steps", "3"]) == 0
    out = capsys.readouterr().out
    assert "auto    cpu: the run that goes on began there\n" in out
    assert "device  cpu (" in out
    assert train.main(["--resume", "--out", "a", "--steps", "3"]) == 0
    out = capsys.readouterr().out
    assert "auto" not in out
    assert "device  ane (" in out
    assert [r["device"] for r in metrics.read(Path("a")) if r["kind"] == "device"] == ["ane", "ane"]


def test_evaluate(engine: Callable[..., None], tests: list[Outcome], capsys: pytest.CaptureFixture[str]) -> None:
    assert train.main([*SMALL, "--device", "cpu", "--out", "c", "--quiet"]) == 0
    np.random.default_rng(0).integers(0, 512, 200, np.uint16).tofile("d.bin")
    capsys.readouterr()
    argv = ["--model", "c", "--data", "d.bin", "--seq-len", "16", "--json"]
    assert evaluate.main([*argv, "auto.json"]) == 0
    captured = capsys.readouterr()
    assert captured.err.splitlines()[-1] == "auto  ane: the Neural Engine's self-test passed on macOS 15.1 (24B83)"
    assert "auto" not in captured.out
    assert evaluate.main([*argv, "cpu.json", "--device", "cpu"]) == 0
    found, expected = (json.loads(Path(f"{name}.json").read_text()) for name in ("auto", "cpu"))
    assert found["device"] == "ane"
    assert found["loss"] == pytest.approx(expected["loss"], abs=2e-3)
    assert len(tests) == 1
