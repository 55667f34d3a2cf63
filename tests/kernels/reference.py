"""Helpers of the kernel tests: arrays that are awkward on purpose, finite differences, comparisons."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from anellm._ffi import check, lib, ptr, text

SENTINEL = np.float32(-12345.5)


def pointer(array: np.ndarray) -> Any:
    """Return the C pointer of a contiguous array (or of None: NULL), for reading or writing."""
    return ptr(array, array.dtype) if array is not None else ptr(None, np.float32)


def rng(seed: int) -> np.random.Generator:
    return np.random.default_rng(seed)


def normal(seed: int, *shape: int, scale: float = 1.0) -> np.ndarray:
    """Return fp32 normal numbers."""
    return (rng(seed).standard_normal(shape) * scale).astype(np.float32)


def unaligned(array: np.ndarray) -> np.ndarray:
    """Return a copy whose address is one element past a multiple of 64 bytes: the worst case for SIMD loads."""
    size = array.itemsize
    raw = np.zeros(array.nbytes + 128, dtype=np.uint8)
    start = (-raw.ctypes.data) % 64 + size
    copy = raw[start : start + array.nbytes].view(array.dtype).reshape(array.shape)
    assert copy.size == 0 or copy.ctypes.data % 64 == size
    copy[...] = array
    return copy


def strided(array: np.ndarray, stride: int) -> np.ndarray:
    """Return (rows, stride) with the rows of `array` at the start and SENTINEL in the gaps."""
    out = np.full((array.shape[0], stride), SENTINEL, dtype=array.dtype)
    out[:, : array.shape[1]] = array
    return out


def assert_gaps_untouched(array: np.ndarray, columns: int) -> None:
    assert (array[:, columns:] == SENTINEL).all(), "a kernel wrote between rows"


def assert_within(actual: np.ndarray, expected: np.ndarray, bound: np.ndarray | float) -> None:
    """Check |actual - expected| <= bound element by element, and that nothing is NaN."""
    error = np.abs(actual.astype(np.float64) - expected)
    bad = ~(error <= bound)  # a NaN is bad
    if bad.any():
        at = tuple(int(i) for i in np.argwhere(bad)[0])
        limit = np.broadcast_to(bound, error.shape)[at]
        raise AssertionError(
            f"{int(bad.sum())} of {bad.size} elements out of bounds; first at {at}: "
            f"found {actual[at]!r}, expected {expected[at]!r}, error {error[at]:.3g}, bound {limit:.3g}"
        )


def finite_differences(f: Callable[[np.ndarray], float], x: np.ndarray, step: float = 1e-5) -> np.ndarray:
    """Return the gradient of a scalar function at x, by central differences in float64."""
    x = x.astype(np.float64)
    gradient = np.empty_like(x)
    for i in np.ndindex(x.shape):
        kept = x[i]
        x[i] = kept + step
        above = f(x)
        x[i] = kept - step
        below = f(x)
        x[i] = kept
        gradient[i] = (above - below) / (2 * step)
    return gradient


def portable(run: Callable[[], Any]) -> Any:
    """Return what `run` gives with the portable kernels."""
    before = text(lib.anellm_cpu_variant())
    check(lib.anellm_cpu_set_variant(b"portable"))
    try:
        return run()
    finally:
        check(lib.anellm_cpu_set_variant(before.encode()))


def assert_same_bytes_for_any_threads(run: Callable[[], tuple[np.ndarray, ...]]) -> None:
    """Check that `run` gives the same bytes on 1, 2, 3 and 16 threads."""
    results = []
    for n in (1, 2, 3, 16):
        check(lib.anellm_set_threads(n))
        results.append([np.asarray(a).tobytes() for a in run()])
    assert results[0] == results[1], "2 threads differ from 1"
    assert results[0] == results[2], "3 threads differ from 1"
    assert results[0] == results[3], "16 threads differ from 1"


def assert_refused(
    status: int, wanted: int, *words: str, untouched: tuple[np.ndarray, ...] = (), fill: float = float(SENTINEL)
) -> None:
    """Check a refusal: its status, that its message has each of `words`, that outputs still hold `fill`."""
    message = text(lib.anellm_last_error())
    assert status == wanted, f"status {text(lib.anellm_status_name(status))}, message {message!r}"
    for word in words:
        assert word in message, message
    for array in untouched:
        assert (array == fill).all(), "a refused call wrote to its output"


def filled(*shape: int, dtype: Any = np.float32) -> np.ndarray:
    """Return an output array full of SENTINEL."""
    return np.full(shape, SENTINEL, dtype=dtype)
