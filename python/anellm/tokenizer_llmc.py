"""llm.c's ``gpt2_tokenizer.bin`` (github.com/karpathy/llm.c): the bytes of GPT-2's tokens, little-endian.

256 int32: magic 20240328, version 1 or 2, number of tokens, in version 2 the id of ``<|endoftext|>`` (in version 1 it
is the last), zeros; then each token's length as one byte, and its bytes. llm.c only decodes with it. As the tokens
stand in the order they were merged in, the merges follow from the table, and texts can be encoded too.
"""

from __future__ import annotations

import copy
import struct
from pathlib import Path
from typing import Final

from anellm import saferead
from anellm.byte_level import Pair, byte_alphabet, merge
from anellm.errors import DataError, InvalidError
from anellm.tokenizer_base import DOCUMENT_SEPARATOR
from anellm.tokenizer_json import JsonTokenizer

FILE_NAME: Final = "gpt2_tokenizer.bin"
MAGIC: Final = 20240328
_HEADER = struct.Struct("<4i")  # magic, version, number of tokens, end of text
_HEADER_BYTES: Final = 1024
_LIMIT_BYTES: Final = 64 << 20
_N_BYTES: Final = 256


def looks_like_table(head: bytes) -> bool:
    """Return whether a file begins as a gpt2_tokenizer.bin does."""
    return head[:4] == MAGIC.to_bytes(4, "little")


def read(path: str | Path) -> JsonTokenizer:
    """Read a ``gpt2_tokenizer.bin`` of version 1 or 2.

    Raises:
        DataError: naming file, token, field, expected and found.
    """
    return parse(saferead.read_regular(Path(path), DataError, _LIMIT_BYTES, follow=True), source=str(path))


def parse(data: bytes, *, source: str = FILE_NAME) -> JsonTokenizer:
    """Parse the bytes of a ``gpt2_tokenizer.bin``; see read()."""
    tokens, end = _table(data, source)
    gpt2 = JsonTokenizer.gpt2()
    if end == gpt2.separator_id and tokens[:end] == list(gpt2.token_table[:end]) and end + 1 == len(tokens):
        found = copy.copy(gpt2)  # nearly always it is this one, whose merges are known
        found.source = source
        return found
    return _with_merges(tokens, end, source)


def _with_merges(tokens: list[bytes], end: int, source: str) -> JsonTokenizer:
    """Return the tokenizer of a table: each token is the merge of what is left of it by the merges before it."""
    merges: dict[Pair, tuple[int, int]] = {}
    byte_ids = {token[0]: index for index, token in enumerate(tokens[:_N_BYTES]) if len(token) == 1}
    if len(byte_ids) != _N_BYTES:
        raise DataError(
            f"{source}: tokens 0 to 255: expected the 256 bytes, each once, found {len(byte_ids)} different"
        )
    spelt = [""] * len(tokens)
    letters = {byte: char for char, byte in byte_alphabet().items()}
    lines: list[str] = []
    for index, token in enumerate(tokens):
        if index == end:
            spelt[index] = token.decode()
            continue
        spelt[index] = "".join([letters[byte] for byte in token])
        if index < _N_BYTES:
            continue
        parts = merge([byte_ids[byte] for byte in token], merges)
        if len(parts) != 2:
            raise DataError(
                f"{source}: token {index}: expected two tokens before it joined, found {token[:40]!r}, which is "
                f"{len(parts)} of them"
            )
        merges[parts[0], parts[1]] = (index, index)
        lines.append(f"{spelt[parts[0]]} {spelt[parts[1]]}")
    return JsonTokenizer.from_bpe(spelt, lines, "gpt-2", bos_id=end, eos_id=end, add_bos=False, source=source)


def _header(data: bytes, source: str) -> tuple[int, int]:
    """Check the header, and return the number of tokens and the id of the end of text."""
    if len(data) < _HEADER_BYTES:
        raise DataError(f"{source}: llm.c tokenizer header: expected {_HEADER_BYTES} bytes, found {len(data)}")
    magic, version, count, end = _HEADER.unpack_from(data)
    if magic != MAGIC:
        raise DataError(f"{source}: llm.c tokenizer magic: expected {MAGIC}, found {magic}")
    if version not in (1, 2):
        raise DataError(f"{source}: llm.c tokenizer header field version: expected 1 or 2, found {version}")
    if not _N_BYTES < count <= len(data) - _HEADER_BYTES:
        raise DataError(
            f"{source}: llm.c tokenizer header field vocab_size: expected {_N_BYTES + 1} to "
            f"{len(data) - _HEADER_BYTES} (the bytes behind the header), found {count}"
        )
    if version == 1:
        end = count - 1
    if not _N_BYTES <= end < count:
        raise DataError(
            f"{source}: llm.c tokenizer header field eot_token: expected {_N_BYTES} to {count - 1}, found {end}"
        )
    return count, end


def _table(data: bytes, source: str) -> tuple[list[bytes], int]:
    """Return the bytes of each token, and the id of the end of text."""
    count, end = _header(data, source)
    tokens: list[bytes] = []
    at = _HEADER_BYTES
    for index in range(count):
        length = data[at] if at < len(data) else 0
        if not 1 <= length <= len(data) - at - 1:
            raise DataError(
                f"{source}: token {index} at byte {at}: length: expected 1 to {max(0, len(data) - at - 1)} (the bytes "
                f"left), found {length if at < len(data) else 'the end of the file'}"
            )
        tokens.append(data[at + 1 : at + 1 + length])
        at += 1 + length
    if at != len(data):
        raise DataError(f"{source}: expected {at} bytes for {count} tokens, found {len(data)}")
    if tokens[end] != DOCUMENT_SEPARATOR.encode():
        raise DataError(f"{source}: token {end}: expected {DOCUMENT_SEPARATOR}, found {tokens[end][:40]!r}")
    return tokens, end


def to_bytes(tokenizer: JsonTokenizer) -> bytes:
    """Return a ``gpt2_tokenizer.bin`` of version 2, for llm.c's own programs.

    Raises:
        InvalidError: where a token does not fit, or there is no ``<|endoftext|>`` to end texts with.
    """
    end = tokenizer.separator_id
    if end is None:
        raise InvalidError(f"{tokenizer.source}: expected a token {DOCUMENT_SEPARATOR}, found none")
    parts = [_HEADER.pack(MAGIC, 2, tokenizer.vocab_size, end).ljust(_HEADER_BYTES, b"\0")]
    for index, token in enumerate(tokenizer.token_table):
        text = DOCUMENT_SEPARATOR.encode() if index == end else token
        if not 1 <= len(text) <= 255:
            raise InvalidError(f"{tokenizer.source}: token {index}: expected 1 to 255 bytes, found {len(text)}")
        parts.append(bytes([len(text)]) + text)
    return b"".join(parts)
