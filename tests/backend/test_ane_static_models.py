"""Models whose layers have programs with their weights in them: numbers, what is compiled when, how often it may."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from anemodels import (
    CONFIGS,
    GQA,
    MHA,
    batch,
    cosine,
    cpu_model,
    sim_model,
    simulator,
    take_trace,
)

from anellm import errors, evaluate, train
from anellm._ffi import check, ffi, lib
from anellm.ane import AneStats
from anellm.device import AneOptions
from anellm.model import Model, memory
from anellm.optim import AdamW
from anellm.sim_device import Simulator

B, T = 2, 40
FORWARD = ["attn_fwd_static", "ffn_fwd_static"]
BACKWARD = ["ffn_bwd_static", "sdpa_bwd1_static", "sdpa_bwd2", "qkv_bwd_static"]
COMPILED = ["attn_fwd_static", "sdpa_bwd1_static", "sdpa_bwd2", "qkv_bwd_static", "ffn_fwd_static", "ffn_bwd_static"]
PER_LAYER, WITH_WEIGHTS = 6, 5
CHIPS = Path(__file__).parents[2] / "python" / "anellm" / "data" / "chips"


def static(config: Any, **options: Any) -> Model:
    return sim_model(config, **{"mode": "static", "numerics": "fast"} | options)


def stats(model: Model) -> AneStats:
    assert model.ane is not None
    return model.ane.stats()


def step(model: Model, tokens: np.ndarray, targets: np.ndarray) -> float:
    loss = float(model.forward(tokens, targets))
    model.backward()
    return loss


def assert_near(found: Model, expected: Model, least: float = 0.9995) -> None:
    for name, gradient in expected.grads.items():
        assert cosine(gradient, found.grads[name]) > least, name


@pytest.fixture
def endless(tmp_path: Path) -> str:
    """Return a chip like M4 that compiles as often as it is asked."""
    chip = json.loads((CHIPS / "m4.json").read_text())
    chip["constants"]["max_compiles"] = {"value": 0, "source": "here"}
    (tmp_path / "endless.json").write_text(json.dumps(chip))
    return str(tmp_path / "endless.json")


# ---- numbers -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("upstream", [1e-1, 1e-4, 1e-8])
@pytest.mark.parametrize("name", CONFIGS)
def test_loss_and_gradients_match_at_every_size(name: str, upstream: float) -> None:
    config = CONFIGS[name]
    tokens, targets = batch(config, B, T)
    cpu, model = cpu_model(config), static(config, numerics="exact")
    losses = [each.forward(tokens, targets) for each in (cpu, model)]
    assert losses[1] == pytest.approx(losses[0], abs=5e-4)
    for each in (cpu, model):
        each.backward(upstream * B * T)
    for tensor, gradient in cpu.grads.items():
        assert cosine(gradient, model.grads[tensor]) > 0.9995, tensor
        worst = np.abs(model.grads[tensor] - gradient).max() / np.abs(gradient).max()
        assert worst < 0.02, (tensor, worst)
    np.testing.assert_allclose(
        model.forward(tokens), expected := cpu.forward(tokens), atol=1e-2 * np.abs(expected).max()
    )


@pytest.mark.parametrize("chip", ["m1", "m3ultra", "m6"])
def test_other_chips_and_padding(chip: str) -> None:
    tokens, targets = batch(GQA, 1, 33)
    cpu, model = cpu_model(GQA), static(GQA, chip=chip, numerics="exact")
    for each in (cpu, model):
        step(each, tokens, targets)
    assert_near(model, cpu, 0.99 if chip == "m1" else 0.9995)


def test_thirty_steps_lose_as_on_the_cpu(endless: str) -> None:
    cpu, model = cpu_model(MHA), static(MHA, chip=endless)
    losses: list[list[float]] = []
    for each in (cpu, model):
        optimizer = AdamW(each, 3e-3)
        losses.append([])
        for number in range(30):
            loss = 0.0
            for micro, size in enumerate((3, 2)):  # the second runs in the programs of the first
                tokens, targets = batch(MHA, size, 33, seed=2 * (number % 3) + micro)
                loss += float(each.forward(tokens, targets)) / 2
                each.backward(0.5, accumulate=micro > 0)
            optimizer.step()
            losses[-1].append(loss)
    assert losses[0][-1] < 0.6 * losses[0][0]
    np.testing.assert_allclose(losses[1], losses[0], rtol=0.01)
    assert stats(model).compiles == MHA.n_layers * (PER_LAYER + 29 * WITH_WEIGHTS)
    assert stats(model).retries == 0


def test_a_run_goes_on_exactly_on_another_device() -> None:
    """As after a restart: with the exponents carried over, nothing else of the engine is needed."""
    ends = []
    for restarts in (False, True):
        model = static(GQA, chip="m4", compile_budget=0 if restarts else 119)
        optimizer = AdamW(model, 3e-3)
        losses = []
        for number in range(5):
            losses.append(step(model, *batch(GQA, B, T, seed=number)))
            optimizer.step()
            if restarts:
                assert model.ane is not None
                exponents = model.ane.exponents()
                model.to("ane-sim", model.ane.device.options)
                assert stats(model).compiles == 0
                model.ane.set_exponents(exponents)
        ends.append((losses, {name: array.tobytes() for name, array in model.params.items()}))
    assert ends[0] == ends[1]


def test_a_smaller_batch_in_a_larger_ones_programs() -> None:
    """Behind it nothing is left of the larger one: the gradients are the CPU's."""
    cpu, model = cpu_model(GQA), static(GQA)
    step(model, *batch(GQA, 4, 64, seed=1))
    compiles = stats(model).compiles
    tokens, targets = batch(GQA, 2, 40, seed=2)
    for each in (cpu, model):
        step(each, tokens, targets)
    assert_near(model, cpu)
    assert stats(model).compiles == compiles
    step(model, *batch(GQA, 5, 64))  # larger: other programs, the old ones go
    assert (stats(model).compiles, stats(model).programs) == (2 * compiles, PER_LAYER * GQA.n_layers)


# ---- what is compiled when -----------------------------------------------------------------------------------------


def test_programs_of_a_step() -> None:
    tokens, targets = batch(GQA, B, T)
    model = static(GQA)
    model.forward(tokens, targets, training=False)
    assert stats(model).programs == stats(model).compiles == 2 * GQA.n_layers
    check(lib.anellm_trace_enable(4096))
    try:
        step(model, tokens, targets)
        events = [(name, layer) for name, row, layer, _, _ in take_trace() if row == lib.ANELLM_TRACE_DEVICE]
    finally:
        check(lib.anellm_trace_enable(0))
    layers = range(GQA.n_layers)
    assert [e for e in events if e[0] != "compile"] == [
        *((name, layer) for layer in layers for name in FORWARD),
        *((name, layer) for layer in reversed(layers) for name in BACKWARD),
    ]
    # those of backward with the forward of their layer: what is refused is known before anything is computed
    assert [e for e in events if e[0] == "compile"] == [("compile", layer) for layer in layers for _ in range(4)]
    found = stats(model)
    assert (found.programs, found.compiles) == (PER_LAYER * GQA.n_layers, PER_LAYER * GQA.n_layers)
    assert found.compile_ms > 0
    assert found.evaluations == (2 + PER_LAYER) * GQA.n_layers


def test_new_weights_are_compiled_and_nothing_else_is() -> None:
    tokens, targets = batch(GQA, B, T)
    cpu, model = cpu_model(GQA), static(GQA)
    first = step(model, tokens, targets)
    assert step(model, tokens, targets) == first  # a micro-step of the same update
    assert stats(model).compiles == PER_LAYER * GQA.n_layers
    for each in (cpu, model):
        each.params["model.layers.1.mlp.gate_proj.weight"][...] *= -3
    # Programs have the weights that they were compiled with: without notice nothing changes.
    assert step(model, tokens, targets) == first
    model.weights_changed()
    expected = step(cpu, tokens, targets)
    assert abs(expected - first) > 0.01
    assert step(model, tokens, targets) == pytest.approx(expected, abs=5e-4)
    assert_near(model, cpu)
    assert stats(model).compiles == (PER_LAYER + WITH_WEIGHTS) * GQA.n_layers
    assert stats(model).programs == PER_LAYER * GQA.n_layers
    assert simulator(model).counters()["loaded"] == PER_LAYER * GQA.n_layers


def test_memory_is_what_is_said() -> None:
    for training in (False, True):
        model = static(GQA)
        model.forward(*batch(GQA, B, T), training=training)
        dim, hidden = GQA.dim, GQA.hidden_dim
        weights = dim * (2 * GQA.q_dim + 2 * GQA.kv_dim) + 3 * dim * hidden
        weights *= 2 * GQA.n_layers * (2 if training else 1)  # fp16; once for each direction
        options = [AneOptions(mode="static"), None]
        more, none = (memory(GQA, B, T, training=training, ane=each).workspace_bytes for each in options)
        buffers = 4 * B * T * (4 * dim + hidden + GQA.q_dim + 2 * GQA.kv_dim) if training else 0
        assert more - none == stats(model).surface_bytes + weights + buffers


def test_an_overflow_costs_one_more_compile() -> None:
    """W2 is baked times a power of two, so that y overflows where y itself would not."""
    tokens, targets = batch(MHA, B, T)
    cpu, model = cpu_model(MHA), static(MHA)
    for each in (cpu, model):
        for name in ("gate", "up"):
            each.params[f"model.layers.1.mlp.{name}_proj.weight"][...] *= 100
        each.params["model.layers.1.mlp.down_proj.weight"][...] *= 1e-3
        each.weights_changed()
    expected = step(cpu, tokens, targets)
    assert step(model, tokens, targets) == pytest.approx(expected, abs=5e-3)
    assert_near(model, cpu, 0.999)
    assert stats(model).retries >= 1
    assert stats(model).compiles == PER_LAYER * MHA.n_layers + 1
    step(model, tokens, targets)
    assert stats(model).compiles == PER_LAYER * MHA.n_layers + 1


@pytest.mark.parametrize("number", range(4), ids=BACKWARD)
def test_an_infinite_gradient_is_computed_again(number: int) -> None:
    """From what went in the first time: backward's outputs go where its inputs came from."""
    tokens, targets = batch(GQA, B, T)
    cpu, model = cpu_model(GQA), static(GQA)
    for each in (cpu, model):
        each.forward(tokens, targets)
    simulator(model).inject("eval-inf", after=number, count=1)
    for each in (cpu, model):
        each.backward()
    assert stats(model).retries == 1
    assert_near(model, cpu)
    assert stats(model).compiles == PER_LAYER * GQA.n_layers


@pytest.mark.parametrize("name", ["self_attn.q_proj", "self_attn.o_proj", "mlp.up_proj"])
def test_weights_beyond_fp16(name: str) -> None:
    model = static(GQA)
    model.params[f"model.layers.2.{name}.weight"][3, 4] = 1e6
    model.weights_changed()
    where = {"q": "attn_fwd_static, layer 2: max |wqkv|", "o": "attn_fwd_static, layer 2: max |wo|"}
    text = where.get(name.split(".")[1][0], "ffn_fwd_static, layer 2: max |w3|")
    with pytest.raises(errors.NonFiniteError, match=text.replace("|", "[|]") + " is 1e"):
        model.forward(*batch(GQA, 1, 32))


# ---- layers that are held ------------------------------------------------------------------------------------------


def test_hold_frees_the_others_and_lets_none_be_compiled() -> None:
    tokens, targets = batch(GQA, B, T)
    cpu, model = cpu_model(GQA), static(GQA)
    assert model.ane is not None
    loss = model.forward(tokens, targets)
    loaded = simulator(model).counters()["loaded"]
    model.ane.hold(1, 3)
    assert (stats(model).programs, simulator(model).counters()["loaded"]) == (2 * PER_LAYER, loaded - PER_LAYER)
    cpu.forward(tokens, targets)
    with pytest.raises(errors.InvalidError, match="ffn_bwd_static of layer 0 is needed; layers 1 up to 3 are held"):
        model.backward()
    with pytest.raises(errors.InvalidError, match="attn_fwd_static of layer 0 is needed; layers 1 up to 3 are held"):
        model.forward(tokens, targets)
    model.ane.hold(0, 0)
    assert (stats(model).programs, simulator(model).counters()["loaded"]) == (0, 0)
    model.ane.hold(0, 3)
    assert model.forward(tokens, targets) == loss
    model.backward()
    cpu.backward()
    assert_near(model, cpu)


def test_what_forward_left_stays_for_backward() -> None:
    """Programs go, surfaces do not: backward compiles its own again, and is what it was."""
    tokens, targets = batch(GQA, B, T)
    plain, model = static(GQA), static(GQA)
    step(plain, tokens, targets)
    model.forward(tokens, targets)
    assert model.ane is not None
    model.ane.hold(0, 0)
    model.ane.hold(0, GQA.n_layers)
    model.backward()
    assert all(np.array_equal(gradient, model.grads[name]) for name, gradient in plain.grads.items())
    assert stats(model).compiles == (PER_LAYER + 4) * GQA.n_layers


@pytest.mark.parametrize(("first", "last"), [(-1, 2), (2, 1), (0, 4), (4, 4), (2**40, 2**41)])
def test_layers_that_are_not_there(first: int, last: int) -> None:
    model = static(GQA)
    assert model.ane is not None
    with pytest.raises(errors.TokenRangeError, match=f"layers {first} up to {last}; there are 3"):
        model.ane.hold(first, last)


def test_hold_is_nothing_to_dynamic_programs_and_an_error_without_an_engine() -> None:
    tokens, targets = batch(GQA, B, T)
    model = sim_model(GQA, numerics="fast")
    loss = step(model, tokens, targets)
    assert model.ane is not None
    model.ane.hold(0, 0)
    assert stats(model).programs == 8
    assert step(model, tokens, targets) == loss
    with pytest.raises(errors.InvalidError, match="not attached"):
        check(lib.anellm_model_ane_hold(cpu_model(GQA)._pointer, 0, 1))


# ---- how often it may be compiled ----------------------------------------------------------------------------------


def test_a_budget_is_kept() -> None:
    tokens, targets = batch(GQA, B, T)
    model = static(GQA, compile_budget=PER_LAYER * GQA.n_layers)
    loss = step(model, tokens, targets)
    model.weights_changed()
    budget = "program attn_fwd_static: the compile budget of 18 is spent: 18 programs have been compiled"
    for _ in range(2):
        with pytest.raises(errors.UnsupportedError, match=budget):
            model.forward(tokens, targets)
    assert simulator(model).counters()["compiles"] == 18
    # Another device, as another process has one, goes on.
    model.to("ane-sim", AneOptions(mode="static", compile_budget=18, numerics="fast"))
    assert model.forward(tokens, targets) == loss
    dynamic = sim_model(GQA, compile_budget=7)
    with pytest.raises(errors.UnsupportedError, match="compile budget of 7 is spent"):
        step(dynamic, tokens, targets)


def test_the_devices_own_limit_is_no_refusal() -> None:
    """Behind 119 compiles nothing is said about a program: the CPU does not take over."""
    tokens, targets = batch(GQA, 1, 32)
    model = static(GQA)
    for _ in range(7):
        step(model, tokens, targets)
        model.weights_changed()
    assert stats(model).compiles == 6 * 15 + 18
    with warnings.catch_warnings(), pytest.raises(errors.CompileError, match="compile number 120 of this process"):
        warnings.simplefilter("error")
        step(model, tokens, targets)
    assert stats(model).n_refusals == 0


@pytest.mark.parametrize("number", range(PER_LAYER), ids=COMPILED)
@pytest.mark.parametrize("layer", [0, 1])
def test_a_refused_program_is_the_cpus(number: int, layer: int) -> None:
    """Of that layer and those above; in the next step of all."""
    tokens, targets = batch(GQA, B, T)
    cpu, model = cpu_model(GQA), static(GQA)
    expected = step(cpu, tokens, targets)
    simulator(model).inject("compile-fails" if number % 2 else "load-fails", after=layer * PER_LAYER + number, count=1)
    with pytest.warns(errors.FallbackWarning, match=f"refused program {COMPILED[number]} "):
        assert step(model, tokens, targets) == pytest.approx(expected, abs=2e-3)
    assert_near(model, cpu, 0.9999)
    share = stats(model).flops_share
    assert share is not None
    assert 0.2 < share < 0.9
    assert stats(model).n_refusals == 1
    model.weights_changed()
    assert step(model, tokens, targets) == pytest.approx(expected, abs=2e-3)
    assert_near(model, cpu, 0.9999)
    assert stats(model).n_refusals == 1
    assert stats(model).flops_share <= share
    assert stats(model).programs < PER_LAYER * GQA.n_layers


def test_a_model_without_programs_is_the_cpus() -> None:
    tokens, targets = batch(MHA, B, T)
    cpu, model = cpu_model(MHA), static(MHA)
    simulator(model).inject("compile-fails", count=-1)
    with pytest.warns(errors.FallbackWarning):
        assert step(model, tokens, targets) == step(cpu, tokens, targets)
    assert all(np.array_equal(gradient, model.grads[name]) for name, gradient in cpu.grads.items())
    assert (stats(model).programs, stats(model).evaluations, stats(model).compiles) == (0, 0, 3)


def test_errors_where_the_cpu_may_not_take_over() -> None:
    model = static(GQA, fallback="error")
    simulator(model).inject("compile-fails", after=8, count=1)
    with pytest.raises(errors.CompileError, match="program sdpa_bwd2 for B = 2, T = 40: "):
        model.forward(*batch(GQA, B, T))
    assert step(model, *batch(GQA, B, T)) > 0


# ---- options -------------------------------------------------------------------------------------------------------


def options(**values: int) -> Callable[[Model, Simulator], None]:
    def attach_with(model: Model, device: Simulator) -> None:
        c = ffi.new("anellm_ane_options *")
        c.scaling, c.async_dw = 1, 1
        for name, value in values.items():
            setattr(c, name, value)
        check(lib.anellm_model_attach_ane(model._pointer, device.pointer, c))

    return attach_with


@pytest.mark.parametrize(
    ("values", "error", "message"),
    [
        ({"mode": 2}, errors.InvalidError, "mode = 2, must be 0 or 1"),
        ({"mode": -1}, errors.InvalidError, "mode = -1, must be 0 or 1"),
        ({"mode": 1, "softmax_cpu": 1}, errors.UnsupportedError, "softmax_cpu = 1 has no programs with mode = 1"),
        ({"compile_budget": -1}, errors.InvalidError, "compile_budget = -1, must not be negative"),
    ],
)
def test_options_are_checked(values: dict[str, int], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        options(**values)(cpu_model(GQA), Simulator("m4"))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"mode": "both"}, "mode: expected one of dynamic, static, found 'both'"),
        ({"mode": "static", "softmax": "cpu"}, 'softmax: expected "ane" with mode "static", found "cpu"'),
        ({"compile_budget": -1}, "compile_budget: expected a number from 0 on, found -1"),
        ({"compile_budget": True}, "compile_budget: expected a number from 0 on, found True"),
        ({"compile_budget": 2**31}, "compile_budget: expected a number"),
    ],
)
def test_python_options_are_checked(values: dict[str, Any], message: str) -> None:
    with pytest.raises(errors.InvalidError, match=message):
        AneOptions(**values)


# ---- the verbs -----------------------------------------------------------------------------------------------------


def test_evaluate_compiles_once(tmp_path: Path, data_dir: Path) -> None:
    """Stories260K: five layers, two programs each; the loss is the CPU's."""
    model = data_dir / "weights" / "stories260K"
    np.random.default_rng(0).integers(0, 512, 9 * 128 + 9, np.uint16).tofile(tmp_path / "d.bin")
    argv = ["--model", str(model / "stories260K.bin"), "--data", str(tmp_path / "d.bin"), "--seq-len", "128"]
    found = []
    for name, device in (("cpu", ["cpu"]), ("dynamic", ["ane-sim"]), ("static", ["ane-sim", "--ane-mode", "static"])):
        path = tmp_path / f"{name}.json"
        assert evaluate.main([*argv, "--batch-size", "4", "--device", *device, "--json", str(path)]) == 0
        found.append(json.loads(path.read_text()))
    assert found[2]["ane_mode"] == "static"
    assert found[2]["loss"] == pytest.approx(found[0]["loss"], abs=2e-3)
    assert found[2]["loss"] == pytest.approx(found[1]["loss"], abs=1e-3)
    assert found[2]["windows"] == 9
    assert found[2]["fallbacks"] == []


def test_train(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    small = ["--preset", "stories260k", "--batch-size", "2", "--seq-len", "16", "--eval-windows", "4", "--steps", "3"]
    small += ["--sample-tokens", "5", "--quiet"]
    losses = []
    for mode in ("dynamic", "static"):
        assert train.main([*small, "--device", "ane-sim", "--ane-mode", mode, "--out", mode]) == 0
        records = [json.loads(line) for line in Path(mode, "metrics.jsonl").read_text().splitlines()]
        assert next(r["ane_mode"] for r in records if r["kind"] == "device") == mode
        assert json.loads(Path(mode, "manifest.json").read_text())["ane_mode"] == mode
        losses.append([r["loss"] for r in records if r["kind"] == "step"])
    assert losses[1] == pytest.approx(losses[0], abs=2e-3)
