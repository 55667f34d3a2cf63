"""A small deterministic byte-pair trainer, in the manner of sentencepiece's, for a few thousand tokens."""

from __future__ import annotations

import heapq
import itertools
import math
import re
from collections import Counter, defaultdict
from collections.abc import Iterable

from anellm.errors import InvalidError
from anellm.tokenizer import BYTE_PIECES, FIRST_PIECE_ID, Tokenizer, split_documents

_SPECIAL = (b"<unk>", b"\n<s>\n", b"\n</s>\n")
# Merges stay inside one of: letters with at most a space and an apostrophe in front ("king", " 'tis", "'s"); a run of
# punctuation with at most a space in front; a single digit; a single other character, a newline among them. So a piece
# holds a space only in front, never a newline beside anything, and numbers are spelt digit by digit.
_WORD = re.compile(r" ?'?[^\W\d_]+| ?(?:[^\w\s]|_)+|\s|.", re.DOTALL)

LEAST_VOCAB, MOST_VOCAB = 512, 8192
LEARN_BYTES = 32 << 20  # UTF-8 bytes of text that a vocabulary is learnt from; what comes after them is not looked at

Symbols = list[int]
Pair = tuple[int, int]


def default_vocab_size(n_bytes: int) -> int:
    """Return how many tokens suit a text: the largest power of two not above the square root of its bytes, 512 to 8192.

    Args:
        n_bytes: UTF-8 bytes of text.
    """
    return min(MOST_VOCAB, max(LEAST_VOCAB, 1 << (math.isqrt(max(1, n_bytes)).bit_length() - 1)))


def train_bpe(text: str, vocab_size: int) -> Tokenizer:
    """Learn a byte-pair vocabulary from a text whose documents are separated by ``<|endoftext|>``.

    See train_bpe_on().
    """
    return train_bpe_on(split_documents(text), vocab_size)


def train_bpe_on(documents: Iterable[str], vocab_size: int | None = None) -> Tokenizer:
    """Learn a byte-pair vocabulary from documents.

    The most frequent pair of neighbours becomes a piece, over and over; among equals the shorter piece comes first,
    then the alphabetically first, so the same text always gives the same bytes.

    Args:
        documents: texts; none is looked at once LEARN_BYTES have been.
        vocab_size: tokens in all: 3 special, 256 bytes, then merges in the order learnt, then the single characters,
            most frequent first; scores fall by one from piece to piece. At most half the pieces are characters: the
            rarest beyond that are left to the byte tokens. None takes default_vocab_size(), or fewer tokens where
            the text has too few different pairs.

    Returns:
        A tokenizer with exactly vocab_size tokens, where that is given.

    Raises:
        InvalidError: if vocab_size leaves no room for pieces, or the text has too few different pairs for it.

    Source: Sennrich et al. 2016, https://arxiv.org/abs/1508.07909, algorithm 1, with counts updated in place.
    """
    if vocab_size is not None and vocab_size < FIRST_PIECE_ID + 2:
        raise InvalidError(f"vocab_size: expected at least {FIRST_PIECE_ID + 2}, found {vocab_size}")
    characters = Counter[str]()
    words = Counter[str]()
    n_bytes = 0
    for document in documents:
        if n_bytes >= LEARN_BYTES:
            break
        spaced = " " + document  # the space that encode puts in front
        characters.update(spaced)
        words.update(_WORD.findall(spaced))
        n_bytes += len(document.encode("utf-8", "replace"))
    room = (vocab_size or default_vocab_size(n_bytes)) - FIRST_PIECE_ID
    characters[" "] = max(characters.values(), default=0) + 1  # always a piece: encode begins with it
    ranked = sorted(characters, key=lambda char: (-characters[char], char))[: max(1, room // 2)]
    merges = _Merger(words, ranked).run(room - len(ranked))
    if vocab_size is not None and len(merges) + len(ranked) < room:
        most = FIRST_PIECE_ID + len(merges) + len(ranked)
        raise InvalidError(f"vocab_size: expected at most {most} for this text, found {vocab_size}")
    learnt = [piece.encode("utf-8") for piece in (*merges, *ranked)]
    scores = [0.0] * FIRST_PIECE_ID + [-float(rank) for rank in range(len(learnt))]
    return Tokenizer([*_SPECIAL, *BYTE_PIECES, *learnt], scores, source="trained tokenizer")


class _Merger:
    """Words as lists of symbols, with the count of every pair and where it occurs, kept up to date merge by merge."""

    def __init__(self, words: Counter[str], characters: list[str]) -> None:
        """Spell each word in symbols; a character that has no symbol is -1 and never pairs."""
        self.texts = list(characters)
        symbol = {char: index for index, char in enumerate(characters)}
        ordered = sorted(words)
        self.words: list[Symbols] = [[symbol.get(char, -1) for char in word] for word in ordered]
        self.weights = [words[word] for word in ordered]
        self.counts: dict[Pair, int] = defaultdict(int)
        self.where: dict[Pair, set[int]] = defaultdict(set)
        for index in range(len(self.words)):
            self._count(index, 1)
        self.heap: list[tuple[int, int, str, Pair]] = []
        for pair in self.counts:
            self._push(pair)

    def _pairs(self, index: int) -> list[Pair]:
        word = self.words[index]
        return [pair for pair in itertools.pairwise(word) if -1 not in pair]

    def _count(self, index: int, sign: int) -> None:
        """Add (1) or take away (-1) a word's pairs."""
        for pair in self._pairs(index):
            self.counts[pair] += sign * self.weights[index]
            if sign > 0:
                self.where[pair].add(index)

    def _push(self, pair: Pair) -> None:
        count = self.counts[pair]
        if count > 0:
            text = self.texts[pair[0]] + self.texts[pair[1]]
            heapq.heappush(self.heap, (-count, len(text), text, pair))

    def run(self, limit: int) -> list[str]:
        """Merge up to limit times; return the new pieces in order.

        Two pairs may spell the same piece ("a"+"bc", "ab"+"c"). The second one adds no token, but it is merged too,
        since the encoder merges whatever neighbours spell a piece.
        """
        learnt: dict[str, int] = {}
        while self.heap and len(learnt) < limit:
            negative, _, text, pair = heapq.heappop(self.heap)
            if self.counts[pair] != -negative:
                continue  # counted anew since
            symbol = learnt.get(text)
            if symbol is None:
                symbol = learnt[text] = len(self.texts)
                self.texts.append(text)
            self._merge(pair, symbol)
        return list(learnt)

    def _merge(self, pair: Pair, symbol: int) -> None:
        """Replace a pair by its symbol wherever it occurs, leftmost first."""
        touched: set[Pair] = set()
        for index in sorted(self.where.pop(pair)):
            touched.update(self._pairs(index))
            self._count(index, -1)
            word, merged, at = self.words[index], [], 0
            while at < len(word):
                if at + 1 < len(word) and (word[at], word[at + 1]) == pair:
                    merged.append(symbol)
                    at += 2
                else:
                    merged.append(word[at])
                    at += 1
            self.words[index] = merged
            self._count(index, 1)
            touched.update(self._pairs(index))
        self.counts[pair] = 0
        for changed in touched:
            self._push(changed)
