"""Memory, operations and time of a planned step: anellm.pipeline_forecast."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from anellm import sim_cost
from anellm.activation_checkpoint import saved_layers
from anellm.ane import memory_bytes
from anellm.config import ModelConfig
from anellm.device import AneOptions
from anellm.errors import ConfigError
from anellm.mil import ane_programs
from anellm.model import Model, _c_config, memory
from anellm.pipeline import CompileBudget, plan
from anellm.pipeline_forecast import (
    Workload,
    compile_ms,
    flops_forecast,
    gradient_buffer_bytes,
    layer_bytes,
    memory_forecast,
    program_bytes,
    restarts_in_a_step,
    surface_bytes,
    time_forecast,
)
from anellm.sim_chips import load_chip
from anellm.stages import Stages

TINY = ModelConfig.from_preset("tiny")
GQA = ModelConfig(
    dim=96, hidden_dim=200, n_layers=3, n_heads=6, n_kv_heads=2, vocab_size=999, max_seq_len=96, qk_norm=True
)
GPT2 = ModelConfig(
    arch="gpt2", dim=48, hidden_dim=110, n_layers=3, n_heads=4, vocab_size=97, padded_vocab_size=128, max_seq_len=96,
    bias=True,
)  # fmt: skip
OWN = ("weights", "gradients", "AdamW moments", "activations kept for backward", "inputs of layers kept for backward",
       "activations of the segment at work", "boundary activations", "classifier", "workspace")  # fmt: skip


def load(
    config: ModelConfig = TINY,
    policy: str = "all",
    budget: int = 119,
    accumulation: int = 3,
    shape: tuple[int, int] = (2, 64),
) -> Workload:
    found = plan(config, CompileBudget(budget))
    saved = saved_layers(config.n_layers, policy, found.boundaries)
    return Workload(config, found, saved, *shape, accumulation)


# ---- memory ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("config", [TINY, GQA, GPT2, ModelConfig.from_preset("stories15m")])
@pytest.mark.parametrize("shape", [(1, 1), (3, 33), (64, 96)])
@pytest.mark.parametrize("policy", ["all", "boundary", "sqrt", "every:2", "every:9", "none"])
def test_with_one_group_it_is_the_memory_of_the_model(config: ModelConfig, shape: tuple[int, int], policy: str) -> None:
    """(64, 96) with 32,000 ids: logits are not all kept."""
    rows = memory_forecast(load(config, policy, shape=shape))
    own = memory(config, *shape, training=True, activation_checkpoint=policy)
    assert sum(rows[name] for name in OWN) == own.total_bytes
    assert sum(rows[name] for name in OWN[3:8]) == own.activations_bytes
    assert all(value >= 0 for value in rows.values())


def test_two_groups_by_hand() -> None:
    """Layers 0-2 and 3 of tiny, every second input kept: 0, 2 of the first group, 3 of the second."""
    work = load(TINY, "every:2", 22, accumulation=3)
    assert [(group.start, group.end) for group in work.plan.groups] == [(0, 3), (3, 4)]
    assert (work.saved.inputs, work.saved.full) == ((0, 2, 3), (3,))
    rows, stream = memory_forecast(work), 2 * 64 * 128 * 4
    assert rows["activations kept for backward"] == 0
    assert rows["inputs of layers kept for backward"] == 2 * stream  # of the first group, one micro-batch at a time
    assert rows["activations of the segment at work"] == 2 * layer_bytes(TINY, 2, 64)
    assert rows["boundary activations"] == 3 * (1 + 1) * stream  # the stream into layer 3, and a gradient
    assert rows["weights in programs, fp16"] == program_bytes(work) == 3 * (4 * 128 * 128 + 3 * 128 * 344) * 2 * 2


def test_keeping_all_in_two_groups_holds_the_longer_one() -> None:
    rows = memory_forecast(load(TINY, "all", 22, accumulation=3))
    assert rows["activations kept for backward"] == 3 * layer_bytes(TINY, 2, 64)
    assert rows["activations of the segment at work"] == rows["inputs of layers kept for backward"] == 0


def test_policies_of_one_group_from_most_to_least() -> None:
    """Of 22 layers, an input is about a twelfth of the activations."""
    config = TINY.replace(n_layers=22)
    policies = ("all", "every:11", "sqrt", "boundary", "none")
    kept = [sum(memory_forecast(load(config, policy, 1000)).values()) for policy in policies]
    assert kept == sorted(kept, reverse=True)
    assert len(set(kept)) == 5


@given(st.integers(1, 9), st.sampled_from(["all", "boundary", "sqrt", "none", "every:3"]), st.integers(7, 60),
       st.integers(1, 5))  # fmt: skip
@settings(max_examples=40)
def test_kinds_are_never_negative_and_grow_with_the_batch(n_layers: int, policy: str, budget: int, micro: int) -> None:
    config = TINY.replace(n_layers=n_layers)
    small = memory_forecast(load(config, policy, budget, micro, (1, 32)))
    large = memory_forecast(load(config, policy, budget, micro, (2, 64)))
    assert all(0 <= small[name] <= large[name] for name in small)
    more = memory_forecast(load(config, policy, budget, micro + 1, (1, 32)))
    one_group = load(config, policy, budget).plan.restarts_per_step == 1
    assert (more == small) if one_group else all(small[name] <= more[name] for name in small)


@pytest.mark.parametrize("config", [TINY, GQA, GPT2])
def test_buffers_and_surfaces_are_those_of_the_engine(config: ModelConfig) -> None:
    """What a model on ane-sim takes, whose weights lie in surfaces, less the weights."""
    work = load(config)
    total = memory_bytes(_c_config(config), 2, 64, training=True, options=AneOptions())
    used = [p for p in ane_programs(config, 2, 64) if p.used(training=True, softmax="ane")]
    once = {"sdpa_bwd2"}
    surfaces = sum(p.input.bytes * (1 if p.name in once else config.n_layers) + p.output.bytes for p in used)
    assert total == surfaces + gradient_buffer_bytes(config, 128)
    outputs = sum(p.output.bytes for p in used)
    assert outputs < surface_bytes(work) < surfaces
    attention = next(p for p in used if p.name == "sdpa_bwd1")  # has no weights: as it is, for each layer
    others = [p for p in used if p.name != "sdpa_bwd1"]
    inputs = 0
    for program in others:
        rows = [field for field in program.input.fields if field.kind in ("rows", "scores")]
        inputs += max(49152, sum(2 * field.channels * field.columns for field in rows))
    assert surface_bytes(work) == outputs + inputs + config.n_layers * attention.input.bytes


# ---- operations ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("config", [TINY, GQA, GPT2])
def test_operations_are_those_that_a_run_counts(config: ModelConfig) -> None:
    model = Model(config, "ane-sim", seed=1)
    tokens = np.arange(2 * 64, dtype=np.int32).reshape(2, 64) % config.vocab_size
    model.forward(tokens, tokens)
    model.backward()
    assert model.ane is not None
    stats = model.ane.stats()
    rows = flops_forecast(load(config, accumulation=1))
    assert sum(value for name, value in rows.items() if name.startswith("engine")) == pytest.approx(stats.ane_flops)
    assert sum(value for name, value in rows.items() if name.startswith("CPU")) == pytest.approx(stats.cpu_flops)


@pytest.mark.parametrize("policy", ["all", "every:2", "boundary", "none"])
def test_operations_are_those_that_a_run_by_groups_counts(policy: str) -> None:
    """Layers 0-2 and 3, two micro-batches: what a process takes forward once more, and what of that again."""
    work = load(TINY, policy, 22, accumulation=2)
    model = Model(TINY, "ane-sim", seed=1, ane=AneOptions(mode="static"))
    model.enable_training()
    model.set_activation_checkpoint(policy)
    stages = Stages(model, 2, 64, 2, work.plan.boundaries)
    tokens = np.arange(2 * 64, dtype=np.int32).reshape(2, 64)
    for micro in range(2):
        stages.batch(micro, tokens, tokens)
        stages.forward(micro, 0)
    for micro in range(2):
        stages.forward(micro, 1)
        stages.backward(micro, 1, accumulate=micro > 0)
    for micro in range(2):
        stages.backward(micro, 0, accumulate=micro > 0)
    assert model.ane is not None
    stats = model.ane.stats()
    rows = flops_forecast(work)
    assert sum(v for name, v in rows.items() if name.startswith("engine")) == pytest.approx(stats.total_ane_flops)
    assert sum(v for name, v in rows.items() if name.startswith("CPU")) == pytest.approx(stats.total_cpu_flops)


def test_micro_batches_layers_again_and_missing_logits_are_counted() -> None:
    one, three = (flops_forecast(load(TINY, "boundary", accumulation=n)) for n in (1, 3))
    assert all(three[name] == pytest.approx(3 * one[name]) for name in one)
    assert one["engine, forward once more"] == pytest.approx(0.75 * one["engine, forward"])
    config = ModelConfig.from_preset("stories15m")
    all_logits, some = (flops_forecast(load(config, shape=(n, 96)))["CPU, classifier"] / n for n in (1, 64))
    assert some == pytest.approx(4 / 3 * all_logits)


# ---- time ------------------------------------------------------------------------------------------------------------


def test_a_step_takes_its_micro_steps_and_compilations() -> None:
    chip, work = load_chip("m4"), load(TINY, "every:2", accumulation=5)
    rows = time_forecast(work, chip)
    assert sum(rows.values()) > 0
    recipe = sim_cost.Recipe(TINY.vocab_size, 5, constant_weights=True)
    product = sim_cost.machine_of(chip)
    one = sim_cost.step(TINY, work.programs(), 128, product, recipe, sim_cost.fit().gb_s[product.cores])
    again = rows["engine, forward once more"]
    assert again == pytest.approx(0.5 * rows["engine, forward"])
    others = again + rows["compiling and loading"] + rows["restarts"]
    assert sum(rows.values()) - others == pytest.approx(5 * one.ms)
    assert rows["restarts"] == pytest.approx(50 / 4)


def test_compilations_by_hand_and_as_published() -> None:
    """Stories110M: 60 programs with weights, 12 without, at 23, 7.5 and 4 ms; published are 7.6 s."""
    from anellm.plan import PUBLISHED

    found = compile_ms(load(ModelConfig.from_preset("stories110m")), load_chip("m4"))
    assert found == pytest.approx(60 * 23 + 12 * 7.5 + 72 * 4)
    assert f"7.6 s to compile its 72, {7600 / found:.1f} times what m4's constants say" in PUBLISHED


def test_groups_on_the_way_back_are_compiled_once_more() -> None:
    chip = load_chip("m4")
    one, two = compile_ms(load(TINY), chip), compile_ms(load(TINY, budget=22), chip)
    assert two == pytest.approx(one * (3 + 1 + 3) / 4)


@pytest.mark.parametrize(("budget", "average"), [(119, 1 / 4), (54, 1 / 2), (27, 1), (22, 3), (7, 7)])
def test_restarts_on_average_are_those_of_long_runs(budget: int, average: float) -> None:
    found = plan(TINY, CompileBudget(budget))
    assert restarts_in_a_step(found) == average
    assert found.restarts(100_000) / 100_000 == pytest.approx(average, abs=2e-5)


def test_chips_whose_surfaces_are_too_narrow_for_weights_have_a_time() -> None:
    """On M1 a row is 16,384 values at most: weights and activations of such a model do not fit, activations do."""
    wide = TINY.replace(n_layers=1, hidden_dim=8192)
    assert time_forecast(load(wide, shape=(1, 32)), load_chip("m1"))["engine, forward"] > 0


# ---- what does not belong together -----------------------------------------------------------------------------------


def test_parts_that_do_not_belong_together_are_refused() -> None:
    found = plan(TINY, CompileBudget(22))
    saved = saved_layers(4, "none", found.boundaries)
    with pytest.raises(ConfigError, match="n_layers: expected the model's 5, found 4 in groups, 4 saved"):
        Workload(TINY.replace(n_layers=5), found, saved, 1, 32, 1)
    with pytest.raises(ConfigError, match=r"saved layers: expected those of groups from layers \(0, 3\), found \(0,\)"):
        Workload(TINY, found, saved_layers(4, "none"), 1, 32, 1)
    with pytest.raises(ConfigError, match="accumulation: expected a whole number from 1, found 0"):
        Workload(TINY, found, saved, 1, 32, 0)
