"""What a failing device does to a model: a named error, untouched weights and moments, and no stale result."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from anemodels import BACKWARD, FORWARD, MHA, QK_NORM, batch, cosine, cpu_model, gradients, sim_model, simulator

from anellm import errors
from anellm.model import Model
from anellm.optim import AdamW

LAYERS = MHA.n_layers


def evaluations(softmax: str) -> list[tuple[int, str, int]]:
    """Return every evaluation of a micro-step: its number, the program, the layer."""
    places = [(name, layer) for layer in range(LAYERS) for name in FORWARD[softmax]]
    places += [(name, layer) for layer in reversed(range(LAYERS)) for name in BACKWARD[softmax]]
    return [(number, *place) for number, place in enumerate(places)]


EVERY = [(softmax, *place) for softmax in ("ane", "cpu") for place in evaluations(softmax)]
RETRIED = {"attn_fwd", "ffn_fwd", "wo_fwd", *BACKWARD["ane"], *BACKWARD["cpu"]}  # with an exponent that can be lowered


class Trained:
    """A model with one optimizer step behind it, so that weights and moments are its own."""

    def __init__(self, softmax: str = "ane") -> None:
        self.model = sim_model(MHA, softmax=softmax, numerics="fast")
        self.tokens, self.targets = batch(MHA, 2, 20)
        self.optimizer = AdamW(self.model, 1e-3)
        self.step()

    def micro_step(self) -> float:
        loss = self.model.forward(self.tokens, self.targets)
        self.model.backward()
        return float(loss)

    def step(self) -> float:
        loss = self.micro_step()
        self.optimizer.step(1e-3)
        return loss

    def state(self) -> list[bytes]:
        """Return the bytes of weights and moments."""
        m = self.model
        return [a.tobytes() for group in (m.params, m.moments_m, m.moments_v) for a in group.values()]

    def refuses(self, kind: type[errors.AnellmError], pattern: str) -> None:
        """A micro-step fails with that error, leaves weights and moments alone, and cannot be gone back through."""
        before = self.state()
        with pytest.raises(kind, match=pattern):
            self.micro_step()
        assert self.state() == before
        with pytest.raises(errors.InvalidError, match="no training forward"):
            self.model.backward()
        assert self.state() == before


@pytest.fixture(scope="module")
def trained() -> Callable[[str], Trained]:
    """Return a model that the tests of this file share: what fails must leave it as it was."""
    made: dict[str, Trained] = {}
    return lambda softmax: made.setdefault(softmax, Trained(softmax))


@pytest.mark.parametrize(("softmax", "number", "program", "layer"), EVERY)
def test_a_failed_evaluation(
    trained: Callable[[str], Trained], softmax: str, number: int, program: str, layer: int
) -> None:
    t = trained(softmax)
    t.micro_step()
    loss, expected = t.micro_step(), gradients(t.model)
    device = simulator(t.model)
    device.inject("eval-fails", after=number, count=1)
    t.refuses(errors.EvalError, rf"program {program}, layer {layer}: evaluation failed: .*injected.*0x1d")
    assert device.failure().code == 8
    # Nothing of it stays: the next micro-step is that of before.
    assert t.micro_step() == loss
    assert all(np.array_equal(expected[name], g) for name, g in t.model.grads.items())


@pytest.mark.parametrize(("softmax", "number", "program", "layer"), EVERY)
def test_infinite_results(
    trained: Callable[[str], Trained], softmax: str, number: int, program: str, layer: int
) -> None:
    t = trained(softmax)
    exponents = t.model.ane.exponents()
    loss, expected = t.micro_step(), gradients(t.model)
    retries = t.model.ane.stats().retries
    # Once: the evaluation is repeated with a smaller input, where there is one that can be made smaller.
    simulator(t.model).inject("eval-inf", after=number, count=1)
    if program in RETRIED:
        assert t.micro_step() == pytest.approx(loss, abs=1e-3)
        assert t.model.ane.stats().retries == retries + 1
        assert all(cosine(expected[name], g) > 0.9995 for name, g in t.model.grads.items())
        assert t.model.ane.exponents()[1::2] == exponents[1::2]  # it was an accident: the target is the old one
        simulator(t.model).inject("eval-inf", after=number, count=2)
    t.refuses(errors.NonFiniteError, rf"program {program}, layer {layer}: (an )?output .*infinite")
    t.model.ane.set_exponents(exponents)
    assert t.micro_step() == loss


@pytest.mark.parametrize(("softmax", "number", "program", "layer"), EVERY[:: LAYERS + 1])
def test_success_without_a_result_is_noticed(
    trained: Callable[[str], Trained], softmax: str, number: int, program: str, layer: int
) -> None:
    t = trained(softmax)
    simulator(t.model).inject("eval-stale", after=number, count=1)
    t.refuses(errors.EvalError, rf"program {program}, layer {layer}: .*reported success and wrote no result")


def test_programs_have_one_output_so_nothing_can_be_swapped(trained: Callable[[str], Trained]) -> None:
    t = trained("ane")
    t.micro_step()
    loss, expected = t.micro_step(), gradients(t.model)
    simulator(t.model).inject("eval-swapped")
    assert t.micro_step() == loss
    simulator(t.model).clear_faults()
    assert all(np.array_equal(expected[name], g) for name, g in t.model.grads.items())


@pytest.mark.parametrize("softmax", ["ane", "cpu"])
@pytest.mark.parametrize("fault", ["compile-fails", "load-fails"])
def test_a_program_that_does_not_compile(fault: str, softmax: str) -> None:
    names = FORWARD[softmax] + BACKWARD[softmax]
    for number in range(len(names)):
        t = sim_model(MHA, softmax=softmax, numerics="fast", fallback="error")
        tokens, targets = batch(MHA, 2, 20)
        simulator(t).inject(fault, after=number, count=1)
        with pytest.raises(errors.CompileError, match=r"program (\w+) for B = 2, T = 20: .*injected") as raised:
            t.forward(tokens, targets)
        assert any(f"program {name} " in str(raised.value) for name in names)
        assert t.ane.stats().programs == 0
        assert t.ane.stats().surface_bytes == 0
        assert t.forward(tokens, targets) > 0  # compiles now


def test_no_compiles_left() -> None:
    """A model that compiles beyond a process's budget says so, and what it has goes on."""
    model = sim_model(MHA, numerics="fast", fallback="error")
    tokens, targets = batch(MHA, 1, 8)
    loss = model.forward(tokens, targets, training=False)
    device = simulator(model)
    device.inject("compile-fails")
    with pytest.raises(errors.CompileError, match="for B = 2, T = 100"):
        model.forward(*batch(MHA, 2, 100), training=False)
    assert model.forward(tokens, targets, training=False) == loss


def poison(model: Model, name: str, value: float) -> None:
    model.params[name].flat[7] = value
    model.weights_changed()


@pytest.mark.parametrize(
    ("name", "program", "what"),
    [
        ("self_attn.k_proj", "attn_fwd", "wqkv"),
        ("self_attn.o_proj", "attn_fwd", "wo"),
        ("mlp.up_proj", "ffn_fwd", "w3"),
        ("mlp.down_proj", "ffn_fwd", "w2"),
    ],
)
def test_weights_beyond_fp16(name: str, program: str, what: str) -> None:
    for value in (7e4, np.inf, np.nan):
        model = sim_model(MHA, numerics="fast")
        poison(model, f"model.layers.1.{name}.weight", value)
        with pytest.raises(errors.NonFiniteError, match=rf"program {program}, layer 1: max \|{what}\| is"):
            model.forward(*batch(MHA, 1, 8))


def test_activations_beyond_fp16() -> None:
    model = sim_model(MHA, numerics="fast")
    poison(model, "model.layers.1.post_attention_layernorm.weight", 1e6)
    with pytest.raises(errors.NonFiniteError, match=r"program ffn_fwd, layer 1: max \|h\| is .*beyond fp16"):
        model.forward(*batch(MHA, 1, 8))


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize(("softmax", "program"), [("ane", "attn_fwd"), ("cpu", "attn_scores")])
def test_heads_too_large_for_their_norm(softmax: str, program: str, training: bool) -> None:
    """The engine would give zeros for them, without an error."""
    tokens, targets = batch(QK_NORM, 1, 8)
    cpu, sim = cpu_model(QK_NORM), sim_model(QK_NORM, softmax=softmax)
    name = "model.layers.1.self_attn.k_proj.weight"
    size = np.abs(sim.params[name]).max()
    for largest, fits in ((20.0, True), (1000.0, False)):
        for model in (cpu, sim):
            model.params[name][...] *= largest / size
            model.weights_changed()
        size = largest
        if fits:
            expected = cpu.forward(tokens, targets, training=training)
            assert sim.forward(tokens, targets, training=training) == pytest.approx(expected, abs=5e-3)
            continue
        with pytest.raises(errors.NonFiniteError, match=rf"program {program}, layer 1: the squares of a head"):
            sim.forward(tokens, targets, training=training)


def test_gradients_beyond_fp16() -> None:
    tokens, targets = batch(MHA, 1, 8)
    scaled, plain, cpu = sim_model(MHA), sim_model(MHA, scaling=False), cpu_model(MHA)
    for model in (scaled, plain, cpu):
        model.forward(tokens, targets)
    scaled.backward(1e9)
    cpu.backward(1e9)
    assert all(cosine(g, scaled.grads[name]) > 0.9995 for name, g in cpu.grads.items())
    with pytest.raises(errors.NonFiniteError, match=r"program ffn_bwd_w2, layer 1: max \|dy\| is .*beyond fp16"):
        plain.backward(1e9)
    scaled.forward(tokens, targets)
    with pytest.raises(errors.NonFiniteError, match=r"program ffn_bwd_w2, layer 1: max \|dy\| is inf"):
        scaled.backward(1e300)


def test_sums_that_really_overflow_are_repeated_smaller_and_stay_so() -> None:
    """dy goes in with up to 2^8; times these weights dact passes 2^15 (Q42)."""
    tokens, targets = batch(MHA, 2, 20)
    cpu, sim = cpu_model(MHA), sim_model(MHA)
    large = np.random.default_rng(5).normal(0, 80, (MHA.dim, MHA.hidden_dim))

    def micro_step() -> None:
        for model in (cpu, sim):
            model.forward(tokens, targets)
            model.backward()

    for model in (cpu, sim):
        model.params["model.layers.1.mlp.down_proj.weight"][...] = large
        model.weights_changed()
    micro_step()
    exponents, retries = sim.ane.exponents(), sim.ane.stats().retries
    assert retries >= 1
    assert sum(exponents[1::2]) > 0
    micro_step()
    assert sim.ane.stats().retries == retries  # aims lower from then on
    assert sim.ane.exponents() == exponents
    assert all(cosine(g, sim.grads[name]) > 0.999 for name, g in cpu.grads.items())
