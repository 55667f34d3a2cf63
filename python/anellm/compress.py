"""The formats that a model's weights may have for decoding, and the parameters that are left when fp32 is released."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Literal, get_args

import numpy as np

from anellm.errors import InvalidError

Weights = Literal["fp32", "bf16", "int8"]
WEIGHTS: tuple[str, ...] = get_args(Weights)  # in the order of enum anellm_weights


def weights_kind(name: str) -> int:
    """Return the C core's number of a format.

    Raises:
        InvalidError: naming the formats there are.
    """
    if name not in WEIGHTS:
        raise InvalidError(f"weights: expected one of {', '.join(WEIGHTS)}, found {name!r}")
    return WEIGHTS.index(name)


class RemainingParams(Mapping[str, np.ndarray[Any, np.dtype[np.float32]]]):
    """The parameters of a model whose matrices were released: all names are there, only what was kept can be read."""

    def __init__(
        self, params: Mapping[str, np.ndarray[Any, np.dtype[np.float32]]], released: frozenset[str], weights: str
    ) -> None:
        """Keep the views of ``params`` but those named in ``released``, whose values are now in ``weights``."""
        self._names = list(params)
        self._kept = {name: array for name, array in params.items() if name not in released}
        self._weights = weights

    def __getitem__(self, name: str) -> np.ndarray[Any, np.dtype[np.float32]]:
        """Return a parameter that was kept.

        Raises:
            KeyError: on a name that the model does not have.
            InvalidError: on a matrix that was released.
        """
        if name in self._kept or name not in self._names:
            return self._kept[name]
        raise InvalidError(f"{name}: released by compress({self._weights!r}, release=True): load the model again")

    def __iter__(self) -> Iterator[str]:
        """Go through all names, in memory order."""
        return iter(self._names)

    def __len__(self) -> int:
        """Return the number of parameters, released ones included."""
        return len(self._names)
