"""The loop's order of things, on a model that is a few numbers: skips, stops, intervals, retention, interrupts."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from anellm import checkpoint, metrics
from anellm.config import ModelConfig, TrainConfig
from anellm.data import TokenDataset
from anellm.errors import CheckpointError, ConfigError, DataError, DivergedError
from anellm.model import GradNorm
from anellm.state import TrainState
from anellm.trainer import Trainer, TrainResult

SHAPE = ModelConfig(dim=8, hidden_dim=12, n_layers=1, n_heads=2, vocab_size=20, max_seq_len=16)


class FakeModel:
    """Loss w**2 / 2 with one weight, and gradients or losses made non-finite on request."""

    def __init__(self, bad: Mapping[int, str] | None = None, val: Mapping[int, float] | None = None) -> None:
        self.config = SHAPE
        self.params = {"w": np.full((2, 1), 3.0, np.float32)}
        self.grads = {"w": np.zeros((2, 1), np.float32)}
        self.moments_m = {"w": np.zeros((2, 1), np.float32)}
        self.moments_v = {"w": np.zeros((2, 1), np.float32)}
        self.bad, self.val = bad or {}, val or {}
        self.calls: list[tuple[Any, ...]] = []
        self.micro_steps = self.evaluations = 0

    def set_activation_checkpoint(self, policy: str) -> None:
        self.activation_checkpoint = policy

    def set_dtype(self, dtype: str) -> None:
        self.dtype = dtype

    def forward(self, tokens: np.ndarray, targets: np.ndarray, *, training: bool = True) -> float:
        if not training:
            self.calls.append(("evaluate", *tokens.shape))
            self.evaluations += 1
            return self.val.get(self.evaluations, 5.0 / self.evaluations)
        self.calls.append(("forward", *tokens.shape))
        self.micro_steps += 1
        return float("nan") if self.bad.get(self.micro_steps) == "loss" else float((self.params["w"] ** 2).sum() / 4)

    def backward(self, scale: float, *, accumulate: bool) -> None:
        self.calls.append(("backward", scale, accumulate))
        gradient = self.params["w"] * np.float32(scale / 2)
        if self.bad.get(self.micro_steps) == "gradient":
            gradient = gradient * np.float32("inf")
        self.grads["w"][...] = gradient + (self.grads["w"] if accumulate else 0)

    def grad_norm(self) -> GradNorm:
        bad = int((~np.isfinite(self.grads["w"])).sum())
        return GradNorm(float(np.linalg.norm(self.grads["w"])), bad, "w" if bad else None)

    def weights_changed(self) -> None:
        self.calls.append(("weights_changed",))


class FakeOptimizer:
    """Plain gradient descent."""

    def __init__(self, model: FakeModel) -> None:
        self.model = model
        self.updates: list[tuple[float, float]] = []
        self.loaded: Mapping[str, int] | None = None

    def step(self, lr: float, grad_scale: float) -> None:
        self.updates.append((lr, grad_scale))
        self.model.params["w"] -= np.float32(lr * grad_scale) * self.model.grads["w"]

    def load_state_dict(self, values: Mapping[str, int]) -> None:
        self.loaded = values


DATA = TokenDataset(np.arange(200, dtype=np.uint16) % 20)
HELD_OUT = TokenDataset(np.arange(41, dtype=np.uint16) % 20)


def trainer_of(model: FakeModel, records: list[Any] | None = None, **options: Any) -> Trainer:
    settings = {"seq_len": 8, "batch_size": 2, "eval_windows": 2, "warmup_steps": 0, "save_interval": 0, **options}
    config = TrainConfig(**settings)
    callbacks = () if records is None else (records.append,)
    optimizer: Any = FakeOptimizer(model)
    fake: Any = model
    return Trainer(fake, config, DATA, HELD_OUT, None, callbacks=callbacks, optimizer=optimizer)


def kinds(records: list[Any], kind: str) -> list[int]:
    return [record["step"] for record in records if record["kind"] == kind]


def test_a_step_reads_straight_down() -> None:
    model, records = FakeModel(), []
    trainer = trainer_of(model, records, steps=1, gradient_accumulation_steps=2, learning_rate=0.1, eval_interval=0)
    result = trainer.train()
    assert model.calls == [
        ("evaluate", 2, 8),
        ("forward", 2, 8),
        ("backward", 0.5, False),
        ("forward", 2, 8),
        ("backward", 0.5, True),
        ("evaluate", 2, 8),
    ]
    assert [record["kind"] for record in records] == ["eval", "step", "eval"]
    step = records[1]
    assert list(step) == ["kind", "step", "loss", "lr", "grad_norm", "tokens", "seconds", "tokens_per_s", "rss_mib"]
    assert step["loss"] == pytest.approx(4.5)
    assert step["tokens"] == 2 * 2 * 8
    assert step["rss_mib"] > 1
    norm = step["grad_norm"]
    assert norm == pytest.approx(1.5 * 2**0.5)
    assert trainer.optimizer.updates == [(pytest.approx(0.1), pytest.approx(1 / norm))]  # type: ignore[attr-defined]
    assert result == TrainResult(trainer.state, step["loss"], interrupted=False, out=None)


@pytest.mark.parametrize(("limit", "scale"), [(0.0, 1.0), (100.0, 1.0), (0.5, 0.5 / (1.5 * 2**0.5))])
def test_clipping(limit: float, scale: float) -> None:
    trainer = trainer_of(FakeModel(), steps=1, max_grad_norm=limit)
    trainer.train()
    assert trainer.optimizer.updates[0][1] == pytest.approx(scale)  # type: ignore[attr-defined]


def test_a_non_finite_gradient_is_skipped_and_counted() -> None:
    model, records = FakeModel({2: "gradient", 3: "loss", 5: "gradient"}), []
    trainer = trainer_of(model, records, steps=6, max_bad_steps=3)
    weights = []
    trainer.callbacks += (lambda record: weights.append(model.params["w"][0, 0]) if record["kind"] == "step" else None,)
    trainer.train()
    assert kinds(records, "step") == [1, 2, 3, 4, 5, 6]
    assert kinds(records, "skip") == [2, 3, 5]
    assert weights[0] == weights[1] == weights[2] != weights[3]
    assert [record["tensor"] for record in records if record["kind"] == "skip"] == ["w", None, "w"]
    assert trainer.state.skipped_steps == 3
    assert (trainer.state.bad_steps, trainer.state.optimizer_step) == (0, 3)
    assert np.isfinite(model.params["w"]).all()


def test_gradients_of_a_skipped_step_are_zeroed() -> None:
    model = FakeModel({1: "gradient"})
    trainer_of(model, steps=1).train()
    assert (model.grads["w"] == 0).all()


def test_training_stops_when_gradients_stay_non_finite(tmp_path: Path) -> None:
    model = FakeModel(dict.fromkeys(range(3, 9), "gradient"))
    trainer = trainer_of(model, steps=9, max_bad_steps=3, save_interval=1, out=str(tmp_path / "run"))
    with pytest.raises(
        DivergedError, match="step 5: 3 steps in a row .* first in w .2 values.*step_00000004"
    ) as caught:
        trainer.train()
    assert caught.value.exit_code == 3
    assert checkpoint.find_checkpoint(tmp_path / "run") == tmp_path / "run" / "step_00000004"
    assert [record["loss"] for record in metrics.read(tmp_path / "run") if record["kind"] == "step"][-1] is not None


def test_intervals_and_retention(tmp_path: Path) -> None:
    # The second evaluation (step 4) is the best; the ones after it are worse.
    model, records = FakeModel(val={1: 9.0, 2: 1.0, 3: 2.0, 4: 3.0, 5: float("nan")}), []
    out = tmp_path / "run"
    trainer = trainer_of(
        model, records, steps=14, eval_interval=4, save_interval=3, keep_last=2, keep_every=6, out=str(out)
    )
    result = trainer.train()
    assert kinds(records, "eval") == [0, 4, 8, 12, 14]
    assert kinds(records, "save") == [3, 4, 6, 9, 12, 14]
    assert checkpoint.list_steps(out) == [4, 6, 12, 14]
    assert checkpoint.read_best(out) == 4
    assert (result.state.best_step, result.state.best_val_loss, result.state.val_loss) == (4, 1.0, None)
    lines = list(metrics.read(out))
    assert [line["step"] for line in lines if line["kind"] == "step"] == list(range(1, 15))
    evals = [line for line in lines if line["kind"] == "eval"]
    assert evals[1]["val_loss"] == 1.0
    assert evals[1]["perplexity"] == pytest.approx(np.e)
    assert evals[1]["bits_per_byte"] is None
    assert evals[-1]["val_loss"] is None
    assert {line["kind"] for line in lines} == {"step", "eval"}


def test_the_best_of_step_0_does_not_count() -> None:
    model = FakeModel(val={1: 0.1, 2: 0.2})
    trainer = trainer_of(model, steps=1)
    trainer.train()
    assert trainer.state.best_step == 1


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_finishes_the_step_and_saves(tmp_path: Path, number: signal.Signals) -> None:
    model, records = FakeModel(), []
    trainer = trainer_of(model, records, steps=50, out=str(tmp_path / "run"))
    before = signal.getsignal(number)

    def interrupt(record: Mapping[str, Any]) -> None:
        if record["kind"] == "step" and record["step"] == 3:
            os.kill(os.getpid(), number)

    trainer.callbacks += (interrupt,)
    result = trainer.train()
    assert result.interrupted
    assert signal.getsignal(number) is before
    assert kinds(records, "interrupt") == kinds(records, "save") == [3]
    assert checkpoint.find_checkpoint(tmp_path / "run") == tmp_path / "run" / "step_00000003"


def test_a_second_signal_falls_back_to_the_system(tmp_path: Path) -> None:
    trainer = trainer_of(FakeModel(), steps=50)
    seen: list[Any] = []

    def interrupt(record: Mapping[str, Any]) -> None:
        if record["kind"] == "step" and record["step"] == 3:
            seen.append(signal.getsignal(signal.SIGINT))
            os.kill(os.getpid(), signal.SIGINT)
            seen.append(signal.getsignal(signal.SIGINT))

    trainer.callbacks += (interrupt,)
    trainer.train()
    assert seen[0] is not signal.default_int_handler
    assert seen[1] == signal.SIG_DFL


def test_another_thread_can_train() -> None:
    results = []
    thread = threading.Thread(target=lambda: results.append(trainer_of(FakeModel(), steps=2).train()))
    thread.start()
    thread.join(30)
    assert results[0].state.step == 2


def test_resume_restores_weights_and_state(tmp_path: Path) -> None:
    out = str(tmp_path / "run")
    trainer_of(FakeModel({2: "gradient"}), steps=4, schedule="constant", out=out).train()
    whole = FakeModel({2: "gradient"})
    trainer_of(whole, steps=7, schedule="constant").train()
    model, records = FakeModel(), []
    trainer = trainer_of(model, records, steps=7, schedule="constant", out=out, resume="auto")
    assert trainer.state.step == 4
    assert trainer.optimizer.loaded == {"step": 3}  # type: ignore[attr-defined]
    assert ("weights_changed",) in model.calls
    trainer.train()
    assert kinds(records, "step") == [5, 6, 7]
    assert kinds(records, "eval") == [7]
    assert np.array_equal(model.params["w"], whole.params["w"])
    steps = [record["step"] for record in metrics.read(tmp_path / "run") if record["kind"] == "step"]
    assert steps == list(range(1, 8))
    assert trainer.state.skipped_steps == 1


def test_resume_notes_the_best_again(tmp_path: Path) -> None:
    out = tmp_path / "run"
    trainer_of(FakeModel(), steps=2, out=str(out)).train()
    (out / "best.json").unlink()
    trainer_of(FakeModel(), steps=2, out=str(out), resume="auto").train()
    assert checkpoint.read_best(out) == 2


def test_resume_at_the_end_does_nothing(tmp_path: Path) -> None:
    out = str(tmp_path / "run")
    trainer_of(FakeModel(), steps=2, out=out).train()
    before = (tmp_path / "run" / "metrics.jsonl").read_bytes()
    result = trainer_of(FakeModel(), steps=2, out=out, resume="auto").train()
    assert not result.interrupted
    assert result.state.step == 2
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == before


def test_resume_refuses_other_data(tmp_path: Path) -> None:
    out = str(tmp_path / "run")
    trainer_of(FakeModel(), steps=2, out=out).train()
    fake: Any = FakeModel()
    other = TokenDataset(np.arange(300, dtype=np.uint16) % 20)
    config = TrainConfig(steps=2, seq_len=8, batch_size=2, out=out, resume="auto")
    with pytest.raises(CheckpointError, match="other data"):
        Trainer(fake, config, other, optimizer=FakeOptimizer(fake))  # type: ignore[arg-type]


def test_epochs_become_steps() -> None:
    trainer = trainer_of(FakeModel(), epochs=2)
    windows = len(DATA.tokens) // 8 - 1
    assert trainer.steps == trainer.config.steps == -(-windows * 2 // 2)
    assert trainer.config.epochs is None


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(ConfigError, match="--seq-len: expected at most the model's longest, 16, found 17"):
        trainer_of(FakeModel(), seq_len=17)
    fake: Any = FakeModel()
    short = TokenDataset(np.zeros(8, dtype=np.uint16))
    for train, val in ((short, None), (DATA, short)):
        with pytest.raises(DataError, match="found 8"):
            Trainer(fake, TrainConfig(seq_len=8), train, val, optimizer=FakeOptimizer(fake))  # type: ignore[arg-type]


def damaged_states() -> Iterator[dict[str, Any]]:
    good = TrainState(step=3, optimizer_step=3, best_val_loss=1.5, best_step=2, data_sha256="0" * 64).to_dict()
    assert TrainState.from_dict(good, "x").step == 3
    yield {key: value for key, value in good.items() if key != "tokens"}
    yield {**good, "extra": 1}
    yield {**good, "step": -1}
    yield {**good, "step": 1.5}
    yield {**good, "step": True}
    yield {**good, "step": None}
    yield {**good, "best_step": "2"}
    yield {**good, "data_sha256": 3}
    yield {**good, "data_sha256": "x"}
    yield {**good, "tokens": 10**30}
    yield {**good, "seconds": 10**400}
    yield {**good, "seconds": float("nan")}
    yield {**good, "seconds": -1.0}
    yield {**good, "val_loss": float("inf")}
    yield {**good, "val_loss": "x" * 10_000}
    yield {**good, "optimizer_step": 2}
    yield {**good, "optimizer_step": 2, "skipped_steps": 1, "bad_steps": 2}
    yield {**good, "best_step": 4}
    yield {**good, "best_step": None}
    yield {**good, "cpu_variant": ""}
    yield {**good, "cpu_variant": "AVX 2"}
    yield {**good, "cpu_variant": 2}


def test_the_state_travels_as_json() -> None:
    state = TrainState(step=3, tokens=7, best_val_loss=1.5, best_step=2, val_loss=2.0, seconds=1.25)
    state.optimizer_step, state.data_sha256, state.cpu_variant = 3, "0" * 64, "avx512bf16"
    assert TrainState.from_dict(state.to_dict(), "x") == state


@pytest.mark.parametrize("values", list(damaged_states()))
def test_a_damaged_state_is_refused(values: dict[str, Any]) -> None:
    with pytest.raises(CheckpointError, match=r"state\.json") as caught:
        TrainState.from_dict(values, "state.json")
    assert len(str(caught.value)) < 400
