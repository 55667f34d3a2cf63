"""Translate between ModelConfig and Hugging Face's config.json for Llama, Qwen3 and GPT-2."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from anellm.errors import ConfigError, DataError

if TYPE_CHECKING:
    from anellm.config import ModelConfig

# What transformers assumes where the key is absent (LlamaConfig and Qwen3Config); None: the key must be there.
_DEFAULTS: dict[str, dict[str, Any]] = {
    "llama": {"max_position_embeddings": 2048, "rms_norm_eps": 1e-6, "head_dim": 0},
    "qwen3": {"max_position_embeddings": 32768, "rms_norm_eps": 1e-6, "head_dim": 128},
}
_ROPE_THETA = 10000.0
_GPT2 = "gpt2"
_GELUS = {"gelu_new": "tanh", "gelu_pytorch_tanh": "tanh", "gelu": "erf"}  # transformers' names -> ours
_GPT2_END = 50256


def to_hf(config: ModelConfig) -> dict[str, Any]:
    """Return the content of a config.json that transformers reads as the same model."""
    if config.arch == _GPT2:
        return _gpt2_to_hf(config)
    kind = "qwen3" if config.qk_norm else "llama"
    return {
        "architectures": ["Qwen3ForCausalLM" if config.qk_norm else "LlamaForCausalLM"],
        "model_type": kind,
        "vocab_size": config.vocab_size,
        "hidden_size": config.dim,
        "intermediate_size": config.hidden_dim,
        "num_hidden_layers": config.n_layers,
        "num_attention_heads": config.n_heads,
        "num_key_value_heads": config.n_kv_heads,
        "head_dim": config.head_dim,
        "max_position_embeddings": config.max_seq_len,
        "rms_norm_eps": config.norm_eps,
        "rope_theta": config.rope_theta,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": config.tie_embeddings,
        "torch_dtype": "float32",
    }


def from_hf(values: Mapping[str, Any], source: str) -> ModelConfig:
    """Return the shape that a config.json describes, or say what in it is not supported.

    Raises:
        DataError: naming the source, the key, what was expected and what was found.
    """
    from anellm.config import ModelConfig

    if not isinstance(values, Mapping):
        raise DataError(f"{source}: expected a JSON object, found {type(values).__name__}")
    kind = values.get("model_type")
    if kind == _GPT2:
        return _gpt2_from_hf(values, source)
    if not isinstance(kind, str) or kind not in _DEFAULTS:
        raise DataError(f"{source}: model_type: expected one of {', '.join([*_DEFAULTS, _GPT2])}, found {kind!r}")
    _refuse_unsupported(values, source)
    defaults = _DEFAULTS[kind]
    n_heads = _integer(values, "num_attention_heads", source)
    try:
        return ModelConfig(
            dim=_integer(values, "hidden_size", source),
            hidden_dim=_integer(values, "intermediate_size", source),
            n_layers=_integer(values, "num_hidden_layers", source),
            n_heads=n_heads,
            n_kv_heads=_integer(values, "num_key_value_heads", source, n_heads),
            head_dim=_integer(values, "head_dim", source, defaults["head_dim"]),
            vocab_size=_integer(values, "vocab_size", source),
            max_seq_len=_integer(values, "max_position_embeddings", source, defaults["max_position_embeddings"]),
            norm_eps=_number(values, "rms_norm_eps", source, defaults["rms_norm_eps"]),
            rope_theta=_rope_theta(values, source),
            tie_embeddings=_boolean(values, "tie_word_embeddings", source, default=False),
            qk_norm=kind == "qwen3",
        )
    except ConfigError as error:
        raise DataError(f"{source}: {error}") from None


def _gpt2_to_hf(config: ModelConfig) -> dict[str, Any]:
    """Return a GPT-2's config.json; what transformers has no key for stands in keys that it does not look at."""
    end = _GPT2_END if config.vocab_size > _GPT2_END else None
    values = {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": _GPT2,
        "vocab_size": config.vocab_size,
        "n_positions": config.max_seq_len,
        "n_ctx": config.max_seq_len,
        "n_embd": config.dim,
        "n_layer": config.n_layers,
        "n_head": config.n_heads,
        "n_inner": None if config.hidden_dim == 4 * config.dim else config.hidden_dim,
        "activation_function": "gelu_new" if config.gelu == "tanh" else "gelu",
        "layer_norm_epsilon": config.norm_eps,
        "resid_pdrop": 0.0,
        "embd_pdrop": 0.0,
        "attn_pdrop": 0.0,
        "tie_word_embeddings": True,
        "bos_token_id": end,
        "eos_token_id": end,
        "torch_dtype": "float32",
    }
    if not config.bias:
        values["bias"] = False
    if config.padded_vocab_size != config.vocab_size:
        values["padded_vocab_size"] = config.padded_vocab_size
    return values


def _gpt2_from_hf(values: Mapping[str, Any], source: str) -> ModelConfig:
    from anellm.config import ModelConfig

    wanted = {"scale_attn_weights": True, "scale_attn_by_inverse_layer_idx": False, "add_cross_attention": False}
    for key, value in {**wanted, "tie_word_embeddings": True}.items():
        if _boolean(values, key, source, default=value) != value:
            raise DataError(f"{source}: {key}: expected {str(value).lower()}, found {str(not value).lower()}")
    activation = values.get("activation_function", "gelu_new")
    if not isinstance(activation, str) or activation not in _GELUS:
        raise DataError(f"{source}: activation_function: expected one of {', '.join(_GELUS)}, found {activation!r}")
    dim = _integer(values, "n_embd", source)
    vocab_size = _integer(values, "vocab_size", source)
    try:
        return ModelConfig(
            arch=_GPT2,
            dim=dim,
            hidden_dim=_integer(values, "n_inner", source, 4 * dim),
            n_layers=_integer(values, "n_layer", source),
            n_heads=_integer(values, "n_head", source),
            vocab_size=vocab_size,
            padded_vocab_size=_integer(values, "padded_vocab_size", source, vocab_size),
            max_seq_len=_integer(values, "n_positions", source),
            norm_eps=_number(values, "layer_norm_epsilon", source, 1e-5),
            bias=_boolean(values, "bias", source, default=True),
            gelu=_GELUS[activation],
        )
    except ConfigError as error:
        raise DataError(f"{source}: {error}") from None


def _refuse_unsupported(values: Mapping[str, Any], source: str) -> None:
    for key in ("attention_bias", "mlp_bias", "use_sliding_window"):
        if _boolean(values, key, source, default=False):
            raise DataError(f"{source}: {key}: expected false (not supported), found true")
    if values.get("hidden_act", "silu") != "silu":
        raise DataError(f"{source}: hidden_act: expected silu, found {values['hidden_act']!r}")
    scaling = values.get("rope_scaling")
    if scaling is not None and not (isinstance(scaling, Mapping) and _rope_type(scaling) == "default"):
        raise DataError(
            f"{source}: rope_scaling: expected null (scaled rotary embeddings are not supported), found {scaling!r}"
        )
    # "use_sliding_window": false makes the window a dead value in Qwen's files.
    if values.get("sliding_window") is not None and "use_sliding_window" not in values:
        raise DataError(f"{source}: sliding_window: expected null (not supported), found {values['sliding_window']!r}")
    layers = values.get("layer_types")
    if layers is not None:
        other = [x for x in layers if x != "full_attention"] if isinstance(layers, list) else [layers]
        if other:
            raise DataError(f"{source}: layer_types: expected only full_attention, found {other[0]!r}")
    if values.get("partial_rotary_factor") not in (None, 1, 1.0):
        raise DataError(f"{source}: partial_rotary_factor: expected 1, found {values['partial_rotary_factor']!r}")


def _rope_type(parameters: Mapping[str, Any]) -> Any:
    return parameters.get("rope_type", parameters.get("type", "default"))


def _rope_theta(values: Mapping[str, Any], source: str) -> float:
    """Return theta: at the top level, or inside rope_parameters as transformers 5 writes it."""
    parameters = values.get("rope_parameters")
    if parameters is None:
        return _number(values, "rope_theta", source, _ROPE_THETA)
    if not isinstance(parameters, Mapping):
        raise DataError(f"{source}: rope_parameters: expected an object, found {parameters!r}")
    if _rope_type(parameters) != "default":
        raise DataError(
            f"{source}: rope_parameters: rope_type: expected default (scaled rotary embeddings are not "
            f"supported), found {_rope_type(parameters)!r}"
        )
    if parameters.get("partial_rotary_factor") not in (None, 1, 1.0):
        raise DataError(
            f"{source}: rope_parameters: partial_rotary_factor: expected 1, "
            f"found {parameters['partial_rotary_factor']!r}"
        )
    nested = [key for key, value in parameters.items() if isinstance(value, Mapping)]
    if nested:
        raise DataError(f"{source}: rope_parameters: expected one set for all layers, found one for {nested[0]!r}")
    default = _number(values, "rope_theta", source, _ROPE_THETA)
    return _number(parameters, "rope_theta", f"{source}: rope_parameters", default)


def _integer(values: Mapping[str, Any], key: str, source: str, default: int | None = None) -> int:
    value = values.get(key)
    if value is None:
        if default is None:
            raise DataError(f"{source}: missing key {key}")
        return default
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise DataError(f"{source}: {key}: expected a whole number above 0, found {value!r}")
    return value


def _number(values: Mapping[str, Any], key: str, source: str, default: float) -> float:
    value = values.get(key)
    if value is None:
        return default
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        raise DataError(f"{source}: {key}: expected a number, found {value!r}")
    try:
        return float(value)
    except OverflowError:
        raise DataError(f"{source}: {key}: expected a finite number, found a whole number beyond it") from None


def _boolean(values: Mapping[str, Any], key: str, source: str, *, default: bool) -> bool:
    value = values.get(key)
    if value is None:
        return default
    if not isinstance(value, bool):
        raise DataError(f"{source}: {key}: expected true or false, found {value!r}")
    return value
