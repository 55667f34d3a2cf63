"""A step in ranges of layers: the losses and gradients of forward and backward, from any process that maps the file."""

from __future__ import annotations

import dataclasses
import tempfile
import tracemalloc
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from anellm import errors
from anellm._ffi import check, ffi, lib
from anellm.config import ModelConfig
from anellm.device import DTYPES, Dtype
from anellm.model import Model, memory
from anellm.optim import AdamW
from anellm.stages import ALIGNMENT, SECTIONS, Stages, share, state_layout

SHAPE = ModelConfig(
    dim=32, hidden_dim=48, n_layers=5, n_heads=4, n_kv_heads=2, head_dim=8, vocab_size=61, max_seq_len=40, qk_norm=True,
    tie_embeddings=False,
)  # fmt: skip
TIED = dataclasses.replace(SHAPE, tie_embeddings=True, qk_norm=False)
GPT2 = ModelConfig(
    arch="gpt2", dim=32, n_layers=5, n_heads=4, vocab_size=61, padded_vocab_size=64, max_seq_len=40, bias=True
)
B, T = 2, 17
GROUPINGS = ((0,), (0, 2), (0, 4), (0, 1, 3), (0, 1, 2, 3, 4))


def make_model(config: ModelConfig = SHAPE, device: str = "cpu", dtype: Dtype = "fp32", policy: str = "all") -> Model:
    model = Model(config, device, seed=5)
    rng = np.random.default_rng(6)
    for tensor in model.tensors:
        if tensor.kind == "vector":
            model.params[tensor.name][...] = rng.uniform(0.5, 1.5, tensor.shape)
    model.weights_changed()
    model.set_dtype(dtype)
    model.set_activation_checkpoint(policy)
    return model


def batches(n: int) -> list[tuple[np.ndarray, np.ndarray]]:
    rng = np.random.default_rng(7)
    found = []
    for _ in range(n):
        tokens = rng.integers(0, SHAPE.vocab_size, (B, T + 1)).astype(np.int32)
        targets = tokens[:, 1:].copy()
        targets[0, :3] = -100
        found.append((tokens[:, :-1].copy(), targets))
    return found


def all_grads(model: Model) -> np.ndarray:
    return np.concatenate([g.reshape(-1) for g in model.grads.values()])


def whole(model: Model, n_micro: int) -> tuple[list[float], np.ndarray]:
    """Return losses and gradients of a step by forward and backward."""
    losses = []
    for micro, (tokens, targets) in enumerate(batches(n_micro)):
        losses.append(model.forward(tokens, targets))
        model.backward(0.5, accumulate=micro > 0)
    return losses, all_grads(model)


def begin(model: Model, n_micro: int, starts: Sequence[int], fd: int = -1) -> Stages:
    stages = Stages(model, B, T, n_micro, starts, fd)
    for micro, batch in enumerate(batches(n_micro)):
        stages.batch(micro, *batch)
    return stages


def actions(n_micro: int, n_groups: int) -> list[tuple[str, int, int]]:
    """Return (direction, micro-batch, group) in the order of a run."""
    micros, turn = range(n_micro), n_groups - 1
    found = [("forward", micro, group) for group in range(turn) for micro in micros]
    found += [(kind, micro, turn) for micro in micros for kind in ("forward", "backward")]
    return found + [("backward", micro, group) for group in reversed(range(turn)) for micro in micros]


def act(stages: Stages, action: tuple[str, int, int]) -> None:
    kind, micro, group = action
    if kind == "forward":
        stages.forward(micro, group)
    else:
        stages.backward(micro, group, 0.5, accumulate=micro > 0)


def staged(model: Model, n_micro: int, starts: Sequence[int]) -> tuple[list[float], np.ndarray]:
    stages = begin(model, n_micro, starts)
    for action in actions(n_micro, len(starts)):
        act(stages, action)
    return [stages.loss(micro) for micro in range(n_micro)], all_grads(model)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n_micro", [1, 2, 3])
def test_losses_and_gradients_are_those_of_forward_and_backward(dtype: Dtype, n_micro: int) -> None:
    losses, expected = whole(make_model(dtype=dtype), n_micro)
    assert np.abs(expected).max() > 1e-3
    for starts in GROUPINGS:
        for policy in ("all", "every:2", "none"):
            found_losses, found = staged(make_model(dtype=dtype, policy=policy), n_micro, starts)
            assert found_losses == losses, (starts, policy)
            assert np.array_equal(found, expected), (starts, policy)


@pytest.mark.parametrize("config", [TIED, GPT2], ids=["llama", "gpt2"])
def test_tied_embeddings_do_not_depend_on_the_groups(config: ModelConfig) -> None:
    losses, expected = whole(make_model(config), 1)
    found_losses, found = staged(make_model(config), 1, (0, 2, 3))
    assert found_losses == losses
    assert np.array_equal(found, expected)
    losses, expected = whole(make_model(config), 3)
    one_losses, one = staged(make_model(config), 3, (0,))
    assert one_losses == losses
    np.testing.assert_allclose(one, expected, rtol=1e-4, atol=1e-7)  # sums in another order
    for starts in GROUPINGS:
        found_losses, found = staged(make_model(config, policy="sqrt"), 3, starts)
        assert found_losses == losses
        assert np.array_equal(found, one), starts


@pytest.mark.parametrize("config", [SHAPE, TIED], ids=["untied", "tied"])
def test_a_compact_vocabulary(config: ModelConfig) -> None:
    config = config.replace(vocab_size=80)  # the batches hold 61

    def model() -> Model:
        made = make_model(config)
        made.compact_vocabulary(np.arange(61, dtype=np.int32), equalize=True)
        return made

    losses, expected = staged(model(), 2, (0,))
    if not config.tie_embeddings:
        plain_losses, plain = whole(model(), 2)
        assert (plain_losses, plain.tobytes()) == (losses, expected.tobytes())
    found_losses, found = staged(model(), 2, (0, 3))
    assert found_losses == losses
    assert np.array_equal(found, expected)


@pytest.mark.parametrize("config", [SHAPE, GPT2], ids=["llama", "gpt2"])
def test_on_the_simulated_engine_too(config: ModelConfig) -> None:
    losses, expected = whole(make_model(config, device="ane-sim"), 1)
    found_losses, found = staged(make_model(config, device="ane-sim"), 1, (0,))
    assert (found_losses, found.tobytes()) == (losses, expected.tobytes())
    found_losses, found = staged(make_model(config, device="ane-sim"), 1, (0, 2))
    assert found_losses == losses
    scale = np.abs(expected).max()
    assert np.abs(found - expected).max() < 0.02 * scale  # the way there was computed twice, with other powers of two


def test_another_model_goes_on_from_the_file_between_any_two_calls(tmp_path: Path) -> None:
    n_micro, starts = 2, (0, 2, 3)
    _, expected = staged(make_model(), n_micro, starts)
    order = actions(n_micro, len(starts))
    layout = state_layout(SHAPE, B, T, n_micro, len(starts))
    with open(tmp_path / "state", "w+b") as file:
        file.truncate(layout.total_bytes + ALIGNMENT)
        model = make_model()
        params = {name: array.copy() for name, array in model.params.items()}
        view = model.params["model.norm.weight"]
        share(model, file.fileno(), ALIGNMENT, load=False)
        assert np.array_equal(view, params["model.norm.weight"])
        stages = Stages(model, B, T, n_micro, starts, file.fileno(), ALIGNMENT)
        for micro, batch in enumerate(batches(n_micro)):
            stages.batch(micro, *batch)
        for action in order:
            model = Model(SHAPE, "cpu", seed=None)
            view = model.params["model.norm.weight"]
            share(model, file.fileno(), ALIGNMENT, load=True)
            assert np.array_equal(view, params["model.norm.weight"])
            act(Stages(model, B, T, n_micro, starts, file.fileno(), ALIGNMENT), action)
        assert np.array_equal(all_grads(model), expected)
        AdamW(model).step(1e-3)
        other = Model(SHAPE, "cpu", seed=None)
        share(other, file.fileno(), ALIGNMENT, load=True)
        for ours, theirs in ((model.params, other.params), (model.moments_v, other.moments_v)):
            assert all(np.array_equal(ours[name], theirs[name]) for name in ours)
        assert not np.array_equal(view, params["model.norm.weight"])  # one page, whoever wrote it


def test_a_step_can_be_repeated_and_other_work_may_come_between() -> None:
    _, expected = whole(make_model(), 2)
    model = make_model()
    stages = begin(model, 2, (0, 2))
    for action in [("forward", 0, 0), ("forward", 1, 0), ("forward", 0, 1), ("forward", 1, 1), ("forward", 0, 0)]:
        act(stages, action)  # an earlier group again: from there on anew
    for i, action in enumerate(actions(2, 2)):
        if i % 2:
            model.forward(np.ones((3, 9), np.int32), np.ones((3, 9), np.int32))
        act(stages, action)
    assert np.array_equal(all_grads(model), expected)
    with pytest.raises(errors.InvalidError, match="no training forward"):
        model.backward()


def test_activations_are_those_of_the_longest_group() -> None:
    config = dataclasses.replace(SHAPE, n_layers=12)
    tall = memory(config, 4, 40, training=True).activations_bytes
    short = memory(dataclasses.replace(SHAPE, n_layers=3), 4, 40, training=True).activations_bytes
    assert short < 0.4 * tall
    sizes = state_layout(config, 4, 40, 2, 4)
    assert sizes.sizes[SECTIONS.index("activations")] == 3 * 2 * 4 * 40 * 32 * 4
    assert sizes.sizes[SECTIONS.index("gradients")] == 2 * 4 * 40 * 32 * 4
    assert all(offset % ALIGNMENT == 0 for offset in sizes.offsets)
    assert sizes.offsets[1:] >= tuple(o + s for o, s in zip(sizes.offsets, sizes.sizes, strict=True))[:-1]


def test_a_step_in_the_steady_state_allocates_nothing() -> None:
    model = make_model()
    stages = begin(model, 2, (0, 2))
    order = actions(2, 2)

    def step() -> None:
        for micro, batch in enumerate(given):
            stages.batch(micro, *batch)
        for action in order:
            act(stages, action)

    given = batches(2)
    step()
    step()
    before = mappings()
    tracemalloc.start()
    for _ in range(3):
        step()
    assert tracemalloc.get_traced_memory()[0] < 10_000
    tracemalloc.stop()
    assert mappings() == before


def mappings() -> int:
    """Return the bytes of addresses in use."""
    return int(Path("/proc/self/statm").read_text().split()[0]) if Path("/proc/self/statm").exists() else 0


ORDER: list[tuple[list[tuple[str, int, int]], tuple[str, int, int], str]] = [
    ([], ("forward", 0, 1), "micro-batch 0 has not come to layer 2: go forward"),
    ([], ("backward", 0, 1), "micro-batch 0 has not come to the last layer"),
    ([("forward", 0, 0)], ("backward", 0, 0), "micro-batch 0 has not come to the last layer"),
    ([("forward", 0, 0), ("forward", 0, 1)], ("backward", 0, 0), "micro-batch 0 has not come back to layer 2"),
    (
        [("forward", 0, 0), ("forward", 0, 1), ("backward", 0, 1)],
        ("backward", 0, 1),
        "micro-batch 0 has already gone back through layer 4",
    ),
    ([("forward", 1, 0), ("forward", 1, 1)], ("backward", 1, 1), "micro-batch 1 goes back before micro-batch 0"),
]


@pytest.mark.parametrize(("before", "action", "message"), ORDER)
def test_a_wrong_order_is_refused(
    before: list[tuple[str, int, int]], action: tuple[str, int, int], message: str
) -> None:
    stages = begin(make_model(), 2, (0, 2))
    for done in before:
        act(stages, done)
    with pytest.raises(errors.InvalidError, match=message):
        act(stages, action)


def test_new_weights_need_a_new_step() -> None:
    model = make_model()
    stages = begin(model, 1, (0, 2))
    for action in actions(1, 2):
        act(stages, action)
    AdamW(model).step(1e-3)
    with pytest.raises(errors.InvalidError, match="it has no tokens"):
        stages.forward(0, 0)
    with pytest.raises(errors.InvalidError, match="has not come to the last layer"):
        stages.loss(0)


def test_what_a_file_holds_is_checked(tmp_path: Path) -> None:
    """Ids and progress in a file may be anything: none of it is an index."""
    layout = state_layout(SHAPE, B, T, 1, 2)
    with open(tmp_path / "state", "w+b") as file:
        file.truncate(layout.total_bytes)
        model = make_model()
        share(model, file.fileno(), 0, load=False)
        stages = Stages(model, B, T, 1, (0, 2), file.fileno())
        with pytest.raises(errors.InvalidError, match="it has no tokens"):
            stages.forward(0, 0)
        file.seek(layout.offsets[SECTIONS.index("progress")])
        file.write(np.array([2**62, -(2**62)], np.int64).tobytes())
        file.seek(layout.offsets[SECTIONS.index("batches")])
        file.write(np.full(2 * B * T, 2**30, np.int32).tobytes())
        file.flush()
        with pytest.raises(errors.TokenRangeError, match=r"tokens\[0\] = 1073741824"):
            stages.forward(0, 0)
        with pytest.raises(errors.InvalidError):
            stages.backward(0, 1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"B": 0}, "B = 0"),
        ({"T": 41}, "T = 41, must be 1..40"),
        ({"n_micro": 0}, "n_micro = 0, must be 1"),
        ({"n_micro": 2**40}, "n_micro = "),
        ({"starts": ()}, "n_groups = 0"),
        ({"starts": (0, 1, 2, 3, 4, 5)}, "n_groups = 6"),
        ({"starts": (1,)}, r"starts\[0\] = 1, must be 0..0"),
        ({"starts": (0, 3, 3)}, r"starts\[2\] = 3, must be 4..4"),
        ({"starts": (0, 5)}, r"starts\[1\] = 5, must be 1..4"),
        ({"fd": 10_000}, "fd = 10000"),
    ],
)
def test_impossible_groups_are_refused(change: dict[str, Any], message: str) -> None:
    values = {"B": B, "T": T, "n_micro": 1, "starts": (0, 2), "fd": -1, **change}
    with pytest.raises(errors.InvalidError, match=message):
        Stages(make_model(), values["B"], values["T"], values["n_micro"], values["starts"], values["fd"])


def test_other_mistakes_are_refused() -> None:
    model = make_model()
    loss = ffi.new("double *")
    for call in (
        lambda: lib.anellm_stage_forward(model._pointer, 0, 0, 2),
        lambda: lib.anellm_stage_backward(model._pointer, 0, 0, 2, 1.0, 0),
        lambda: lib.anellm_stage_loss(model._pointer, 0, loss),
    ):
        with pytest.raises(errors.InvalidError, match="no stages were begun"):
            check(call())
    stages = begin(model, 1, (0, 2))
    for first, last in ((0, 5), (0, 3), (2, 4), (-1, 2)):
        with pytest.raises(errors.InvalidError, match=f"layers {first} to {last} are no group"):
            check(lib.anellm_stage_forward(model._pointer, 0, first, last))
    for micro in (-1, 1):
        with pytest.raises(errors.TokenRangeError, match=r"micro = -?1, must be 0..0"):
            stages.forward(micro, 0)
    for group in (-1, 2):
        with pytest.raises(errors.InvalidError, match="group: expected 0 to 1"):
            stages.forward(0, group)
    with pytest.raises(errors.InvalidError, match="scale = inf"):
        stages.backward(0, 1, float("inf"))
    with pytest.raises(errors.TokenRangeError, match="tokens"):
        stages.batch(0, np.full((B, T), 61, np.int32), np.zeros((B, T), np.int32))
    with pytest.raises(errors.InvalidError, match="tokens: expected shape"):
        stages.batch(0, np.zeros((B, T + 1), np.int32), np.zeros((B, T), np.int32))
    stages.close()
    with pytest.raises(errors.InvalidError, match="no stages were begun"):
        stages.forward(0, 0)


def test_a_file_that_cannot_hold_a_model_is_refused(tmp_path: Path) -> None:
    model = make_model()
    before = {name: array.copy() for name, array in model.params.items()}
    with tempfile.TemporaryFile(dir=tmp_path) as file:
        file.truncate(1000)
        with pytest.raises(errors.InvalidError, match="the file has 1000 bytes"):
            share(model, file.fileno(), 0, load=True)
        with pytest.raises(errors.InvalidError, match="offset = 100, must be a multiple of 16384"):
            share(model, file.fileno(), 100, load=True)
    with open(tmp_path / "read", "wb") as file:
        file.truncate(10 << 20)
        with pytest.raises(errors.InvalidError, match="cannot map"):
            share(model, file.fileno(), 0, load=True)
    with pytest.raises(errors.InvalidError, match="fd = -1"):
        share(model, -1, 0, load=True)
    assert all(np.array_equal(before[name], model.params[name]) for name in before)
