"""The GGUF container, versions 2 and 3 (github.com/ggml-org/ggml, docs/gguf.md): a strict reader of its header.

Layout, little-endian: "GGUF", u32 version, u64 number of tensors, u64 number of fields; each field a key (u64 length,
bytes), a u32 type and a value; each tensor a name, u32 number of dimensions, u64 dimensions (fastest first), u32 type,
u64 offset from the start of the data; then the data, each tensor at a multiple of general.alignment.

The header is walked here rather than by the gguf package, whose reader trusts it: it makes objects of a hundred times
the header's size, and takes any offset. Here nothing is made of an array before somebody asks for it. The package
decodes quantised blocks, in slices that were checked before.
"""

from __future__ import annotations

import importlib
import math
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from anellm import errors
from anellm.errors import DataError
from anellm.weights import shown

MAGIC = b"GGUF"
_HEADER = struct.Struct("<4sIQQ")
_U32, _U64 = struct.Struct("<I"), struct.Struct("<Q")
_VERSIONS = (2, 3)  # their little-endian layouts are the same
_MAX_FIELDS, _MAX_TENSORS = 1 << 14, 1 << 16  # real files have dozens, and hundreds
_MAX_KEY_BYTES, _MAX_TEXT_BYTES = 1 << 16, 16 << 20
_MAX_DIMS = 4
_MAX_ALIGNMENT = 1 << 20
_ALIGNMENT = "general.alignment"
_CHUNK_BYTES = 1 << 20  # of quantised rows decoded in one go

# Field types: number -> (name, layout). 8 is a string, 9 an array.
_SCALARS = {
    0: ("uint8", "<u1"),
    1: ("int8", "<i1"),
    2: ("uint16", "<u2"),
    3: ("int16", "<i2"),
    4: ("uint32", "<u4"),
    5: ("int32", "<i4"),
    6: ("float32", "<f4"),
    7: ("bool", "<u1"),
    10: ("uint64", "<u8"),
    11: ("int64", "<i8"),
    12: ("float64", "<f8"),
}
_BOOL, _STRING, _ARRAY = 7, 8, 9

# Tensor types that are read: number -> (name, weights in a block, bytes of a block).
_TYPES = {
    0: ("F32", 1, 4),
    1: ("F16", 1, 2),
    2: ("Q4_0", 32, 18),
    3: ("Q4_1", 32, 20),
    8: ("Q8_0", 32, 34),
    30: ("BF16", 1, 2),
}
# The names of others, for messages.
_OTHER_TYPES = {
    6: "Q5_0",
    7: "Q5_1",
    9: "Q8_1",
    10: "Q2_K",
    11: "Q3_K",
    12: "Q4_K",
    13: "Q5_K",
    14: "Q6_K",
    15: "Q8_K",
    20: "IQ4_NL",
    23: "IQ4_XS",
    24: "I8",
    25: "I16",
    26: "I32",
    27: "I64",
    28: "F64",
    34: "TQ1_0",
    35: "TQ2_0",
    39: "MXFP4",
}


@dataclass(frozen=True)
class Array:
    """An array field: where it lies, checked against the file's size."""

    kind: int
    count: int
    begin: int
    end: int


@dataclass(frozen=True)
class Tensor:
    """A tensor's place in the file, from its start, and its shape, slowest dimension first."""

    name: str
    type_name: str
    shape: tuple[int, ...]
    begin: int
    n_bytes: int


class GgufFile:
    """A GGUF file whose header has been checked.

    Attributes:
        path: the file, for messages.
        fields: key -> int, float, bool, str or Array.
        tensors: by name, in the order of the header.
    """

    def __init__(self, path: Path) -> None:
        """Map the file and check its header: every count, length, type and offset against the file's size.

        Raises:
            DataError: naming the file, what was expected and what was found.
        """
        self.path = path
        self._size = path.stat().st_size
        if self._size < _HEADER.size:
            raise DataError(f"{path}: GGUF header: expected {_HEADER.size} bytes, found {self._size}")
        self._bytes = np.asarray(np.memmap(path, dtype=np.uint8, mode="r"))
        self._view = self._bytes.data
        self._at = _HEADER.size
        magic, version, n_tensors, n_fields = _HEADER.unpack_from(self._view)
        if magic != MAGIC:
            raise DataError(f"{path}: GGUF header: expected it to begin with {MAGIC!r}, found {magic!r}")
        if version not in _VERSIONS:
            big = " (big-endian)" if int.from_bytes(_U32.pack(version), "big") in _VERSIONS else ""
            raise DataError(f"{path}: GGUF version: expected 2 or 3, found {version}{big}")
        # 13 and 32 bytes are the least that a field and a tensor take.
        self._check_count("number of fields", n_fields, 13, _MAX_FIELDS)
        self._check_count("number of tensors", n_tensors, 32, _MAX_TENSORS)
        self.fields: dict[str, Any] = {}
        for index in range(n_fields):
            self._read_field(index)
        self.alignment = self._read_alignment()
        found = [self._read_tensor(index) for index in range(n_tensors)]
        self.tensors = self._place(found)

    # ---- the header ------------------------------------------------------------------------------------------------

    def _bad(self, what: str, expected: str, found: object) -> DataError:
        return DataError(f"{self.path}: {what}: expected {expected}, found {shown(found)}")

    def _check_count(self, what: str, count: int, least_bytes: int, most: int) -> None:
        limit = min(most, (self._size - self._at) // least_bytes)
        if count > limit:
            raise self._bad(f"GGUF {what}", f"at most {limit} (for {self._size} bytes)", count)

    def _take(self, n_bytes: int, what: str) -> int:
        """Step over bytes of the header and return where they begin."""
        begin = self._at
        if n_bytes > self._size - begin:
            raise self._bad(what, f"{n_bytes} bytes at byte {begin}", f"{self._size - begin} before the file's end")
        self._at = begin + n_bytes
        return begin

    def _u32(self, what: str) -> int:
        return int(_U32.unpack_from(self._view, self._take(4, what))[0])

    def _u64(self, what: str) -> int:
        return int(_U64.unpack_from(self._view, self._take(8, what))[0])

    def _text(self, what: str, limit: int) -> str:
        length = self._u64(what)
        if length > limit:
            raise self._bad(what, f"at most {limit} bytes", length)
        begin = self._take(length, what)
        try:
            return str(self._view[begin : self._at], "utf-8")
        except UnicodeDecodeError as error:
            raise self._bad(what, "UTF-8", f"{error.reason} at byte {begin + error.start}") from None

    def _read_field(self, index: int) -> None:
        key = self._text(f"key of field {index}", _MAX_KEY_BYTES)
        what = f"field {shown(key)}"
        if key in self.fields:
            raise self._bad(what, "one", "two (duplicate key)")
        kind = self._u32(f"{what}: type")
        if kind == _STRING:
            self.fields[key] = self._text(what, _MAX_TEXT_BYTES)
        elif kind == _ARRAY:
            self.fields[key] = self._read_array(what)
        elif kind in _SCALARS:
            layout = np.dtype(_SCALARS[kind][1])
            begin = self._take(layout.itemsize, what)
            value = self._bytes[begin : self._at].view(layout)[0].item()
            if kind == _BOOL:
                if value not in (0, 1):
                    raise self._bad(what, "0 or 1", value)
                value = bool(value)
            self.fields[key] = value
        else:
            raise self._bad(f"{what}: type", "0 to 12", kind)

    def _read_array(self, what: str) -> Array:
        kind, count = self._u32(f"{what}: type of array"), self._u64(f"{what}: length of array")
        if kind == _STRING:
            least = 8
        elif kind in _SCALARS:
            least = np.dtype(_SCALARS[kind][1]).itemsize
        else:
            raise self._bad(f"{what}: type of array", "numbers or strings", kind)
        limit = (self._size - self._at) // least
        if count > limit:
            raise self._bad(f"{what}: length of array", f"at most {limit} (for {self._size} bytes)", count)
        begin = self._at
        if kind != _STRING:
            self._take(count * least, what)
        else:
            for _, end in self._string_spans(what, begin, count):
                self._at = end
        return Array(kind, count, begin, self._at)

    def _string_spans(self, what: str, at: int, count: int) -> Iterator[tuple[int, int]]:
        """Yield where each string of an array begins and ends, checked against the file's size."""
        unpack, view, size = _U64.unpack_from, self._view, self._size
        for index in range(count):
            if size - at < 8:
                raise self._bad(f"{what}[{index}]", f"8 bytes at byte {at}", f"{size - at} before the file's end")
            (length,) = unpack(view, at)
            at += 8
            if length > size - at:
                raise self._bad(
                    f"{what}[{index}]", f"{length} bytes at byte {at}", f"{size - at} before the file's end"
                )
            yield at, at + length
            at += length

    def _read_alignment(self) -> int:
        value = self.fields.get(_ALIGNMENT, 32)
        good = isinstance(value, int) and not isinstance(value, bool) and 8 <= value <= _MAX_ALIGNMENT
        if not good or value & (value - 1):
            raise self._bad(f"field {_ALIGNMENT}", f"a power of two from 8 to {_MAX_ALIGNMENT}", value)
        return int(value)

    def _read_tensor(self, index: int) -> tuple[str, int, tuple[int, ...], int]:
        """Return name, type, shape and offset of the next tensor of the header."""
        name = self._text(f"name of tensor {index}", _MAX_KEY_BYTES)
        what = f"tensor {shown(name)}"
        n_dims = self._u32(f"{what}: number of dimensions")
        if not 1 <= n_dims <= _MAX_DIMS:
            raise self._bad(f"{what}: number of dimensions", f"1 to {_MAX_DIMS}", n_dims)
        shape = tuple(self._u64(f"{what}: dimensions") for _ in range(n_dims))
        kind, offset = self._u32(f"{what}: type"), self._u64(f"{what}: offset")
        if kind not in _TYPES:
            names = ", ".join(name for name, _, _ in _TYPES.values())
            raise self._bad(f"{what}: type", f"one of {names}", _OTHER_TYPES.get(kind, f"number {kind}"))
        block = _TYPES[kind][1]
        if 0 in shape:
            raise self._bad(f"{what}: dimensions", "numbers above 0", shape)
        if shape[0] % block:
            raise self._bad(f"{what}: row length", f"a multiple of {block} for {_TYPES[kind][0]}", shape[0])
        return name, kind, shape[::-1], offset

    def _place(self, found: list[tuple[str, int, tuple[int, ...], int]]) -> dict[str, Tensor]:
        """Check that the tensors fill the rest of the file, one behind the other, and return them by name."""
        tensors: dict[str, Tensor] = {}
        start = -(-self._at // self.alignment) * self.alignment
        for name, kind, shape, offset in found:
            if name in tensors:
                raise self._bad(f"tensor {shown(name)}", "one", "two (duplicate name)")
            type_name, block, block_bytes = _TYPES[kind]
            n_bytes = math.prod(shape) // block * block_bytes
            tensors[name] = Tensor(name, type_name, shape, start + offset, n_bytes)
        at, before = start, "the header"
        for tensor in sorted(tensors.values(), key=lambda t: t.begin):
            at = -(-at // self.alignment) * self.alignment
            if tensor.begin != at:
                what = "overlaps" if tensor.begin < at else "leaves a gap behind"
                raise self._bad(
                    f"tensor {shown(tensor.name)}: offset",
                    str(at - start),
                    f"{tensor.begin - start} ({what} {shown(before)})",
                )
            if tensor.n_bytes > self._size - at:
                raise self._bad(
                    f"tensor {shown(tensor.name)}",
                    f"{tensor.n_bytes} bytes at byte {at} for {tensor.type_name} of shape {tensor.shape}",
                    f"{max(self._size - at, 0)} before the file's end",
                )
            at, before = at + tensor.n_bytes, tensor.name
        padded = -(-at // self.alignment) * self.alignment
        if not at <= self._size <= padded:
            raise self._bad("size", f"{at} bytes by its header (or {padded}, padded)", self._size)
        return tensors

    # ---- values ----------------------------------------------------------------------------------------------------

    def integer(self, key: str, default: int | None = None) -> int:
        """Return a field that is a whole number from 0 to 2^31 - 1.

        Raises:
            DataError: when it is missing and there is no default, or is something else.
        """
        value = self.fields.get(key, default)
        if value is None:
            raise self._bad(f"field {key}", "a whole number", "no such field")
        if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < 2**31:
            raise self._bad(f"field {key}", "a whole number from 0 to 2147483647", _kind(value))
        return value

    def number(self, key: str, default: float | None = None) -> float:
        """Return a field that is a finite number, as the shortest decimal that is the same in fp32.

        Raises:
            DataError: when it is missing and there is no default, or is something else.
        """
        value = self.fields.get(key, default)
        if value is None:
            raise self._bad(f"field {key}", "a number", "no such field")
        if not isinstance(value, (int, float)) or isinstance(value, bool) or not abs(value) < 3e38:
            raise self._bad(f"field {key}", "a finite number", _kind(value))
        return float(str(np.float32(value)))

    def text(self, key: str, default: str | None = None) -> str | None:
        """Return a field that is a string, or the default when it is missing.

        Raises:
            DataError: when it is something else.
        """
        value = self.fields.get(key, default)
        if value is not None and not isinstance(value, str):
            raise self._bad(f"field {key}", "a string", _kind(value))
        return value

    def boolean(self, key: str, *, default: bool) -> bool:
        """Return a field that is true or false, or the default when it is missing.

        Raises:
            DataError: when it is something else.
        """
        value = self.fields.get(key, default)
        if not isinstance(value, bool):
            raise self._bad(f"field {key}", "true or false", _kind(value))
        return value

    def _array(self, key: str, expected: str) -> Array | None:
        value = self.fields.get(key)
        if value is not None and not isinstance(value, Array):
            raise self._bad(f"field {key}", expected, _kind(value))
        return value

    def strings(self, key: str) -> list[bytes] | None:
        """Return a field that is an array of strings, or None when it is missing.

        Raises:
            DataError: when it is something else.
        """
        array = self._array(key, "an array of strings")
        if array is None:
            return None
        if array.kind != _STRING:
            raise self._bad(f"field {key}", "an array of strings", f"one of {_SCALARS[array.kind][0]}")
        spans = self._string_spans(f"field {key}", array.begin, array.count)
        return [bytes(self._view[begin:end]) for begin, end in spans]

    def numbers(self, key: str) -> np.ndarray | None:
        """Return a field that is an array of numbers, or None when it is missing.

        Raises:
            DataError: when it is something else.
        """
        array = self._array(key, "an array of numbers")
        if array is None:
            return None
        if array.kind == _STRING:
            raise self._bad(f"field {key}", "an array of numbers", "one of strings")
        return np.frombuffer(bytes(self._view[array.begin : array.end]), _SCALARS[array.kind][1])

    # ---- tensors ---------------------------------------------------------------------------------------------------

    def need_decoder(self) -> None:
        """Check that what decodes this file's tensors is installed.

        Raises:
            UnavailableError: naming the extra that brings it.
        """
        quantised = next((t for t in self.tensors.values() if t.type_name.startswith("Q")), None)
        if quantised is not None:
            _decoder(f"{self.path}: tensor {shown(quantised.name)} is {quantised.type_name}")

    def read(self, tensor: Tensor) -> np.ndarray:
        """Return a tensor as fp32: a view of the mapped file where it is fp32 already, else a decoded copy."""
        raw = self._bytes[tensor.begin : tensor.begin + tensor.n_bytes]
        if tensor.type_name == "F32":
            return raw.view("<f4").reshape(tensor.shape)
        if tensor.type_name == "F16":
            return raw.view("<f2").astype(np.float32).reshape(tensor.shape)
        if tensor.type_name == "BF16":
            bits = raw.view("<u2").astype(np.uint32)  # the upper half of a float32
            bits <<= 16
            return bits.view(np.float32).reshape(tensor.shape)
        return self._decode(tensor, raw)

    def _decode(self, tensor: Tensor, raw: np.ndarray) -> np.ndarray:
        """Decode quantised rows, some at a time, so that the decoder's temporaries stay small."""
        gguf = _decoder(str(self.path))
        array = np.empty(tensor.shape, np.float32)
        rows = array.reshape(-1, tensor.shape[-1])
        blocks = raw.reshape(rows.shape[0], -1)
        step = max(1, _CHUNK_BYTES // blocks.shape[1])
        kind = gguf.GGMLQuantizationType[tensor.type_name]
        try:
            with np.errstate(all="ignore"):  # what is not finite is refused by `weights.checked`
                for start in range(0, rows.shape[0], step):
                    rows[start : start + step] = gguf.dequantize(blocks[start : start + step], kind)
        except Exception as error:
            raise DataError(
                f"{self.path}: tensor {shown(tensor.name)}: the gguf package cannot decode {tensor.type_name}: "
                f"{type(error).__name__}: {shown(error)}"
            ) from error
        return array


def _kind(value: object) -> str:
    return "an array" if isinstance(value, Array) else f"{type(value).__name__} {value!r}"


def _decoder(what: str) -> Any:
    """Return the gguf package."""
    try:
        return importlib.import_module("gguf")
    except ImportError:
        raise errors.UnavailableError(
            f"{what}: decoding it needs the gguf package: pip install 'anellm[gguf]'"
        ) from None
