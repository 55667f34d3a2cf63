"""Runs on the simulated Neural Engine go on exactly where they stopped, its powers of two and loss scale included."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from anellm import checkpoint
from anellm.ane_run import STATE
from anellm.config import ModelConfig, TrainConfig
from anellm.data import TokenDataset
from anellm.errors import CheckpointError
from anellm.loss_scaler import LossScaler
from anellm.model import Model
from anellm.trainer import Trainer

SHAPE = ModelConfig(dim=16, hidden_dim=24, n_layers=2, n_heads=2, n_kv_heads=1, vocab_size=64, max_seq_len=16)
DATA = TokenDataset(np.random.default_rng(0).integers(0, 64, 2000).astype(np.uint16))
HELD_OUT = TokenDataset(np.random.default_rng(1).integers(0, 64, 100).astype(np.uint16))
STEPS = 10
FILES = ("model.safetensors", "optimizer.safetensors", STATE)


@pytest.fixture(autouse=True)
def _no_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ANELLM_DEVICE", raising=False)


def make_trainer(out: Path, records: list[Any] | None = None, **options: Any) -> Trainer:
    settings: dict[str, Any] = {
        "device": "ane-sim",
        "steps": STEPS,
        "batch_size": 4,
        "seq_len": 16,
        "learning_rate": 1e-2,
        "warmup_steps": 2,
        "eval_interval": 3,
        "save_interval": 1,
        "keep_last": 100,
        "out": str(out),
        **options,
    }
    callbacks = () if records is None else (records.append,)
    return Trainer(Model(SHAPE, "cpu", seed=3), TrainConfig(**settings), DATA, HELD_OUT, callbacks=callbacks)


def lines(records: list[Any], kind: str, keys: tuple[str, ...]) -> dict[int, tuple[Any, ...]]:
    return {r["step"]: tuple(r[key] for key in keys) for r in records if r["kind"] == kind}


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"numerics": "exact", "chip": "m1", "gradient_accumulation_steps": 2},
        {"ane_softmax": "cpu"},
        {"ane_scaling": "off"},
    ],
    ids=lambda options: "-".join(map(str, options.values())) or "default",
)
def test_resume_is_exact(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any]) -> None:
    monkeypatch.setattr(LossScaler, "GROWTH_INTERVAL", 4)  # so that it grows behind step 4, and its pause counts
    whole: list[Any] = []
    make_trainer(tmp_path / "whole", whole, **options).train()
    keys = ("loss", "grad_norm", "loss_scale", "rescales", "skipped")
    expected = lines(whole, "step", keys)
    scales = [values[2] for values in expected.values()]
    first = 1.0 if options.get("ane_scaling") == "off" else LossScaler().scale
    assert scales == ([first] * STEPS if first == 1.0 else [first] * 4 + [2 * first] * 4 + [4 * first] * 2)
    for step in (2, 5):
        part: list[Any] = []
        resume = str(tmp_path / "whole" / f"step_{step:08d}")
        make_trainer(tmp_path / f"from{step}", part, resume=resume, **options).train()
        assert lines(part, "step", keys) == {n: values for n, values in expected.items() if n > step}
        evals = lines(whole, "eval", ("val_loss", "max_activation"))
        assert lines(part, "eval", ("val_loss", "max_activation")) == {n: v for n, v in evals.items() if n > step}
        for name in FILES:
            files = [(tmp_path / run / f"step_{STEPS:08d}" / name).read_bytes() for run in ("whole", f"from{step}")]
            assert files[0] == files[1], name


def test_a_skipped_step_is_part_of_the_state(tmp_path: Path) -> None:
    """The exponents that a failure lowered, and the halved scale, are what a resumed run starts with."""
    trainer = make_trainer(tmp_path / "whole", steps=5)

    def inject(record: Any) -> None:
        if record["kind"] == "step" and record["step"] == 1:
            trainer.model.ane.device.simulator.inject("eval-inf", after=6, count=2)  # type: ignore[union-attr]

    trainer.callbacks += (inject,)
    trainer.train()
    assert trainer.state.skipped_steps == 1
    part: list[Any] = []
    other = make_trainer(tmp_path / "part", part, steps=5, resume=str(tmp_path / "whole" / "step_00000003"))
    assert other.train().state.skipped_steps == 1
    assert {r["loss_scale"] for r in part if r["kind"] == "step"} == {LossScaler().scale / 2}
    for name in FILES:
        files = [(tmp_path / run / "step_00000005" / name).read_bytes() for run in ("whole", "part")]
        assert files[0] == files[1], name


def test_a_checkpoint_goes_on_elsewhere(tmp_path: Path) -> None:
    """From the CPU to the engine, back, and with the softmax elsewhere: the engine's own state begins anew."""
    make_trainer(tmp_path / "cpu", device="cpu", steps=2).train()
    assert not (tmp_path / "cpu" / "step_00000002" / STATE).exists()
    for run, source, options in (
        ("ane", "cpu/step_00000002", {"steps": 4}),
        ("softmax", "ane/step_00000004", {"steps": 5, "ane_softmax": "cpu"}),
        ("back", "ane/step_00000004", {"steps": 5, "device": "cpu"}),
    ):
        records: list[Any] = []
        trainer = make_trainer(tmp_path / run, records, resume=str(tmp_path / source), **options)
        before = checkpoint.open_checkpoint(tmp_path / source).state["val_loss"]
        trainer.train()
        assert trainer.state.val_loss == pytest.approx(before, rel=0.1)
        assert (tmp_path / run / f"step_{options['steps']:08d}" / STATE).exists() == (run != "back")


DAMAGED: list[tuple[Any, str]] = [
    ([], "expected a JSON object"),
    ({}, "expected the keys ane_softmax, exponents, scaler"),
    ({"more": 1}, "expected the keys"),
    ({"exponents": [1, 2]}, "exponents: expected [0-9]+ numbers, found 2"),
    ({"exponents": "x"}, "exponents: expected a list"),
    ({"exponents": [2**31]}, "exponents: expected a list"),
    ({"exponents": [0.5]}, "exponents: expected a list"),
    ({"exponents": [True]}, "exponents: expected a list"),
    ({"exponents": None}, "exponents: expected a list"),
    ({"scaler": 3}, "scaler: expected an object or null, found 3"),
    ({"scaler": {"loss_scale": 3.0, "quiet_steps": 0}}, "loss_scale: expected a power of two"),
    ({"scaler": {"loss_scale": 2.0, "quiet_steps": -1}}, "quiet_steps: expected 0 to"),
    ({"scaler": {}}, "expected loss_scale and quiet_steps"),
]


def test_a_damaged_state_is_refused(tmp_path: Path) -> None:
    make_trainer(tmp_path / "run", steps=1).train()
    step = tmp_path / "run" / "step_00000001"
    good = json.loads((step / STATE).read_text())
    manifest = json.loads((step / checkpoint.MANIFEST).read_text())
    (step / STATE).write_text(json.dumps({**good, "scaler": None}))
    with pytest.raises(CheckpointError, match=r"ane\.json: size"):  # every byte is under a SHA-256
        make_trainer(tmp_path / "new", resume=str(step))
    for i, (change, message) in enumerate(DAMAGED):
        content = json.dumps(change if isinstance(change, list) or not change else {**good, **change}).encode()
        (step / STATE).write_bytes(content)
        manifest["files"][STATE] = {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
        (step / checkpoint.MANIFEST).write_text(json.dumps(manifest))
        with pytest.raises(CheckpointError, match=rf"ane\.json.*{message}"):
            make_trainer(tmp_path / str(i), resume=str(step))
