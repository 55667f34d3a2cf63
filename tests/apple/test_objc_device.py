"""csrc/backend/ane/device_ane.m on Linux: GNUstep, a strict fake of Apple's framework, and the simulator behind it.

The device is a library of its own here (tests/apple/build.sh). Whatever trains runs in a process of its own: what would
crash or corrupt with Apple's framework makes the fake abort.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from objc_mutants import LEAKS, MUTANTS, Mutant, mutate

from anellm.ane import AneDevice
from anellm.device import AneOptions

HERE = Path(__file__).parent
SOURCE = HERE.parents[1] / "csrc" / "backend" / "ane" / "device_ane.m"
PACKAGES = "apt-get install clang libgnustep-base-dev libclang-rt-14-dev valgrind"
SANITIZERS = "-fsanitize=address,undefined -fno-sanitize-recover=undefined -fno-omit-frame-pointer"
VALGRIND = ["valgrind", "-q", "--leak-check=full", "--num-callers=40", "--show-leak-kinds=definite",
            "--errors-for-leak-kinds=definite", "--error-exitcode=9",
            f"--suppressions={HERE / 'valgrind.supp'}"]  # fmt: skip


def build(out: Path, *arguments: str, **environment: str) -> Path:
    """Run build.sh and return the folder."""
    command = ["bash", str(HERE / "build.sh"), str(out), *arguments]
    done = subprocess.run(command, env=os.environ | environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return out


@pytest.fixture(scope="session")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of the libraries and the driver, or skip."""
    if not sys.platform.startswith("linux"):
        pytest.skip("GNUstep stands in for macOS on Linux")
    missing = [name for name in ("bash", "clang", "gcc") if shutil.which(name) is None]
    if not Path("/usr/include/GNUstep/Foundation/Foundation.h").exists():
        missing.append("GNUstep")
    if missing:
        pytest.skip(f"needs {', '.join(missing)}: {PACKAGES}")
    return build(tmp_path_factory.mktemp("objc"))


def environment(built: Path, tmp: Path, **more: str) -> dict[str, str]:
    """Return an environment in which the device ``ane`` is the Objective-C one."""
    tmp.mkdir(exist_ok=True)
    own = {
        name: value for name, value in os.environ.items() if not name.startswith(("ANELLM_ANE", "ANELLM_DEV", "SHIM_"))
    }
    return own | {
        "ANELLM_ANE_DEVICE": str(built / "libane_device.so"),
        "ANELLM_ANE_FRAMEWORK": str(built / "libAppleNeuralEngine.so"),
        "ANELLM_ANE_BACKOFF": "0.05",
        "TMP": str(tmp),
    } | more  # fmt: skip


def left_in(tmp: Path) -> list[Path]:
    """Return what is in the folder of temporary files, but for the one that GNUstep makes in it."""
    return [path for top in tmp.iterdir() for path in (top.iterdir() if top.name.startswith("GNUstep") else [top])]


def drive(built: Path, tmp: Path, *checker: str, **more: str) -> subprocess.CompletedProcess[str]:
    """Run the driver; more is environment."""
    command = [*checker, str(built / "driver")]
    return subprocess.run(
        command, env=environment(built, tmp, **more), capture_output=True, text=True, timeout=120, check=False
    )


# ---- without Python ----------------------------------------------------------------------------------------------


def test_driver(built: Path, tmp_path: Path) -> None:
    """Every call, every failure of the framework, any order of freeing."""
    done = drive(built, tmp_path / "tmp")
    assert (done.returncode, done.stdout) == (0, "ok\n"), done.stderr
    assert "without pool" not in done.stderr
    assert left_in(tmp_path / "tmp") == []


def test_valgrind(built: Path, tmp_path: Path) -> None:
    if shutil.which("valgrind") is None:
        pytest.skip(f"needs valgrind: {PACKAGES}")
    done = drive(built, tmp_path / "tmp", *VALGRIND)
    assert done.returncode == 0, done.stderr
    assert "definitely lost" not in done.stderr


def test_sanitizers(built: Path, tmp_path: Path) -> None:
    """Addresses, undefined behaviour, leaks."""
    found = subprocess.run(
        ["clang", "-print-file-name=libclang_rt.asan-x86_64.a"], capture_output=True, text=True, check=True
    )
    if not Path(found.stdout.strip()).is_absolute():
        pytest.skip(f"needs clang's sanitizers: {PACKAGES}")
    out = build(tmp_path / "asan", FLAGS=SANITIZERS, OBJECTS=str(built / "objects"))
    done = drive(
        out,
        tmp_path / "tmp",
        ASAN_OPTIONS="detect_leaks=1,fast_unwind_on_malloc=0",
        LSAN_OPTIONS=f"suppressions={HERE / 'lsan.supp'},print_suppressions=0",
        UBSAN_OPTIONS="print_stacktrace=1",
    )
    assert (done.returncode, done.stdout) == (0, "ok\n"), done.stderr


def drive_mutant(built: Path, tmp: Path, mutant: Mutant, *checker: str) -> subprocess.CompletedProcess[str]:
    """Build a device with a mistake, and run the driver on it."""
    source, library = tmp / f"{mutant.name}.m", f"lib{mutant.name}.so"
    source.write_text(mutate(SOURCE.read_text(), mutant))
    build(built, "device", library, str(source), FLAGS="-w")
    return drive(built, tmp / "tmp", *checker, ANELLM_ANE_DEVICE=str(built / library))


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_mutants(mutant: Mutant, built: Path, tmp_path: Path) -> None:
    done = drive_mutant(built, tmp_path, mutant)
    assert done.returncode != 0 or "without pool" in done.stderr, f"nothing notices {mutant.name}"


@pytest.mark.parametrize("mutant", LEAKS, ids=lambda mutant: mutant.name)
def test_leaks(mutant: Mutant, built: Path, tmp_path: Path) -> None:
    if shutil.which("valgrind") is None:
        pytest.skip(f"needs valgrind: {PACKAGES}")
    done = drive_mutant(built, tmp_path, mutant, *VALGRIND)
    assert done.returncode == 9, f"nothing notices {mutant.name}: {done.stderr}"
    assert "definitely lost" in done.stderr


# ---- training ----------------------------------------------------------------------------------------------------

PRELUDE = """
import ctypes, gc, json, os, sys
import numpy as np
from anellm.config import ModelConfig
from anellm.device import AneOptions
from anellm.errors import *
from anellm.model import Model
from anellm.optim import AdamW

def a_model(device, **more):
    options = AneOptions(softmax=more.pop("softmax", "ane"))
    shape = dict(dim=32, hidden_dim=64, n_layers=2, n_heads=2, n_kv_heads=1, head_dim=16, vocab_size=48, max_seq_len=40)
    return Model(ModelConfig(**(shape | more)), device, seed=3, ane=options)

def a_batch(step):
    tokens = np.random.default_rng(step).integers(0, 48, (2, 34)).astype(np.int32)
    return np.ascontiguousarray(tokens[:, :-1]), np.ascontiguousarray(tokens[:, 1:])

def train(model, steps=4):
    model.enable_training()
    optimizer, losses = AdamW(model, 1e-2), []
    for step in range(steps):
        losses.append(model.forward(*a_batch(step), training=True))
        model.backward()
        optimizer.step(1e-2)
    return losses

def fake():
    library = ctypes.CDLL(os.environ["ANELLM_ANE_FRAMEWORK"])
    library.fake_ane_fail.argtypes = [ctypes.c_char_p, ctypes.c_int, ctypes.c_int, ctypes.c_int]
    return library

def files():
    return [f for _, _, names in os.walk(os.environ["TMP"]) for f in names]
"""


def run_python(script: str, env: dict[str, str], *arguments: str) -> str:
    """Run Python in a process of its own; return what it prints."""
    command = [sys.executable, "-c", PRELUDE + script, *arguments]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "without pool" not in done.stderr
    return done.stdout


COMPARE = """
shape = json.loads(sys.argv[1])
sim, ane = a_model("ane-sim", **shape), a_model("ane", **shape)
losses = train(sim), train(ane)
assert losses[0] == losses[1], losses
assert losses[0][-1] != losses[0][0]
for name in sim.params:
    for a, b in ((sim, ane), ):
        assert np.array_equal(a.params[name], b.params[name]), name
        assert np.array_equal(a.grads[name], b.grads[name]), name
        assert np.array_equal(a.moments_m[name], b.moments_m[name]), name
assert sim.ane.exponents() == ane.ane.exponents()
assert np.array_equal(sim.forward(a_batch(9)[0]), ane.forward(a_batch(9)[0]))
first, second = sim.ane.device.counters(), ane.ane.device.counters()
names = "compiles", "loaded", "evaluations", "compile_failures", "evaluation_failures"
assert [first[n] for n in names] == [second[n] for n in names], (first, second)
assert fake().fake_ane_count(b"evaluate") == second["evaluations"] > 0
assert fake().fake_ane_live() > 0 and files()
del sim, ane, a, b
gc.collect()
assert (fake().fake_ane_live(), files()) == (0, [])
"""


@pytest.mark.parametrize(
    "shape", [{}, {"softmax": "cpu"}, {"qk_norm": True, "n_kv_heads": 2}, {"tie_embeddings": False}]
)
def test_training_equals_the_simulator(shape: dict[str, object], built: Path, tmp_path: Path) -> None:
    """Losses, weights, gradients, moments, the scaling's state and logits, bit for bit; nothing stays."""
    run_python(COMPARE, environment(built, tmp_path / "tmp"), json.dumps(shape))
    assert left_in(tmp_path / "tmp") == []


FAULTS = """
expected = train(a_model("ane"))
gc.collect()
assert (fake().fake_ane_live(), files()) == (0, [])
for step, after, error, domain, code, words in (
    ("compile", 0, CompileError, "com.apple.appleneuralengine.compiler", 1, "ANECCompile() FAILED"),
    ("compile", 5, CompileError, "com.apple.appleneuralengine.compiler", 1, "ANECCompile() FAILED"),
    ("load", 1, CompileError, "com.apple.appleneuralengine", 6, "0x20004"),
    ("descriptor", 0, CompileError, "", 0, "no NSError"),
    ("model", 2, CompileError, "", 0, "no NSError"),
    ("surface", 3, EvalError, "", 0, "no NSError"),
    ("request", 2, EvalError, "", 0, "no NSError"),
    ("evaluate", 0, EvalError, "com.apple.appleneuralengine", 8, "Program Inference error"),
    ("evaluate", 6, EvalError, "com.apple.appleneuralengine", 8, "Program Inference error"),
):
    model = a_model("ane")
    device = model.ane.device
    fake().fake_ane_fail(step.encode(), after, 1, 0)
    try:
        train(model)
    except error as e:
        message = str(e)
    else:
        raise AssertionError(f"{step}: no error")
    failure = device.failure()
    assert (failure.domain, failure.code) == (domain, code) and words in failure.text, failure
    assert failure.text in message and failure.domain in message, message
    if error is CompileError:
        assert "program " in message and "for B = 2" in message, message
    del model, device
    gc.collect()
    assert (fake().fake_ane_live(), files()) == (0, []), step
model = a_model("ane")
assert train(model) == expected
"""


def test_failures_reach_python(built: Path, tmp_path: Path) -> None:
    """The error's class, domain, code and text; no object and no file stays; what comes next is right."""
    run_python(FAULTS, environment(built, tmp_path / "tmp"))
    assert left_in(tmp_path / "tmp") == []


def run_cli(env: dict[str, str], cwd: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "anellm.train", *arguments]
    return subprocess.run(command, env=env, cwd=cwd, capture_output=True, text=True, timeout=120, check=False)


def test_the_train_verb(built: Path, tmp_path: Path) -> None:
    """``--device ane`` gives the losses of ``--device ane-sim``."""
    env = environment(built, tmp_path / "tmp")
    runs = []
    for device in ("ane-sim", "ane"):
        size = ["--preset", "tiny", "--steps", "3", "--batch-size", "1", "--seq-len", "32", "--eval-interval", "0"]
        done = run_cli(env, tmp_path, *size, "--device", device, "--out", device)
        assert done.returncode == 0, done.stderr
        lines = map(json.loads, (tmp_path / device / "metrics.jsonl").read_text().splitlines())
        runs.append([(line["step"], line["loss"], line["grad_norm"]) for line in lines if line["kind"] == "step"])
    assert len(runs[0]) == 3
    assert runs[0] == runs[1]
    assert left_in(tmp_path / "tmp") == []


# ---- where there is no engine ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "more", "words"),
    [
        ([], {"SHIM_MACOS": "14.7.1"}, "need macOS 15 or newer, on macOS 14.7.1, Apple M4"),
        (
            [],
            {"SHIM_MACOS": "", "SHIM_CHIP": ""},
            "need macOS 15 or newer, on macOS of unknown version, an unknown chip",
        ),
        ([], {"ANELLM_ANE_FRAMEWORK": "/nowhere/ANE"}, "/nowhere/ANE: cannot open.*, on macOS 15.1, Apple M4"),
        (["-DFAKE_REQUEST=_ANEOther"], {"SHIM_MACOS": "19.0"}, "has no class _ANERequest, on macOS 19.0, Apple M4"),
        (
            ["-DFAKE_KEYWORD=procedure"],
            {"SHIM_CHIP": "Apple M9"},
            "class _ANERequest lacks a method that it had, on .* M9",
        ),
        (["-DFAKE_ENGINES=0"], {"SHIM_CHIP": "Apple M1 (Virtual)"}, r"has none, on macOS 15.1, Apple M1 \(Virtual\)"),
        ([], {"ANELLM_ANE_BACKOFF": "soon"}, 'ANELLM_ANE_BACKOFF: expected a number from 0 to 600, found "soon"'),
    ],
)
def test_unavailable(flags: list[str], more: dict[str, str], words: str, built: Path, tmp_path: Path) -> None:
    """The reason names the version of macOS, the chip, and what is missing; so does the verb's exit."""
    if flags:
        name = f"lib{re.sub(r'[^A-Za-z0-9]', '', flags[0])}.so"
        build(built, "fake", name, *flags)
        more = more | {"ANELLM_ANE_FRAMEWORK": str(built / name)}
    env = environment(built, tmp_path / "tmp", **more)
    done = run_cli(env, tmp_path, "--preset", "tiny", "--device", "ane", "--steps", "1", "--out", "r")
    assert done.returncode == (2 if "BACKOFF" in words else 5), done.stderr
    assert re.search(words, done.stderr), done.stderr
    assert not (tmp_path / "r").exists()


def test_information_of_the_simulator() -> None:
    assert AneDevice("ane-sim", AneOptions(chip="m1")).information() == {
        "device": "sim", "architecture": "h13g", "chip": "m1", "system": "", "n_engines": 0, "n_cores": 0,
    }  # fmt: skip


def test_information(built: Path, tmp_path: Path) -> None:
    script = "print(json.dumps(a_model('ane').ane.device.information()))"
    found = json.loads(run_python(script, environment(built, tmp_path / "tmp", SHIM_MACOS="26.2")))
    assert found == {
        "device": "ane", "architecture": "h16g", "chip": "Apple M4", "system": "macOS 26.2",
        "n_engines": 1, "n_cores": 16,
    }  # fmt: skip


def test_the_info_verb(built: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "anellm.info"]
    for version, words in (
        ("15.0", "ane           available"),
        ("14.0", "ane           not available: .* on macOS 14.0"),
    ):
        env = environment(built, tmp_path / "tmp", SHIM_MACOS=version)
        done = subprocess.run(command, env=env, capture_output=True, text=True, check=True)
        assert re.search(words, done.stdout), done.stdout
