"""csrc/backend/ane/device_ane.m on Linux: GNUstep, a strict fake of Apple's framework, and the simulator behind it.

The device is a library of its own here (tests/apple/build.sh). Whatever trains runs in a process of its own: what would
crash or corrupt with Apple's framework makes the fake abort.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from objc_mutants import LEAKS, MUTANTS, QOS_MUTANTS, Mutant, mutate
from objc_tools import (
    HERE,
    PACKAGES,
    SANITIZERS,
    VALGRIND,
    build,
    environment,
    has_sanitizers,
    left_in,
    run_python,
)

from anellm.ane import AneDevice
from anellm.device import QOS, AneOptions

Done = subprocess.CompletedProcess[str]
SOURCE = HERE.parents[1] / "csrc" / "backend" / "ane" / "device_ane.m"


def drive(built: Path, tmp: Path, *checker: str, arguments: tuple[str, ...] = (), **more: str) -> Done:
    """Run the driver; more is environment."""
    command = [*checker, str(built / "driver"), *arguments]
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


# The QoS that is fast, or the step that fails.
MEASURED = ("9", "21", "33", "compile", "load", "evaluate", "surface", "request")


@pytest.mark.parametrize("how", MEASURED)
def test_measured_qos(how: str, built: Path, tmp_path: Path) -> None:
    """Measured on first use, once; the fastest is taken, else the default."""
    done = drive(built, tmp_path / "tmp", arguments=(how,))
    assert (done.returncode, done.stdout) == (0, "ok\n"), done.stderr
    assert "without pool" not in done.stderr
    assert left_in(tmp_path / "tmp") == []


def test_a_framework_without_a_cache(built: Path, tmp_path: Path) -> None:
    """Where models do not tell whether they are compiled, all are compiled."""
    build(built, "fake", "libNoCache.so", "-DFAKE_EXISTS=isCompiled")
    other = str(built / "libNoCache.so")
    done = drive(built, tmp_path / "tmp", arguments=("no-cache",), ANELLM_ANE_FRAMEWORK=other)
    assert (done.returncode, done.stdout) == (0, "ok\n"), done.stderr


@pytest.mark.parametrize("arguments", [(), ("9",)])
def test_valgrind(arguments: tuple[str, ...], built: Path, tmp_path: Path) -> None:
    if shutil.which("valgrind") is None:
        pytest.skip(f"needs valgrind: {PACKAGES}")
    done = drive(built, tmp_path / "tmp", *VALGRIND, arguments=arguments)
    assert done.returncode == 0, done.stderr
    assert "definitely lost" not in done.stderr


def test_sanitizers(built: Path, tmp_path: Path) -> None:
    """Addresses, undefined behaviour, leaks."""
    if not has_sanitizers():
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


def drive_mutant(built: Path, tmp: Path, mutant: Mutant, *checker: str, arguments: tuple[str, ...] = ()) -> Done:
    """Build a device with a mistake, unless it is there already, and run the driver on it."""
    source, library = tmp / f"{mutant.name}.m", f"lib{mutant.name}.so"
    if not (built / library).exists():
        source.write_text(mutate(SOURCE.read_text(), mutant))
        build(built, "device", library, str(source), FLAGS="-w -O0 -g0")
    return drive(built, tmp / "tmp", *checker, arguments=arguments, ANELLM_ANE_DEVICE=str(built / library))


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_mutants(mutant: Mutant, built: Path, tmp_path: Path) -> None:
    done = drive_mutant(built, tmp_path, mutant)
    assert done.returncode != 0 or "without pool" in done.stderr, f"nothing notices {mutant.name}"


@pytest.mark.parametrize("mutant", QOS_MUTANTS, ids=lambda mutant: mutant.name)
def test_qos_mutants(mutant: Mutant, built: Path, tmp_path: Path) -> None:
    for how in ("9", "compile", "evaluate"):
        if drive_mutant(built, tmp_path, mutant, arguments=(how,)).returncode != 0:
            return
    pytest.fail(f"nothing notices {mutant.name}")


@pytest.mark.parametrize("mutant", LEAKS, ids=lambda mutant: mutant.name)
def test_leaks(mutant: Mutant, built: Path, tmp_path: Path) -> None:
    if shutil.which("valgrind") is None:
        pytest.skip(f"needs valgrind: {PACKAGES}")
    done = drive_mutant(built, tmp_path, mutant, *VALGRIND)
    assert done.returncode == 9, f"nothing notices {mutant.name}: {done.stderr}"
    assert "definitely lost" in done.stderr


# ---- training ----------------------------------------------------------------------------------------------------

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
    "shape",
    [
        {},
        {"softmax": "cpu"},
        {"qk_norm": True, "n_kv_heads": 2},
        {"tie_embeddings": False},
        {"mode": "static"},
        {"mode": "static", "qk_norm": True},
        {"arch": "gpt2", "n_kv_heads": 2, "bias": True},
        {"arch": "gpt2", "n_kv_heads": 2, "gelu": "erf", "mode": "static"},
    ],
)
def test_training_equals_the_simulator(shape: dict[str, object], built: Path, tmp_path: Path) -> None:
    """Losses, weights, gradients, moments, the scaling's state and logits, bit for bit; nothing stays."""
    run_python(COMPARE, environment(built, tmp_path / "tmp"), json.dumps(shape))
    assert left_in(tmp_path / "tmp") == []


KEPT = """
losses = []
for _ in range(2):
    model = a_model("ane")
    losses.append(train(model))
    counters = model.ane.device.counters()
    print(json.dumps([counters["compiles"], counters["cache_hits"], counters["loads"]]))
    del model
    gc.collect()
    assert (fake().fake_ane_live(), files()) == (0, [])
assert losses[0] == losses[1]
"""


def test_a_second_model_compiles_nothing(built: Path, tmp_path: Path) -> None:
    """Programs that macOS has are loaded as they are; what they compute is the same."""
    script = "fake().fake_ane_keep(1)\n" + KEPT
    counts = [json.loads(line) for line in run_python(script, environment(built, tmp_path / "tmp")).splitlines()]
    assert counts == [[8, 0, 8], [0, 8, 8]]
    off = environment(built, tmp_path / "tmp", ANELLM_ANE_CACHE="off")
    assert [json.loads(line) for line in run_python(script, off).splitlines()] == [[8, 0, 8]] * 2


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


FALLBACK = """
import warnings

def refused(device, step, kind):
    model = a_model(device, fallback="cpu")
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        if device == "ane":
            fake().fake_ane_fail(step.encode(), 5, 1, kind)
        else:
            model.ane.device.simulator.inject(f"{step}-fails", after=5, count=1)
        losses = train(model)
    assert len(found) == 1, found
    (refusal,) = model.ane.refusals
    return model, losses, refusal, str(found[0].message)

for step in "compile", "load":
    sim, losses, expected, _ = refused("ane-sim", step, 0)
    assert expected.program == "sdpa_bwd1"
    for kind in 0, 1, 2:  # an NSError, none, an exception
        ane, found, refusal, warning = refused("ane", step, kind)
        assert losses == found
        assert all(np.array_equal(a, ane.params[name]) for name, a in sim.params.items())
        assert refusal[:4] == expected[:4] == ("sdpa_bwd1", "attention backward", 2, 33)
        assert "program sdpa_bwd1 for B = 2, T = 33" in warning and refusal.text in warning, warning
        if kind == 0:
            assert refusal[4:7] == expected[4:7] and refusal.domain in warning, refusal
        a, b = sim.ane.stats(), ane.ane.stats()
        assert (a.programs, a.flops_share, a.n_refusals) == (b.programs, b.flops_share, 1)
        assert ane.ane.device.counters()["compiles"] == sim.ane.device.counters()["compiles"]
        del ane
        gc.collect()
        assert (fake().fake_ane_live(), files()) == (0, [])
"""


def test_refused_programs_fall_back(built: Path, tmp_path: Path) -> None:
    """Training goes on as it does over the simulator with the same refusal; what was compiled in vain is freed."""
    run_python(FALLBACK, environment(built, tmp_path / "tmp"))
    assert left_in(tmp_path / "tmp") == []


def run_cli(env: dict[str, str], cwd: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "anellm.train", *arguments]
    return subprocess.run(command, env=env, cwd=cwd, capture_output=True, text=True, timeout=120, check=False)


def test_a_run_equals_the_simulators(built: Path, tmp_path: Path) -> None:
    """The framework's name is enough: the device is the library beside it."""
    size = ["--preset", "tiny", "--steps", "20", "--batch-size", "2", "--seq-len", "33", "--eval-interval", "10"]
    found = []
    for device in ("ane", "ane-sim"):
        env = environment(built, tmp_path / "tmp")
        del env["ANELLM_ANE_DEVICE"]
        done = run_cli(env, tmp_path, *size, "--device", device, "--out", device)
        assert done.returncode == 0, done.stderr
        records = map(json.loads, (tmp_path / device / "metrics.jsonl").read_text().splitlines())
        found.append([r.get("loss", r.get("val_loss")) for r in records if r["kind"] in ("step", "eval")])
    assert len(found[0]) >= 22
    assert found[0] == found[1]


def test_the_qos_of_a_run(built: Path, tmp_path: Path) -> None:
    """The flag comes before the environment; what neither says is measured. The losses are the same."""
    size = ["--preset", "tiny", "--steps", "2", "--batch-size", "1", "--seq-len", "32", "--eval-interval", "0"]
    losses = []
    for name, flags, qos, expected in (
        ("flag", ["--ane-qos", "user-initiated"], "9", {"ane_qos": "user-initiated", "ane_qos_measured": False}),
        ("environment", ["--ane-qos", "auto"], "9", {"ane_qos": "background", "ane_qos_measured": False}),
        ("number", [], "5", {"ane_qos": "5", "ane_qos_measured": False}),
        ("measured", [], "", {"ane_qos_measured": True}),
    ):
        env = environment(built, tmp_path / "tmp", ANELLM_ANE_QOS=qos)
        done = run_cli(env, tmp_path, *size, "--device", "ane", *flags, "--out", name, "--json", f"{name}.json")
        assert done.returncode == 0, done.stderr
        records = [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        manifest, summary = (tmp_path / name / "manifest.json", tmp_path / f"{name}.json")
        for found in (records[0], json.loads(manifest.read_text()), json.loads(summary.read_text())):
            assert expected.items() <= found.items()
            assert found["ane_qos"] in {"5", *QOS[1:]}
        assert found["compiles"] > 0
        assert found["cache_hits"] == 0
        losses.append([record["loss"] for record in records if record["kind"] == "step"])
    assert losses[1:] == losses[:1] * 3
    assert 'ane_qos = "user-initiated"' in (tmp_path / "flag" / "config.toml").read_text()
    assert left_in(tmp_path / "tmp") == []


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


def test_the_check_verb(built: Path, tmp_path: Path) -> None:
    """Layer by layer ``--device ane`` gives what ``--reference ane-sim`` gives: the simulator is behind it."""
    words = ["--layer-by-layer", "--preset", "tiny", "--batch-size", "1", "--seq-len", "20", "--json", "o.json"]
    command = [sys.executable, "-m", "anellm.check", *words, "--device", "ane"]
    for reference in ("cpu", "ane-sim"):
        done = subprocess.run(
            [*command, "--reference", reference],
            env=environment(built, tmp_path / "tmp"),
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        values = json.loads((tmp_path / "o.json").read_text())
        assert (values["tested"], values["device"]) == ("ane, dynamic", "ane")
        rows = [layer["forward"] for layer in values["layers"][1:-1]]
        assert all((row["difference"] == 0) == (reference == "ane-sim") for row in rows)
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
