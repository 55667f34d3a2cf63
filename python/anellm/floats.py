"""Floating-point numbers as files have them: fp32, fp16 and bfloat16, little-endian."""

from __future__ import annotations

import numpy as np

from anellm import errors

DTYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}  # as users name them -> as safetensors does
ITEM_BYTES = {"F32": 4, "F16": 2, "BF16": 2}


def decode(raw: np.ndarray, code: str) -> np.ndarray:
    """Return bytes of a file dtype as fp32."""
    if code == "F32":
        array = raw.view("<f4") if raw.ctypes.data % 4 == 0 else raw.copy().view("<f4")
    elif code == "F16":
        array = raw.view("<f2").astype(np.float32)
    else:
        bits = raw.view("<u2").astype(np.uint32)  # bfloat16 is the upper half of a float32
        bits <<= 16
        array = bits.view(np.float32)
    return np.asarray(array)


def rounded(name: str, array: np.ndarray, dtype: str) -> np.ndarray:
    """Return an fp32 array as it is read back after being written in a dtype.

    Raises:
        NonFiniteError: when a value does not fit the dtype.
    """
    if dtype == "float32":
        return array
    code = DTYPES[dtype]
    return decode(np.frombuffer(encode(name, array, code), np.uint8), code).reshape(array.shape)


def encode(name: str, array: np.ndarray, dtype: str) -> bytes | memoryview:
    """Return a tensor's bytes in a file dtype, rounded to nearest even."""
    array = np.ascontiguousarray(array, dtype="<f4").reshape(-1)
    if dtype == "F32":
        return array.data.cast("B")
    if dtype == "F16":
        with np.errstate(over="ignore"):
            half = array.astype("<f2")
        overflow = ~np.isfinite(half)
    else:
        bits = array.view(np.uint32)
        half = ((bits + (np.uint32(0x7FFF) + ((bits >> 16) & 1))) >> 16).astype("<u2")
        overflow = (half & 0x7F80) == 0x7F80
    if overflow.any():
        value = array[int(overflow.argmax())]
        raise errors.NonFiniteError(f"params[{name!r}]: {value:g} does not fit {dtype}; use float32")
    return half.data.cast("B")
