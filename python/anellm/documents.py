"""Documents out of text and JSONL files, one at a time, so that no file has to fit into memory."""

from __future__ import annotations

import codecs
import json
from collections.abc import Iterator
from io import FileIO
from pathlib import Path
from typing import Any

from anellm import saferead
from anellm.errors import DataError
from anellm.tokenizer_base import DOCUMENT_SEPARATOR

LONGEST_DOCUMENT = 8 << 20  # characters of a document in a text file; a longer one is cut at a line's end
LONGEST_LINE = 64 << 20  # bytes of a line in a JSONL file
_BLOCK = 1 << 20
_BOM = b"\xef\xbb\xbf"


def read_documents(path: Path) -> Iterator[str]:
    """Yield the documents of a file: JSONL by its name (``.jsonl``, ``.ndjson``), else text.

    Raises:
        DataError: naming file, line, field, expected and found.
    """
    return read_jsonl(path) if path.suffix.lower() in (".jsonl", ".ndjson") else read_text_documents(path)


def read_jsonl(path: Path) -> Iterator[str]:
    """Yield the ``text`` of each line, a JSON object; blank lines and a byte-order mark are skipped.

    Raises:
        DataError: naming file, line, field, expected and found.
    """
    with saferead.open_regular(path, DataError, follow=True) as file:
        for number, line in enumerate(_lines(file, path), 1):
            where = f"{path}:{number}"
            data = line[len(_BOM) :] if number == 1 and line.startswith(_BOM) else line
            if data.strip():
                yield text_field(_decode_line(data, where), "text", where)


def _lines(file: FileIO, path: Path) -> Iterator[bytes]:
    """Yield lines of bounded length."""
    number, pending = 0, bytearray()
    while block := file.read(_BLOCK):
        start = 0
        while (end := block.find(b"\n", start)) >= 0:
            pending += block[start:end]
            number += 1
            yield bytes(pending)
            pending.clear()
            start = end + 1
        pending += block[start:]
        if len(pending) > LONGEST_LINE:
            raise DataError(f"{path}:{number + 1}: expected a line of at most {LONGEST_LINE} bytes, found a longer one")
    if pending:
        yield bytes(pending)


def _decode_line(data: bytes, where: str) -> Any:
    try:
        return json.loads(data.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise DataError(
            f"{where}: expected UTF-8 text, found byte 0x{data[error.start]:02x} at {error.start}"
        ) from None
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where}: expected a JSON object, found {str(error)[:200]}") from None


def text_field(value: Any, field: str, where: str) -> str:
    """Return a text out of a JSON object.

    Raises:
        DataError: naming where it stands and the field.
    """
    if not isinstance(value, dict):
        raise DataError(f"{where}: expected a JSON object, found {_kind(value)}")
    if field not in value:
        names = ", ".join(repr(name[:40]) for name in list(value)[:5]) or "no field"
        raise DataError(f"{where}:{field}: expected a text, found none (there is {names})")
    text = value[field]
    if not isinstance(text, str):
        raise DataError(f"{where}:{field}: expected a text, found {_kind(text)}")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise DataError(
            f"{where}:{field}: expected Unicode text, found the lone surrogate {text[error.start]!r} "
            f"at character {error.start}"
        ) from None
    return text


def _kind(value: object) -> str:
    names = {dict: "an object", list: "a list", str: "a text", bool: "true or false", type(None): "null"}
    return names.get(type(value), "a number")


def read_text_documents(path: Path) -> Iterator[str]:
    """Yield the documents of a UTF-8 text, separated by ``<|endoftext|>``; none is empty.

    Newlines right before and after a marker belong to it. A document of more than LONGEST_DOCUMENT characters is cut
    behind a line's end, and each part is a document.

    Raises:
        DataError: naming file, line and byte where it is not UTF-8.
    """
    with saferead.open_regular(path, DataError, follow=True) as file:
        yield from split_stream(_text_blocks(file, path))


def _text_blocks(file: FileIO, path: Path) -> Iterator[str]:
    decoder = codecs.getincrementaldecoder("utf-8")()
    line, at, first = 1, 0, True
    while True:
        block = file.read(_BLOCK) or b""
        held = len(decoder.getstate()[0])  # bytes of an unfinished code point
        skip = len(_BOM) if first and block.startswith(_BOM) else 0
        first = False
        try:
            text = decoder.decode(block[skip:], final=not block)
        except UnicodeDecodeError as error:
            bad = error.object[error.start]
            line += error.object[: error.start].count(b"\n")
            raise DataError(
                f"{path}:{line}: expected UTF-8 text, found byte 0x{bad:02x} at {at + skip - held + error.start}"
            ) from None
        if not block:
            return
        line += text.count("\n")
        at += len(block)
        yield text


def split_stream(blocks: Iterator[str]) -> Iterator[str]:
    """Split text that comes in blocks as tokenizer_base.split_documents() does, but for documents that are too long."""
    pending, after_marker = "", False
    for block in blocks:
        pending += block
        *whole, pending = pending.split(DOCUMENT_SEPARATOR)
        for document in whole:
            text = document.rstrip("\r\n")
            text = text.lstrip("\r\n") if after_marker else text
            after_marker = True
            if text:
                yield text
        while len(pending) > LONGEST_DOCUMENT + _BLOCK:
            head = pending[:LONGEST_DOCUMENT]
            cut = head.rfind("\n") + 1 or LONGEST_DOCUMENT
            text = pending[:cut].lstrip("\r\n") if after_marker else pending[:cut]
            pending, after_marker = pending[cut:], False
            if text:
                yield text
    text = pending.lstrip("\r\n") if after_marker else pending
    if text:
        yield text
