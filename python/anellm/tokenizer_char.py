"""A token a character: nanoGPT's character-level vocabulary, kept as a ``tokenizer.json``.

The file is a byte-pair model without merges whose tokens are single characters, in the order of their code points, so
Hugging Face's ``tokenizers`` reads it and gives the same ids. (It drops characters that the vocabulary lacks, which are
refused here.)
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Final

import numpy as np

from anellm import safeio, saferead
from anellm.errors import DataError, InvalidError
from anellm.tokenizer_base import BaseTokenizer

FILE_NAME: Final = "tokenizer.json"


class CharTokenizer(BaseTokenizer):
    """Each character that occurs in a text is a token; no token begins, ends or separates texts."""

    file_name = FILE_NAME
    bos_id: int | None = None
    eos_id: int | None = None
    add_bos = False
    separator_id: int | None = None
    stop_ids: frozenset[int] = frozenset()

    def __init__(self, characters: Iterable[str], *, source: str = "tokenizer") -> None:
        """Build a tokenizer.

        Args:
            characters: one character each; their ids are their places.
            source: what to call it in an error.

        Raises:
            DataError: if there is none, one is there twice, or is not a single Unicode character.
        """
        self.characters, self.source = tuple(characters), source
        if not self.characters:
            raise DataError(f"{source}: expected at least one character, found none")
        self._ids: dict[str, int] = {}
        for index, char in enumerate(self.characters):
            if len(char) != 1 or "\ud800" <= char <= "\udfff":
                raise DataError(f"{source}: token {index}: expected one character, found {char[:40]!r}")
            if self._ids.setdefault(char, index) != index:
                raise DataError(f"{source}: token {index}: expected each once, found {char!r} as {self._ids[char]}")
        self._bytes = [char.encode("utf-8") for char in self.characters]
        self._drops_space = np.zeros(len(self._bytes), dtype=np.bool_)

    @classmethod
    def learn(cls, texts: Iterable[str], *, source: str = "characters of the text") -> CharTokenizer:
        """Return a tokenizer of the characters that occur, in the order of their code points.

        Raises:
            DataError: if there is none.
        """
        found: set[str] = set()
        for text in texts:
            found.update(text)
        return cls(sorted(found), source=source)

    @classmethod
    def from_json(cls, values: Mapping[str, Any], *, source: str = FILE_NAME) -> CharTokenizer:
        """Build a tokenizer from a tokenizer.json that is_char_level().

        Raises:
            DataError: naming source, token, expected and found.
        """
        vocab = values["model"]["vocab"]
        table = [""] * len(vocab)
        for char, index in vocab.items():
            if not isinstance(index, int) or isinstance(index, bool) or not 0 <= index < len(vocab):
                raise DataError(
                    f"{source}: token {char[:40]!r}: id: expected 0 to {len(vocab) - 1}, found {str(index)[:40]}"
                )
            if table[index]:
                raise DataError(f"{source}: token {char[:40]!r}: id {index}: also of {table[index][:40]!r}")
            table[index] = char
        return cls(table, source=source)

    @classmethod
    def from_bytes(cls, data: bytes, *, source: str = FILE_NAME) -> CharTokenizer:
        """Parse what to_bytes() gave.

        Raises:
            DataError: naming source, expected and found.
        """
        values = saferead.parse_json(data, source, DataError)
        if not is_char_level(values):
            raise DataError(f"{source}: expected a tokenizer.json without merges, of single characters")
        return cls.from_json(values, source=source)

    def to_bytes(self) -> bytes:
        """Return the content of tokenizer.json."""
        values: dict[str, Any] = {
            "version": "1.0",
            "truncation": None,
            "padding": None,
            "added_tokens": [],
            "normalizer": None,
            "pre_tokenizer": None,
            "post_processor": None,
            "decoder": {"type": "Fuse"},
            "model": {"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None}
            | {"end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False, "ignore_merges": False}
            | {"vocab": dict(self._ids), "merges": []},
        }
        return safeio.json_bytes(values, None)

    def encode_prompt(self, text: str) -> list[int]:
        """Encode a text to write on from; an empty one is a line's end, or the first character where there is none."""
        return self.encode(text) if text else [self._ids.get("\n", 0)]

    def _encode_text(self, text: str) -> list[int]:
        ids = self._ids
        try:
            return [ids[char] for char in text]
        except KeyError:
            text.encode("utf-8")  # a lone surrogate is refused with its own message
            at = next(i for i, char in enumerate(text) if char not in ids)
            raise InvalidError(
                f"text: expected one of the {len(ids)} characters of {self.source}, found {text[at]!r} "
                f"(U+{ord(text[at]):04X}) at character {at}"
            ) from None


def is_char_level(values: Mapping[str, Any]) -> bool:
    """Return whether a tokenizer.json is of the kind that CharTokenizer writes."""
    model = values.get("model")
    if not isinstance(model, dict) or model.get("type") != "BPE" or model.get("merges") != []:
        return False
    keys = ("added_tokens", "normalizer", "pre_tokenizer", "post_processor")
    more = ("dropout", "continuing_subword_prefix", "end_of_word_suffix", "unk_token", "byte_fallback")
    vocab = model.get("vocab")
    return (
        not any(values.get(key) for key in keys)
        and not any(model.get(key) for key in more)
        and values.get("decoder") == {"type": "Fuse"}
        and isinstance(vocab, dict)
        and len(vocab) > 0
        and all(len(char) == 1 for char in vocab)
    )
