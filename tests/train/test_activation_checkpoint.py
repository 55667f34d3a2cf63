"""What each policy of activation checkpointing keeps: anellm.activation_checkpoint.saved_layers()."""

from __future__ import annotations

import math
import re
from pathlib import Path

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
    """Of groups but the last all, then what the policy asks for."""
    assert saved_layers(6, "every:2", [3]).recomputed == (3, 4, 0, 1, 2, 0, 1)
    assert saved_layers(5, "all", [3]).recomputed == (0, 1, 2)
    assert saved_layers(5, "none", [2]).recomputed == (2, 3, 2, 0, 1, 0)
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


@given(st.integers(1, 100), POLICIES, st.lists(st.integers(0, 99), max_size=4))
def test_segments_end_where_a_group_does(n_layers: int, policy: str, starts: list[int]) -> None:
    boundaries = [start for start in starts if start < n_layers]
    saved, alone = saved_layers(n_layers, policy, boundaries), saved_layers(n_layers, policy)
    assert set(saved.inputs) >= set(boundaries) | {0}
    assert saved.buffer_layers <= alone.buffer_layers
    last, _ = saved.groups[-1]
    inside = saved_layers(n_layers - last, policy)
    if policy != "sqrt":  # its N is that of all layers
        assert tuple(layer - last for layer in saved.full) == inside.full
        assert [layer - last for layer in saved.recomputed[: len(inside.recomputed)]] == list(inside.recomputed)
    others = [layer for layer in saved.recomputed if layer < last]
    assert set(others) == set(range(last))
    assert [layer for start, end in saved.segments for layer in range(start, end)] == list(range(n_layers))


@pytest.mark.parametrize("boundary", [-1, 12, 1.0])
def test_a_boundary_that_is_no_layer_is_refused(boundary: object) -> None:
    with pytest.raises(ConfigError, match="boundary: expected a layer from 0 to 11, found"):
        saved_layers(12, "sqrt", [boundary])  # type: ignore[list-item]


def test_the_table_of_the_documentation() -> None:
    text = (Path(__file__).parents[2] / "docs" / "pipeline.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `([a-z:N]+)` \|.*\| (?:N = 4: )?(\d+), (\d+), (\d+) \|$", text, re.MULTILINE)
    assert [policy for policy, *_ in rows] == ["all", "boundary", "every:N", "sqrt", "none"]
    for policy, *numbers in rows:
        saved = saved_layers(32, policy.replace("N", "4"))
        assert [len(saved.inputs), saved.buffer_layers, len(saved.recomputed)] == [int(number) for number in numbers]
