"""Programs that the device refuses: the CPU computes their part, right, once warned of, and never tried again."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import pytest
from anemodels import (
    BACKWARD,
    CONFIGS,
    FORWARD,
    GQA,
    MHA,
    attach,
    batch,
    cosine,
    cpu_model,
    gradients,
    sim_model,
    take_trace,
)
from anemodels import simulator as simulator_of

from anellm._ffi import check, ffi, lib
from anellm.config import ModelConfig
from anellm.errors import CompileError, EvalError, FallbackWarning, InvalidError, TokenRangeError
from anellm.model import Model
from anellm.optim import AdamW
from anellm.sim_device import Simulator

B, T = 2, 40
# Program -> what the CPU computes without it.
PARTS = {
    **dict.fromkeys(("attn_fwd", "attn_scores", "attn_values", "wo_fwd"), "attention forward and backward"),
    "ffn_fwd": "mlp forward",
    **dict.fromkeys(("ffn_bwd_w2", "ffn_bwd_w13"), "mlp backward"),
    **dict.fromkeys(
        ("wo_bwd", "sdpa_bwd1", "sdpa_bwd2", "qkv_bwd", "sdpa_bwd1_given", "sdpa_bwd2_given"), "attention backward"
    ),
}


def refusing(config: ModelConfig, fault: str, after: int, count: int = 1, **options: Any) -> Model:
    """Return a model on an engine that refuses some of its next programs."""
    model = sim_model(config, **options)
    simulator_of(model).inject(fault, after=after, count=count)
    return model


def forward(model: Model, tokens: np.ndarray, targets: np.ndarray, *expected: str, training: bool = True) -> float:
    """Go forward, with a warning of each of these programs and no other."""
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        loss = model.forward(tokens, targets, training=training)
    assert all(issubclass(w.category, FallbackWarning) for w in found), found
    assert [str(w.message).split("refused program ")[1].split()[0] for w in found] == list(expected)
    return float(loss)


def programs(softmax: str) -> list[str]:
    """Return the programs of a training step in the order in which they are compiled."""
    order = list(PARTS)
    known = ["attn_fwd", "ffn_fwd", "ffn_bwd_w2", "ffn_bwd_w13", "wo_bwd", "sdpa_bwd1", "sdpa_bwd2", "qkv_bwd"]
    known += ["attn_scores", "attn_values", "wo_fwd", "sdpa_bwd1_given", "sdpa_bwd2_given"]
    assert sorted(known) == sorted(order)
    return [n for n in known if n in FORWARD[softmax]] + [n for n in known if n in BACKWARD[softmax]]


EACH = [(softmax, number, name) for softmax in ("ane", "cpu") for number, name in enumerate(programs(softmax))]


@pytest.mark.parametrize(("softmax", "number", "program"), EACH)
@pytest.mark.parametrize("name", CONFIGS)
def test_each_program_refused_alone(name: str, softmax: str, number: int, program: str) -> None:
    """Loss and gradients stay within the bounds that hold with every program there."""
    config = CONFIGS[name]
    tokens, targets = batch(config, B, T)
    cpu = cpu_model(config)
    loss = cpu.forward(tokens, targets)
    cpu.backward()
    expected = gradients(cpu)
    model = refusing(config, "compile-fails" if number % 2 else "load-fails", number, softmax=softmax)
    assert forward(model, tokens, targets, program) == pytest.approx(loss, abs=2e-3)
    model.backward()
    for tensor, gradient in model.grads.items():
        assert cosine(expected[tensor], gradient) > 0.9999, tensor
    assert model.ane is not None
    (refusal,) = model.ane.refusals
    assert (refusal.program, refusal.part) == (program, PARTS[program])
    stats = model.ane.stats()
    assert stats.n_refusals == 1
    gone = {PARTS[program]} | ({"attention backward"} if "and" in PARTS[program] else set())
    assert stats.programs == sum(PARTS[other] not in gone for other in programs(softmax))
    share = stats.flops_share
    assert share is not None
    assert 0.2 < share < 0.9
    # A second step compiles nothing, warns of nothing, and computes the same.
    compiles = model.ane.device.counters()["compiles"]
    again = forward(model, tokens, targets)
    assert model.ane.device.counters()["compiles"] == compiles
    assert again == pytest.approx(loss, abs=2e-3)


@pytest.mark.parametrize("softmax", ["ane", "cpu"])
@pytest.mark.parametrize("name", CONFIGS)
def test_a_model_without_programs_is_the_cpus(name: str, softmax: str) -> None:
    """Bit for bit; each part is tried once."""
    config = CONFIGS[name]
    tokens, targets = batch(config, B, T)
    cpu, model = cpu_model(config), refusing(config, "compile-fails", 0, -1, softmax=softmax)
    first = ("attn_fwd", "ffn_fwd") if softmax == "ane" else ("ffn_fwd", "attn_scores")
    optimizers = [AdamW(each, 1e-2) for each in (cpu, model)]
    for step in range(3):
        expected = cpu.forward(tokens, targets)
        assert forward(model, tokens, targets, *(() if step else (*first, "ffn_bwd_w2"))) == expected
        for each, optimizer in zip((cpu, model), optimizers, strict=True):
            each.backward(accumulate=False)
            optimizer.step()
    assert all(np.array_equal(array, model.params[tensor]) for tensor, array in cpu.params.items())
    assert model.ane is not None
    stats = model.ane.stats()
    assert (stats.programs, stats.evaluations, stats.surface_bytes, stats.flops_share) == (0, 0, 0, 0.0)
    assert model.ane.device.counters()["compiles"] == 3
    assert stats.max_activation > 0
    assert np.array_equal(model.forward(tokens), cpu.forward(tokens))


def test_operations_are_counted_where_they_run() -> None:
    """Whatever is refused, those of the matrix products sum to the same, but for what the engine does besides."""
    tokens, targets = batch(MHA, 1, 32)
    N, d, h, q, pairs = 32, MHA.dim, MHA.hidden_dim, 64, 32 * 33 / 2
    attention, mlp, scores = 2 * N * d * 4 * q, 2 * N * d * 3 * h, 2 * pairs * q
    head = 2 * N * d * MHA.vocab_size
    cpu_flops = {
        "attn_fwd": 3 * attention + (2 + 5) * scores + mlp,
        "ffn_fwd": mlp + attention + mlp,
        "ffn_bwd_w2": 2 * mlp + attention,
        "wo_bwd": 2 * attention + (2 + 5) * scores + mlp,  # the forward's scores once more
    }
    for number, program in enumerate(programs("ane")):
        if program not in cpu_flops:
            continue
        model = refusing(MHA, "compile-fails", number, numerics="fast")
        forward(model, tokens, targets, program)
        model.backward()
        assert model.ane is not None
        stats = model.ane.stats()
        assert stats.cpu_flops == pytest.approx(3 * head + MHA.n_layers * cpu_flops[program], rel=1e-12), program
    model = refusing(MHA, "compile-fails", 0, -1, numerics="fast")
    forward(model, tokens, targets, "attn_fwd", "ffn_fwd", "ffn_bwd_w2")
    model.backward()
    assert model.ane is not None
    everything = 3 * head + MHA.n_layers * (3 * attention + 3 * mlp + 7 * scores)
    assert model.ane.stats().cpu_flops == pytest.approx(everything, rel=1e-12)


@pytest.mark.parametrize("after", [None, 0, 1, 2, 4])
@pytest.mark.parametrize("policy", ["boundary", "none"])
def test_layers_that_are_computed_again(policy: str, after: int | None) -> None:
    """The same bytes, whatever is refused; the second forward of a layer counts as more operations of the same pass."""
    tokens, targets = batch(GQA, B, T)
    models = [sim_model(GQA, numerics="fast") for _ in range(2)]
    for model in models:
        if after is not None:
            simulator_of(model).inject("compile-fails", after=after, count=1)
        model.set_activation_checkpoint("all" if model is models[0] else policy)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FallbackWarning)
            model.forward(tokens, targets)
        model.backward()
    assert all(np.array_equal(gradient, models[1].grads[name]) for name, gradient in models[0].grads.items())
    kept, again = (model.ane.stats() for model in models if model.ane is not None)
    assert [kept.max_activation, kept.max_activation_layer] == [again.max_activation, again.max_activation_layer]
    assert again.ane_flops + again.cpu_flops > kept.ane_flops + kept.cpu_flops
    assert (again.total_ane_flops, again.total_cpu_flops) == (again.ane_flops, again.cpu_flops)


def test_inference_only() -> None:
    tokens, targets = batch(GQA, B, T)
    expected = cpu_model(GQA).forward(tokens, targets, training=False)
    model = refusing(GQA, "compile-fails", 0)
    assert forward(model, tokens, targets, "attn_fwd", training=False) == pytest.approx(expected, abs=2e-3)
    assert model.ane is not None
    assert model.ane.stats().programs == 1  # the backward of attention will not be asked for either
    assert forward(model, tokens, targets) == pytest.approx(expected, abs=2e-3)
    assert model.ane.stats().programs == 3
    model.backward()
    with pytest.raises(InvalidError, match="no training forward"):
        model.backward()


def test_shapes_beyond_a_refused_one_are_not_tried() -> None:
    model = refusing(MHA, "compile-fails", 1, numerics="fast")  # ffn_fwd
    assert model.ane is not None
    device = model.ane.device

    def compiled(size: int, length: int, *warned: str) -> int:
        before = device.counters()["compiles"]
        forward(model, *batch(MHA, size, length), *warned, training=False)
        return int(device.counters()["compiles"] - before)

    assert compiled(2, 40, "ffn_fwd") == 2
    assert compiled(3, 70) == 1  # larger: attn_fwd alone
    assert compiled(2, 64) == 0
    simulator_of(model).inject("compile-fails", after=1, count=1)
    assert compiled(2, 20) == 2  # shorter: tried, refused, and warned of before
    assert model.ane.stats().n_refusals == 2
    assert [(r.program, r.batch_size, r.seq_len) for r in model.ane.refusals] == [
        ("ffn_fwd", 2, 40),
        ("ffn_fwd", 2, 20),
    ]
    assert compiled(1, 8) == 0  # in the programs for two
    assert compiled(4, 10) == 1


def test_no_end_of_refusals() -> None:
    """After 32 of them nothing is tried any more."""
    model = refusing(MHA.replace(max_seq_len=640), "compile-fails", 0, -1, numerics="fast")
    assert model.ane is not None
    with pytest.warns(FallbackWarning):
        for length in range(640, 32, -32):
            model.forward(*batch(MHA, 1, length), training=False)
    assert model.ane.stats().n_refusals == len(model.ane.refusals) == 32
    assert model.ane.device.counters()["compiles"] == 32
    assert len({(r.program, r.seq_len) for r in model.ane.refusals}) == 32
    assert model.ane.stats().flops_share == 0.0


def test_an_evaluation_that_fails_is_an_error_as_ever() -> None:
    model = refusing(MHA, "compile-fails", 1, numerics="fast")
    simulator_of(model).inject("eval-fails", after=0, count=1)
    with (
        pytest.raises(EvalError, match="program attn_fwd, layer 0: evaluation failed"),
        pytest.warns(FallbackWarning, match="program ffn_fwd"),
    ):
        model.forward(*batch(MHA, B, T))
    assert forward(model, *batch(MHA, B, T)) > 0


def test_infinite_values_behind_a_refused_backward() -> None:
    """q, k and v go to the CPU: an infinity among them is not passed on."""
    model = refusing(MHA, "compile-fails", 5, numerics="fast", softmax="cpu")  # wo_bwd or later: attention's backward
    tokens, targets = batch(MHA, B, T)
    with pytest.warns(FallbackWarning):
        model.forward(tokens, targets)
    simulator_of(model).inject("eval-inf", after=0, count=1)
    with pytest.raises(Exception, match="program attn_scores, layer 0: output .* infinite"):
        model.forward(tokens, targets)


def test_refused_backward_with_jobs_aside_or_not() -> None:
    """The same bytes: what the CPU computes and what runs on the second thread do not meet."""
    found = []
    for async_dw in (0, 1):
        for after in (2, 4):
            model, device = cpu_model(GQA), Simulator("m4", numerics="fast")
            attach(model, device, async_dw=async_dw, fallback=1)
            device.inject("compile-fails", after=after, count=1)
            model.forward(*batch(GQA, B, T))
            model.backward()
            found.append(b"".join(g.tobytes() for g in model.grads.values()))
    assert found[0] == found[2]
    assert found[1] == found[3]
    assert found[0] != found[1]


def test_the_trace_says_what_the_cpu_does_instead() -> None:
    model = refusing(MHA, "compile-fails", 4, numerics="fast")  # wo_bwd
    check(lib.anellm_trace_enable(4096))
    try:
        forward(model, *batch(MHA, 1, 8), "wo_bwd")
        model.backward()
        events = take_trace()
    finally:
        check(lib.anellm_trace_enable(0))
    caller = [(name, layer) for name, row, layer, *_ in events if row == lib.ANELLM_TRACE_CALLER]
    assert {("attention", 0), ("attention", 1), ("attention_backward", 1), ("attention_backward", 0)} <= set(caller)
    device = [name for name, row, *_ in events if row == lib.ANELLM_TRACE_DEVICE and name != "compile"]
    assert device == [*FORWARD["ane"] * 2, *["ffn_bwd_w2", "ffn_bwd_w13"] * 2]


def test_the_c_entries() -> None:
    model, device = cpu_model(MHA), Simulator("m4", numerics="fast")
    found = ffi.new("anellm_ane_refusal *")
    with pytest.raises(InvalidError, match="not attached"):
        check(lib.anellm_model_ane_refusal(model._pointer, 0, found))
    attach(model, device)  # without
    device.inject("compile-fails", count=1)
    with pytest.raises(CompileError, match="program attn_fwd"):
        model.forward(*batch(MHA, B, T))
    with pytest.raises(InvalidError, match="options: fallback = 2, must be 0 or 1"):
        attach(model, device, fallback=2)
    check(lib.anellm_model_attach_ane(model._pointer, device.pointer, ffi.NULL))  # the default
    device.inject("compile-fails", count=1)
    model.forward(*batch(MHA, B, T))
    check(lib.anellm_model_ane_refusal(model._pointer, 0, found))
    assert ffi.string(found.program) == b"attn_fwd"
    assert (found.B, found.T, found.error.code) == (B, T, 1)
    for index in (-1, 1):
        with pytest.raises(TokenRangeError, match=f"index = {index}, there are 1 refusals"):
            check(lib.anellm_model_ane_refusal(model._pointer, index, found))
    with pytest.raises(InvalidError, match="refusal is NULL"):
        check(lib.anellm_model_ane_refusal(model._pointer, 0, ffi.NULL))
