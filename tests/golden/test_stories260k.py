"""The engine on a real pretrained model, stories260K, against numbers recorded from llama2.c."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from anellm import weights
from anellm.model import Model
from anellm.sample import Sampling
from anellm.tokenizer import Tokenizer

SOURCES = ["stories260K.bin", "."]  # the llama2.c file, and the Hugging Face directory


@pytest.fixture(scope="module")
def folder(data_dir: Path) -> Path:
    """Return the folder of the model."""
    path = data_dir / "weights" / "stories260K"
    if not path.is_dir():
        pytest.skip(f"{path} is missing")
    return path


@pytest.fixture(scope="module", params=SOURCES)
def model(folder: Path, request: pytest.FixtureRequest) -> Model:
    """Return the model, from either format."""
    return Model.from_pretrained(folder / request.param, device="cpu")


@pytest.fixture(scope="module")
def golden(data_dir: Path) -> dict[str, Any]:
    """Return the logits and loss recorded from llama2.c's model.py."""
    return json.loads((data_dir / "goldens" / "goldens_stories260K.json").read_text())


@pytest.fixture(scope="module")
def greedy() -> dict[str, Any]:
    """Return the ids recorded from run.c at temperature 0."""
    return json.loads((Path(__file__).parent / "stories260k_greedy.json").read_text())


def test_logits_and_loss(model: Model, golden: dict[str, Any]) -> None:
    ids = np.array([golden["tokens"]], np.int32)
    tokens, targets = np.ascontiguousarray(ids[:, :-1]), np.ascontiguousarray(ids[:, 1:])
    logits = model.forward(tokens)
    np.testing.assert_allclose(logits[0, 0], golden["logits_pos0"], rtol=0, atol=1e-4)
    np.testing.assert_allclose(logits[0, -1], golden["logits_last"], rtol=0, atol=1e-4)
    assert model.forward(tokens, targets, training=False) == pytest.approx(golden["loss"], abs=1e-4)
    assert model.loss_per_token(tokens, targets).mean(dtype=np.float64) == pytest.approx(golden["loss"], abs=1e-4)


def test_greedy_is_what_run_c_writes(model: Model, greedy: dict[str, Any], data_dir: Path) -> None:
    expected = greedy["start"]
    ids = model.generate([1], expected["steps"], temperature=0)
    assert ids == expected["ids"]
    tokenizer = Tokenizer.from_file(data_dir / "tokenizers" / "tok512" / "tok512.bin")
    assert tokenizer.decode([1, *ids]) == expected["text"]


def test_greedy_stops_where_run_c_stops(model: Model, greedy: dict[str, Any]) -> None:
    expected = greedy["to_the_end"]
    stream = model.stream([1], expected["steps"], Sampling(temperature=0))
    ids = list(stream)
    assert len(ids) == expected["n_ids"]
    assert ids[-20:] == expected["last_ids"]
    assert stream.finish_reason == "stop"


def test_greedy_from_a_prompt(model: Model, greedy: dict[str, Any], data_dir: Path) -> None:
    expected = greedy["prompted"]
    tokenizer = Tokenizer.from_file(data_dir / "tokenizers" / "tok512" / "tok512.bin")
    prompt = tokenizer.encode(expected["prompt"])
    assert prompt == expected["prompt_ids"]
    ids = model.generate(prompt, len(expected["ids"]), temperature=0)
    assert ids == expected["ids"]


def test_both_formats_hold_the_same_weights(folder: Path) -> None:
    one, other = (weights.load_pretrained(folder / name) for name in SOURCES)
    assert one.config == other.config
    for (name, a), (other_name, b) in zip(one.tensors, other.tensors, strict=True):
        assert name == other_name
        assert np.array_equal(a, b), name


def test_written_file_is_the_original(folder: Path, tmp_path: Path) -> None:
    """Only the RoPE tables differ, which readers recompute: theirs were computed in fp32."""
    found = weights.load_pretrained(folder)
    weights.save_llama2c(tmp_path / "new.bin", found.config, dict(found.tensors))
    new, old = (np.fromfile(p, np.uint8) for p in (tmp_path / "new.bin", folder / "stories260K.bin"))
    assert new.size == old.size
    tables = 4 * 512 * 8
    assert np.array_equal(new[:-tables], old[:-tables])
    np.testing.assert_allclose(new[-tables:].view("<f4"), old[-tables:].view("<f4"), rtol=0, atol=1e-5)
