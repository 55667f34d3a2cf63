"""Hugging Face directories in several files: what is written, what is replaced, and what a failure leaves behind."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from modelfiles import GQA, SMALL, Params, bit_flips, cuts, message, random_params, read, same, survives

from anellm import errors, safeio, weights
from anellm.config import ModelConfig

CONFIG = ModelConfig(**SMALL)
LIMIT = 4 << 20


def files(folder: Path) -> dict[str, int]:
    """Return the size of each file in a folder."""
    return {p.name: p.stat().st_size for p in sorted(folder.iterdir())}


@pytest.mark.parametrize(("dtype", "size"), [("float32", 4), ("float16", 2), ("bfloat16", 2)])
def test_shards(tmp_path: Path, dtype: str, size: int) -> None:
    from safetensors import safe_open

    config = ModelConfig(**GQA)
    params = random_params(config)
    limit = 16 * 20 * size  # the largest matrix, without which it cannot do
    weights.save_hf(tmp_path / "whole", config, params, dtype)
    weights.save_hf(tmp_path / "hf", config, params, dtype, max_shard_bytes=limit)
    index = json.loads((tmp_path / "hf" / "model.safetensors.index.json").read_text())
    names = sorted(set(index["weight_map"].values()))
    n = len(names)
    assert names == [f"model-{i:05}-of-{n:05}.safetensors" for i in range(1, n + 1)]
    assert set(files(tmp_path / "hf")) == {"config.json", "model.safetensors.index.json", *names}
    assert n > 5
    assert index["metadata"] == {"total_size": size * config.n_params()}
    assert list(index["weight_map"]) == list(params)
    used = []
    for name in names:
        with safe_open(tmp_path / "hf" / name, "numpy") as shard:
            found = list(shard.keys())
        assert {key for key, file in index["weight_map"].items() if file == name} == set(found)
        used.append(sum(params[key].size * size for key in found))
    assert max(used) <= limit
    assert sum(used) > limit * (n // 2)  # no more files than that takes
    assert same(read(tmp_path / "hf")[1], read(tmp_path / "whole")[1])


def test_a_tensor_larger_than_the_limit_has_its_own_file(tmp_path: Path) -> None:
    params = random_params(CONFIG)
    weights.save_hf(tmp_path, CONFIG, params, max_shard_bytes=1)
    assert len(list(tmp_path.glob("model-*.safetensors"))) == len(params)
    assert same(read(tmp_path)[1], params)
    with pytest.raises(errors.InvalidError, match="max_shard_bytes: expected at least 1, found 0"):
        weights.save_hf(tmp_path, CONFIG, params, max_shard_bytes=0)


@pytest.mark.parametrize("before", [None, 1, 3000])
@pytest.mark.parametrize("after", [None, 1, 3000])
def test_a_model_replaces_another(tmp_path: Path, before: int | None, after: int | None) -> None:
    """No file of the old one stays; what is not a model's does."""
    old, new = random_params(CONFIG, 1), random_params(CONFIG, 2)
    weights.save_hf(tmp_path / "x", CONFIG, old, max_shard_bytes=before)
    (tmp_path / "x" / "tokenizer.bin").write_bytes(b"mine")
    weights.save_hf(tmp_path / "x", CONFIG, new, "float32", after)
    assert same(read(tmp_path / "x")[1], new)
    weights.save_hf(tmp_path / "y", CONFIG, new, "float32", after)
    expected = {**files(tmp_path / "y"), "tokenizer.bin": 4}
    assert files(tmp_path / "x") == expected


@pytest.mark.parametrize("before", [None, 3000])
def test_a_failed_write_leaves_the_old_model(tmp_path: Path, before: int | None) -> None:
    old, new = random_params(CONFIG, 1), random_params(CONFIG, 2)
    weights.save_hf(tmp_path / "x", CONFIG, old, max_shard_bytes=before)
    kept = files(tmp_path / "x")
    new["model.norm.weight"][-1] = 70000.0
    with pytest.raises(errors.NonFiniteError, match="does not fit F16"):
        weights.save_hf(tmp_path / "x", CONFIG, new, "float16", 3000)
    assert files(tmp_path / "x") == kept
    assert same(read(tmp_path / "x")[1], old)


@pytest.mark.parametrize("what", ["config.json", "model.safetensors", "model.safetensors.index.json"])
def test_links_are_not_written_through(tmp_path: Path, what: str) -> None:
    target = tmp_path / "precious"
    target.write_bytes(b"x")
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / what).symlink_to(target)
    with pytest.raises(errors.InvalidError, match="symbolic link"):
        weights.save_hf(tmp_path / "x", CONFIG, random_params(CONFIG))
    assert target.read_bytes() == b"x"
    assert [p.name for p in (tmp_path / "x").iterdir()] == [what]


class _Killed(BaseException):
    """Stands for the end of the process."""


@pytest.mark.parametrize("before", [None, 3000])
def test_a_kill_never_leaves_a_mixture(tmp_path: Path, before: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stopped before any one of its file operations, the folder holds the old model, the new one, or none."""
    new_config = CONFIG.replace(norm_eps=1e-3)
    old, new = random_params(CONFIG, 1), random_params(new_config, 2)
    seen = set()
    real = {name: getattr(safeio, name) for name in ("write", "fsync", "rename", "fsync_dir", "_delete")}
    for stop in range(1, 200):
        folder = tmp_path / str(stop)
        weights.save_hf(folder, CONFIG, old, max_shard_bytes=before)
        left = [stop]

        def step(name: str, *args: Any, left: list[int] = left) -> Any:
            left[0] -= 1
            if left[0] <= 0:
                raise _Killed
            return real[name](*args)

        for name in real:
            monkeypatch.setattr(safeio, name, lambda *args, name=name, step=step: step(name, *args))
        try:
            weights.save_hf(folder, new_config, new, max_shard_bytes=3000)
            done = True
        except _Killed:
            done = False
        monkeypatch.undo()
        seen.add(state(folder, {"old": (CONFIG, old), "new": (new_config, new)}))
        if done:
            break
    assert done
    assert seen == {"old", "new", "refused"}


def state(folder: Path, models: dict[str, tuple[ModelConfig, Params]]) -> str:
    """Return which model a folder holds."""
    try:
        found = read(folder)
    except errors.DataError:
        return "refused"
    return next(name for name, model in models.items() if found[0] == model[0] and same(found[1], model[1]))


# ---- damaged shards ------------------------------------------------------------------------------------------------


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    """Return a model in several files."""
    weights.save_hf(tmp_path / "hf", CONFIG, random_params(CONFIG), max_shard_bytes=3000)
    return tmp_path / "hf"


def shards(folder: Path) -> list[Path]:
    """Return the files of weights."""
    return sorted(folder.glob("model-*.safetensors"))


def test_cut_anywhere(sharded: Path) -> None:
    """One of the shards, and the index, at every byte of their headers."""
    shard = shards(sharded)[1]
    index = sharded / "model.safetensors.index.json"
    for path, header in ((shard, 8 + int.from_bytes(shard.read_bytes()[:8], "little")), (index, index.stat().st_size)):
        data = path.read_bytes()
        places = cuts(header, len(data)) if header < len(data) else range(0, header - 2, 7)
        for length in places:
            path.write_bytes(data[:length])
            found = message(sharded)
            assert str(path) in found, length
        path.write_bytes(data)
    read(sharded)


def test_bit_flips(sharded: Path) -> None:
    shard = shards(sharded)[1]
    data = shard.read_bytes()
    header = 8 + int.from_bytes(data[:8], "little")
    for damaged in bit_flips(data, 500, header, 50):
        shard.write_bytes(damaged)
        survives(sharded, LIMIT)


def test_non_finite_in_a_shard(sharded: Path) -> None:
    shard = shards(sharded)[-1]
    data = bytearray(shard.read_bytes())
    data[-4:] = np.float32(math.nan).tobytes()
    shard.write_bytes(data)
    assert "tensor model.norm.weight: expected finite weights, found nan" in message(sharded)


def test_a_missing_shard(sharded: Path) -> None:
    gone = shards(sharded)[2]
    gone.unlink()
    assert f"expected files beside it, found {gone.name}" in message(sharded)
