"""Activation checkpointing in the model: the same losses and gradients whatever is kept, in less memory."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from anellm import errors
from anellm._ffi import check, lib
from anellm.activation_checkpoint import saved_layers
from anellm.config import ModelConfig, TrainConfig
from anellm.data import TokenDataset
from anellm.device import DTYPES, Dtype
from anellm.model import Model, memory
from anellm.trainer import Trainer

SHAPE = ModelConfig(
    dim=32, hidden_dim=48, n_layers=7, n_heads=4, n_kv_heads=2, head_dim=8, vocab_size=61, max_seq_len=40, qk_norm=True
)
POLICIES = ("boundary", "sqrt", "every:3", "every:4", "every:6", "every:7", "every:99", "none")
DATA = TokenDataset(np.random.default_rng(4).integers(0, 61, 900).astype(np.uint16))


def gradients(device: str, policy: str, dtype: Dtype = "fp32") -> tuple[list[float], np.ndarray]:
    """Return losses and gradients of two batches of different shapes, accumulated."""
    model = Model(SHAPE, device, seed=5)
    rng = np.random.default_rng(6)
    for tensor in model.tensors:
        if tensor.kind == "vector":
            model.params[tensor.name][...] = rng.uniform(0.5, 1.5, tensor.shape)
    model.weights_changed()
    model.set_dtype(dtype)
    model.set_activation_checkpoint(policy)
    losses = []
    for i, (B, T) in enumerate(((2, 33), (3, 17))):
        tokens = rng.integers(0, SHAPE.vocab_size, (B, T + 1)).astype(np.int32)
        losses.append(model.forward(tokens[:, :-1].copy(), tokens[:, 1:].copy()))
        model.backward(accumulate=i > 0)
    return losses, np.concatenate([g.reshape(-1) for g in model.grads.values()])


@pytest.mark.parametrize("dtype", DTYPES)
def test_losses_and_gradients_are_the_same_bits(dtype: Dtype) -> None:
    losses, expected = gradients("cpu", "all", dtype)
    assert np.abs(expected).max() > 1e-3
    for policy in POLICIES:
        found_losses, found = gradients("cpu", policy, dtype)
        assert found_losses == losses, policy
        assert np.array_equal(found, expected), policy


@pytest.mark.parametrize("policy", ["boundary", "every:3", "none"])
def test_on_the_simulated_engine_too(policy: str) -> None:
    losses, expected = gradients("ane-sim", "all")
    found_losses, found = gradients("ane-sim", policy)
    assert found_losses == losses
    assert np.array_equal(found, expected)


def test_a_run_does_not_depend_on_the_policy() -> None:
    def losses(policy: str) -> list[float]:
        found: list[float] = []
        config = TrainConfig(
            steps=4, batch_size=2, seq_len=16, gradient_accumulation_steps=2, activation_checkpoint=policy
        )
        Trainer(
            Model(SHAPE, seed=1), config, DATA,
            callbacks=(lambda record: found.append(record["loss"]) if record["kind"] == "step" else None,),
        ).train()  # fmt: skip
        return found

    expected = losses("all")
    assert len(expected) == 4
    for policy in ("sqrt", "none"):
        assert losses(policy) == expected


@pytest.mark.parametrize("dtype", DTYPES)
def test_memory_is_that_of_what_is_kept(dtype: Dtype) -> None:
    """Of the last layer all is kept, of a segment its input, so that forecasts of two policies tell all others'."""
    shape = dataclasses.replace(SHAPE, n_layers=24)

    def forecast(policy: str) -> int:
        return memory(shape, 4, 32, training=True, dtype=dtype, activation_checkpoint=policy).activations_bytes

    one_input = 4 * 4 * 32 * shape.dim
    layers = {policy: saved_layers(24, policy).buffer_layers for policy in ("all", "none", *POLICIES)}
    a_layer = (forecast("all") - forecast("none") + one_input) / 23
    assert a_layer > 4 * one_input if dtype == "fp32" else a_layer > 2 * one_input
    for policy in POLICIES:
        inputs = 0 if layers[policy] == 24 else len(saved_layers(24, policy).inputs)
        expected = forecast("all") - (24 - layers[policy]) * a_layer + inputs * one_input
        assert forecast(policy) == expected, policy
    assert forecast("none") < forecast("boundary") < forecast("sqrt") < forecast("all")
    training = memory(shape, 4, 32, training=False, dtype=dtype, activation_checkpoint="none")
    assert training == memory(shape, 4, 32, training=False, dtype=dtype)


def test_another_policy_forgets_the_forward() -> None:
    model = Model(SHAPE, seed=5)
    tokens = np.ones((1, 8), np.int32)
    model.forward(tokens, tokens)
    model.set_activation_checkpoint("all")
    model.backward()
    model.forward(tokens, tokens)
    model.set_activation_checkpoint("sqrt")
    with pytest.raises(errors.InvalidError, match="no training forward"):
        model.backward()
    assert model.activation_checkpoint == "sqrt"
    assert model.memory(1, 8) == memory(SHAPE, 1, 8, training=True, activation_checkpoint="sqrt")


def test_what_is_no_policy_is_refused() -> None:
    model = Model(SHAPE, seed=5)
    for attempt in (
        lambda: model.set_activation_checkpoint("some"),
        lambda: memory(SHAPE, 1, 8, training=True, activation_checkpoint="every:0"),
        lambda: TrainConfig(activation_checkpoint="every:x"),
    ):
        with pytest.raises(errors.ConfigError, match=r"activation.checkpoint: expected all, boundary"):
            attempt()
    with pytest.raises(errors.InvalidError, match="checkpoint = -2, must be -1"):
        check(lib.anellm_model_set_checkpoint(model._pointer, -2))
    assert model.activation_checkpoint == "all"
