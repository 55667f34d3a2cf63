"""The door to the C core: the only module that imports ``anellm._anellm``."""

from __future__ import annotations

from typing import Any

import numpy as np

from anellm import errors
from anellm._anellm import ffi, lib  # type: ignore[import-not-found]

__all__ = ["Handle", "check", "ffi", "lib", "ptr", "text"]

_ERRORS: dict[int, type[errors.AnellmError]] = {
    lib.ANELLM_INVALID: errors.InvalidError,
    lib.ANELLM_RANGE: errors.TokenRangeError,
    lib.ANELLM_NOMEM: errors.OutOfMemoryError,
    lib.ANELLM_UNAVAILABLE: errors.UnavailableError,
    lib.ANELLM_UNSUPPORTED: errors.UnsupportedError,
    lib.ANELLM_COMPILE: errors.CompileError,
    lib.ANELLM_EVAL: errors.EvalError,
    lib.ANELLM_NONFINITE: errors.NonFiniteError,
    lib.ANELLM_BUSY: errors.BusyError,
    lib.ANELLM_INTERNAL: errors.InternalError,
}

_CTYPES = {
    np.dtype(np.float32): "float *",
    np.dtype(np.float64): "double *",
    np.dtype(np.int32): "int32_t *",
    np.dtype(np.int64): "int64_t *",
    np.dtype(np.uint16): "uint16_t *",
    np.dtype(np.int8): "int8_t *",
}


def text(pointer: Any) -> str:
    """Return a C string as str."""
    return str(ffi.string(pointer).decode("utf-8", "replace"))


def check(status: int) -> None:
    """Raise the error class of a C status other than OK, with the C core's message."""
    if status == lib.ANELLM_OK:
        return
    raise _ERRORS.get(status, errors.InternalError)(text(lib.anellm_last_error()))


def ptr(
    array: Any, dtype: Any, shape: tuple[int, ...] | None = None, *, write: bool = False, name: str = "array"
) -> Any:
    """Return the C pointer of a NumPy array, after checking that C may use it as it is.

    This is the one gate for arrays: cffi's own ``from_buffer`` reinterprets a float64 array as floats without a word.

    Args:
        array: NumPy array, C-contiguous; None gives NULL.
        dtype: the element type that C expects (float32, float64, int32, int64, uint16 or int8).
        shape: the exact shape expected; None accepts any.
        write: whether C will write to it.
        name: what to call the array in an error.

    Raises:
        InvalidError: on a wrong type, dtype, shape, layout, or a read-only array where C writes.
    """
    if array is None:
        return ffi.NULL
    want = np.dtype(dtype)
    if not isinstance(array, np.ndarray):
        raise errors.InvalidError(f"{name}: expected a NumPy array, found {type(array).__name__}")
    if array.dtype != want:
        raise errors.InvalidError(f"{name}: expected dtype {want}, found {array.dtype}")
    if shape is not None and array.shape != tuple(shape):
        raise errors.InvalidError(f"{name}: expected shape {tuple(shape)}, found {array.shape}")
    if not array.flags.c_contiguous:
        raise errors.InvalidError(f"{name}: expected a C-contiguous array, found strides {array.strides}")
    if write and not array.flags.writeable:
        raise errors.InvalidError(f"{name}: expected a writable array, found a read-only one")
    return ffi.cast(_CTYPES[want], array.ctypes.data)


class Handle:
    """Own a C object: freed once, on close() or when collected; using it after that is an error."""

    def __init__(self, pointer: Any, free: Any, what: str) -> None:
        self._pointer = ffi.gc(pointer, free)
        self._what = what
        self.kept: object = None  # what the C object uses, and must not be freed before it

    @property
    def pointer(self) -> Any:
        """Return the C pointer.

        Raises:
            InvalidError: after close().
        """
        if self._pointer is None:
            raise errors.InvalidError(f"{self._what} is closed")
        return self._pointer

    def close(self) -> None:
        """Free the C object now. Calling it again does nothing."""
        pointer, self._pointer = self._pointer, None
        if pointer is not None:
            ffi.release(pointer)
