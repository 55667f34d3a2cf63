"""Vocabulary compaction: the classifier over the ids that occur gives what the whole one does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from anellm import errors
from anellm._ffi import check, ffi, lib, ptr
from anellm.config import ModelConfig, TrainConfig
from anellm.data import TokenDataset
from anellm.model import IGNORE_INDEX, Model
from anellm.optim import AdamW
from anellm.trainer import Trainer

TIED = ModelConfig(dim=16, hidden_dim=24, n_layers=2, n_heads=2, n_kv_heads=1, vocab_size=300, max_seq_len=16)
UNTIED = TIED.replace(tie_embeddings=False)
IDS = np.array([0, 2, 3, 7, 50, 51, 52, 128, 250, 299], np.int32)
CLASSIFIER = {True: "model.embed_tokens.weight", False: "lm_head.weight"}


def pair(config: ModelConfig) -> tuple[Model, Model]:
    """Return two models of the same weights, one of them compact."""
    compact, whole = Model(config, seed=3), Model(config, seed=3)
    compact.compact_vocabulary(IDS, equalize=True)
    for name, array in compact.params.items():
        whole.params[name][...] = array
    whole.weights_changed()
    return compact, whole


def batch(seed: int, shape: tuple[int, int] = (3, 12)) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    return rng.choice(IDS, shape).astype(np.int32), rng.choice(IDS, shape).astype(np.int32)


@pytest.mark.parametrize("config", [TIED, UNTIED], ids=["tied", "untied"])
def test_loss_and_gradients_are_those_of_the_whole_vocabulary(config: ModelConfig) -> None:
    compact, whole = pair(config)
    for micro in range(2):  # the second adds to the gradients of the first
        tokens, targets = batch(micro)
        targets[0, :3] = IGNORE_INDEX
        assert compact.forward(tokens, targets) == pytest.approx(whole.forward(tokens, targets), rel=1e-6)
        for model in (compact, whole):
            model.backward(0.5, accumulate=micro > 0)
    for name, expected in whole.grads.items():
        assert np.linalg.norm(compact.grads[name] - expected) <= 1e-5 * np.linalg.norm(expected), name


@pytest.mark.parametrize("config", [TIED, UNTIED], ids=["tied", "untied"])
def test_training_is_that_of_the_whole_vocabulary_and_the_others_stay_equal(config: ModelConfig) -> None:
    models = pair(config)
    losses: list[list[float]] = [[], []]
    for model, history in zip(models, losses, strict=True):
        optimizer = AdamW(model, 1e-2)
        for step in range(10):
            history.append(model.forward(*batch(step)))
            model.backward()
            optimizer.step(1e-2)
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert losses[0][-1] < losses[0][0]
    for model in models:
        others = np.delete(model.params[CLASSIFIER[config.tie_embeddings]], IDS, axis=0)
        assert (others == others[0]).all()
        assert np.isfinite(others).all()


def test_losses_of_ids_left_out_logits_and_decoding_are_of_the_whole_table() -> None:
    compact, whole = pair(TIED)
    rng = np.random.default_rng(5)
    tokens, targets = (rng.integers(0, 300, (2, 9)).astype(np.int32) for _ in range(2))
    np.testing.assert_allclose(
        compact.loss_per_token(tokens, targets), whole.loss_per_token(tokens, targets), rtol=1e-5
    )
    assert np.array_equal(compact.forward(tokens), whole.forward(tokens))
    prompt = [int(i) for i in IDS[:4]]
    assert compact.generate(prompt, 8, temperature=0.0) == whole.generate(prompt, 8, temperature=0.0)


def test_weights_written_from_outside_are_seen() -> None:
    compact, whole = pair(TIED)
    tokens, targets = batch(1)
    compact.forward(tokens, targets)
    for model in (compact, whole):
        model.params["model.embed_tokens.weight"][7] *= 3
        model.weights_changed()
    assert compact.forward(tokens, targets) == pytest.approx(whole.forward(tokens, targets), rel=1e-6)


def test_it_can_be_turned_off_and_all_ids_are_no_compaction() -> None:
    compact, whole = pair(TIED)
    tokens, targets = batch(2)
    expected = whole.forward(tokens, targets)
    compact.compact_vocabulary(None)
    assert compact.forward(tokens, targets) == expected
    compact.compact_vocabulary(np.arange(300, dtype=np.int32))
    assert compact.forward(tokens, targets) == expected


def test_what_does_not_fit_is_refused() -> None:
    model = Model(TIED, seed=1)
    for ids, error, says in (
        (np.array([1, 300], np.int32), errors.TokenRangeError, r"ids\[1\] = 300, must be 0..299"),
        (np.array([-1, 3], np.int32), errors.TokenRangeError, r"ids\[0\] = -1"),
        (np.array([3, 3], np.int32), errors.InvalidError, r"ids\[1\] = 3, must be above the one before it, 3"),
        (np.array([], np.int32), errors.InvalidError, "n = 0"),
        (np.array([1, 2], np.int64), errors.InvalidError, "ids: expected dtype int32"),
        (IDS, errors.InvalidError, "must be equal; those of 1 and 4 differ"),
    ):
        with pytest.raises(error, match=says):
            model.compact_vocabulary(ids)
    compact, _ = pair(TIED)
    tokens, targets = batch(3)
    for changed, name in ((tokens, "tokens"), (targets, "targets")):
        before, changed[1, 2] = changed[1, 2], 1
        with pytest.raises(errors.TokenRangeError, match=rf"{name}\[14\] = 1 is not among the 10 ids"):
            compact.forward(tokens, targets)
        with pytest.raises(errors.InvalidError, match="no training forward"):
            compact.backward()
        changed[1, 2] = before
    logits = np.zeros((3, 12, 300), np.float32)
    status = lib.anellm_model_forward(
        compact._pointer, ffi.NULL, ffi.NULL, ffi.NULL, ptr(logits, np.float32, (3, 12, 300), write=True),
        ptr(tokens, np.int32, (3, 12)), ptr(targets, np.int32, (3, 12)), 3, 12, 1,
    )  # fmt: skip
    with pytest.raises(errors.InvalidError, match="gives no logits"):
        check(status)


def run(out: Path, **options: Any) -> Trainer:
    rng = np.random.default_rng(0)
    train, held_out = (TokenDataset(rng.choice(IDS[:9], n).astype(np.uint16)) for n in (1500, 100))
    settings = {"steps": 6, "batch_size": 4, "seq_len": 16, "learning_rate": 1e-2, "save_interval": 3, "keep_last": 9}
    config = TrainConfig(**{**settings, "out": str(out), "sample_tokens": 0, **options})  # type: ignore[arg-type]
    return Trainer(Model(TIED, seed=3), config, train, held_out)


def test_a_run_goes_on_with_it_exactly(tmp_path: Path) -> None:
    whole = run(tmp_path / "whole", compact_vocab=True)
    assert whole.n_ids == 9
    whole.train()
    run(tmp_path / "rest", compact_vocab=True, resume=str(tmp_path / "whole" / "step_00000003")).train()
    for name in ("model.safetensors", "optimizer.safetensors"):
        a, b = ((tmp_path / part / "step_00000006" / name).read_bytes() for part in ("whole", "rest"))
        assert a == b


def test_a_run_that_began_without_it_cannot_go_on_with_it(tmp_path: Path) -> None:
    run(tmp_path / "run").train()
    with pytest.raises(errors.ConfigError, match=r"--compact-vocab: this run cannot go on with it: .*must be equal"):
        run(tmp_path / "run", compact_vocab=True, resume="auto", steps=9)
    with pytest.raises(errors.ConfigError, match="--compact-vocab: only for new models"):
        TrainConfig(compact_vocab=True, model="x")
