"""Training a real model: accumulation, exact resume, thread counts, and processes that are interrupted or killed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from anellm import checkpoint, metrics
from anellm._ffi import check, lib
from anellm.config import ModelConfig, TrainConfig
from anellm.data import TokenDataset
from anellm.device import cpu_variant, follow_cpu_variant
from anellm.errors import InvalidError
from anellm.model import Model
from anellm.optim import AdamW, clip_scale
from anellm.trainer import Trainer

SHAPE = ModelConfig(dim=16, hidden_dim=24, n_layers=2, n_heads=2, n_kv_heads=1, vocab_size=64, max_seq_len=16)
DATA = TokenDataset(np.random.default_rng(0).integers(0, 64, 2000).astype(np.uint16))
HELD_OUT = TokenDataset(np.random.default_rng(1).integers(0, 64, 100).astype(np.uint16))


def make_trainer(out: Path | None = None, records: list[Any] | None = None, **options: Any) -> Trainer:
    settings: dict[str, Any] = {
        "steps": 8,
        "batch_size": 4,
        "seq_len": 16,
        "learning_rate": 1e-2,
        "warmup_steps": 2,
        "eval_interval": 3,
        "save_interval": 2,
        "keep_last": 100,
        "out": None if out is None else str(out),
        **options,
    }
    callbacks = () if records is None else (records.append,)
    return Trainer(Model(SHAPE, seed=3), TrainConfig(**settings), DATA, HELD_OUT, callbacks=callbacks)


def losses(records: list[Any]) -> dict[int, float]:
    return {record["step"]: record["loss"] for record in records if record["kind"] == "step"}


def flat(arrays: Mapping[str, np.ndarray]) -> np.ndarray:
    return np.concatenate([array.reshape(-1) for array in arrays.values()])


def test_accumulation_equals_the_big_batch() -> None:
    results = []
    for batch_size, n_micro in ((8, 1), (4, 2), (1, 8)):
        model = Model(SHAPE, seed=3)
        for micro in range(n_micro):
            tokens, targets = DATA.batch(1, 0, micro, batch_size, 16, n_micro, "epoch")
            model.forward(tokens, targets)
            model.backward(1 / n_micro, accumulate=micro > 0)
        results.append(flat(model.grads))
    size = np.linalg.norm(results[0])
    assert np.linalg.norm(results[1] - results[0]) <= 1e-6 * size
    assert np.linalg.norm(results[2] - results[0]) <= 1e-6 * size


def test_accumulation_trains_alike() -> None:
    curves = []
    for batch_size, n_micro in ((8, 1), (2, 4)):
        records: list[Any] = []
        make_trainer(records=records, batch_size=batch_size, gradient_accumulation_steps=n_micro).train()
        curves.append(losses(records))
    assert curves[0] == pytest.approx(curves[1], rel=1e-5)


def test_resume_is_exact(tmp_path: Path) -> None:
    records: list[Any] = []
    make_trainer(tmp_path / "whole", records).train()
    whole = losses(records)
    assert whole[8] < whole[1]
    for step in (2, 3, 6):
        part: list[Any] = []
        resume = tmp_path / "whole" / f"step_{step:08d}"
        make_trainer(tmp_path / f"from{step}", part, resume=str(resume)).train()
        assert losses(part) == {n: loss for n, loss in whole.items() if n > step}
        for name in ("model.safetensors", "optimizer.safetensors"):
            files = [tmp_path / run / "step_00000008" / name for run in ("whole", f"from{step}")]
            assert files[0].read_bytes() == files[1].read_bytes()


def test_bf16_resumes_exactly_too_and_tracks_fp32(tmp_path: Path) -> None:
    whole: list[Any] = []
    rest: list[Any] = []
    fp32: list[Any] = []
    make_trainer(tmp_path / "whole", whole, dtype="bf16").train()
    make_trainer(tmp_path / "rest", rest, dtype="bf16", resume=str(tmp_path / "whole" / "step_00000004")).train()
    assert losses(rest) == {n: loss for n, loss in losses(whole).items() if n > 4}
    make_trainer(records=fp32).train()
    assert losses(whole) != losses(fp32)
    assert losses(whole) == pytest.approx(losses(fp32), rel=5e-3)


def test_a_run_goes_on_with_the_kernels_it_began_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = cpu_variant()
    monkeypatch.delenv("ANELLM_CPU", raising=False)
    try:
        check(lib.anellm_cpu_set_variant(b"portable"))
        trainer = make_trainer(tmp_path / "run", steps=4)
        trainer.train()
        assert trainer.state.cpu_variant == "portable"
        check(lib.anellm_cpu_set_variant(before.encode()))
        resumed = make_trainer(tmp_path / "run", resume="auto", steps=4)
        assert (cpu_variant(), resumed.state.cpu_variant, resumed.warning) == ("portable", "portable", None)
        assert resumed.run is not None
        resumed.run.close()
        if before == "portable":
            return
        check(lib.anellm_cpu_set_variant(before.encode()))
        monkeypatch.setenv("ANELLM_CPU", before)
        forced = make_trainer(tmp_path / "run", resume="auto", steps=4)
        assert forced.state.cpu_variant == cpu_variant() == before
        assert forced.warning == f"CPU kernels: the run began with portable, ANELLM_CPU asks for {before}"
        assert forced.run is not None
        forced.run.close()
        monkeypatch.delenv("ANELLM_CPU")
        says = f"the run began with neon9, which this machine lacks; it goes on with {before}"
        assert says in str(follow_cpu_variant("neon9"))
    finally:
        check(lib.anellm_cpu_set_variant(before.encode()))


def test_threads_do_not_change_a_byte(tmp_path: Path) -> None:
    before = lib.anellm_get_threads()
    try:
        for threads in (1, 2, 3):
            check(lib.anellm_set_threads(threads))
            make_trainer(tmp_path / str(threads)).train()
    finally:
        check(lib.anellm_set_threads(before))
    for name in ("model.safetensors", "optimizer.safetensors"):
        files = [(tmp_path / str(n) / "step_00000008" / name).read_bytes() for n in (1, 2, 3)]
        assert files[0] == files[1] == files[2]


def test_a_nan_weight_stops_the_run_with_its_name(tmp_path: Path) -> None:
    from anellm.errors import DivergedError

    trainer = make_trainer(tmp_path / "run", max_bad_steps=2)

    def poison(record: Mapping[str, Any]) -> None:
        if record["kind"] == "step" and record["step"] == 4:
            trainer.model.params["model.layers.1.mlp.down_proj.weight"][0, 0] = np.nan

    trainer.callbacks += (poison,)
    from anellm.errors import NonFiniteError

    with pytest.raises(NonFiniteError, match=r"model\.layers\.1\.mlp\.down_proj\.weight"):
        trainer.train()  # the checkpoint of step 4 is due, and refuses the weight
    assert checkpoint.find_checkpoint(tmp_path / "run") == tmp_path / "run" / "step_00000003"
    trainer = make_trainer(tmp_path / "other", max_bad_steps=2, save_interval=0, eval_interval=0)
    trainer.callbacks += (poison,)
    with pytest.raises(DivergedError, match="step 6: 2 steps in a row"):
        trainer.train()


def test_adamw_checks_its_numbers() -> None:
    model = Model(SHAPE)
    bad: list[dict[str, Any]] = [
        {"decay": "none"},
        {"betas": (1.0, 0.9)},
        {"betas": (0.9, -0.1)},
        {"eps": 0.0},
        {"learning_rate": -1.0},
        {"weight_decay": float("inf")},
    ]
    for options in bad:
        with pytest.raises(InvalidError, match=next(iter(options))):
            AdamW(model, **options)
    optimizer = AdamW(model)
    for state in ({}, {"step": -1}, {"step": True}, {"step": 1, "x": 1}):
        with pytest.raises(InvalidError, match="optimizer state"):
            optimizer.load_state_dict(state)
    optimizer.load_state_dict({"step": 5})
    assert optimizer.state_dict() == {"step": 5}
    assert [clip_scale(*pair) for pair in ((2.0, 1.0), (0.5, 1.0), (2.0, 0.0))] == [0.5, 1.0, 1.0]


@pytest.mark.parametrize("decay", ["matrices", "all"])
def test_adamw_follows_its_formula(decay: str) -> None:
    model = Model(SHAPE, seed=1)
    optimizer = AdamW(model, 0.01, (0.8, 0.9), 1e-6, 0.3, decay)
    rng = np.random.default_rng(0)
    names = ["model.embed_tokens.weight", "model.norm.weight"]
    w = {name: model.params[name].astype(np.float64) for name in names}
    m = {name: np.zeros_like(w[name]) for name in names}
    v = {name: np.zeros_like(w[name]) for name in names}
    for step in (1, 2, 3):
        for name, array in model.grads.items():
            array[...] = rng.standard_normal(array.shape)
            if name in names:
                g = array.astype(np.float64) * 0.5
                m[name] = 0.8 * m[name] + 0.2 * g
                v[name] = 0.9 * v[name] + 0.1 * g * g
                w[name] *= 1 - 0.01 * (0.3 if decay == "all" or array.ndim == 2 else 0)
                w[name] -= 0.01 * (m[name] / (1 - 0.8**step)) / (np.sqrt(v[name] / (1 - 0.9**step)) + 1e-6)
        optimizer.step(grad_scale=0.5)
    for name in names:
        np.testing.assert_allclose(model.params[name], w[name], atol=2e-6)
        np.testing.assert_allclose(model.moments_m[name], m[name], atol=1e-6)
        np.testing.assert_allclose(model.moments_v[name], v[name], atol=1e-6)


# ---- processes ---------------------------------------------------------------------------------------------------


def command(out: Path, *more: str) -> list[str]:
    return [sys.executable, "-m", "anellm.train", "--out", str(out), "--plain", "--sample-tokens", "0",
            "--batch-size", "1", "--seq-len", "16", "--eval-interval", "0", "--eval-windows", "4", *more]  # fmt: skip


def wait_for_steps(run: Path, n: int, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + 60
    while sum(record["kind"] == "step" for record in metrics.read(run)) < n:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_ctrl_c_saves_and_exits_130(tmp_path: Path) -> None:
    run, summary = tmp_path / "run", tmp_path / "out.json"
    process = subprocess.Popen(
        command(run, "--steps", "1000000", "--json", str(summary)), stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    wait_for_steps(run, 3, process)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert b"anellm train --resume --out" in out
    last = [record["step"] for record in metrics.read(run)][-1]
    newest = checkpoint.find_checkpoint(run)
    assert newest is not None
    assert checkpoint.verify(newest) == last >= 3
    values = json.loads(summary.read_text())
    assert values["interrupted"] is True
    assert values["step"] == last


def test_a_second_ctrl_c_leaves_at_once(tmp_path: Path) -> None:
    code = f"""
import sys, time
sys.path.insert(0, {str(Path(__file__).parent)!r})
from test_training import make_trainer
from pathlib import Path
trainer = make_trainer(Path({str(tmp_path / "run")!r}), steps=1000)
trainer.callbacks += (lambda record: (print(flush=True), time.sleep(60)) if record["kind"] == "step" else None,)
trainer.train()
"""
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stdout.read(1) == b"\n", process.communicate()
    process.send_signal(signal.SIGINT)
    time.sleep(0.3)
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=20)
    assert process.returncode == -signal.SIGINT


def test_kill_9_never_loses_a_checkpoint(tmp_path: Path) -> None:
    more = (
        "--preset",
        "stories260k",
        "--steps",
        "40",
        "--save-interval",
        "1",
        "--keep-last",
        "2",
        "--seed",
        "5",
        "--eval-interval",
        "7",
    )
    subprocess.run(command(tmp_path / "whole", *more, "--quiet"), check=True)
    run = tmp_path / "run"
    reached = 0
    for delay_ms in (3, 11, 23, 7, 17):
        process = subprocess.Popen([*command(run, *more), "--resume"], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        wait_for_steps(run, reached + 3, process)
        time.sleep(delay_ms / 1000)
        process.kill()
        process.communicate()
        steps = checkpoint.list_steps(run)
        for step in steps:
            assert checkpoint.verify(checkpoint.step_dir(run, step)) == step
        assert steps[-1] >= reached
        reached = steps[-1]
        if reached >= 30:
            break
    assert 0 < reached < 40
    subprocess.run([*command(run, *more, "--quiet"), "--resume"], check=True)
    for name in ("model.safetensors", "optimizer.safetensors"):
        files = [tmp_path / name_of_run / "step_00000040" / name for name_of_run in ("whole", "run")]
        assert files[0].read_bytes() == files[1].read_bytes()
    curves = [losses(list(metrics.read(tmp_path / name_of_run))) for name_of_run in ("whole", "run")]
    assert curves[0] == curves[1]
    lines = (run / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines if '"kind": "step"' in line] == list(range(1, 41))
    assert checkpoint.read_best(run) == checkpoint.read_best(tmp_path / "whole")
    assert not [name for name in os.listdir(run) if name.startswith(".")]
