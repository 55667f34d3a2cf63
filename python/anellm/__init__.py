"""anellm: train language models on the Apple Neural Engine, or on any CPU.

>>> import anellm
>>> model = anellm.Model.from_preset("tiny")
>>> loss = model.forward(tokens, targets)      # (B, T) int32 arrays
>>> model.backward()
>>> anellm.AdamW(model, learning_rate=1e-3).step()

Names are loaded when first used, so that ``import anellm`` stays fast.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

# Public name -> the module it lives in.
_EXPORTS = {
    "AdamW": "anellm.optim",
    "AneOptions": "anellm.device",
    "AnellmError": "anellm.errors",
    "IGNORE_INDEX": "anellm.model",
    "Model": "anellm.model",
    "ModelConfig": "anellm.config",
    "Sampling": "anellm.sample",
    "TokenDataset": "anellm.data",
    "Tokenizer": "anellm.tokenizer",
    "TrainConfig": "anellm.config",
    "Trainer": "anellm.trainer",
    "set_threads": "anellm.device",
}

__all__ = [
    "IGNORE_INDEX",
    "AdamW",
    "AneOptions",
    "AnellmError",
    "Model",
    "ModelConfig",
    "Sampling",
    "TokenDataset",
    "Tokenizer",
    "TrainConfig",
    "Trainer",
    "__version__",
    "set_threads",
]

if TYPE_CHECKING:
    from anellm.config import ModelConfig, TrainConfig
    from anellm.data import TokenDataset
    from anellm.device import AneOptions, set_threads
    from anellm.errors import AnellmError
    from anellm.model import IGNORE_INDEX, Model
    from anellm.optim import AdamW
    from anellm.sample import Sampling
    from anellm.tokenizer import Tokenizer
    from anellm.trainer import Trainer


def __getattr__(name: str) -> Any:
    """Load a public name from its module."""
    if name not in _EXPORTS:
        raise AttributeError(f"module 'anellm' has no attribute {name!r}")
    import importlib

    value = getattr(importlib.import_module(_EXPORTS[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    """Return the public names."""
    return __all__
