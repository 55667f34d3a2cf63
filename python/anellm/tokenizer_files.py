"""Tokenizer files whose first bytes leave open what they are: which kind of tokenizer.json, and lists of merges."""

from __future__ import annotations

from pathlib import Path

from anellm import saferead
from anellm.errors import DataError
from anellm.tokenizer_base import BaseTokenizer
from anellm.tokenizer_char import CharTokenizer, is_char_level
from anellm.tokenizer_json import LIMIT_BYTES, JsonTokenizer


def read_json(path: Path) -> BaseTokenizer:
    """Read a tokenizer.json of any kind: byte-pair, or single characters.

    Raises:
        DataError: naming file, field, expected and found.
        UnavailableError: if it needs the ``tokenizers`` package, which is not installed.
    """
    data = saferead.read_regular(path, DataError, LIMIT_BYTES, follow=True)
    values = saferead.parse_json(data, str(path), DataError)
    if is_char_level(values):
        return CharTokenizer.from_json(values, source=str(path))
    return JsonTokenizer.from_file(path)


def read_merges(path: Path) -> JsonTokenizer:
    """Read GPT-2's merges, vocab.bpe or merges.txt; see JsonTokenizer.from_merges().

    Raises:
        DataError: naming file, merge, expected and found.
    """
    data = saferead.read_regular(path, DataError, LIMIT_BYTES, follow=True)
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: expected UTF-8 text, found byte 0x{data[error.start]:02x} at {error.start}") from None
    return JsonTokenizer.from_merges(text, source=str(path))
