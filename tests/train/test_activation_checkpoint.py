"""What each policy of activation checkpointing keeps: anellm.activation_checkpoint.saved_layers()."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from anellm.activation_checkpoint import check_policy, saved_layers
from anellm.errors import ConfigError

POLICIES = st.sampled_from(["all", "boundary", "sqrt", "none"]) | st.integers(1, 80).map(lambda n: f"every:{n}")


@given(st.integers(1, 200), POLICIES)
def test_every_layer_lies_in_one_segment_and_is_kept_or_computed_again(n_layers: int, policy: str) -> None:
    saved = saved_layers(n_layers, policy)
    assert [layer for start, end in saved.segments for layer in range(start, end)] == list(range(n_layers))
    assert set(saved.full) | set(saved.recomputed) == set(range(n_layers))
    assert not set(saved.full) & set(saved.recomputed)
    assert saved.inputs[0] == 0
    assert saved.full[-1] == n_layers - 1
    assert saved.buffer_layers <= n_layers
    if policy != "none":
        assert len(saved.recomputed) == n_layers - len(saved.full)
        assert max(end - start for start, end in saved.segments) <= saved.buffer_layers
    for start, end in saved.segments[:-1]:
        assert policy == "all" or not set(range(start, end)) & set(saved.full)


def test_the_order_of_what_is_computed_again() -> None:
    assert saved_layers(5, "every:2").recomputed == (2, 3, 0, 1)
    assert saved_layers(4, "none").recomputed == (0, 1, 2, 0, 1, 0)
    assert saved_layers(4, "all").recomputed == ()


@pytest.mark.parametrize(
    ("n_layers", "policy", "inputs", "full", "buffer"),
    [
        (4, "all", (0, 1, 2, 3), (0, 1, 2, 3), 4),
        (4, "boundary", (0, 1, 2, 3), (3,), 1),
        (12, "sqrt", (0, 3, 6, 9), (9, 10, 11), 3),
        (22, "sqrt", (0, 4, 8, 12, 16, 20), (20, 21), 4),
        (32, "sqrt", (0, 5, 10, 15, 20, 25, 30), (30, 31), 5),
        (5, "every:2", (0, 2, 4), (4,), 2),
        (5, "every:5", (0,), (0, 1, 2, 3, 4), 5),
        (5, "every:9", (0,), (0, 1, 2, 3, 4), 5),
        (5, "none", (0,), (4,), 1),
        (1, "sqrt", (0,), (0,), 1),
        (1, "none", (0,), (0,), 1),
    ],
)
def test_what_each_policy_keeps(
    n_layers: int, policy: str, inputs: tuple[int, ...], full: tuple[int, ...], buffer: int
) -> None:
    saved = saved_layers(n_layers, policy)
    assert (saved.inputs, saved.full, saved.buffer_layers) == (inputs, full, buffer)


@given(st.integers(1, 200))
def test_a_policy_with_a_name_is_one_with_a_number(n_layers: int) -> None:
    assert saved_layers(n_layers, "boundary") == saved_layers(n_layers, "every:1")
    assert saved_layers(n_layers, "sqrt") == saved_layers(n_layers, f"every:{math.isqrt(n_layers)}")


@pytest.mark.parametrize(
    "policy",
    ["", "some", "ALL", "every", "every:", "every:0", "every:-1", "every:+1", "every: 1", "every:1.5", "every:N",
     "every:²", "every:" + "9" * 11, "sqrt:2", "None"],
)  # fmt: skip
def test_another_policy_is_refused_with_what_was_expected(policy: str) -> None:
    with pytest.raises(ConfigError) as caught:
        saved_layers(12, policy)
    message = str(caught.value)
    assert "all, boundary, sqrt, every:N (N from 1) or none" in message
    assert repr(policy)[:20] in message


def test_a_policy_can_be_checked_before_there_is_a_model() -> None:
    assert check_policy("every:7") == 7
    assert [check_policy(policy) for policy in ("all", "boundary", "sqrt", "none")] == [None] * 4


@pytest.mark.parametrize("n_layers", [0, -1, True, 2.0, "4"])
def test_a_number_of_layers_that_is_none_is_refused(n_layers: object) -> None:
    with pytest.raises(ConfigError, match="n_layers: expected a whole number from 1, found"):
        saved_layers(n_layers, "all")  # type: ignore[arg-type]
