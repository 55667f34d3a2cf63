"""Read sentencepiece's ``.model`` files: a strict parser for the parts in use, into the exact encoder of tokenizer.py.

A ``.model`` is a protocol buffer: a run of fields, each a key (number and wire type) and a value. Only models of
Llama's kind are taken: byte-pair, with byte fallback, and text left as it is but for the spaces. Such a model and the
``tokenizer.bin`` made of it are the same table, so that it is kept as tokenizer.bin from then on.

Source: https://protobuf.dev/programming-guides/encoding/ and sentencepiece_model.proto (field numbers).
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from pathlib import Path

from anellm import saferead
from anellm.errors import DataError
from anellm.tokenizer import BOS_ID, EOS_ID, FIRST_PIECE_ID, UNK_ID, Tokenizer

_LIMIT_BYTES = 64 << 20
_VARINT, _FIXED64, _LENGTH, _FIXED32 = 0, 1, 2, 5  # wire types
_PIECES, _TRAINER, _NORMALIZER = 1, 2, 3  # fields of the model
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6  # kinds of pieces, in GGUF files too
_MODEL_TYPES = {1: "UNIGRAM", 2: "BPE", 3: "WORD", 4: "CHAR"}
_NEVER = -3e38  # a score that no merge takes; see Tokenizer

Field = tuple[int, int, int | bytes]


def looks_like_model(head: bytes) -> bool:
    """Return whether a file that starts so may be a sentencepiece model: a piece that holds a text."""
    return len(head) > 2 and head[0] == head[2] == (_PIECES << 3 | _LENGTH) and head[1] > 0


def read(path: str | Path) -> Tokenizer:
    """Read a sentencepiece model.

    Raises:
        DataError: naming file, field, expected and found.
    """
    data = saferead.read_regular(Path(path), DataError, _LIMIT_BYTES, follow=True)
    return parse(data, str(path))


def parse(data: bytes, source: str = "tokenizer.model") -> Tokenizer:
    """Parse the bytes of a sentencepiece model.

    Raises:
        DataError: naming source, field, expected and found.
    """
    pieces: list[str] = []
    scores: list[float] = []
    kinds: list[int] = []
    trainer: dict[int, int | bytes] = {}
    normalizer: dict[int, int | bytes] = {}
    for number, wire, value in _fields(data, source):
        if number == _PIECES:
            piece, score, kind = _piece(value, f"{source}: piece {len(pieces)}")
            pieces.append(piece)
            scores.append(score)
            kinds.append(kind)
        elif number in (_TRAINER, _NORMALIZER):
            if wire != _LENGTH or not isinstance(value, bytes):
                raise DataError(f"{source}: field {number}: expected a message, found wire type {wire}")
            settings = trainer if number == _TRAINER else normalizer
            settings.update({key: item for key, _, item in _fields(value, f"{source}: field {number}")})
    model_type = trainer.get(3, 1)
    if model_type != 2:
        raise DataError(f"{source}: model_type: expected BPE, found {_MODEL_TYPES.get(_int(model_type), model_type)!r}")
    wanted = (
        (trainer, 24, 0, 0, "treat_whitespace_as_suffix"),
        (trainer, 40, UNK_ID, 0, "unk_id"),
        (trainer, 41, BOS_ID, 1, "bos_id"),
        (trainer, 42, EOS_ID, 2, "eos_id"),
        (normalizer, 2, b"", b"", "precompiled_charsmap"),
        (normalizer, 3, 1, 1, "add_dummy_prefix"),
        (normalizer, 4, 0, 1, "remove_extra_whitespaces"),
        (normalizer, 5, 1, 1, "escape_whitespaces"),
    )
    for settings, number, expected, default, name in wanted:
        found = settings.get(number, default)
        if found != expected:
            shown = f"{len(found)} bytes" if isinstance(found, bytes) else found
            raise DataError(
                f"{source}: {name}: expected {'none' if isinstance(expected, bytes) else expected}, found {shown}: "
                "only models of Llama's kind are supported"
            )
    return from_pieces(pieces, scores, kinds, source=source)


def from_pieces(pieces: Sequence[str], scores: Sequence[float], kinds: Sequence[int], *, source: str) -> Tokenizer:
    """Return the tokenizer of a sentencepiece vocabulary of Llama's kind, as ``.model`` and GGUF files have it.

    Args:
        pieces: text of each token, U+2581 for a space; 0 to 2 are the unknown token and those that begin and end a
            text, 3 to 258 the bytes ``<0x00>`` to ``<0xFF>``.
        scores: merge priority of each, higher first.
        kinds: 1 normal, 2 unknown, 3 control, 4 user-defined, 5 unused, 6 byte.
        source: what to call it in an error.

    Raises:
        DataError: naming source, token, field, expected and found.
    """
    if not len(pieces) == len(scores) == len(kinds):
        raise DataError(
            f"{source}: expected a score and a kind for each token, found {len(pieces)} tokens, {len(scores)} scores, "
            f"{len(kinds)} kinds"
        )
    expected_kinds = [UNKNOWN, CONTROL, CONTROL, *[BYTE] * 256]
    table: list[bytes] = []
    ranks = list(scores)
    for index, (piece, kind) in enumerate(zip(pieces, kinds, strict=True)):
        if index < FIRST_PIECE_ID and kind != expected_kinds[index]:
            raise DataError(f"{source}: token {index}: kind: expected {expected_kinds[index]}, found {kind}")
        if index >= FIRST_PIECE_ID and kind not in (NORMAL, CONTROL, UNUSED):
            raise DataError(f"{source}: token {index}: kind: expected 1, 3 or 5, found {kind}: not supported")
        if index >= FIRST_PIECE_ID and kind != NORMAL:
            ranks[index] = _NEVER
        text = f"\n{piece}\n" if index in (BOS_ID, EOS_ID) else piece.replace("\u2581", " ")  # as tokenizer.bin has it
        table.append(text.encode("utf-8", "replace"))
    return Tokenizer(table, ranks, source=source)


def _int(value: int | bytes) -> int:
    return value if isinstance(value, int) else 0


def _piece(message: int | bytes, source: str) -> tuple[str, float, int]:
    """Return the text, score and kind of a piece."""
    if not isinstance(message, bytes):
        raise DataError(f"{source}: expected a message, found a number")
    piece, score, kind = b"", 0.0, NORMAL
    for number, wire, value in _fields(message, source):
        if (number, wire) == (1, _LENGTH) and isinstance(value, bytes):
            piece = value
        elif (number, wire) == (2, _FIXED32) and isinstance(value, bytes):
            (score,) = struct.unpack("<f", value)
        elif (number, wire) == (3, _VARINT) and isinstance(value, int):
            kind = value
        else:
            raise DataError(f"{source}: expected text, score or kind, found field {number} of wire type {wire}")
    try:
        return piece.decode("utf-8"), score, kind
    except UnicodeDecodeError as error:
        raise DataError(f"{source}: expected UTF-8 text, found byte 0x{error.object[error.start]:02x}") from None


def _fields(data: bytes, source: str) -> Iterator[Field]:
    """Yield number, wire type and value of each field of a message.

    Raises:
        DataError: where a field runs past the end, or is of an unknown wire type.
    """
    at, size = 0, len(data)
    while at < size:
        start = at
        key, at = _varint(data, at, source)
        number, wire = key >> 3, key & 7
        if wire == _VARINT:
            value, at = _varint(data, at, source)
            yield number, wire, value
            continue
        if wire == _LENGTH:
            length, at = _varint(data, at, source)
        elif wire in (_FIXED32, _FIXED64):
            length = 4 if wire == _FIXED32 else 8
        else:
            raise DataError(f"{source}: byte {start}: wire type: expected 0, 1, 2 or 5, found {wire}")
        if length > size - at:
            raise DataError(
                f"{source}: byte {start}: field {number}: expected {length} bytes, found {size - at} before the end"
            )
        yield number, wire, data[at : at + length]
        at += length


def _varint(data: bytes, at: int, source: str) -> tuple[int, int]:
    """Return a number of 7 bits a byte, and where the next field is."""
    value = 0
    for shift in range(0, 64, 7):
        if at >= len(data):
            raise DataError(f"{source}: byte {at}: expected a number, found the end of the file")
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
    raise DataError(f"{source}: byte {at - 10}: expected a number of at most 64 bits, found a longer one")
