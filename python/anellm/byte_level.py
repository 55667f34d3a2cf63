r"""GPT-2's byte-level byte-pair encoding, without another package: words by Unicode categories, then merges of bytes.

Source: Radford et al. 2019, "Language Models are Unsupervised Multitask Learners", section 2.2, and the expression for
words in GPT-2's encoder.py: 's|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+
"""

from __future__ import annotations

import functools
import heapq
import re
import unicodedata
from collections.abc import Mapping
from typing import Any

Pair = tuple[int, int]
Merges = Mapping[Pair, tuple[int, int]]  # two neighbours -> rank (the least merges first), id of what they become

# Unicode's White_Space. Python's own \s has U+001C to U+001F as well.
_SPACE = r"\t-\r \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000"
_PLANES = range(0x40000)  # Unicode has no letters and numbers beyond plane 3
_CACHE_ENTRIES, _CACHE_TEXT = 1 << 17, 48  # words kept, and the longest one worth keeping, in characters


def _classes(*categories: str) -> list[str]:
    """Return, for each first letter of a general category, the inside of its character class."""
    found: dict[str, list[list[int]]] = {category: [] for category in categories}
    for code in _PLANES:
        ranges = found.get(unicodedata.category(chr(code))[0])
        if ranges is None:
            continue
        if ranges and ranges[-1][1] == code - 1:
            ranges[-1][1] = code
        else:
            ranges.append([code, code])
    return ["".join(f"\\U{first:08x}-\\U{last:08x}" for first, last in ranges) for ranges in found.values()]


@functools.cache
def word_pattern() -> re.Pattern[str]:
    """Return GPT-2's expression for words; together its matches are the whole text.

    Letters and numbers are those of the Unicode version that Python has (`unicodedata.unidata_version`).
    """
    letters, numbers = _classes("L", "N")
    return re.compile(
        rf"'(?:s|t|re|ve|m|ll|d)| ?[{letters}]+| ?[{numbers}]+| ?[^{_SPACE}{letters}{numbers}]+"
        rf"|[{_SPACE}]+(?![^{_SPACE}])|[{_SPACE}]+"
    )


def merge(ids: list[int], merges: Merges) -> list[int]:
    """Merge neighbours, the least rank first and leftmost among equals, until no two merge; O(n log n).

    Args:
        ids: one symbol after the other.
        merges: what may merge.

    Source: Sennrich et al. 2016, https://arxiv.org/abs/1508.07909, section 3.2.
    """
    n = len(ids)
    ids = [*ids, -1]  # the end merges with nothing
    following, previous = list(range(1, n + 1)), list(range(-1, n - 1))
    heap: list[tuple[int, int]] = []
    for at in range(n - 1):
        found = merges.get((ids[at], ids[at + 1]))
        if found is not None:
            heap.append((found[0], at))
    heapq.heapify(heap)
    while heap:
        rank, at = heapq.heappop(heap)
        if ids[at] < 0:
            continue  # merged into the one before
        other = following[at]
        found = merges.get((ids[at], ids[other]))
        if found is None or found[0] != rank:
            continue  # one of the two has grown since
        end = following[other]
        ids[at], ids[other] = found[1], -1
        following[at] = end
        if end < n:
            previous[end] = at
            found = merges.get((ids[at], ids[end]))
            if found is not None:
                heapq.heappush(heap, (found[0], at))
        before = previous[at]
        if before >= 0:
            found = merges.get((ids[before], ids[at]))
            if found is not None:
                heapq.heappush(heap, (found[0], before))
    return [token for token in ids if token >= 0]


class ByteLevelEncoder:
    """Text to ids by GPT-2's rules."""

    def __init__(self, byte_ids: list[int], merges: Merges) -> None:
        """Keep the tables.

        Args:
            byte_ids: (256,) the id of each byte.
            merges: what may merge.
        """
        self._byte_ids, self._merges = byte_ids, merges
        self._cache: dict[str, list[int]] = {}
        self._words = word_pattern()

    def encode(self, text: str) -> list[int]:
        """Return the ids of a text.

        Raises:
            UnicodeEncodeError: if it holds a lone surrogate.
        """
        ids: list[int] = []
        cache = self._cache
        for word in self._words.findall(text):
            found = cache.get(word)
            if found is None:
                found = merge([self._byte_ids[byte] for byte in word.encode("utf-8")], self._merges)
                if len(word) <= _CACHE_TEXT and len(cache) < _CACHE_ENTRIES:
                    cache[word] = found
            ids += found
        return ids


def byte_alphabet() -> dict[str, int]:
    """Return which byte each character of a byte-level vocabulary stands for.

    Source: GPT-2's encoder.py: printable bytes stand for themselves, the others for U+0100 and up, in order.
    """
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [value for value in range(256) if value not in set(printable)]
    return {chr(value): value for value in printable} | {chr(256 + i): value for i, value in enumerate(others)}


def is_version(item: object) -> bool:
    """Return whether a merge is the line that old files begin with, and the package skips."""
    return isinstance(item, str) and item.startswith("#version")


def encoder_of(
    values: Mapping[str, Any], vocab: Mapping[str, int], added: Mapping[int, tuple[str, bool]]
) -> ByteLevelEncoder | None:
    """Return the encoder of a tokenizer.json that does what GPT-2's does and nothing else, or None.

    Args:
        values: its content; merges and vocabulary fit each other.
        vocab: the id of each token's text.
        added: of each added token, its text and whether it is special.
    """
    pre, model = values.get("pre_tokenizer"), values["model"]
    while isinstance(pre, dict) and isinstance(pre.get("pretokenizers"), list) and len(pre["pretokenizers"]) == 1:
        pre = pre["pretokenizers"][0]
    wanted = isinstance(pre, dict) and (
        pre.get("type") == "ByteLevel" and pre.get("add_prefix_space") is False and pre.get("use_regex", True) is True
    )
    more = ("dropout", "continuing_subword_prefix", "end_of_word_suffix", "ignore_merges")
    wanted = wanted and not values.get("normalizer") and not any(model.get(key) for key in more)
    post = values.get("post_processor")
    wanted = wanted and (post is None or (isinstance(post, dict) and post.get("type") == "ByteLevel"))
    alphabet = byte_alphabet()
    byte_ids = {byte: vocab[char] for char, byte in alphabet.items() if char in vocab}
    merges = model.get("merges")
    wanted = wanted and len(byte_ids) == 256 and isinstance(merges, list)
    if not wanted or not all(special for _, special in added.values()):
        return None
    pairs = [item.split(" ") if isinstance(item, str) else item for item in merges if not is_version(item)]
    table = {(vocab[a], vocab[b]): (rank, vocab[a + b]) for rank, (a, b) in enumerate(pairs)}
    return ByteLevelEncoder([byte_ids[byte] for byte in range(256)], table)
