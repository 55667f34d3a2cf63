"""Sampling: what may be chosen, how often, and that the same seed chooses the same."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from anellm import errors
from anellm.config import ModelConfig
from anellm.model import Model
from anellm.sample import Sampling, StopText, candidates, choose, generate_stream, uniform

GREEDY = Sampling(temperature=0)
PLAIN = Sampling(temperature=1, top_p=1)
RECORDED = {
    (0, 0, 0): 0.23092810572081413,
    (0, 0, 1): 0.9828720712981496,
    (0, 1, 0): 0.8168445280678776,
    (1337, 0, 7): 0.9484223829791403,
    (2**64 - 1, 2**32 - 1, 2**31): 0.47195369722232716,
}

logits_of = npst.arrays(
    np.float32, st.integers(1, 40), elements=st.floats(-30, 30, width=32) | st.just(np.float32(-np.inf))
).filter(lambda a: bool(np.isfinite(a).any()))


def log(*probabilities: float) -> np.ndarray:
    """Return logits of these probabilities."""
    return np.log(np.array(probabilities, np.float64)).astype(np.float32)


@pytest.mark.parametrize(
    ("settings", "field"),
    [
        ({"temperature": -0.1}, "temperature"),
        ({"temperature": math.nan}, "temperature"),
        ({"temperature": math.inf}, "temperature"),
        ({"top_k": -1}, "top_k"),
        ({"top_k": 1.5}, "top_k"),
        ({"top_p": 0.0}, "top_p"),
        ({"top_p": 1.1}, "top_p"),
        ({"top_p": math.nan}, "top_p"),
        ({"min_p": -0.1}, "min_p"),
        ({"min_p": 1.5}, "min_p"),
        ({"seed": -1}, "seed"),
        ({"seed": 2**64}, "seed"),
        ({"seed": 0.5}, "seed"),
    ],
)
def test_impossible_settings(settings: dict[str, Any], field: str) -> None:
    with pytest.raises(errors.ConfigError, match=f"^{field}: expected .* found"):
        Sampling(**settings)


def test_greedy_takes_the_lowest_id_among_equals() -> None:
    assert choose(np.array([0, 3, 1, 3], np.float32), GREEDY, 0) == 1
    assert choose(np.array([-np.inf, -5, -np.inf], np.float32), GREEDY, 0) == 1


@pytest.mark.parametrize("sampling", [GREEDY, PLAIN])
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_non_finite_logits(sampling: Sampling, bad: float) -> None:
    with pytest.raises(errors.NonFiniteError, match="for token 2"):
        choose(np.array([0, 1, bad, 2], np.float32), sampling, 0)
    with pytest.raises(errors.NonFiniteError):
        choose(np.full(3, -np.inf, np.float32), sampling, 0)


@pytest.mark.parametrize("shape", [(0,), (1, 4), ()])
def test_wrong_shape(shape: tuple[int, ...]) -> None:
    with pytest.raises(errors.InvalidError, match="shape"):
        choose(np.zeros(shape, np.float32), PLAIN, 0)


@pytest.mark.parametrize(
    ("settings", "ids", "probabilities"),
    [
        ({}, [2, 0, 3, 1], [0.5, 0.25, 0.15, 0.1]),
        ({"top_k": 2}, [2, 0], [2 / 3, 1 / 3]),
        ({"top_k": 9}, [2, 0, 3, 1], [0.5, 0.25, 0.15, 0.1]),
        ({"top_p": 0.4}, [2], [1.0]),
        ({"top_p": 0.6}, [2, 0], [2 / 3, 1 / 3]),
        ({"top_p": 0.8}, [2, 0, 3], [5 / 9, 2.5 / 9, 1.5 / 9]),
        ({"min_p": 0.4}, [2, 0], [2 / 3, 1 / 3]),
        ({"min_p": 1.0}, [2], [1.0]),
        ({"top_k": 3, "top_p": 0.8, "min_p": 0.1}, [2, 0], [2 / 3, 1 / 3]),  # of three, 5/9 + 2.5/9 reach 0.8
        ({"temperature": 0.5}, [2, 0, 3, 1], [0.25 / 0.345, 0.0625 / 0.345, 0.0225 / 0.345, 0.01 / 0.345]),
        ({"temperature": 1e-30}, [2, 0, 3, 1], [1.0, 0.0, 0.0, 0.0]),
        ({"temperature": 1e30}, [2, 0, 3, 1], [0.25, 0.25, 0.25, 0.25]),
    ],
)
def test_candidates(settings: dict[str, Any], ids: list[int], probabilities: list[float]) -> None:
    sampling = Sampling(**{"temperature": 1, "top_p": 1, **settings})
    found, probs = candidates(log(0.25, 0.1, 0.5, 0.15), sampling)
    assert found.tolist() == ids
    np.testing.assert_allclose(probs, probabilities, atol=1e-6)


@given(
    logits_of,
    st.floats(0.01, 10),
    st.integers(0, 50),
    st.floats(0, 1, exclude_min=True),
    st.floats(0, 1),
    st.integers(0, 2**64 - 1),
    st.integers(0, 2**31),
)
def test_any_choice(
    logits: np.ndarray, temperature: float, top_k: int, top_p: float, min_p: float, seed: int, position: int
) -> None:
    """Whatever the settings, the choice is one of the candidates, which are the likeliest tokens and sum to 1."""
    sampling = Sampling(temperature, top_k, top_p, min_p, seed)
    ids, probs = candidates(logits, sampling)
    assert 1 <= len(ids) <= min(top_k or logits.size, logits.size)
    assert probs.sum() == pytest.approx(1)
    assert (np.diff(probs) <= 0).all()
    assert (np.diff(logits[ids]) <= 0).all()
    assert ids[0] == np.argmax(logits)
    left_out = np.setdiff1d(np.arange(logits.size), ids)
    if left_out.size:
        assert logits[left_out].max() <= logits[ids].min()
    token = choose(logits, sampling, position)
    assert token in ids
    assert np.isfinite(logits[token])
    assert choose(logits, sampling, position) == token


def test_random_numbers_are_fixed_for_all_time() -> None:
    """The same seed gives the same text on every machine and in every version."""
    found = [uniform(seed, index, position) for seed, index, position in RECORDED]
    assert found == list(RECORDED.values())


def test_how_often() -> None:
    """Over many positions each token comes as often as its probability says (within 5 standard deviations)."""
    probabilities = np.array([0.5, 0.05, 0.2, 0.25])
    n = 4000
    logits = log(*probabilities)
    counts = np.bincount([choose(logits, PLAIN, position) for position in range(n)], minlength=4)
    assert (np.abs(counts - n * probabilities) < 5 * np.sqrt(n * probabilities * (1 - probabilities))).all()


@pytest.fixture(scope="module")
def model() -> Model:
    """Return a small model with random weights."""
    config = ModelConfig(dim=16, hidden_dim=24, n_layers=2, n_heads=4, n_kv_heads=2, vocab_size=30, max_seq_len=12)
    model = Model(config, "cpu", seed=3)
    for array in model.params.values():
        array *= 4 if array.ndim == 2 else 1
    model.weights_changed()
    return model


def test_greedy_stream_is_what_forward_says(model: Model) -> None:
    """Each token is the argmax of a full forward pass over everything before it."""
    ids = [1, 5]
    new = list(generate_stream(model, ids, 6, GREEDY, stop_ids=()))
    assert len(new) == 6
    for at, token in enumerate(new):
        logits = model.forward(np.array([[*ids, *new[:at]]], np.int32))
        assert token == int(np.argmax(logits[0, -1]))


def test_seed_and_sample_index(model: Model) -> None:
    def text(seed: int, index: int = 0) -> list[int]:
        return list(generate_stream(model, [1], 10, Sampling(1.0, top_p=1, seed=seed), stop_ids=(), sample_index=index))

    assert text(1) == text(1)
    assert len({tuple(text(seed)) for seed in range(6)}) == 6
    assert len({tuple(text(1, index)) for index in range(6)}) == 6


def test_model_generate_is_the_same(model: Model) -> None:
    seen: list[int] = []
    found = model.generate([1], 8, temperature=1, top_p=1, seed=5, stop_ids=(), on_token=seen.append)
    assert found == seen == list(generate_stream(model, [1], 8, Sampling(1, top_p=1, seed=5), stop_ids=()))


@pytest.mark.parametrize(("n_prompt", "asked", "written", "reason"), [
    (1, 5, 5, "length"), (1, 12, 12, "length"), (1, 13, 12, "context"), (12, 1, 1, "length"), (12, 2, 1, "context"),
    (5, 100, 8, "context"), (3, 0, 0, "length"),
])  # fmt: skip
def test_end_of_context(model: Model, n_prompt: int, asked: int, written: int, reason: str) -> None:
    """The last token may stand behind the context's end, since it is not fed back."""
    stream = generate_stream(model, [1] * n_prompt, asked, GREEDY, stop_ids=())
    assert len(list(stream)) == written
    assert stream.finish_reason == reason
    assert list(stream) == []


def test_stop_ids(model: Model) -> None:
    free = list(generate_stream(model, [1], 10, GREEDY, stop_ids=()))
    stop = free[3]
    stream = generate_stream(model, [1], 10, GREEDY, stop_ids=[stop])
    assert list(stream) == free[: free.index(stop)]
    assert stream.finish_reason == "stop"


def test_vocab_size_leaves_out_the_rest(model: Model) -> None:
    stream = generate_stream(model, [1], 11, Sampling(100.0, top_p=1), stop_ids=(), vocab_size=4)
    assert set(stream) <= set(range(4))


def test_bad_calls(model: Model) -> None:
    for ids, count, match in [
        ([], 1, "at least one token"),
        ([1] * 13, 1, "at most max_seq_len = 12 tokens, found 13"),
        ([1], -1, "max_new_tokens"),
    ]:
        with pytest.raises(errors.InvalidError, match=match):
            generate_stream(model, ids, count)
    with pytest.raises(errors.InvalidError, match="sample_index"):
        generate_stream(model, [1], 1, sample_index=-1)
    for bad in (30, -1, 2**40):
        with pytest.raises(errors.TokenRangeError):
            list(generate_stream(model, [1, bad], 1))


@given(st.lists(st.text("abc", max_size=4), max_size=8), st.text("abc", min_size=1, max_size=3))
def test_stop_text(pieces: list[str], stop: str) -> None:
    """However the text is cut, what is shown is all of it up to the first stop text, and none is shown too early."""
    shown: list[str] = []
    gate = StopText(stop, shown.append)
    whole, seen = "".join(pieces), ""
    for piece in pieces:
        seen += piece
        if gate.feed(piece):
            break
        assert seen.startswith(gate.text)
        held = seen[len(gate.text) :]
        assert held == "" or stop.startswith(held)
    else:
        gate.feed("", last=True)
    assert "".join(shown) == gate.text == whole.split(stop)[0]
    assert gate.found == (stop in whole)


@pytest.mark.parametrize("stop", [None, ""])
def test_no_stop_text(stop: str | None) -> None:
    gate = StopText(stop, lambda _: None)
    assert not any(gate.feed(piece) for piece in ("a", "", "b"))
    assert gate.text == "ab"
