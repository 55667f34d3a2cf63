"""How far a tensor is from its reference, and how far arithmetic of 16 bits may be: docs/ane.md, "How exact"."""

from __future__ import annotations

import math
from typing import Any, Final, NamedTuple

import numpy as np
import numpy.typing as npt

from anellm.device import named_device

# Half the distance of neighbours from 1 to 2, in what products are multiplied: the largest relative error of rounding.
UNITS: Final = {"fp32": 2.0**-24, "fp16": 2.0**-11, "bf16": 2.0**-8}

# A single value may be that many times as far off, as a part of the tensor's largest, as the tensor is in the norm: of
# a million values with normally distributed errors the worst is five deviations off, and the largest value of a tensor
# is never below its root mean square.
SINGLE: Final = 5.0

_CHUNK: Final = 1 << 18  # values at a time in fp64


class Row(NamedTuple):
    """One comparison.

    Attributes:
        name: of the tensor, or "logits".
        difference: largest absolute difference; NaN where one side has none.
        largest: largest absolute value of the reference.
        error: the difference in the Frobenius norm, as a part of the reference's.
        cosine: of the angle between the two.
        ok: whether it is within the tolerance.
    """

    name: str
    difference: float
    largest: float
    error: float
    cosine: float
    ok: bool


def arithmetic(device: str, dtype: str) -> str:
    """Return what a device multiplies: a key of UNITS."""
    return dtype if named_device(device) == "cpu" else "fp16"


def compare(
    name: str, found: npt.NDArray[Any], expected: npt.NDArray[Any], tolerance: float, *, norm: bool = False
) -> Row:
    """Compare two tensors of one shape.

    Args:
        name: of the tensor.
        found: what the model gives.
        expected: the reference.
        tolerance: largest difference, as a part of the reference's largest absolute value.
        norm: the tolerance is of the difference's Frobenius norm, as a part of the reference's, and SINGLE times that
            of a single value.
    """
    largest = max(-float(expected.min()), float(expected.max()))
    difference = squares = size = found_size = product = 0.0
    ours, theirs = found.reshape(-1), expected.reshape(-1)
    for start in range(0, len(ours), _CHUNK):
        x, y = (flat[start : start + _CHUNK].astype(np.float64) for flat in (ours, theirs))
        apart = x - y
        difference = float(np.maximum(difference, np.abs(apart).max()))  # NaN stays
        squares += float(apart @ apart)
        size, found_size, product = size + float(y @ y), found_size + float(x @ x), product + float(x @ y)
    distance, size, found_size = (math.sqrt(x) if x >= 0 else math.nan for x in (squares, size, found_size))
    error = distance / size if size > 0 else 0.0 if distance == 0 else math.inf
    sizes = size * found_size
    cosine = product / sizes if sizes > 0 else 1.0 if distance == 0 else 0.0
    ok = difference <= tolerance * (SINGLE if norm else 1.0) * largest and (not norm or error <= tolerance)
    return Row(name, difference, largest, error, cosine, ok)
