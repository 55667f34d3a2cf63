"""Layers one at a time, each of two devices given what the reference has: what differs is found where it is."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence

import numpy as np
import pytest
from anemodels import GQA, MHA, QK_NORM, batch, cpu_model, simulator

from anellm import errors
from anellm.check_layers import Layer, Limits, between_ends, compare_layers
from anellm.config import ModelConfig
from anellm.device import AneOptions
from anellm.differences import compare
from anellm.model import Model

GPT2 = ModelConfig(arch="gpt2", dim=40, n_layers=3, n_heads=5, vocab_size=61, max_seq_len=64, bias=True)
PLAIN_GPT2 = GPT2.replace(bias=False, gelu="erf", n_layers=1)
CONFIGS = {"mha": MHA, "gqa": GQA, "qk_norm": QK_NORM, "gpt2": GPT2, "plain gpt2": PLAIN_GPT2}
LIMITS = Limits.of(2.0**-11)
CPU = ("cpu", None, "fp32")


def pair(config: ModelConfig, **options: object) -> list[Model]:
    """Return the reference and what is tested: the CPU once more, or with ``options`` the simulator."""
    tested = ("ane-sim", AneOptions(**options), "fp32") if options else CPU
    return between_ends(config, cpu_model(config).params.items(), [CPU, tested])


def compared(models: Sequence[Model], B: int = 2, T: int = 20) -> list[Layer]:
    return compare_layers(*models, *batch(models[0].config, B, T), LIMITS)


def wrong(layers: Sequence[Layer]) -> dict[str, list[str]]:
    """Return what is not within tolerance, by the name of the layer."""
    found = {layer.name: layer.wrong(forward=True, backward=True) for layer in layers}
    return {name: names for name, names in found.items() if names}


@pytest.fixture(params=CONFIGS)
def config(request: pytest.FixtureRequest) -> ModelConfig:
    return CONFIGS[request.param]


def test_the_layers_at_the_ends_change_nothing(config: ModelConfig) -> None:
    model = cpu_model(config)
    tokens, targets = batch(config, 2, 20)
    loss = model.forward(tokens, targets)
    model.backward()
    models = pair(config)
    layers = compare_layers(*models, tokens, targets, LIMITS)
    head = layers[-1].forward
    assert head is not None
    assert head.largest == loss
    names = [[row.name for row in layer.gradients] for layer in layers]
    table = model.tensors[0].name
    if config.tie_embeddings:
        names[0].remove(f"{table} (as embedding)")
        names[-1].remove(f"{table} (as classifier)")
        names[0].append(table)
    assert sorted(name for part in names for name in part) == sorted(model.grads)  # each once
    found = models[0].grads
    for name, gradient in model.grads.items():
        if name != table:
            np.testing.assert_array_equal(found[shifted(name)], gradient, name)


def shifted(name: str) -> str:
    """Return a tensor's name in the model with a layer more at either end."""
    parts = name.split(".")
    return ".".join(str(int(part) + 1) if part.isdecimal() else part for part in parts)


def test_a_device_against_itself_has_no_difference(config: ModelConfig) -> None:
    layers = compared(pair(config))
    assert [layer.name for layer in layers] == ["embedding", *(f"layer {i}" for i in range(config.n_layers)), "head"]
    rows = [row for layer in layers for row in (layer.forward, layer.backward, *layer.gradients) if row is not None]
    assert len(rows) == 2 * len(layers) - 1 + sum(len(layer.gradients) for layer in layers)
    assert {row.difference for row in rows} == {0.0}
    assert all(row.largest > 0 for row in rows)


@pytest.mark.parametrize("options", [{"mode": "dynamic"}, {"mode": "static"}, {"softmax": "cpu"}, {"chip": "m1"}],
                         ids=lambda options: next(iter(options.values())))  # fmt: skip
def test_the_simulator_is_within_tolerance(config: ModelConfig, options: dict[str, str]) -> None:
    layers = compared(pair(config, **options))
    assert wrong(layers) == {}
    for layer in layers[1:-1]:
        assert layer.forward is not None
        assert layer.backward is not None
        assert layer.forward.error > 0
        assert layer.backward.error > 0
        assert layer.forward.cosine > 0.9999
        assert layer.backward.cosine > 0.9999


@pytest.mark.parametrize("tensor", [
    "model.layers.{}.mlp.up_proj.weight", "model.layers.{}.self_attn.v_proj.weight",
    "model.layers.{}.self_attn.o_proj.weight", "model.layers.{}.post_attention_layernorm.weight",
])  # fmt: skip
@pytest.mark.parametrize("layer", range(MHA.n_layers))
def test_a_weight_that_differs_is_found_in_its_layer(tensor: str, layer: int) -> None:
    models = pair(MHA, mode="dynamic")
    models[1].params[tensor.format(layer + 1)][1] *= 1.5  # a row, or a number
    models[1].weights_changed()
    found = wrong(compared(models))
    assert list(found) == [f"layer {layer}"]
    assert found[f"layer {layer}"][0] == f"layer {layer} forward"


@pytest.mark.parametrize("mode", ["dynamic", "static"])
@pytest.mark.parametrize("tensor", ["attn.c_attn.bias", "attn.c_proj.bias", "mlp.c_fc.bias", "ln_2.bias"])
def test_a_bias_that_differs_is_found_in_its_layer(tensor: str, mode: str) -> None:
    models = pair(GPT2, mode=mode)
    models[1].params[f"transformer.h.2.{tensor}"][-1] += 0.5
    models[1].weights_changed()
    assert list(wrong(compared(models))) == ["layer 1"]


def test_what_differs_at_the_ends_is_found_there() -> None:
    assert not MHA.tie_embeddings
    models = pair(MHA, mode="dynamic")
    tokens, _ = batch(MHA, 2, 20)
    models[1].params["model.embed_tokens.weight"][tokens[0, 0]] *= 1.1
    models[1].weights_changed()
    assert wrong(compared(models)) == {"embedding": ["embedding forward"]}
    models = pair(MHA)
    models[1].params["lm_head.weight"][3] *= 2
    models[1].weights_changed()
    assert wrong(compared(models)) == {"head": ["head dx", "model.norm.weight", "lm_head.weight"]}
    models = pair(GQA)
    models[1].params["model.embed_tokens.weight"][...] *= 1.1  # tied
    models[1].weights_changed()
    assert {name: names[0] for name, names in wrong(compared(models)).items()} == {
        "embedding": "embedding forward",
        "head": "head forward",
    }


def test_without_scaling_only_the_backward_of_layers_is_wrong() -> None:
    layers = compared(pair(MHA, scaling=False))
    assert list(wrong(layers)) == [f"layer {i}" for i in range(MHA.n_layers)]
    assert all(layer.wrong(forward=True, backward=False) == [] for layer in layers)
    worst = layers[1].worst()
    assert worst is not None
    assert not worst.ok
    assert worst.error == max(row.error for row in layers[1].gradients)


# An evaluation of the reference's order: embedding's layer, forward and back, then that of layer 0, and so on.
FORWARDS, BACKWARDS = 2, 6


@pytest.mark.parametrize(
    ("after", "failed", "phase"),
    [(FORWARDS + BACKWARDS, "layer 0", "forward"), (2 * (FORWARDS + BACKWARDS) + FORWARDS, "layer 1", "backward")],
)
@pytest.mark.parametrize("fault", ["eval-fails", "eval-inf", "eval-stale"])
def test_a_failed_evaluation_is_a_row(fault: str, after: int, failed: str, phase: str) -> None:
    models = pair(MHA, mode="dynamic")
    simulator(models[1]).inject(fault, after=after, count=2 if fault == "eval-inf" else 1)
    layers = compared(models)
    found = {layer.name: layer for layer in layers}[failed]
    assert wrong(layers) == {failed: [f"{failed} {phase}"]}
    assert found.wrong(forward=phase == "forward", backward=phase == "backward") == [f"{failed} {phase}"]
    assert found.wrong(forward=phase == "backward", backward=phase == "forward") == []
    program = "attn_fwd" if phase == "forward" else "ffn_bwd_w2"
    assert found.error is not None
    assert f"program {program}, {failed}: " in found.error
    assert (found.forward is None) == (phase == "forward")
    assert found.backward is None


def test_a_refused_program_is_an_error_where_it_is_to_be() -> None:
    models = pair(MHA, mode="static", fallback="error")
    simulator(models[1]).inject("compile-fails", after=2)
    with pytest.raises(errors.CompileError):
        compared(models)
    models = pair(MHA, mode="dynamic", fallback="cpu")
    simulator(models[1]).inject("compile-fails")
    with pytest.warns(errors.FallbackWarning):
        layers = compared(models)
    rows = [row for layer in layers for row in (layer.forward, layer.backward, *layer.gradients) if row is not None]
    assert {row.difference for row in rows} == {0.0}  # the CPU computed all of it


def test_where_files_cannot_be_allocated_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    expected = compared(pair(GQA, mode="dynamic"))
    monkeypatch.delattr(os, "posix_fallocate")  # macOS
    assert compared(pair(GQA, mode="dynamic")) == expected


def test_models_can_be_compared_again() -> None:
    models = pair(GQA, mode="dynamic")
    first, second = compared(models), compared(models)
    assert [layer.forward for layer in first] == [layer.forward for layer in second]
    assert [layer.gradients for layer in first] == [layer.gradients for layer in second]


def test_a_token_alone_is_refused() -> None:
    with pytest.raises(errors.InvalidError, match="seq_len: expected at least 2 tokens to compare layers, found 1"):
        compared(pair(MHA), T=1)


def test_bad_ids_are_refused() -> None:
    models = pair(MHA)
    tokens, targets = batch(MHA, 2, 20)
    tokens[1, 3] = MHA.vocab_size
    with pytest.raises(errors.TokenRangeError):
        compare_layers(*models, tokens, targets, LIMITS)
    tokens[1, 3] = 0
    compare_layers(*models, tokens, targets, LIMITS)


def test_bf16_on_the_cpu_is_within_its_own_tolerance() -> None:
    models = between_ends(GPT2, cpu_model(GPT2).params.items(), [CPU, ("cpu", None, "bf16")])
    layers = compare_layers(*models, *batch(GPT2, 2, 20), Limits.of(2.0**-8))
    assert wrong(layers) == {}
    assert all(layer.forward is not None and layer.forward.error > 2.0**-11 for layer in layers[1:-1])


@pytest.fixture(scope="module")
def noise() -> Iterator[tuple[np.ndarray, np.ndarray]]:
    rng = np.random.default_rng(0)
    yield rng.normal(size=4096).astype(np.float32), rng.normal(size=4096).astype(np.float32)


def test_the_norm_of_a_difference(noise: tuple[np.ndarray, np.ndarray]) -> None:
    x, y = noise
    row = compare("x", x + np.float32(1e-3) * y, x, 1.1e-3, norm=True)
    assert row.ok
    assert row.error == pytest.approx(1e-3 * np.linalg.norm(y) / np.linalg.norm(x), rel=1e-3)
    assert row.cosine == pytest.approx(1 - row.error**2 / 2, abs=1e-7)
    assert not compare("x", x + np.float32(1e-3) * y, x, 0.9e-3, norm=True).ok
    # One value of 4,096 that is wrong is hardly seen in the norm.
    z = x.copy()
    z[7] += 0.02
    row = compare("x", z, x, 1e-3, norm=True)
    assert row.error < 1e-3
    assert not row.ok
    assert compare("x", z, x, 2e-3, norm=True).ok


def test_the_norm_of_what_is_nothing_or_not_finite() -> None:
    zeros, ones = np.zeros(3, np.float32), np.ones(3, np.float32)
    assert compare("x", zeros, zeros, 1e-3, norm=True) == ("x", 0.0, 0.0, 0.0, 1.0, True)
    row = compare("x", ones, zeros, 1e-3, norm=True)
    assert (row.error, row.cosine, row.ok) == (np.inf, 0.0, False)
    row = compare("x", zeros, ones, 1e-3, norm=True)
    assert (row.error, row.cosine, row.ok) == (1.0, 0.0, False)
    for bad in (np.nan, np.inf):
        assert not compare("x", np.array([1, bad, 1], np.float32), ones, 1e-3, norm=True).ok
    assert compare("x", -ones, ones, 1e-3, norm=True).cosine == pytest.approx(-1.0)
