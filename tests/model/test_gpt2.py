"""GPT-2: layout, padding, decay groups, and invariants that need no reference.

Agreement with PyTorch is tests/golden's business; here the gradients are held against finite differences of a model
written in NumPy.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from anellm import errors
from anellm._ffi import check, lib, text
from anellm.config import ModelConfig
from anellm.device import DTYPES, MODES, AneOptions, Dtype
from anellm.model import IGNORE_INDEX, Model, memory, tensor_table
from anellm.optim import AdamW

SHAPE: dict[str, Any] = {"arch": "gpt2", "dim": 36, "n_layers": 5, "n_heads": 4, "vocab_size": 61, "max_seq_len": 70}
BIASED = ModelConfig(**SHAPE, bias=True, padded_vocab_size=128)
PLAIN = ModelConfig(**SHAPE, gelu="erf")
CONFIGS = {"biased-tanh": BIASED, "plain-erf": PLAIN}
WTE, WPE = "transformer.wte.weight", "transformer.wpe.weight"


@pytest.fixture(params=CONFIGS)
def config(request: pytest.FixtureRequest) -> ModelConfig:
    return CONFIGS[request.param]


@pytest.fixture(params=text(lib.anellm_cpu_variants()).split(","))
def variant(request: pytest.FixtureRequest) -> Iterator[str]:
    before = text(lib.anellm_cpu_variant())
    check(lib.anellm_cpu_set_variant(request.param.encode()))
    yield request.param
    check(lib.anellm_cpu_set_variant(before.encode()))


def batch(config: ModelConfig, B: int, T: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    ids = np.random.default_rng(seed).integers(0, config.vocab_size, (B, T + 1)).astype(np.int32)
    return np.ascontiguousarray(ids[:, :-1]), np.ascontiguousarray(ids[:, 1:])


def make(config: ModelConfig, scale: float = 5.0, **how: Any) -> Model:
    """Return a model whose vectors are drawn too, and whose weights matter more than freshly drawn ones."""
    model = Model(config, "cpu", seed=1, **how)
    rng = np.random.default_rng(1)
    for tensor in model.tensors:
        if tensor.kind != "vector":
            model.params[tensor.name][...] *= scale
        elif tensor.name.endswith("bias"):
            model.params[tensor.name][...] = rng.normal(0, 0.3, tensor.shape)
        else:
            model.params[tensor.name][...] = rng.uniform(0.5, 1.5, tensor.shape)
    model.weights_changed()
    return model


def gradients(model: Model) -> np.ndarray:
    return np.concatenate([g.reshape(-1) for g in model.grads.values()])


# ---- layout and initialisation ----------------------------------------------------------------


def test_the_table_is_contiguous_and_kinds_decide_what_decays(config: ModelConfig) -> None:
    offset = 0
    for tensor in tensor_table(config):
        assert tensor.offset == offset
        offset += math.prod(tensor.shape)
        tables = {WTE: "embedding", WPE: "positions"}
        assert tensor.kind == ("vector" if len(tensor.shape) == 1 else tables.get(tensor.name, "matrix"))
    shapes = {t.name: t.shape for t in tensor_table(config)}
    assert shapes[WTE] == (config.padded_vocab_size, 36)
    assert shapes[WPE] == (70, 36)
    assert shapes["transformer.h.4.attn.c_attn.weight"] == (108, 36)
    assert shapes["transformer.h.0.mlp.c_fc.weight"] == (144, 36)
    assert shapes["transformer.h.0.mlp.c_proj.weight"] == (36, 144)
    assert ("transformer.h.0.mlp.c_fc.bias" in shapes) == config.bias


def test_initialisation() -> None:
    config = BIASED.replace(dim=128, head_dim=32, hidden_dim=512)
    model = Model(config, seed=3)
    for name, array in model.params.items():
        if name.endswith("bias"):
            assert not array.any(), name
        elif array.ndim == 1:
            assert (array == 1).all(), name
        else:
            std = 0.02 / math.sqrt(2 * 5) if name.endswith("c_proj.weight") else 0.02
            used = array[: config.vocab_size] if name == WTE else array
            assert used.std() == pytest.approx(std, rel=0.05), name
            assert abs(used.mean()) < 0.05 * std + 3 * std / math.sqrt(used.size), name
    assert not model.params[WTE][config.vocab_size :].any()
    again = Model(config, seed=3)
    assert all(np.array_equal(a, b) for a, b in zip(model.params.values(), again.params.values(), strict=True))


def test_first_loss_is_that_of_a_uniform_guess_over_the_vocabulary(config: ModelConfig) -> None:
    assert Model(config, seed=1).forward(*batch(config, 2, 50)) == pytest.approx(math.log(61), abs=0.02)


# ---- padding ----------------------------------------------------------------


def test_padding_is_never_predicted(variant: str) -> None:
    tokens, targets = batch(BIASED, 2, 9)
    model = make(BIASED)
    logits, loss = model.forward(tokens), model.forward(tokens, targets)
    assert logits.shape == (2, 9, 61)
    model.params[WTE][61:] = 1e6
    model.weights_changed()
    assert np.array_equal(model.forward(tokens), logits)
    assert model.forward(tokens, targets) == loss
    cache = model.kvcache()
    assert model.decode(cache, tokens[0]).shape == (61,)
    for bad in (61, 127):
        tokens[1, 3] = bad
        with pytest.raises(errors.TokenRangeError, match=rf"tokens\[12\] = {bad}, must be 0\.\.60"):
            model.forward(tokens)
        with pytest.raises(errors.TokenRangeError):
            model.decode(cache, tokens[1])
    tokens[1, 3], targets[0, 0] = 0, 61
    with pytest.raises(errors.TokenRangeError, match="targets"):
        model.forward(tokens, targets)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("decay", ["matrices", "all"])
def test_padding_stays_zero_in_training(decay: Any, dtype: Dtype) -> None:
    model = Model(BIASED, seed=2)
    model.set_dtype(dtype)
    model.enable_training()
    model.grads[WTE][...] = 7  # left over from whatever was before
    optimizer = AdamW(model, 1e-2, weight_decay=0.1, decay=decay)
    for step in range(8):
        for micro in range(2):
            model.forward(*batch(BIASED, 2, 11, seed=2 * step + micro))
            model.backward(0.5, accumulate=micro > 0)
            assert not model.grads[WTE][61:].any()
        optimizer.step()
    for rows in (model.params[WTE], model.moments_m[WTE], model.moments_v[WTE]):
        assert not rows[61:].any()
        assert rows[:61].all(axis=1).any()


# ---- gradients ----------------------------------------------------------------


def numpy_loss(c: ModelConfig, w: dict[str, np.ndarray], tokens: np.ndarray, targets: np.ndarray) -> float:
    """Return the loss in float64, written from the formulas."""

    def norm(x: np.ndarray, name: str) -> np.ndarray:
        z = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + c.norm_eps)
        return z * w[name + ".weight"] + w.get(name + ".bias", 0.0)

    def linear(x: np.ndarray, name: str) -> np.ndarray:
        return x @ w[name + ".weight"].T + w.get(name + ".bias", 0.0)

    def gelu(v: np.ndarray) -> np.ndarray:
        if c.gelu == "erf":
            return v * 0.5 * np.vectorize(math.erfc)(-v / math.sqrt(2))
        return v * 0.5 * (1 + np.tanh(math.sqrt(2 / math.pi) * (v + 0.044715 * v**3)))

    B, T = tokens.shape
    x = w[WTE][tokens] + w[WPE][:T]
    for i in range(c.n_layers):
        p = f"transformer.h.{i}."
        qkv = linear(norm(x, p + "ln_1"), p + "attn.c_attn").reshape(B, T, 3, c.n_heads, c.head_dim)
        q, k, v = (qkv[:, :, j].transpose(0, 2, 1, 3) for j in range(3))
        scores = q @ k.transpose(0, 1, 3, 2) / math.sqrt(c.head_dim) + np.triu(np.full((T, T), -np.inf), 1)
        e = np.exp(scores - scores.max(-1, keepdims=True))
        h = (e / e.sum(-1, keepdims=True) @ v).transpose(0, 2, 1, 3).reshape(B, T, c.dim)
        x = x + linear(h, p + "attn.c_proj")
        x = x + linear(gelu(linear(norm(x, p + "ln_2"), p + "mlp.c_fc")), p + "mlp.c_proj")
    logits = norm(x, "transformer.ln_f") @ w[WTE][: c.vocab_size].T
    lse = np.log(np.exp(logits).sum(-1))
    chosen = np.take_along_axis(logits, np.maximum(targets, 0)[..., None], -1)[..., 0]
    return float((lse - chosen)[targets != IGNORE_INDEX].mean())


@pytest.mark.parametrize(("bias", "gelu"), [(True, "tanh"), (True, "erf"), (False, "tanh"), (False, "erf")])
def test_gradients_are_the_derivative(bias: bool, gelu: str) -> None:
    """Every parameter of a tiny model, by central differences in float64."""
    config = ModelConfig(
        arch="gpt2", dim=6, hidden_dim=10, n_layers=2, n_heads=2, vocab_size=5, max_seq_len=4, padded_vocab_size=7,
        bias=bias, gelu=gelu,
    )  # fmt: skip
    model = make(config, 20.0)
    tokens, targets = np.array([[0, 3, 1], [4, 4, 2]], np.int32), np.array([[3, 1, 2], [4, IGNORE_INDEX, 0]], np.int32)
    loss = model.forward(tokens, targets)
    model.backward()
    w = {name: array.astype(np.float64) for name, array in model.params.items()}
    assert loss == pytest.approx(numpy_loss(config, w, tokens, targets), rel=1e-6)
    for name, array in w.items():
        slope = np.zeros_like(array)
        for i in np.ndindex(array.shape):
            kept = array[i]
            array[i] = kept + 1e-5
            above = numpy_loss(config, w, tokens, targets)
            array[i] = kept - 1e-5
            slope[i] = (above - numpy_loss(config, w, tokens, targets)) / 2e-5
            array[i] = kept
        assert np.linalg.norm(model.grads[name] - slope) <= 1e-5 * np.linalg.norm(slope) + 1e-7, name
    assert not model.grads[WPE][3:].any()  # the position that no token is at


@pytest.mark.parametrize("dtype", DTYPES)
def test_same_bits_for_any_threads_and_whatever_is_kept(config: ModelConfig, dtype: Dtype) -> None:
    def run(policy: str, threads: int) -> tuple[list[float], np.ndarray]:
        check(lib.anellm_set_threads(threads))
        model = make(config)
        model.set_dtype(dtype)
        model.set_activation_checkpoint(policy)
        losses = []
        for i, shape in enumerate(((2, 33), (3, 17))):
            losses.append(model.forward(*batch(config, *shape, seed=i)))
            model.backward(accumulate=i > 0)
        return losses, gradients(model)

    before = lib.anellm_get_threads()
    try:
        losses, expected = run("all", 1)
        assert np.abs(expected).max() > 1e-3
        for policy, threads in (("all", 3), ("boundary", 2), ("every:2", 1), ("every:3", 2), ("none", 3)):
            found_losses, found = run(policy, threads)
            assert found_losses == losses, policy
            assert np.array_equal(found, expected), policy
    finally:
        check(lib.anellm_set_threads(before))


def test_accumulation_equals_the_big_batch(config: ModelConfig) -> None:
    tokens, targets = batch(config, 4, 21)
    model = make(config)
    model.forward(tokens, targets)
    model.backward()
    expected = gradients(model)
    for i in range(2):
        part = slice(2 * i, 2 * i + 2)
        model.forward(tokens[part].copy(), targets[part].copy())
        model.backward(0.5, accumulate=i > 0)
    assert np.linalg.norm(gradients(model) - expected) <= 1e-5 * np.linalg.norm(expected)


def test_bf16_stays_close(config: ModelConfig) -> None:
    model = make(config, 3.0)
    tokens, targets = batch(config, 3, 40)
    loss = model.forward(tokens, targets)
    model.backward()
    expected = gradients(model)
    model.set_dtype("bf16")
    assert model.forward(tokens, targets) == pytest.approx(loss, rel=2e-3)
    model.backward()
    found = gradients(model)
    assert 1e-5 < np.linalg.norm(found - expected) / np.linalg.norm(expected) < 0.03


def test_matrices_and_positions_decay_vectors_do_not(config: ModelConfig) -> None:
    model = make(config)
    model.enable_training()
    before = {name: array.copy() for name, array in model.params.items()}
    AdamW(model, 0.1, weight_decay=0.5).step()  # all gradients are zero
    for name, array in model.params.items():
        factor = np.float32(0.95) if array.ndim == 2 else np.float32(1)
        np.testing.assert_allclose(array, before[name] * factor, rtol=1e-6, err_msg=name)


# ---- decoding ----------------------------------------------------------------


@pytest.mark.parametrize("pieces", [[1] * 20, [20], [7, 1, 12], [66, 1, 3]])
def test_decoding_with_a_cache_equals_the_whole_forward(config: ModelConfig, pieces: list[int]) -> None:
    model = make(config)
    tokens = batch(config, 1, sum(pieces))[0]
    logits = model.forward(tokens)[0]
    cache, done = model.kvcache(), 0
    for n in pieces:
        found = model.decode(cache, np.ascontiguousarray(tokens[0, done : done + n]))
        done += n
        np.testing.assert_allclose(found, logits[done - 1], rtol=0, atol=2e-5)
    cache.truncate(5)
    np.testing.assert_allclose(model.decode(cache, tokens[0, 5:9].copy()), logits[8], rtol=0, atol=2e-5)


def test_generation_ends_where_positions_do(config: ModelConfig) -> None:
    model = make(config)
    assert (
        len(model.generate([1, 2, 3], 500, temperature=0.0, stop_ids=())) == 70 - 3 + 1
    )  # the last one is not fed back
    cache = model.kvcache()
    model.decode(cache, np.zeros(70, np.int32))
    with pytest.raises(errors.InvalidError, match="do not fit the cache"):
        model.decode(cache, np.zeros(1, np.int32))
    with pytest.raises(errors.InvalidError, match="T = 71"):
        model.forward(np.zeros((1, 71), np.int32))


@pytest.mark.parametrize(("kind", "bound"), [("bf16", 0.03), ("int8", 0.15)])
def test_compressed_weights_decode(config: ModelConfig, kind: Any, bound: float) -> None:
    model = make(config)
    tokens = np.ascontiguousarray(batch(config, 1, 30)[0][0])
    expected = model.decode(model.kvcache(), tokens)
    model.compress(kind, release=True)
    found = model.decode(model.kvcache(), tokens)
    assert 0 < np.abs(found - expected).max() <= bound * np.abs(expected).max()
    with pytest.raises(errors.InvalidError, match="released"):
        model.forward(tokens[None])
    for tensor in model.tensors:
        if tensor.kind in {"vector", "positions"}:
            assert model.params[tensor.name].any()
        else:
            with pytest.raises(errors.InvalidError, match="released"):
                model.params[tensor.name]


# ---- with what else there is ----------------------------------------------------------------


def test_a_compact_vocabulary(config: ModelConfig) -> None:
    ids = np.array([0, 2, 7, 30, 60], np.int32)
    compact, whole = make(config), make(config)
    compact.compact_vocabulary(ids, equalize=True)
    for name, array in compact.params.items():
        whole.params[name][...] = array
    whole.weights_changed()
    rng = np.random.default_rng(0)
    for micro in range(2):
        tokens, targets = (rng.choice(ids, (3, 12)).astype(np.int32) for _ in range(2))
        assert compact.forward(tokens, targets) == pytest.approx(whole.forward(tokens, targets), rel=1e-6)
        for model in (compact, whole):
            model.backward(accumulate=micro > 0)
    for name, expected in whole.grads.items():
        assert np.linalg.norm(compact.grads[name] - expected) <= 1e-5 * np.linalg.norm(expected), name
    assert not compact.grads[WTE][61:].any()


def test_to_the_neural_engine_and_back(config: ModelConfig) -> None:
    model, tokens = make(config), batch(config, 2, 9)
    expected = model.forward(*tokens)
    for mode in MODES:
        model.to("ane-sim", AneOptions(mode=mode))
        assert model.forward(*tokens) == pytest.approx(expected, rel=2e-3)
        model.to("cpu")
        assert model.forward(*tokens) == expected
        assert memory(config, 2, 9, training=True, ane=AneOptions(mode=mode)).total_bytes > 0


def test_memory_forecast(config: ModelConfig) -> None:
    whole = memory(config, 4, 64, training=True)
    table = sum(math.prod(t.shape) for t in tensor_table(config))
    assert whole.params_bytes == whole.grads_bytes == 4 * table
    N, L = 4 * 64, config.n_layers
    taps = 36 + 3 * 36 + 4 + 36 + 36 + 144 + 4  # x, qkv, lse, attn, mid, what GELU is taken of, means and rstds
    head = 36 + 36 + 61 + 3
    assert whole.activations_bytes == pytest.approx(4 * N * (L * taps + head), rel=0.01)
    one = memory(config, 4, 64, training=True, activation_checkpoint="none")
    assert one.activations_bytes < 0.4 * whole.activations_bytes
    half = memory(config, 4, 64, training=True, dtype="bf16")
    assert whole.activations_bytes - half.activations_bytes == 4 * N * L * 144 // 2
    model = make(config)
    model.forward(*batch(config, 4, 64))
    model.backward()
    assert model.memory(4, 64) == whole
