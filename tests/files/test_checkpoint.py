"""Checkpoints: what is saved, what verifies, what is found, what is kept."""

from __future__ import annotations

import errno
import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from anellm import checkpoint, metrics, safeio
from anellm.config import ModelConfig, TrainConfig
from anellm.errors import BusyError, CheckpointError, ConfigError, NonFiniteError
from anellm.model import Model
from anellm.rundir import RunDirectory, newest_run, run_of

SHAPE = ModelConfig(dim=8, hidden_dim=12, n_layers=1, n_heads=2, n_kv_heads=1, vocab_size=20, max_seq_len=16)


def make_model(seed: int = 1) -> Model:
    """Return a model with training enabled and moments that are not zero."""
    model = Model(SHAPE, seed=seed)
    model.enable_training()
    rng = np.random.default_rng(seed)
    for moments in (model.moments_m, model.moments_v):
        for array in moments.values():
            array[...] = rng.random(array.shape, dtype=np.float32)
    return model


@pytest.fixture(scope="module")
def model() -> Model:
    return make_model()


def test_what_is_saved_comes_back(tmp_path: Path, model: Model) -> None:
    path = checkpoint.save(tmp_path, 7, model, {"step": 7}, {"tokenizer.bin": b"tokenizer"})
    assert path.name == "step_00000007"
    assert sorted(os.listdir(path)) == sorted(
        ["model.safetensors", "config.json", "optimizer.safetensors", "state.json", "tokenizer.bin", "checkpoint.json"]
    )
    found = checkpoint.open_checkpoint(path)
    assert (found.step, found.state) == (7, {"step": 7})
    other = Model(SHAPE, seed=2)
    other.enable_training()
    checkpoint.load_tensors(found, other)
    for ours, theirs in (
        (model.params, other.params),
        (model.moments_m, other.moments_m),
        (model.moments_v, other.moments_v),
    ):
        assert all(np.array_equal(ours[name], theirs[name]) for name in ours)


def test_a_checkpoint_is_a_hugging_face_directory(tmp_path: Path, model: Model) -> None:
    path = checkpoint.save(tmp_path, 1, model, {})
    loaded = Model.from_pretrained(path)
    assert loaded.config == SHAPE
    tensors = load_file(path / "model.safetensors")
    assert tensors.keys() == model.params.keys()
    assert all(np.array_equal(tensors[name], loaded.params[name]) for name in tensors)


def test_every_changed_byte_is_noticed(tmp_path: Path, model: Model) -> None:
    path = checkpoint.save(tmp_path, 1, model, {"step": 1}, {"tokenizer.bin": b"tokenizer"})
    for file in sorted(path.iterdir()):
        data = file.read_bytes()
        for at in {0, len(data) // 2, len(data) - 1}:
            broken = bytearray(data)
            broken[at] ^= 1
            file.write_bytes(broken)
            # A changed blank in checkpoint.json alone may leave the same JSON.
            whole = checkpoint.is_whole(path)
            assert not whole or (file.name == "checkpoint.json" and json.loads(broken) == json.loads(data))
        for changed in (data[:-1], data + b"\n" if file.name != "checkpoint.json" else b"", b""):
            file.write_bytes(changed)
            with pytest.raises(CheckpointError, match=str(file)):
                verify_strictly(path)
        file.unlink()
        with pytest.raises(CheckpointError, match=str(file)):
            checkpoint.verify(path)
        file.symlink_to(os.devnull)
        with pytest.raises(CheckpointError, match=str(file)):
            checkpoint.verify(path)
        file.unlink()
        file.write_bytes(data)
    assert checkpoint.verify(path) == 1


def verify_strictly(path: Path) -> None:
    """Verify; a manifest cut by its last newline alone still says the same, and counts as noticed."""
    manifest = path / checkpoint.MANIFEST
    if manifest.read_bytes().endswith(b"}"):
        raise CheckpointError(str(manifest))
    checkpoint.verify(path)


@pytest.mark.parametrize(
    "manifest",
    [
        {"format": 2},
        {"format": 1, "step": -1},
        {"format": 1, "step": True},
        {"format": 1, "step": 1},
        {"format": 1, "step": 1, "files": []},
        {"format": 1, "step": 1, "files": {}},
        {"format": 1, "step": 1, "files": {"model.safetensors": 3}},
        {"format": 1, "step": 1, "files": {name: {} for name in checkpoint._REQUIRED}},
        {"format": 1, "step": 1, "files": {name: {} for name in [*sorted(checkpoint._REQUIRED), "../x"]}},
    ],
)
def test_a_manifest_is_checked(tmp_path: Path, manifest: dict[str, Any]) -> None:
    (tmp_path / checkpoint.MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError, match=str(tmp_path)):
        checkpoint.verify(tmp_path)


def test_the_newest_whole_one_is_found(tmp_path: Path, model: Model) -> None:
    assert checkpoint.find_checkpoint(tmp_path) is None
    for step in (9, 10, 123456789):
        checkpoint.save(tmp_path, step, model, {})
    (tmp_path / "step_00000011").mkdir()
    (tmp_path / "step_x").mkdir()
    assert checkpoint.list_steps(tmp_path) == [9, 10, 11, 123456789]
    assert checkpoint.find_checkpoint(tmp_path) == tmp_path / "step_123456789"
    (tmp_path / "step_123456789" / "state.json").write_text("{}")
    assert checkpoint.find_checkpoint(tmp_path) == tmp_path / "step_00000010"


def test_a_run_means_its_best_checkpoint(tmp_path: Path, model: Model) -> None:
    for step in (1, 2, 3):
        checkpoint.save(tmp_path, step, model, {})
    assert checkpoint.resolve_model_path(tmp_path) == tmp_path / "step_00000003"
    checkpoint.write_best(tmp_path, 2, 1.5)
    assert checkpoint.resolve_model_path(tmp_path) == tmp_path / "step_00000002"
    shutil.rmtree(tmp_path / "step_00000002")
    assert checkpoint.resolve_model_path(tmp_path) == tmp_path / "step_00000003"
    (tmp_path / "best.json").write_text('{"step": "x"}')
    assert checkpoint.resolve_model_path(tmp_path) == tmp_path / "step_00000003"
    step = tmp_path / "step_00000001"
    assert checkpoint.resolve_model_path(step) == step
    assert checkpoint.resolve_model_path(tmp_path / "m.bin") == tmp_path / "m.bin"
    empty = tmp_path / "empty"
    empty.mkdir()
    (empty / "config.toml").write_text("")
    with pytest.raises(CheckpointError, match="whole checkpoint"):
        checkpoint.resolve_model_path(empty)


def test_the_retention_rule(tmp_path: Path) -> None:
    for step in range(1, 11):
        checkpoint.step_dir(tmp_path, step).mkdir()
    assert checkpoint.prune(tmp_path, 2, 4, 3) == [1, 2, 5, 6, 7]
    assert checkpoint.list_steps(tmp_path) == [3, 4, 8, 9, 10]
    assert checkpoint.prune(tmp_path, 1, 0, None) == [3, 4, 8, 9]
    assert sorted(os.listdir(tmp_path)) == ["step_00000010"]


def test_non_finite_weights_are_not_saved(tmp_path: Path) -> None:
    model = make_model()
    model.params["model.norm.weight"][3] = np.nan
    with pytest.raises(NonFiniteError, match=r"model\.norm\.weight"):
        checkpoint.save(tmp_path, 1, model, {})
    model.params["model.norm.weight"][3] = 1
    model.moments_v["model.norm.weight"][3] = np.inf
    with pytest.raises(NonFiniteError, match=r"v\.model\.norm\.weight"):
        checkpoint.save(tmp_path, 1, model, {})
    assert os.listdir(tmp_path) == []


def test_another_shape_is_refused(tmp_path: Path, model: Model) -> None:
    found = checkpoint.open_checkpoint(checkpoint.save(tmp_path, 1, model, {}))
    wider = Model(SHAPE.replace(hidden_dim=16))
    wider.enable_training()
    with pytest.raises(CheckpointError, match=r"mlp\.\w+_proj\.weight: expected F32 \(.*found F32"):
        checkpoint.load_tensors(found, wider)
    deeper = Model(SHAPE.replace(n_layers=2))
    deeper.enable_training()
    with pytest.raises(CheckpointError, match="on one side only"):
        checkpoint.load_tensors(found, deeper)


@pytest.mark.parametrize("prune", [False, True])
def test_a_failure_at_any_operation_leaves_a_whole_checkpoint(
    tmp_path: Path, model: Model, monkeypatch: pytest.MonkeyPatch, prune: bool
) -> None:
    class Crash(BaseException):
        """What no handler of the code under test may take for an error it can go on from."""

    run, first = tmp_path / "run", tmp_path / "first"
    first.mkdir()
    checkpoint.save(first, 1, model, {})
    for nth in range(1, 100):
        shutil.copytree(first, run)
        count = 0
        with monkeypatch.context() as patch:
            for name in ("write", "fsync", "rename", "fsync_dir", "_delete"):
                real = getattr(safeio, name)

                def operation(*args: Any, real: Any = real, last: int = nth) -> Any:
                    nonlocal count
                    count += 1
                    if count == last:
                        raise Crash
                    return real(*args)

                patch.setattr(safeio, name, operation)
            # A killed process cleans nothing up.
            patch.setattr(safeio.shutil, "rmtree", lambda *args, **kwargs: None)
            patch.setattr(Path, "unlink", lambda *args, **kwargs: None)
            try:
                checkpoint.save(run, 2, model, {})
                if prune:
                    checkpoint.write_best(run, 2, 1.0)
                    checkpoint.prune(run, 1, 0, 2)
                finished = True
            except Crash:
                finished = False
        newest = checkpoint.find_checkpoint(run)
        assert newest is not None
        assert all(checkpoint.is_whole(checkpoint.step_dir(run, step)) for step in checkpoint.list_steps(run))
        safeio.sweep(run)
        assert not [name for name in os.listdir(run) if name.startswith(".")]
        shutil.rmtree(run)
        if finished:
            break
    assert newest.name == "step_00000002"
    assert nth > (20 if prune else 15)


def test_a_full_disk_keeps_the_last_checkpoint(tmp_path: Path, model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    run = RunDirectory(tmp_path / "run")
    run.begin(TrainConfig(steps=1), {})
    run.save(1, model, {}, None)

    def full(fd: int, data: memoryview) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(safeio, "write", full)
        with pytest.raises(CheckpointError, match="step 2 .*No space left.*keeps step_00000001"):
            run.save(2, model, {}, None)
    assert checkpoint.find_checkpoint(run.path) == run.path / "step_00000001"
    assert not [name for name in os.listdir(run.path) if name.startswith(".")]
    run.close()


def begin(path: Path, resume: str | None = None) -> RunDirectory:
    run = RunDirectory(path, resume)
    run.begin(TrainConfig(out=str(path)), {})
    return run


def test_who_may_open_a_run_directory(tmp_path: Path, model: Model) -> None:
    path = tmp_path / "runs" / "a"
    run = begin(path)
    with pytest.raises(BusyError, match=str(path)):
        RunDirectory(path, "auto")
    run.save(5, model, {}, None)
    run.close()
    run.close()
    with pytest.raises(ConfigError, match="there is a run in it already"):
        RunDirectory(path)
    run = begin(path, "auto")
    assert run.resumed is not None and run.resumed.step == 5
    run.save(9, model, {}, None)
    run.close()
    with pytest.raises(ConfigError, match=r"has a checkpoint \(step 9\)"):
        RunDirectory(path, str(path / "step_00000005"))
    assert checkpoint.list_steps(path) == [5, 9]
    fork = begin(tmp_path / "fork", str(path / "step_00000005"))
    assert fork.resumed is not None and fork.resumed.step == 5
    fork.close()
    (path / "step_00000009" / "state.json").unlink()
    (path / "step_00000005" / "state.json").unlink()
    with pytest.raises(CheckpointError, match="found 2 damaged"):
        RunDirectory(path, "auto")
    with pytest.raises(CheckpointError, match="has one, found none"):
        RunDirectory(tmp_path / "new", str(path))


def test_other_folders_are_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("")
    with pytest.raises(ConfigError, match=r"found .thesis\.txt. in it"):
        RunDirectory(tmp_path, "auto")
    with pytest.raises(ConfigError, match="found a file"):
        RunDirectory(tmp_path / "thesis.txt")
    assert os.listdir(tmp_path) == ["thesis.txt"]


def test_resume_of_nothing_starts_fresh(tmp_path: Path) -> None:
    run = begin(tmp_path / "a", "auto")
    assert run.resumed is None
    run.write({"kind": "step", "step": 1})
    run.close()
    # Killed before its first checkpoint: the records of the lost steps go.
    run = begin(tmp_path / "a", "auto")
    assert run.resumed is None
    run.close()
    assert (tmp_path / "a" / "metrics.jsonl").read_bytes() == b""


def test_metrics_are_cut_at_the_step(tmp_path: Path) -> None:
    lines = [f'{{"kind": "step", "step": {n}}}\n' for n in range(1, 6)]
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(lines) + '{"kind": "ev')
    assert metrics.cut(tmp_path, 5) == 1
    assert path.read_text() == "".join(lines)
    before = path.stat().st_ino
    assert metrics.cut(tmp_path, 5) == 0
    assert path.stat().st_ino == before
    assert metrics.cut(tmp_path, 3) == 2
    assert [record["step"] for record in metrics.read(tmp_path)] == [1, 2, 3]
    assert metrics.cut(tmp_path / "missing", 3) == 0
    assert list(metrics.read(tmp_path / "missing")) == []


def test_runs_are_found(tmp_path: Path) -> None:
    assert newest_run(tmp_path / "runs") is None
    for index, name in enumerate(("a", "b", "c")):
        folder = tmp_path / "runs" / name
        folder.mkdir(parents=True)
        (folder / "config.toml").write_text("")
        os.utime(folder / "config.toml", (index, index))
    os.utime(tmp_path / "runs" / "a" / "config.toml", (10, 10))
    assert newest_run(tmp_path / "runs") == tmp_path / "runs" / "a"
    step = tmp_path / "runs" / "a" / "step_00000001"
    step.mkdir()
    (step / "checkpoint.json").write_text("{}")
    assert run_of(step) == run_of(step.parent) == step.parent
