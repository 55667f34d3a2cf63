"""The engine against the numbers that make_goldens.py recorded from PyTorch, under every CPU variant."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from anellm._ffi import check, lib, text
from anellm.config import ModelConfig
from anellm.model import Model
from anellm.optim import AdamW, clip_scale

FOLDER = Path(__file__).parent
CASES = sorted(path.stem for path in FOLDER.glob("*.npz"))
VARIANTS = text(lib.anellm_cpu_variants()).split(",")


class Golden:
    """One recorded case."""

    def __init__(self, name: str) -> None:
        with np.load(FOLDER / f"{name}.npz", allow_pickle=False) as data:
            self.arrays: dict[str, np.ndarray] = dict(data)
        self.about: dict[str, Any] = json.loads(str(self.arrays.pop("about")))
        self.config = ModelConfig(**self.about["config"])
        self.tokens, self.targets = self.arrays["tokens"], self.arrays["targets"]

    def part(self, prefix: str) -> dict[str, np.ndarray]:
        """Return the arrays under a prefix."""
        return {k.removeprefix(prefix): v for k, v in self.arrays.items() if k.startswith(prefix)}

    def model(self) -> Model:
        """Return a model with the recorded weights."""
        model = Model(self.config, "cpu", seed=None)
        recorded = self.part("weight/")
        assert recorded.keys() == model.params.keys()
        for name, array in recorded.items():
            model.params[name][...] = array
        model.weights_changed()
        return model


@pytest.fixture(scope="module", params=CASES)
def golden(request: pytest.FixtureRequest) -> Golden:
    """Return one recorded case."""
    return Golden(request.param)


@pytest.fixture(params=VARIANTS)
def variant(request: pytest.FixtureRequest) -> Iterator[str]:
    """Put a CPU variant in force for one test."""
    before = text(lib.anellm_cpu_variant())
    check(lib.anellm_cpu_set_variant(request.param.encode()))
    assert text(lib.anellm_cpu_variant()) == request.param
    yield request.param
    check(lib.anellm_cpu_set_variant(before.encode()))


def test_cases_cover_what_they_should() -> None:
    configs = [config for name in CASES if (config := Golden(name).config).arch == "llama"]
    assert {c.tie_embeddings for c in configs} == {True, False}
    assert {c.n_kv_heads == c.n_heads for c in configs} == {True, False}
    assert {c.qk_norm for c in configs} == {True, False}
    assert any(c.q_dim != c.dim for c in configs)
    gpt2 = [config for name in CASES if (config := Golden(name).config).arch == "gpt2"]
    assert {(c.bias, c.gelu) for c in gpt2} == {(False, "tanh"), (False, "erf"), (True, "tanh"), (True, "erf")}
    assert {c.padded_vocab_size > c.vocab_size for c in gpt2} == {True, False}
    for name in CASES:
        case = Golden(name)
        assert (case.targets == -100).any()
        weights = case.part("weight/").items()
        norms = [w for key, w in weights if w.ndim == 1 and not key.endswith(".bias")]
        assert all(np.abs(w).max() > 0.1 for key, w in weights if key.endswith(".bias"))
        assert all(w.min() >= 0.5 and w.max() <= 1.5 and np.abs(w - 1).max() > 0.1 for w in norms)


@pytest.mark.usefixtures("variant")
def test_logits(golden: Golden) -> None:
    logits = golden.model().forward(golden.tokens)
    assert logits.shape == golden.arrays["logits"].shape
    np.testing.assert_allclose(logits, golden.arrays["logits"], rtol=0, atol=1e-4)


@pytest.mark.usefixtures("variant")
def test_decoding_gives_the_same_logits(golden: Golden) -> None:
    """A prompt in one piece, then token by token through the cache."""
    model = golden.model()
    row, expected = np.ascontiguousarray(golden.tokens[0]), golden.arrays["logits"][0]
    cache = model.kvcache(len(row))
    half = len(row) // 2
    np.testing.assert_allclose(model.decode(cache, row[:half]), expected[half - 1], rtol=0, atol=1e-4)
    for t in range(half, len(row)):
        np.testing.assert_allclose(model.decode(cache, row[t : t + 1]), expected[t], rtol=0, atol=1e-4)


@pytest.mark.usefixtures("variant")
def test_loss_and_gradients(golden: Golden) -> None:
    model = golden.model()
    loss = model.forward(golden.tokens, golden.targets)
    assert loss == pytest.approx(float(golden.arrays["loss"]), rel=1e-5)
    model.backward()
    expected = golden.part("grad/")
    assert expected.keys() == model.grads.keys()
    for name, gradient in expected.items():
        error = np.linalg.norm(model.grads[name].astype(np.float64) - gradient)
        assert error <= 1e-4 * np.linalg.norm(gradient), name
    assert model.grad_norm().norm == pytest.approx(golden.about["grad_norm"], rel=1e-4)


@pytest.mark.usefixtures("variant")
@pytest.mark.parametrize("series", ["matrices", "all", "clipped"])
def test_adamw_losses(golden: Golden, series: str) -> None:
    """Twenty updates on one batch: the losses before each of them."""
    how = golden.about["adamw"]
    model = golden.model()
    decay = "all" if series == "all" else "matrices"
    optimizer = AdamW(model, how["lr"], tuple(how["betas"]), how["eps"], how["weight_decay"], decay)
    losses = []
    for _ in golden.arrays[f"losses/{series}"]:
        losses.append(model.forward(golden.tokens, golden.targets))
        model.backward()
        scale = clip_scale(model.grad_norm().norm, how["max_grad_norm"]) if series == "clipped" else 1.0
        optimizer.step(grad_scale=scale)
    np.testing.assert_allclose(losses, golden.arrays[f"losses/{series}"], rtol=1e-5)
    assert len(losses) == 20
