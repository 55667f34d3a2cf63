"""How Hugging Face stores a model's tensors, where that is not how they are kept here.

Llama models are the same in both. A GPT-2 there has its four matrices a layer as (in, out) (transformers' Conv1D), no
rows that pad the vocabulary, and always biases: a model without any stores zeros, which compute the same, and says so
in its config.json ("bias": false, which transformers does not look at).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

import numpy as np

from anellm import errors
from anellm.model_config import ModelConfig

EMBEDDINGS: Final = {"llama": "model.embed_tokens.weight", "gpt2": "transformer.wte.weight"}
_PREFIX: Final = "transformer."
_TRANSPOSED: Final = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")
_BUFFERS: Final = (".attn.bias", ".attn.masked_bias")  # the causal mask, which older files carry
_ALONE: Final = ("transformer.wte.weight", "transformer.wpe.weight")  # have no bias

Params = Mapping[str, np.ndarray[Any, Any]]
Shapes = dict[str, tuple[int, ...]]


def is_buffer(name: str) -> bool:
    """Return whether a name in a file is of a table that is computed here: the causal mask, or rotary frequencies."""
    return name.endswith((*_BUFFERS, "rotary_emb.inv_freq"))


def full_name(name: str, config: ModelConfig) -> str:
    """Return a tensor's name with the prefix that files of GPT2Model leave out and those of GPT2LMHeadModel have."""
    if config.arch != "gpt2" or name.startswith((_PREFIX, "lm_head.")):
        return name
    return _PREFIX + name


def stored_shapes(config: ModelConfig, shapes: Shapes) -> Shapes:
    """Return name and shape of every tensor as files have them.

    Args:
        config: the model's dimensions.
        shapes: those of the model's own tensors.
    """
    if config.arch != "gpt2":
        return dict(shapes)
    result: Shapes = {}
    for name, shape in shapes.items():
        result[name] = _stored_shape(name, shape, config)
        if _lacks_bias(name, config):
            result[_bias_of(name)] = (shape[0],)
    return result


def _stored_shape(name: str, shape: tuple[int, ...], config: ModelConfig) -> tuple[int, ...]:
    if name.endswith(_TRANSPOSED):
        return shape[::-1]
    return (config.vocab_size, shape[1]) if name == EMBEDDINGS["gpt2"] else shape


def _lacks_bias(name: str, config: ModelConfig) -> bool:
    return not config.bias and name not in _ALONE


def _bias_of(name: str) -> str:
    return name.removesuffix("weight") + "bias"


def optional(config: ModelConfig, name: str) -> bool:
    """Return whether a file may lack a tensor of stored_shapes(): a bias that the model does not have."""
    return config.arch == "gpt2" and not config.bias and name.endswith(".bias")


def stored(config: ModelConfig, params: Params) -> dict[str, np.ndarray[Any, Any]]:
    """Return the model's tensors as files have them: views, so that what is written to them is written to the model.

    Biases that the model does not have are arrays of zeros.
    """
    if config.arch != "gpt2":
        return dict(params)
    result: dict[str, np.ndarray[Any, Any]] = {}
    for name, array in params.items():
        if name.endswith(_TRANSPOSED):
            result[name] = array.T
        else:
            result[name] = array[: config.vocab_size] if name == EMBEDDINGS["gpt2"] else array
        if _lacks_bias(name, config):
            result[_bias_of(name)] = np.zeros(array.shape[0], np.float32)
    return result


def own(name: str, array: np.ndarray[Any, Any], config: ModelConfig) -> np.ndarray[Any, Any]:
    """Return a tensor of a file as the model has it, (out, in), with rows of zeros that pad the vocabulary."""
    if config.arch != "gpt2":
        return array
    if name.endswith(_TRANSPOSED):
        return np.ascontiguousarray(array.T)
    if name == EMBEDDINGS["gpt2"] and config.padded_vocab_size > config.vocab_size:
        return padded(array, config.padded_vocab_size)
    return array


def padded(array: np.ndarray[Any, Any], n_rows: int) -> np.ndarray[Any, Any]:
    """Return a copy of a matrix with rows of zeros behind its own."""
    result = np.zeros((n_rows, array.shape[1]), np.float32)
    result[: array.shape[0]] = array
    return result


def check_padding(config: ModelConfig, params: Params) -> None:
    """Check that the rows that pad the vocabulary are zero before a model is written without them.

    Raises:
        InvalidError: when one is not.
    """
    if config.padded_vocab_size > config.vocab_size:
        name = EMBEDDINGS[config.arch]
        if params[name][config.vocab_size :].any():
            raise errors.InvalidError(f"params[{name!r}]: expected zeros from row {config.vocab_size} on, found others")


def check_zero_biases(config: ModelConfig, tensors: Params, source: str, error: type[errors.AnellmError]) -> None:
    """Check that biases in a file of a model without biases are zeros.

    Raises:
        AnellmError: of the class given, at the first one that is not.
    """
    for name, array in tensors.items():
        if optional(config, name) and array.any():
            at = int(array.reshape(-1).astype(bool).argmax())
            raise error(
                f"{source}: tensor {name}: expected zeros, as config.json says that there are no biases, found "
                f"{array.reshape(-1)[at]} at index {at}"
            )
