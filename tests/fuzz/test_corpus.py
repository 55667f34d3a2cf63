"""Every fuzz target over its seeds, the inputs that fuzzing kept, and some changes of them by hypothesis."""

from __future__ import annotations

import functools
from pathlib import Path

import pytest
import targets
from hypothesis import given, settings
from hypothesis import strategies as st

CORPUS = Path(__file__).parent / "corpus"


@functools.cache
def inputs(name: str) -> list[bytes]:
    """Return what a target starts from."""
    kept = CORPUS / f"{name}.json"
    found = list(targets.seeds()[name].values())
    return found + (list(targets.read_corpus(kept).values()) if kept.exists() else [])


@pytest.mark.parametrize("name", targets.TARGETS)
def test_what_fuzzing_kept(name: str) -> None:
    for data in inputs(name):
        targets.TARGETS[name](data)


@pytest.mark.parametrize("name", targets.TARGETS)
def test_changes_of_it(name: str) -> None:
    edits = st.tuples(st.floats(0, 1), st.integers(0, 12), st.binary(max_size=9))

    @settings(max_examples=80)
    @given(st.sampled_from(inputs(name)), st.lists(edits, min_size=1, max_size=4))
    def change(data: bytes, edits: list[tuple[float, int, bytes]]) -> None:
        for where, removed, added in edits:
            at = int(where * len(data))
            data = data[:at] + added + data[at + removed :]
        targets.TARGETS[name](data)

    change()


@pytest.mark.parametrize("name", targets.TARGETS)
def test_anything_at_all(name: str) -> None:
    @settings(max_examples=40)
    @given(st.binary(max_size=200))
    def anything(data: bytes) -> None:
        targets.TARGETS[name](data)

    anything()


def test_the_corpus_is_small() -> None:
    assert sum(path.stat().st_size for path in CORPUS.iterdir()) < 400_000
    assert {path.stem for path in CORPUS.iterdir()} <= targets.TARGETS.keys()
