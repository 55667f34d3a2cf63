"""Blocks on the simulated Neural Engine against the CPU's in fp32: outputs, every gradient, batches, memory."""

from __future__ import annotations

import numpy as np
import pytest
from anemodels import (
    BACKWARD,
    CONFIGS,
    FORWARD,
    GQA,
    MHA,
    QK_NORM,
    attach,
    batch,
    cosine,
    cpu_model,
    sim_model,
    simulator,
    threads,
)

from anellm import errors
from anellm._ffi import check, ffi, lib
from anellm.config import ModelConfig
from anellm.device import AneOptions
from anellm.model import Model, memory
from anellm.sim_device import Simulator

B, T = 2, 40


@pytest.mark.parametrize("softmax", ["ane", "cpu"])
@pytest.mark.parametrize("name", CONFIGS)
def test_forward_matches(name: str, softmax: str) -> None:
    config = CONFIGS[name]
    tokens, targets = batch(config, B, T)
    cpu, sim = cpu_model(config), sim_model(config, softmax=softmax)
    expected, found = cpu.forward(tokens), sim.forward(tokens)
    assert cosine(expected, found) > 0.99999
    np.testing.assert_allclose(found, expected, atol=1e-2 * np.abs(expected).max())  # the sigmoid's table: 3.4e-3
    assert sim.forward(tokens, targets) == pytest.approx(cpu.forward(tokens, targets), abs=5e-4)
    np.testing.assert_allclose(sim.loss_per_token(tokens, targets), cpu.loss_per_token(tokens, targets), atol=2e-2)


@pytest.mark.parametrize("upstream", [1e-1, 1e-3, 1e-5, 1e-8])
@pytest.mark.parametrize(("name", "softmax"), [("mha", "ane"), ("gqa", "ane"), ("qk_norm", "ane"), ("gqa", "cpu")])
def test_gradients_match_at_every_size(name: str, softmax: str, upstream: float) -> None:
    """``upstream`` is the largest gradient of a logit: softmax minus one-hot, times the scale, over the targets."""
    config = CONFIGS[name]
    tokens, targets = batch(config, B, T)
    cpu, sim = cpu_model(config), sim_model(config, softmax=softmax)
    for model in (cpu, sim):
        model.forward(tokens, targets)
        model.backward(upstream * B * T)
    for tensor, gradient in cpu.grads.items():
        assert np.abs(gradient).max() > 0
        assert cosine(gradient, sim.grads[tensor]) > 0.9995, tensor
        worst = np.abs(sim.grads[tensor] - gradient).max() / np.abs(gradient).max()
        assert worst < 0.02, (tensor, worst)  # a few units of fp16's 2^-11, over the programs on the way


def test_qk_norm_with_the_softmax_on_the_cpu() -> None:
    tokens, targets = batch(QK_NORM, B, T)
    cpu, sim = cpu_model(QK_NORM), sim_model(QK_NORM, softmax="cpu")
    for model in (cpu, sim):
        model.forward(tokens, targets)
        model.backward()
    assert all(cosine(g, sim.grads[name]) > 0.9995 for name, g in cpu.grads.items())


def test_without_scaling_small_gradients_are_lost() -> None:
    tokens, targets = batch(MHA, B, T)
    cpu, sim = cpu_model(MHA), sim_model(MHA, scaling=False)
    kept = {}
    for upstream in (1e-1, 1e-4, 1e-7):
        for model in (cpu, sim):
            model.forward(tokens, targets)
            model.backward(upstream * B * T)
        name = "model.layers.0.mlp.gate_proj.weight"
        kept[upstream] = cosine(cpu.grads[name], sim.grads[name])
    assert kept[1e-1] > 0.99
    assert kept[1e-4] < 0.9
    assert kept[1e-7] == 0  # not one product is left


@pytest.mark.parametrize("chip", ["m1", "m3ultra", "m6"])
def test_other_chips(chip: str) -> None:
    tokens, targets = batch(GQA, 1, 33)
    cpu, sim = cpu_model(GQA), sim_model(GQA, chip=chip)
    for model in (cpu, sim):
        model.forward(tokens, targets)
        model.backward()
    least = 0.99 if chip == "m1" else 0.9995  # M1 sums four products at a time in fp16
    assert all(cosine(g, sim.grads[name]) > least for name, g in cpu.grads.items())


def test_sums_in_fp32_do_as_well() -> None:
    """The other reading of the published measurements: nothing is dropped."""
    tokens, targets = batch(GQA, 1, 33)
    cpu, sim = cpu_model(GQA), cpu_model(GQA)
    device = Simulator("m4", mac="wide_fp32")
    attach(sim, device)
    for model in (cpu, sim):
        model.forward(tokens, targets)
        model.backward()
    assert all(cosine(g, sim.grads[name]) > 0.9995 for name, g in cpu.grads.items())


@pytest.mark.parametrize("softmax", ["ane", "cpu"])
def test_one_token(softmax: str) -> None:
    tokens, targets = batch(GQA, 1, 1)
    cpu, sim = cpu_model(GQA), sim_model(GQA, softmax=softmax)
    for model in (cpu, sim):
        model.forward(tokens, targets)
        model.backward()
    # With one key the softmax is 1 whatever the scores: q and k have no gradient.
    for name, gradient in cpu.grads.items():
        if "q_proj" in name or "k_proj" in name:
            assert np.abs(sim.grads[name]).max() < 1e-5
        else:
            assert cosine(gradient, sim.grads[name]) > 0.9995, name


def test_accumulation() -> None:
    tokens, targets = batch(GQA, 4, T)
    cpu, sim = cpu_model(GQA), sim_model(GQA)
    for model in (cpu, sim):
        for micro in range(2):
            rows = slice(2 * micro, 2 * micro + 2)
            model.forward(tokens[rows], targets[rows])
            model.backward(0.5, accumulate=micro > 0)
    assert all(cosine(g, sim.grads[name]) > 0.9995 for name, g in cpu.grads.items())


# ---- same bytes ----------------------------------------------------------------------------------------------------


def step_bytes(model: Model, tokens: np.ndarray, targets: np.ndarray) -> tuple[float, bytes]:
    loss = model.forward(tokens, targets)
    model.backward()
    return loss, b"".join(g.tobytes() for g in model.grads.values())


def test_same_bytes_for_any_number_of_threads_aside_or_not() -> None:
    tokens, targets = batch(QK_NORM, 3, T)
    seen = []
    for n, async_dw in ((1, 1), (2, 1), (3, 0), (2, 0)):
        with threads(n):
            model = cpu_model(QK_NORM)
            device = Simulator("m4", numerics="fast")
            attach(model, device, async_dw=async_dw)
            seen.append([step_bytes(model, tokens, targets) for _ in range(2)])
    assert all(found == seen[0] for found in seen[1:])


@pytest.mark.parametrize("softmax", ["ane", "cpu"])
def test_a_smaller_batch_in_a_larger_program_gives_its_own_bytes(softmax: str) -> None:
    """What an earlier batch left in the columns behind it must not show."""
    alone, after = sim_model(GQA, softmax=softmax), sim_model(GQA, softmax=softmax)
    big, small = batch(GQA, 3, T, seed=1), batch(GQA, 2, T - 7, seed=2)
    zeros = np.zeros((3, T), np.int32)
    alone.forward(zeros, zeros)
    alone.backward()
    after.forward(*big)
    after.backward()
    for model in (alone, after):  # the exponents follow from the small batch alone
        model.ane.set_exponents([0] * len(model.ane.exponents()))
    compiles = simulator(after).counters()["compiles"]
    assert step_bytes(after, *small) == step_bytes(alone, *small)
    assert simulator(after).counters()["compiles"] == compiles


def test_new_weights_are_staged() -> None:
    tokens, targets = batch(MHA, B, T)
    model = sim_model(MHA)
    first = model.forward(tokens).copy()
    layers = [tensor.name for tensor in model.tensors if tensor.name.endswith("proj.weight")]
    for name in layers:
        model.params[name][...] *= 1.25
    assert np.array_equal(model.forward(tokens), first)  # nobody said so yet
    model.weights_changed()
    fresh = sim_model(MHA)
    for name in layers:
        fresh.params[name][...] *= 1.25
    fresh.weights_changed()
    assert np.array_equal(model.forward(tokens), fresh.forward(tokens))
    assert step_bytes(model, tokens, targets) == step_bytes(fresh, tokens, targets)


# ---- programs, memory, counters -------------------------------------------------------------------------------------


@pytest.mark.parametrize("softmax", ["ane", "cpu"])
def test_a_step_in_the_steady_state_compiles_and_allocates_nothing(softmax: str) -> None:
    tokens, targets = batch(GQA, B, T)
    model = sim_model(GQA, softmax=softmax)
    step_bytes(model, tokens, targets)
    before, counters = model.ane.stats(), simulator(model).counters()
    step_bytes(model, tokens, targets)
    model.forward(tokens)
    after = model.ane.stats()
    assert simulator(model).counters()["compiles"] == counters["compiles"] == before.programs == after.programs
    assert after.surface_bytes == before.surface_bytes
    forward, backward = len(FORWARD[softmax]), len(BACKWARD[softmax])
    assert after.programs == forward + backward
    assert after.evaluations - before.evaluations == GQA.n_layers * (2 * forward + backward)
    assert after.rescales == before.rescales  # the same gradients again


@pytest.mark.parametrize("softmax", ["ane", "cpu"])
@pytest.mark.parametrize("training", [False, True])
def test_the_forecast_of_memory_is_what_is_taken(softmax: str, training: bool) -> None:
    tokens, targets = batch(GQA, B, T)
    model = sim_model(GQA, softmax=softmax)
    model.forward(tokens, targets, training=training)
    options = AneOptions(softmax=softmax)
    plain = memory(GQA, B, T, training=training).workspace_bytes
    forecast = memory(GQA, B, T, training=training, ane=options).workspace_bytes - plain
    q, kv = 60, 20
    buffers = 4 * B * T * (4 * GQA.dim + GQA.hidden_dim + q + 2 * kv) if training else 0
    assert model.ane.stats().surface_bytes == forecast - buffers


def test_flops_are_those_of_the_programs_and_of_the_cpu() -> None:
    tokens, targets = batch(MHA, 1, 32)
    model = sim_model(MHA)
    step_bytes(model, tokens, targets)
    stats = model.ane.stats()
    N, d, h, q = 32, MHA.dim, MHA.hidden_dim, 64
    linear = 2 * N * d * (4 * q + 3 * h)  # one pass over the four matrices of attention and the three of the mlp
    scores = 2 * N * N * q  # one product of all heads with each other
    assert stats.cpu_flops == MHA.n_layers * linear + 3 * 2 * N * d * MHA.vocab_size
    # forward: scores and values; backward: both again as p and dv, dp, dq, dk
    assert stats.ane_flops >= MHA.n_layers * (2 * linear + 7 * scores)
    assert stats.ane_flops < 1.5 * MHA.n_layers * (2 * linear + 7 * scores)
    assert 0 < stats.flops_share < 1
    assert (stats.total_ane_flops, stats.total_cpu_flops) == (stats.ane_flops, stats.cpu_flops)
    model.forward(tokens, targets, training=False)
    more = model.ane.stats()
    assert more.ane_flops < stats.ane_flops
    assert more.cpu_flops == 2 * N * d * MHA.vocab_size
    assert more.total_ane_flops == stats.ane_flops + more.ane_flops
    assert more.total_cpu_flops == stats.cpu_flops + more.cpu_flops


def test_flops_of_a_compact_vocabulary() -> None:
    tokens, targets = batch(MHA, 1, 32)
    model = sim_model(MHA)
    ids = np.unique(np.concatenate([tokens, targets], axis=None)).astype(np.int32)
    model.compact_vocabulary(ids, equalize=True)
    model.forward(tokens, targets, training=False)
    assert model.ane.stats().cpu_flops == 2 * 32 * MHA.dim * (len(ids) + 1) < 2 * 32 * MHA.dim * MHA.vocab_size


def test_at_most_16_programs_whatever_is_evaluated() -> None:
    model = sim_model(MHA)
    shapes = [(B, T), (1, 8), (1, 64), (1, 96), (1, 128), (4, 16), (8, 8), (2, 100), (B, T)]
    losses = {}
    for shape in shapes:
        tokens, targets = batch(MHA, *shape)
        training = shape == (B, T)
        loss = model.forward(tokens, targets, training=training)
        assert losses.setdefault(shape, loss) == loss
        if training:
            model.backward()
        assert model.ane.stats().programs <= 16
    compiles = simulator(model).counters()["compiles"]
    assert compiles <= 8 + 2 * (len(shapes) - 2)  # the programs of training were kept


def test_a_longer_program_serves_when_there_is_no_room() -> None:
    model, own = sim_model(MHA), sim_model(MHA)
    model.forward(*batch(MHA, B, 64))
    model.backward()
    for length in (32, 96, 128):
        model.forward(*batch(MHA, 2, length), training=False)
    model.forward(*batch(MHA, 3, 8), training=False)
    assert model.ane.stats().programs == 16
    compiles = simulator(model).counters()["compiles"]
    tokens, targets = batch(MHA, 1, 50)  # fits into 64 exactly; 2 x 65 only into 96
    model.forward(tokens, targets, training=False)
    tokens, targets = batch(MHA, 2, 65)
    assert model.forward(tokens, targets, training=False) == own.forward(tokens, targets, training=False)
    assert simulator(model).counters()["compiles"] == compiles


def test_activation_watch() -> None:
    tokens, _ = batch(MHA, B, T)
    model = sim_model(MHA)
    for tensor in model.tensors:
        if "o_proj" in tensor.name or "down_proj" in tensor.name:
            model.params[tensor.name][...] = 0  # the residual stream stays the embedding
    model.params["model.embed_tokens.weight"][tokens[1, 7], 5] = -50
    model.weights_changed()
    model.forward(tokens)
    assert model.ane.activations() == [50.0] * MHA.n_layers
    down = model.params["model.layers.1.mlp.down_proj.weight"]
    down[...] = np.random.default_rng(0).normal(0, 30, down.shape)
    model.weights_changed()
    model.forward(tokens)
    watched, stats = model.ane.activations(), model.ane.stats()
    assert watched[0] == 50.0 < watched[1] == stats.max_activation
    assert stats.max_activation_layer == 1


# ---- attaching -----------------------------------------------------------------------------------------------------


def test_detached_it_is_the_cpu_again() -> None:
    tokens, targets = batch(GQA, B, T)
    model, plain = sim_model(GQA), cpu_model(GQA)
    model.forward(tokens, targets)
    model.to("cpu")
    with pytest.raises(errors.InvalidError, match="forward"):
        model.backward()  # what forward kept was the engine's
    assert step_bytes(model, tokens, targets) == step_bytes(plain, tokens, targets)
    stats = ffi.new("anellm_ane_stats *")
    with pytest.raises(errors.InvalidError, match="not attached"):
        check(lib.anellm_model_ane_stats(model._pointer, stats))


def test_decode_runs_on_the_cpu() -> None:
    model, plain = sim_model(GQA), cpu_model(GQA)
    prompt = batch(GQA, 1, 9)[0][0]
    found, expected = model.decode(model.kvcache(16), prompt), plain.decode(plain.kvcache(16), prompt)
    assert np.array_equal(found, expected)
    assert model.ane.stats().evaluations == 0


def test_options_are_checked() -> None:
    model, device = cpu_model(GQA), Simulator("m4")
    for name in ("scaling", "softmax_cpu", "async_dw"):
        with pytest.raises(errors.InvalidError, match=f"{name} = 2, must be 0 or 1"):
            attach(model, device, **{name: 2})
    tokens, targets = batch(GQA, 1, 8)
    assert model.forward(tokens, targets) == cpu_model(GQA).forward(tokens, targets)  # still the CPU's
    model.set_dtype("bf16")
    with pytest.raises(errors.UnsupportedError, match="bf16"):
        attach(model, device)


def test_a_model_that_no_chip_takes_is_refused_when_attached() -> None:
    wide = ModelConfig(
        dim=8, hidden_dim=40000, n_layers=1, n_heads=1, n_kv_heads=1, head_dim=8, vocab_size=9, max_seq_len=8
    )
    with pytest.raises(errors.UnsupportedError, match="no chip takes"):
        attach(Model(wide, "cpu", seed=None), Simulator("m4"))


def test_exponents_are_checked() -> None:
    model = sim_model(GQA)
    exponents = model.ane.exponents()
    assert exponents == [0] * len(exponents)
    with pytest.raises(errors.InvalidError, match="expected"):
        model.ane.set_exponents(exponents[:-1])
    for index, value in ((0, 127), (2, -127), (1, -1), (3, 25)):
        with pytest.raises(errors.InvalidError, match=rf"exponents\[{index}\] = {value}, must be"):
            model.ane.set_exponents([value if i == index else 0 for i in range(len(exponents))])
    assert model.ane.exponents() == exponents
    wanted = [5 if i % 2 == 0 else 6 for i in range(len(exponents))]
    model.ane.set_exponents(wanted)
    assert model.ane.exponents() == wanted
