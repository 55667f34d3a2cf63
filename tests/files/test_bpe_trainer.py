"""The byte-pair trainer: small cases by hand, a literal re-count, and the shape of what it learns."""

from __future__ import annotations

import itertools
import re
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from anellm.bpe_trainer import _WORD, train_bpe
from anellm.errors import InvalidError
from anellm.tokenizer import BYTE_PIECES, Tokenizer

TEXT = (
    "The king's horse, the king's men.\nWho is't? 'Tis he--the king!\n\n"
    "In 1599 and 1600 the king's fool o'ersaw  the men; naïve.\n"
) * 3
SIZE = 320


def learnt(tokenizer: Tokenizer) -> list[str]:
    """Return the pieces after the byte tokens."""
    return [piece.decode() for piece in tokenizer.pieces[259:]]


def merges_literally(text: str, n_merges: int) -> list[str]:
    """Learn merges by counting everything anew each time; every character of the text has a symbol."""
    words = Counter(_WORD.findall(" " + text))
    spelt = {word: list(word) for word in words}
    pieces: list[str] = []
    while len(pieces) < n_merges:
        counts: Counter[tuple[str, str]] = Counter()
        for word, symbols in spelt.items():
            for pair in itertools.pairwise(symbols):
                counts[pair] += words[word]
        if not counts:
            break
        best = min(counts, key=lambda pair: (-counts[pair], len("".join(pair)), "".join(pair), pair))
        if "".join(best) not in pieces:
            pieces.append("".join(best))
        for symbols in spelt.values():
            at = 0
            while at + 1 < len(symbols):
                if (symbols[at], symbols[at + 1]) == best:
                    symbols[at : at + 2] = ["".join(best)]
                at += 1
    return pieces


def test_small_case_by_hand() -> None:
    # " abab": ab occurs twice; then " ab" and "abab" once each, the shorter first; then what is left.
    assert learnt(train_bpe("abab", 259 + 6)) == ["ab", " ab", " abab", " ", "a", "b"]


@given(st.text(alphabet="abc '", min_size=12, max_size=60), st.integers(0, 8))
def test_merges_equal_a_literal_count(text: str, n_merges: int) -> None:
    characters = set(" " + text)
    expected = merges_literally(text, n_merges)
    size = 259 + len(expected) + len(characters)
    if len(expected) < len(characters):  # characters get at most half the room
        return
    assert learnt(train_bpe(text, size))[: len(expected)] == expected


def test_layout_and_pieces() -> None:
    tokenizer = train_bpe(TEXT, SIZE)
    assert tokenizer.vocab_size == SIZE
    assert tokenizer.pieces[:3] == (b"<unk>", b"\n<s>\n", b"\n</s>\n")
    assert tokenizer.pieces[3:259] == BYTE_PIECES
    assert tokenizer.scores[:259] == (0.0,) * 259
    assert list(tokenizer.scores[259:]) == [-float(rank) for rank in range(SIZE - 259)]
    pieces = learnt(tokenizer)
    assert len(set(pieces)) == len(pieces)
    for piece in pieces:
        if len(piece) > 1:
            assert re.fullmatch(r" ?'?[^\W\d_]+| ?[^\w\s]+", piece), piece
    assert " king" in pieces
    assert {"'s", " "} <= set(pieces)
    assert tokenizer.decode(tokenizer.encode(TEXT)) == TEXT
    assert tokenizer._segments is not None


def test_same_text_same_bytes() -> None:
    assert train_bpe(TEXT, SIZE).to_bytes() == train_bpe(TEXT, SIZE).to_bytes()


def test_separator_is_not_learnt() -> None:
    text = "\n<|endoftext|>\n".join(TEXT.splitlines() * 20)
    assert not any("|" in piece or "<" in piece or "endo" in piece for piece in learnt(train_bpe(text, SIZE)))


def test_rare_characters_are_left_to_the_bytes() -> None:
    text = "abcdefgh" * 4 + "".join(chr(0x4E00 + i) for i in range(200))
    tokenizer = train_bpe(text, 259 + 20)
    assert sum(len(piece) == 1 for piece in learnt(tokenizer)) == 10
    assert tokenizer.decode(tokenizer.encode(text)) == text


@pytest.mark.parametrize("size", [0, 259, 260])
def test_no_room_is_refused(size: int) -> None:
    with pytest.raises(InvalidError, match=f"expected at least 261, found {size}"):
        train_bpe("ab", size)


def test_a_text_too_small_for_the_vocabulary_is_refused() -> None:
    with pytest.raises(InvalidError, match="expected at most 264 for this text, found 300"):
        train_bpe("ab", 300)
