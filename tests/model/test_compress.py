"""Compressed weights: how far decoding moves, that copies follow the weights, and what a released model refuses."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from anellm import errors
from anellm._ffi import check, lib
from anellm.compress import WEIGHTS
from anellm.config import ModelConfig
from anellm.model import Model
from anellm.optim import AdamW

TIED = ModelConfig(
    dim=48, hidden_dim=100, n_layers=3, n_heads=6, n_kv_heads=2, head_dim=10, vocab_size=97, max_seq_len=80
)
UNTIED = TIED.replace(tie_embeddings=False, qk_norm=True, dim=130, vocab_size=61)
CONFIGS = {"tied": TIED, "untied": UNTIED}
COMPRESSED = ("bf16", "int8")
GROUP: int = lib.ANELLM_QUANTIZE_GROUP
# The largest part of itself (bf16: 8 significant bits) or of the largest of its group (int8: half a step of 127) by
# which a weight is off.
STEP = {"bf16": 2.0**-8, "int8": 0.5 / 127}


@pytest.fixture(params=CONFIGS)
def config(request: pytest.FixtureRequest) -> ModelConfig:
    return CONFIGS[request.param]


def make(config: ModelConfig, seed: int = 1) -> Model:
    """Return a model whose norms are not all one, and whose weights matter more than freshly drawn ones."""
    model = Model(config, "cpu", seed=seed)
    rng = np.random.default_rng(seed)
    for tensor in model.tensors:
        if tensor.kind == "vector":
            model.params[tensor.name][...] = rng.uniform(0.5, 1.5, tensor.shape)
        else:
            model.params[tensor.name][...] *= 3
    model.weights_changed()
    return model


def rounded(w: np.ndarray, kind: str) -> np.ndarray:
    """Return what the format makes of a matrix, by NumPy alone."""
    if kind == "bf16":
        bits = w.view(np.uint32).astype(np.uint64)
        return ((bits + 0x7FFF + (bits >> 16 & 1) >> 16 << 16).astype(np.uint32)).view(np.float32)
    out = np.empty_like(w)
    for start in range(0, w.shape[1], GROUP):
        group = w[:, start : start + GROUP]
        scale = np.abs(group).max(axis=1, keepdims=True) / np.float32(127)
        out[:, start : start + GROUP] = np.rint(group / scale) * scale
    return out


def decode(model: Model, ids: np.ndarray, pieces: tuple[int, ...] = ()) -> np.ndarray:
    cache = model.kvcache()
    logits, start = np.zeros(0, np.float32), 0
    for n in pieces or (len(ids),):
        logits = model.decode(cache, ids[start : start + n])
        start += n
    return logits


def some_ids(config: ModelConfig, n: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, config.vocab_size, n).astype(np.int32)


@pytest.mark.parametrize("kind", COMPRESSED)
def test_decode_is_that_of_a_model_with_the_rounded_weights(config: ModelConfig, kind: str) -> None:
    """The formats are exact in what they stand for: a model that holds those values in fp32 gives the same logits."""
    model, twin = make(config), make(config)
    for tensor in model.tensors:
        looked_up_in_fp32 = tensor.kind == "embedding" and not config.tie_embeddings
        if tensor.kind != "vector" and not looked_up_in_fp32:
            twin.params[tensor.name][...] = rounded(model.params[tensor.name], kind)
    twin.weights_changed()
    model.compress(kind)
    ids = some_ids(config, 70)
    expected = decode(twin, ids)
    for pieces in ((70,), (1,) * 70, (3, 64, 3)):
        np.testing.assert_allclose(decode(model, ids, pieces), expected, rtol=0, atol=2e-5 * np.abs(expected).max())


@pytest.mark.parametrize("kind", COMPRESSED)
def test_logits_stay_close(config: ModelConfig, kind: str) -> None:
    """Roundings are independent, so the logits move by about the relative error of a weight (root mean square).

    A weight is off by at most STEP of itself (bf16) or of the largest of its group (int8: for a normal distribution
    about three times a weight), uniformly: a standard deviation of STEP / sqrt(3). Each layer adds twice to the
    residual stream, and the classifier once more.
    """
    model = make(config)
    ids = some_ids(config, 20)
    exact = decode(model, ids).astype(np.float64)
    model.compress(kind)
    found = decode(model, ids)
    weight = STEP[kind] / np.sqrt(3) * (3 if kind == "int8" else 1)
    bound = 3 * weight * np.sqrt(2 * config.n_layers + 1)
    error = np.sqrt(np.mean((found - exact) ** 2) / np.mean(exact**2))
    assert 0 < error < bound


@pytest.mark.parametrize("kind", WEIGHTS)
def test_same_bytes_for_any_threads(config: ModelConfig, kind: Any) -> None:
    ids = some_ids(config, 70)
    found = set()
    before = lib.anellm_get_threads()
    try:
        for threads in (1, 2, 5):
            check(lib.anellm_set_threads(threads))
            model = make(config)
            model.compress(kind)
            found.add(decode(model, ids, (66, 1, 1, 2)).tobytes())
    finally:
        check(lib.anellm_set_threads(before))
    assert len(found) == 1


@pytest.mark.parametrize("kind", COMPRESSED)
def test_forward_is_not_touched_and_fp32_comes_back(config: ModelConfig, kind: str) -> None:
    model = make(config)
    ids = some_ids(config, 9)
    before, logits = decode(model, ids), model.forward(ids[None])
    model.compress(kind)
    assert model.weights == kind
    assert not np.array_equal(decode(model, ids), before)
    assert np.array_equal(model.forward(ids[None]), logits)
    model.compress("fp32")
    assert model.weights == "fp32"
    assert np.array_equal(decode(model, ids), before)


@pytest.mark.parametrize("kind", COMPRESSED)
def test_copies_follow_the_weights(config: ModelConfig, kind: str) -> None:
    """After a write to the parameters, an optimizer's step, or new weights, decode is that of a fresh copy."""
    model = make(config)
    model.compress(kind)
    ids = some_ids(config, 9)
    decode(model, ids)

    def write() -> None:
        for tensor in model.tensors:
            model.params[tensor.name][...] *= 1.25
        model.weights_changed()

    def step() -> None:
        tokens = some_ids(config, 21)
        model.forward(tokens[None, :-1].copy(), tokens[None, 1:].copy())
        model.backward()
        AdamW(model, 0.01).step(0.01)

    changes: list[Callable[[], None]] = [write, step]
    for change in changes:
        before = decode(model, ids)
        change()
        after = decode(model, ids)
        assert not np.array_equal(after, before)
        model.compress(kind)
        assert np.array_equal(decode(model, ids), after)


@pytest.mark.parametrize("kind", COMPRESSED)
def test_a_released_model_decodes_the_same_and_refuses_the_rest(config: ModelConfig, kind: str, tmp_path: Path) -> None:
    model = make(config)
    ids = some_ids(config, 40)
    tokens, targets = ids[None, :-1].copy(), ids[None, 1:].copy()
    optimizer = AdamW(model, 0.01)
    model.forward(tokens, targets)  # a backward is due
    model.compress(kind)
    kept, written = decode(model, ids), model.generate(ids[:3].tolist(), 30, temperature=0)
    names = list(model.params)
    model.compress(kind, release=True)
    assert np.array_equal(decode(model, ids), kept)
    assert model.generate(ids[:3].tolist(), 30, temperature=0) == written

    refused: list[Callable[[], Any]] = [
        lambda: model.forward(tokens),
        lambda: model.forward(tokens, targets),
        lambda: model.loss_per_token(tokens, targets),
        lambda: model.enable_training(),
        lambda: model.weights_changed(),
        lambda: optimizer.step(0.01),
        *(lambda weights=weights: model.compress(weights) for weights in WEIGHTS),
        lambda: model.compress(kind, release=True),
        lambda: model.params["model.layers.0.mlp.up_proj.weight"],
        lambda: model.save_pretrained(tmp_path / "hf"),
    ]
    for call in refused:
        with pytest.raises(errors.InvalidError, match="released"):
            call()
    with pytest.raises(errors.InvalidError, match="training forward"):
        model.backward()
    assert lib.anellm_model_init(model._pointer, 1, 0.02) == lib.ANELLM_INVALID
    assert np.array_equal(decode(model, ids), kept)

    assert list(model.params) == names
    assert len(model.params) == len(names)
    assert np.array_equal(model.params["model.norm.weight"], make(config).params["model.norm.weight"])
    if not config.tie_embeddings:
        assert model.params["model.embed_tokens.weight"].any()
    with pytest.raises(KeyError):
        model.params["model.layers.9.mlp.up_proj.weight"]


def test_bad_arguments() -> None:
    model = make(TIED)
    ids = some_ids(TIED, 5)
    before = decode(model, ids)
    with pytest.raises(errors.InvalidError, match="expected one of fp32, bf16, int8, found 'int4'"):
        model.compress("int4")  # type: ignore[arg-type]
    with pytest.raises(errors.InvalidError, match="release"):
        model.compress("fp32", release=True)
    for kind in (-1, 3):
        assert lib.anellm_model_compress(model._pointer, kind, 0) == lib.ANELLM_INVALID
    assert model.weights == "fp32"
    assert np.array_equal(decode(model, ids), before)


@pytest.mark.parametrize("kind", COMPRESSED)
def test_non_finite_weights_show(kind: str) -> None:
    model = make(TIED)
    model.params["model.layers.1.mlp.down_proj.weight"][3, 70] = np.inf
    model.weights_changed()
    model.compress(kind)
    assert not np.isfinite(decode(model, some_ids(TIED, 5))).any()


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="the system does not tell a process's memory")
def test_released_memory_goes_back() -> None:
    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * 4096

    config = TIED.replace(dim=256, hidden_dim=1024, head_dim=32, vocab_size=8000, n_heads=8, n_kv_heads=8)
    model = Model(config, "cpu", seed=1)
    size = 4 * model.n_params()
    before = resident()
    model.compress("int8", release=True)
    assert resident() - before < -0.5 * size  # a quarter stays, as int8


@pytest.fixture(scope="module")
def stories(data_dir: Path) -> Path:
    path = data_dir / "weights" / "stories260K" / "stories260K.bin"
    if not path.exists():
        pytest.skip(f"{path} is missing")
    return path


@pytest.mark.parametrize(("kind", "n_same", "loss_part"), [("bf16", 100, 0.002), ("int8", 50, 0.01)])
def test_a_real_model(stories: Path, data_dir: Path, kind: str, n_same: int, loss_part: float) -> None:
    """Greedy text is the same for a while, and the loss hardly moves."""
    exact, model = Model.from_pretrained(stories, "cpu"), Model.from_pretrained(stories, "cpu")
    model.compress(kind, release=True)
    assert model.generate([1], n_same, temperature=0) == exact.generate([1], n_same, temperature=0)
    ids = np.fromfile(data_dir / "text" / "tinystories" / "sample_val.tok512.uint16.bin", np.uint16).astype(np.int32)

    def loss(model: Model) -> float:
        total = 0.0
        for start in range(0, 600, 200):
            cache = model.kvcache(200)
            for at in range(start, start + 199):
                logits = model.decode(cache, ids[at : at + 1]).astype(np.float64)
                total += float(np.log(np.exp(logits - logits.max()).sum()) + logits.max() - logits[ids[at + 1]])
        return total / 597

    fp32 = loss(exact)
    assert 1.0 < fp32 < 2.0
    assert loss(model) == pytest.approx(fp32, rel=loss_part)
