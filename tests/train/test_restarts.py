"""Runs whose processes may compile only so much: new images go on in the middle of a step, and nothing shows of it."""

from __future__ import annotations

import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from anellm import checkpoint, image, metrics, pipeline_run, safeio
from anellm.ane_run import STATE, EngineRun
from anellm.config import ModelConfig, TrainConfig
from anellm.data import TokenDataset
from anellm.errors import BusyError, CheckpointError, CompileError, ConfigError, DeviceError, UnavailableError
from anellm.model import Model
from anellm.pipeline import CompileBudget, plan
from anellm.pipeline_run import MAX_IDLE, STATE_FILE
from anellm.stages import Stages
from anellm.state_file import DATA_OFFSET, StateFile, StateKey
from anellm.trainer import Trainer, TrainResult

STEPS = 2
OPTIONS = ["--preset", "stories260k", "--batch-size", "2", "--seq-len", "32", "--seed", "1", "--save-interval", "1",
           "--eval-interval", "1", "--eval-windows", "2", "--sample-tokens", "0", "--quiet"]  # fmt: skip
STORIES = ModelConfig.from_preset("stories260k")
SHAPE = ModelConfig(dim=16, hidden_dim=24, n_layers=3, n_heads=2, n_kv_heads=1, vocab_size=64, max_seq_len=16)
DATA = TokenDataset(np.random.default_rng(0).integers(0, 64, 2000).astype(np.uint16))
HELD_OUT = TokenDataset(np.random.default_rng(1).integers(0, 64, 100).astype(np.uint16))


@pytest.fixture(autouse=True)
def _no_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ANELLM_DEVICE", raising=False)
    monkeypatch.delenv(image.VARIABLE, raising=False)


def start(out: Path, *more: str, steps: int = STEPS, **how: Any) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "anellm.train", *OPTIONS, "--steps", str(steps), "--out", str(out), *more]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, **how)


def finish(process: subprocess.Popen[bytes], code: int = 0) -> str:
    out, err = process.communicate(timeout=120)
    assert process.returncode == code, err
    return out.decode() + err.decode()


def digests(run: Path, step: int) -> dict[str, str]:
    folder = checkpoint.step_dir(run, step)
    names = [checkpoint.MODEL, checkpoint.OPTIMIZER, *([STATE] if (folder / STATE).exists() else [])]
    return {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in names}


def records(run: Path, kind: str) -> list[dict[str, Any]]:
    return [record for record in metrics.read(run) if record["kind"] == kind]


def curve(run: Path) -> list[tuple[Any, ...]]:
    steps = [(r["step"], r["loss"], r["grad_norm"], r["tokens"]) for r in records(run, "step")]
    return steps + [(r["step"], r["val_loss"]) for r in records(run, "eval")]


def expect_same(whole: Path, run: Path, steps: int) -> None:
    assert digests(run, steps) == digests(whole, steps)
    assert curve(run) == curve(whole)
    assert len(curve(run)) == 2 * steps + 1
    assert checkpoint.list_steps(run) == checkpoint.list_steps(whole)
    assert checkpoint.read_best(run) == checkpoint.read_best(whole)
    assert not (run / STATE_FILE).exists()


@pytest.mark.parametrize(
    ("budget", "more", "compiles"),
    [
        (14, ("--gradient-accumulation-steps", "2", "--compact-vocab"), 54),
        (20, ("--device", "ane-sim", "--ane-mode", "static"), 48),
    ],
    ids=["cpu", "static"],
)
def test_images_follow_one_another_as_planned(
    tmp_path: Path, budget: int, more: tuple[str, ...], compiles: int
) -> None:
    whole, run = tmp_path / "whole", tmp_path / "run"
    finish(start(whole, "--compile-budget", "119", *more))
    path = tmp_path / "summary.json"
    said = finish(start(run, "--compile-budget", str(budget), "--json", str(path), *more))
    expect_same(whole, run, STEPS)
    planned = plan(STORIES, CompileBudget(budget))
    summary = json.loads(path.read_text())
    assert summary["restarts"] == planned.restarts(STEPS) == STEPS * (2 * len(planned.groups) - 1) - 1
    assert summary["images"] == summary["restarts"] + 1
    assert summary["groups"] == len(planned.groups) == {14: 3, 20: 2}[budget]
    assert f"{summary['restarts']} restarts" in said
    images = records(run, "image")
    assert [record["image"] for record in images] == list(range(1, summary["images"] + 1))
    assert len({record["nonce"] for record in images}) == len(images)
    assert all(0 < record["compiles"] <= planned.budget.usable for record in images)
    assert sum(record["compiles"] for record in images) == summary["compiles"] == STEPS * compiles
    assert [record["startup_seconds"] > 0 for record in images] == [False] + [True] * (len(images) - 1)
    assert summary["restart_seconds"] == pytest.approx(sum(record["startup_seconds"] for record in images))
    assert len(records(whole, "image")) == 1


def test_killed_at_any_time_and_resumed(tmp_path: Path) -> None:
    steps, whole, run = 4, tmp_path / "whole", tmp_path / "run"
    more = ("--compile-budget", "20", "--save-interval", "3")
    finish(start(whole, *more[2:], steps=steps))
    chance = random.Random(3)
    for least in (1, 3, 5):  # images that have ended
        process = start(run, *more, "--resume", steps=steps)
        deadline = time.monotonic() + 60
        while len(records(run, "image")) < least:
            assert process.poll() is None, process.communicate()
            assert time.monotonic() < deadline
            time.sleep(0.002)
        time.sleep(chance.random() * 0.6)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        assert process.returncode == -signal.SIGKILL, "it was done before it was killed"
    finish(start(run, *more, "--resume", steps=steps))
    expect_same(whole, run, steps)


@pytest.mark.parametrize("before", [signal.SIG_DFL, signal.SIG_IGN], ids=["default", "ignored"])
def test_interrupted_in_a_step_it_ends_with_the_step(tmp_path: Path, before: Any) -> None:
    """Also where the shell has started it with SIGINT ignored, as in the background."""
    run = tmp_path / "run"
    process = start(run, "--compile-budget", "20", steps=20, preexec_fn=lambda: signal.signal(signal.SIGINT, before))
    while not records(run, "image"):
        assert process.poll() is None, process.communicate()
        time.sleep(0.002)
    process.send_signal(signal.SIGINT)  # wherever it is: in Python's start, in a step, in exec()
    finish(process, 130)
    steps = checkpoint.list_steps(run)
    assert steps[-1] in (1, 2)
    assert steps[-1] == records(run, "step")[-1]["step"]
    assert not (run / STATE_FILE).exists()


# ---- from Python: child processes ------------------------------------------------------------------------------------


def make_trainer(out: Path | None, found: list[Any], **options: Any) -> Trainer:
    settings: dict[str, Any] = {
        "steps": STEPS, "batch_size": 4, "seq_len": 16, "learning_rate": 1e-2, "warmup_steps": 2, "eval_interval": 1,
        "out": None if out is None else str(out), **options,
    }  # fmt: skip
    model = Model(SHAPE, "cpu", seed=3)
    return Trainer(model, TrainConfig(**settings), DATA, HELD_OUT, callbacks=(found.append,))


def train(out: Path | None = None, **options: Any) -> tuple[TrainResult, list[Any]]:
    found: list[Any] = []
    return make_trainer(out, found, **options).train(), found


def values(found: list[Any], *keys: str) -> list[tuple[Any, ...]]:
    return [tuple(record.get(key) for key in keys) for record in found if record["kind"] in ("step", "eval")]


@pytest.mark.parametrize(
    "options",
    [{"gradient_accumulation_steps": 2}, {"device": "ane-sim", "ane_mode": "static"}],
    ids=["cpu", "static"],
)
def test_a_script_survives(tmp_path: Path, options: dict[str, Any]) -> None:
    keys = ("kind", "step", "loss", "val_loss", "grad_norm", "loss_scale", "rescales")
    pid = os.getpid()
    _, whole = train(compile_budget=119, **options)
    result, found = train(tmp_path / "run", compile_budget=14, **options)
    assert values(found, *keys) == values(whole, *keys)
    assert (result.images["restarts"], result.images["groups"]) == (plan(SHAPE, CompileBudget(14)).restarts(STEPS), 2)
    images = [record for record in found if record["kind"] == "image"]
    assert [record["image"] for record in images] == list(range(1, result.images["images"] + 1))
    assert os.getpid() == pid
    assert not (tmp_path / "run" / STATE_FILE).exists()
    assert not any("max_activation" in record for record in found if record["kind"] == "eval")  # the CPU's
    last = [record for record in found if record["kind"] == "step"][-1]
    if "device" in options:
        assert min(last["max_activation"]) > 0
        assert last["modelled_ms"] > 0


def test_a_deep_model_trains_under_the_real_budget(tmp_path: Path) -> None:
    """llama1b's 22 layers, at small widths: 132 programs, where a process may compile 119."""
    shape = ModelConfig(dim=16, hidden_dim=24, n_layers=22, n_heads=2, n_kv_heads=1, vocab_size=64, max_seq_len=16)
    found: list[Any] = []
    config = TrainConfig(
        device="ane-sim", ane_mode="static", steps=1, batch_size=2, seq_len=16, activation_checkpoint="sqrt",
        learning_rate=1e-3, out=str(tmp_path / "run"),
    )  # fmt: skip
    model = Model(shape, "cpu", seed=3)
    result = Trainer(model, config, DATA, callbacks=(found.append,)).train()
    assert (result.images["groups"], result.images["restarts"], result.images["compiles"]) == (2, 2, 102 + 30 + 102)
    (staged,) = (record for record in found if record["kind"] == "step")
    plain: list[Any] = []
    on_cpu = TrainConfig(steps=1, batch_size=2, seq_len=16, learning_rate=1e-3)
    Trainer(Model(shape, "cpu", seed=3), on_cpu, DATA, callbacks=(plain.append,)).train()
    expected = next(record for record in plain if record["kind"] == "step")
    assert staged["loss"] == pytest.approx(expected["loss"], rel=1e-4)
    assert staged["grad_norm"] == pytest.approx(expected["grad_norm"], rel=0.02)


def test_a_model_stays_usable() -> None:
    found: list[Any] = []
    trainer = make_trainer(None, found, compile_budget=14)
    weights = trainer.model.params["model.norm.weight"]
    before = weights.copy()
    trainer.train()
    assert weights is trainer.model.params["model.norm.weight"]
    assert not np.array_equal(weights, before)  # the same array: what the children trained with
    tokens = np.ones((1, 8), np.int32)
    assert trainer.model.forward(tokens, tokens) > 0
    trainer.model.backward()


def test_a_child_that_dies_ends_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    found: list[Any] = []
    trainer = make_trainer(None, found, compile_budget=14)
    perform, calls = image.ChildImage.perform, []

    def kill(self: Any, action: Any, scale: float) -> None:
        calls.append(action)
        if len(calls) == 2:
            self._process.kill()
        perform(self, action, scale)

    monkeypatch.setattr(image.ChildImage, "perform", kill)
    with pytest.raises(UnavailableError, match="has ended by itself, with exit code -9"):
        trainer.train()


def test_a_step_that_is_not_finite_is_skipped(tmp_path: Path) -> None:
    options: dict[str, Any] = {"device": "ane-sim", "ane_mode": "static", "steps": 3}
    found: list[Any] = []
    trainer = make_trainer(tmp_path / "run", found, compile_budget=14, **options)
    trainer.model.params["model.layers.1.mlp.up_proj.weight"][0, 0] = 1e6  # beyond fp16
    trainer.model.weights_changed()

    def mend(record: Any) -> None:
        if record["kind"] == "skip":
            trainer.model.params["model.layers.1.mlp.up_proj.weight"][0, 0] = 0.01

    trainer.callbacks += (mend,)
    result = trainer.train()
    (skip,) = (record for record in found if record["kind"] == "skip")
    assert (skip["step"], skip["layer"], skip["reason"]) == (1, 1, "non-finite")
    assert (result.state.step, result.state.optimizer_step) == (3, 2)


class Here(image.LocalImage):
    """What a child does, in this process: quicker."""

    def __init__(self, model: Model) -> None:
        self.model, self.engine, self.ids = model, None, None
        self.file: Any = None

    def perform(self, action: Any, scale: float) -> None:
        if not hasattr(self, "_stages"):
            key = self.file.key
            shape = key.batch_size, key.seq_len, key.n_micro
            super().__init__(self.model, Stages(self.model, *shape, key.starts, self.file.fd, DATA_OFFSET))
        super().perform(action, scale)

    def restart(self) -> None:
        self.model.weights_changed()


# ---- what is refused -------------------------------------------------------------------------------------------------


def test_a_loop_without_progress_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise CompileError("no")

    with monkeypatch.context() as patch:
        patch.setattr(image.ChildImage, "perform", fail)
        for _ in range(MAX_IDLE):
            with pytest.raises(CompileError):
                train(tmp_path / "run", compile_budget=14, resume="auto")
        held = (tmp_path / "run" / STATE_FILE).read_bytes()
        with pytest.raises(
            DeviceError, match=rf"{STATE_FILE}: {MAX_IDLE} processes in a row got nothing done in step 1"
        ):
            train(tmp_path / "run", compile_budget=14, resume="auto")
        assert (tmp_path / "run" / STATE_FILE).read_bytes() == held
    (tmp_path / "run" / STATE_FILE).unlink()
    result, _ = train(tmp_path / "run", compile_budget=14, resume="auto")
    assert result.state.step == STEPS


def stopped_run(out: Path, monkeypatch: pytest.MonkeyPatch, actions: int) -> None:
    """Stop a run behind some actions, as a kill would."""
    perform, calls = Here.perform, []

    def stop(self: Any, action: Any, scale: float) -> None:
        if len(calls) == actions:
            raise CompileError("stopped")
        calls.append(action)
        perform(self, action, scale)

    with monkeypatch.context() as patch:
        patch.setattr(Here, "perform", stop)
        with pytest.raises(CompileError, match="stopped"):
            train(out, compile_budget=14, save_interval=1)


def test_every_place_in_a_step_can_be_gone_on_from(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pipeline_run, "ChildImage", Here)
    _, whole = train(compile_budget=119)
    per_step = 7  # of 2 groups: compile, forward; compile, forward, backward; compile, backward
    for actions in range(2 * per_step):
        run = tmp_path / str(actions)
        stopped_run(run, monkeypatch, actions)
        torn = actions % per_step in (4, 6)  # before a backward, which had begun to change gradients
        _, found = train(run, compile_budget=14, save_interval=1, resume="auto")
        done = 0 if torn and actions < per_step else actions // per_step
        keys = ("kind", "step", "loss", "val_loss", "grad_norm")
        expected = [v for v in values(whole, *keys) if v[1] > done or (done == 0 and v[1] == 0 and torn)]
        assert values(found, *keys) == expected, actions
        curves = [
            [(r["step"], r["loss"]) for r in records(run, "step")],
            [(s, loss) for k, s, loss, *_ in values(whole, *keys) if k == "step"],
        ]
        assert curves[0] == curves[1]


def test_a_state_of_another_run_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pipeline_run, "ChildImage", Here)
    stopped_run(tmp_path / "run", monkeypatch, 2)
    held = (tmp_path / "run" / STATE_FILE).read_bytes()
    for options, message in (
        ({"batch_size": 3}, "batch_size: expected 3, found 4; without that file the run goes on"),
        ({"compile_budget": 7}, "groups: expected 3, found 2"),
        ({"gradient_accumulation_steps": 2}, "micro_batches: expected 2, found 1"),
    ):
        with pytest.raises(CheckpointError, match=f"{STATE_FILE}: slot 0: {message}"):
            train(tmp_path / "run", **{"compile_budget": 14, "resume": "auto", **options})
    other = TokenDataset(np.zeros(2000, np.uint16))
    for _ in range(MAX_IDLE + 1):  # a refusal is no image that got nothing done
        with pytest.raises(CheckpointError, match="trained with other data: expected SHA-256"):
            Trainer(
                Model(SHAPE, seed=3),
                TrainConfig(batch_size=4, seq_len=16, out=str(tmp_path / "run"), compile_budget=14, resume="auto"),
                other,
                HELD_OUT,
            )
    assert (tmp_path / "run" / STATE_FILE).read_bytes() == held
    (tmp_path / "run" / STATE_FILE).write_text("notes")
    with pytest.raises(CheckpointError, match="magic: expected"):
        train(tmp_path / "run", compile_budget=14, resume="auto")
    assert (tmp_path / "run" / STATE_FILE).read_text() == "notes"


WRONG: list[tuple[Any, str]] = [
    ({}, "expected the keys pipeline, run"),
    ({"run": {}, "pipeline": {}}, "pipeline: expected the keys in_step"),
    ({"run": [], "pipeline": None}, "pipeline: expected the keys in_step"),
    (("pipeline", "in_step", 1), "in_step: expected a bool from 0, found 1"),
    (("pipeline", "restarts", -1), "restarts: expected a int from 0, found -1"),
    (("pipeline", "restarts", 2**60), "restarts: expected a int"),
    (("pipeline", "restart_seconds", 1), "restart_seconds: expected a float"),
    (("pipeline", "nonce", None), "nonce: expected a str"),
    (("run", "state", {}), "expected the keys step, tokens"),
    (("run", "state", None), "state: expected an object, found None"),
    (("run", "more", 1), "run: expected the keys"),
    (("run", "partial", 1), "partial: expected an object"),
    (("run", "step_seconds", -1.0), "step_seconds: expected a time"),
    (("run", "step_seconds", "1"), "step_seconds: expected a time"),
    (("run", "ane", 3), "ane: expected an object or null, found 3"),
]


def test_values_of_a_state_are_checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pipeline_run, "ChildImage", Here)
    stopped_run(tmp_path / "run", monkeypatch, 2)
    key = StateKey(SHAPE, 4, 16, 1, (0, 2))
    path = tmp_path / "run" / STATE_FILE
    for change, message in WRONG:
        file = StateFile.open(path, key)
        good = file.commit
        wrong: Any = change
        if isinstance(change, tuple):
            part, name, value = change
            wrong = {**good.values, part: {**good.values[part], name: value}}
        file.store(good._replace(values=wrong))
        file.close()
        with pytest.raises(CheckpointError, match=message) as caught:
            train(tmp_path / "run", compile_budget=14, resume="auto")
        assert STATE_FILE in str(caught.value)
        file = StateFile.open(path, key)
        file.store(good)
        file.close()
    for words, message in (
        ((0, 9, 0, 0, 0), "schedule state: phase: expected 0 to 3"),
        ((0, 0, 7, 0, 0), "schedule state: unit: expected 0 to 0"),
        ((1, 0, 0, 0, 12), "run: step: expected 1 by the schedule, found 0"),
    ):
        file = StateFile.open(path, key)
        file.store(good._replace(words=words))
        file.close()
        with pytest.raises(CheckpointError, match=f"{STATE_FILE}: {message}"):
            train(tmp_path / "run", compile_budget=14, resume="auto")


def test_what_an_engine_counts_on_from_is_checked(tmp_path: Path) -> None:
    run = EngineRun(Model(SHAPE, "ane-sim", seed=3).ane)
    run.begin_step()
    good = run.partial()
    run.go_on(good, tmp_path)
    for name in good:
        for value in (None, "x", [1], [True] * 3, {}):
            with pytest.raises(CheckpointError, match=f"{tmp_path}: partial: {name}: expected"):
                run.go_on({**good, name: value}, tmp_path)
    run.close()
    EngineRun(None).go_on({}, tmp_path)


def test_flags_that_cannot_be_are_refused() -> None:
    for options, message in (
        ({"compile_budget": 0}, "compile_budget: expected at least 1, found 0"),
        ({"compile_headroom": 1.0}, "compile_headroom: expected less than 1, found 1.0"),
        ({"compile_headroom": 0.0}, "compile_headroom: expected more than 0, found 0.0"),
        ({"compile_budget": 20, "profile": "p.json"}, "--profile: not with --compile-budget"),
    ):
        with pytest.raises(ConfigError, match=message):
            TrainConfig(**options)
    with pytest.raises(ConfigError, match="compile budget: expected room for the 6 programs of a layer, found 4"):
        train(compile_budget=5)


def test_what_an_image_is_left_is_checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    good = {"out": str(tmp_path), "nonce": "a", "lock": 3, "signals": 4, "began": 1.0}
    for text, message in (
        ("x", "expected JSON"),
        ("{}", "expected the keys out, nonce, lock, signals, began"),
        (json.dumps({**good, "lock": "3"}), "lock: expected a int, found '3'"),
        (json.dumps({**good, "began": None}), "began: expected a float, found None"),
    ):
        monkeypatch.setenv(image.VARIABLE, text)
        with pytest.raises(ConfigError, match=f"environment variable {image.VARIABLE}: {message}"):
            image.take_handover()
        assert image.VARIABLE not in os.environ
    monkeypatch.setenv(image.VARIABLE, json.dumps(good))
    assert image.take_handover() == image.Handover(**good)
    assert image.take_handover() is None


def test_no_room_for_the_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(CheckpointError, match=f"{STATE_FILE}: [0-9]+ bytes for the state .*: No space left on device"):
        train(tmp_path / "run", compile_budget=14)
    assert STATE_FILE not in os.listdir(tmp_path / "run")


def test_signals_wait_for_the_next_image() -> None:
    """Also one that another thread takes, which does not block it."""
    code = (
        "import os, signal, sys, threading, time\n"
        "from anellm import image\n"
        "other = threading.Thread(target=time.sleep, args=(2,), daemon=True)\n"
        "signal.signal(signal.SIGTERM, lambda *_: None)\n"
        "if sys.argv[1] == 'other': other.start()\n"
        "pipe = image.hold_signals()\n"
        "os.kill(os.getpid(), signal.SIGTERM)\n"
        "found = []\n"
        "signal.signal(signal.SIGTERM, lambda *_: found.append('handler'))\n"
        "came = image.take_signals(image.Handover('', '', 0, pipe, 0.0))\n"
        "for _ in range(1000):\n"
        "    if came or found: break\n"
        "    time.sleep(0.01)\n"  # the other thread takes it when it runs
        "print('pipe' if came else '', *found)\n"
    )
    for who in ("nobody", "other"):
        command = [sys.executable, "-c", code, who]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        assert set(done.stdout.split()) & {"pipe", "handler"}, (who, done)


def test_a_lock_is_adopted_by_who_holds_it(tmp_path: Path) -> None:
    path = tmp_path / "run.lock"
    lock = safeio.Lock(path, "run")
    fd = lock.hand_over()
    assert os.get_inheritable(fd)
    adopted = safeio.Lock.adopt(path, fd)
    assert not os.get_inheritable(fd)
    with pytest.raises(BusyError):
        safeio.Lock(path, "run")
    with pytest.raises(BusyError, match="expected descriptor 9999 to hold this lock"):
        safeio.Lock.adopt(path, 9999)
    with open(tmp_path / "other", "w") as other, pytest.raises(BusyError, match="found another file"):
        safeio.Lock.adopt(path, other.fileno())
    with open(path) as again, pytest.raises(BusyError, match="to hold this lock"):
        safeio.Lock.adopt(path, again.fileno())
    adopted.close()
    safeio.Lock(path, "run").close()
