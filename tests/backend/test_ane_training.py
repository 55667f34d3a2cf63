"""Training through the simulated Neural Engine: losses, exact continuation, and weight gradients beside evaluations."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
from anemodels import BACKWARD, CONFIGS, GQA, MHA, attach, batch, cpu_model, sim_model, take_trace, threads

from anellm import errors
from anellm._ffi import check, ffi, lib
from anellm.config import ModelConfig
from anellm.model import Model
from anellm.optim import AdamW
from anellm.sim_device import Simulator


def train(model: Model, steps: int, *, first: int = 0, optimizer: AdamW | None = None) -> list[float]:
    """Learn a few batches by heart, each step from two micro-steps, the first of which is larger."""
    optimizer = optimizer or AdamW(model, 3e-3)
    losses = []
    for step in range(first, first + steps):
        loss = 0.0
        for micro, size in enumerate((3, 2)):
            tokens, targets = batch(model.config, size, 33, seed=2 * (step % 3) + micro)
            loss += float(model.forward(tokens, targets)) / 2
            model.backward(1.0 / (1 + step) ** 4, accumulate=micro > 0)  # gradients of many sizes
        optimizer.step(3e-3, grad_scale=float((1 + step) ** 4) / 2)
        losses.append(loss)
    return losses


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("softmax", ["ane", "cpu"])
def test_twenty_steps_lose_as_on_the_cpu(name: str, softmax: str) -> None:
    expected = train(cpu_model(CONFIGS[name]), 20)
    found = train(sim_model(CONFIGS[name], softmax=softmax, numerics="fast"), 20)
    assert expected[-1] < (0.75 if name == "gpt2" else 0.7) * expected[0]  # its six batches take longer to learn
    np.testing.assert_allclose(found, expected, rtol=0.01)


def test_without_scaling_training_falls_behind() -> None:
    """With the same small gradients that the scaled run above learns from."""
    expected = train(cpu_model(MHA), 12)
    found = train(sim_model(MHA, scaling=False, numerics="fast"), 12)
    assert expected[-1] < 0.6 * expected[0]
    assert found[-1] > 1.2 * expected[-1]


@pytest.mark.parametrize("softmax", ["ane", "cpu"])
def test_exponents_make_a_continued_run_exact(softmax: str) -> None:
    whole = sim_model(GQA, softmax=softmax, numerics="fast")
    optimizer = AdamW(whole, 3e-3)
    losses = train(whole, 4, optimizer=optimizer)
    saved = [
        {name: a.copy() for name, a in group.items()} for group in (whole.params, whole.moments_m, whole.moments_v)
    ]
    exponents, count = whole.ane.exponents(), optimizer.state_dict()
    losses += train(whole, 4, first=4, optimizer=optimizer)

    def go_on(exponents: list[int] | None) -> tuple[list[float], bool]:
        model = sim_model(GQA, softmax=softmax, numerics="fast")
        again = AdamW(model, 3e-3)
        for group, kept in zip((model.params, model.moments_m, model.moments_v), saved, strict=True):
            for name, values in kept.items():
                group[name][...] = values
        model.weights_changed()
        again.load_state_dict(count)
        if exponents is not None:
            model.ane.set_exponents(exponents)
        found = train(model, 4, first=4, optimizer=again)
        same = all(np.array_equal(whole.params[name], a) for name, a in model.params.items())
        return found, same and (exponents is None or model.ane.exponents() == whole.ane.exponents())

    assert go_on(exponents) == (losses[4:], True)
    assert go_on(None)[1] is False  # they are part of the state


# ---- what ran when --------------------------------------------------------------------------------------------------

WIDE = ModelConfig(
    dim=256, hidden_dim=1024, n_layers=1, n_heads=4, n_kv_heads=4, head_dim=64, vocab_size=64, max_seq_len=128
)


@pytest.fixture
def trace() -> Iterator[None]:
    """Record spans during the test."""
    check(lib.anellm_trace_enable(4096))
    yield
    check(lib.anellm_trace_enable(0))


def covered(spans: list[tuple[int, int]]) -> int:
    """Return the length of the union of spans."""
    total, end = 0, 0
    for start, stop in sorted(spans):
        total += max(0, stop - max(start, end))
        end = max(end, stop)
    return total


def slow_backward(async_dw: int) -> list[tuple[str, int, int, int, int]]:
    """Return the spans of a backward pass whose evaluations take 30 ms longer than they need."""
    model, device = cpu_model(WIDE), Simulator("m4", numerics="fast")
    attach(model, device, async_dw=async_dw)
    tokens, targets = batch(WIDE, 4, 128)
    with threads(2):
        model.forward(tokens, targets)
        model.backward()  # stages weights and chooses exponents
        model.forward(tokens, targets)
        device.inject("eval-slow", slow_ms=30)
        take_trace()
        model.backward()
    return take_trace()


def test_weight_gradients_run_beside_evaluations(trace: None) -> None:
    """One of some attempts, since a busy machine may run one thread at a time; without async there is never any."""
    for _ in range(8):
        events = slow_backward(async_dw=1)
        rows: dict[int, list[tuple[int, int]]] = {lib.ANELLM_TRACE_JOBS: []}
        for name, row, _, start, end in events:
            if name != "wait":  # for a job: that is not work beside it
                rows.setdefault(row, []).append((start, end))
        device, jobs = rows[lib.ANELLM_TRACE_DEVICE], rows[lib.ANELLM_TRACE_JOBS]
        assert [name for name, row, *_ in events if row == lib.ANELLM_TRACE_DEVICE] == BACKWARD["ane"]
        assert sorted(name for name, row, *_ in events if row == lib.ANELLM_TRACE_JOBS) == [
            "dw_down",
            "dw_gate_up",
            "dw_qkv",
            "dw_wo",
        ]
        # Jobs of some milliseconds, evaluations of 30 at least: most of a job lies within one.
        job_time = sum(end - start for start, end in jobs)
        beside = sum(end - start for start, end in device + jobs) - covered(device + jobs)
        # So the phases of all threads sum to more than the time that they took together.
        spans = [span for row in rows.values() for span in row]
        more = sum(end - start for start, end in spans) - covered(spans)
        if beside > 0.05 * job_time and more > 0.05 * job_time:
            return
    pytest.fail("no weight gradient ran beside an evaluation")


def test_without_async_nothing_runs_beside_anything(trace: None) -> None:
    events = slow_backward(async_dw=0)
    spans = [(start, end) for _, row, _, start, end in events]
    assert {row for _, row, *_ in events} == {
        lib.ANELLM_TRACE_CALLER,
        lib.ANELLM_TRACE_DEVICE,
        lib.ANELLM_TRACE_JOBS,
    }
    assert covered(spans) == sum(end - start for start, end in spans)


def test_trace_names_programs_and_layers(trace: None) -> None:
    model = sim_model(MHA, numerics="fast")
    model.forward(*batch(MHA, 1, 8))
    evaluations = [(name, layer) for name, row, layer, _, _ in take_trace() if row == lib.ANELLM_TRACE_DEVICE]
    assert evaluations == [("compile", -1)] * 8 + [("attn_fwd", 0), ("ffn_fwd", 0), ("attn_fwd", 1), ("ffn_fwd", 1)]


def test_trace_keeps_what_fits_and_counts_the_rest() -> None:
    model = sim_model(MHA, numerics="fast")
    model.forward(*batch(MHA, 1, 8))
    check(lib.anellm_trace_enable(3))
    try:
        model.forward(*batch(MHA, 1, 8))
        events, n, lost = ffi.new("anellm_trace_event[2]"), ffi.new("int64_t *"), ffi.new("int64_t *")
        check(lib.anellm_trace_take(events, 2, n, lost))
        assert n[0] == 2
        assert lost[0] > 0
        check(lib.anellm_trace_take(events, 2, n, lost))
        assert (n[0], lost[0]) == (1, 0)
    finally:
        check(lib.anellm_trace_enable(0))
    model.forward(*batch(MHA, 1, 8))
    check(lib.anellm_trace_take(events, 2, n, lost))
    assert (n[0], lost[0]) == (0, 0)
    with pytest.raises(errors.InvalidError, match="capacity = -1"):
        check(lib.anellm_trace_enable(-1))
