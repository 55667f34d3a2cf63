"""Model shapes: presets, checks, and Hugging Face's config.json."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from anellm._ffi import check, lib
from anellm.config import ModelConfig, preset_names
from anellm.errors import ConfigError, DataError, InvalidError
from anellm.model import _c_config as c_config
from anellm.model import tensor_table

TINY: dict[str, Any] = {
    "dim": 16,
    "hidden_dim": 24,
    "n_layers": 1,
    "n_heads": 4,
    "n_kv_heads": 2,
    "vocab_size": 32,
    "max_seq_len": 8,
}


# Parameters as published with each model: llama2.c's files, the models' Hugging Face pages, Touvron et al. 2023.
@pytest.mark.parametrize(
    ("name", "n_params"),
    [
        ("stories260k", 260_032),
        ("stories15m", 15_191_712),
        ("stories42m", 41_689_600),
        ("stories110m", 109_529_856),
        ("smollm2-135m", 134_515_008),
        ("qwen3-0.6b", 596_049_920),
        ("llama7b", 6_738_415_616),
        ("gpt2", 124_439_808),
        ("gpt2-medium", 354_823_168),
        ("gpt2-large", 774_030_080),
        ("gpt2-xl", 1_557_611_200),
    ],
)
def test_presets_have_their_published_size(name: str, n_params: int) -> None:
    assert ModelConfig.from_preset(name).n_params() == n_params


@pytest.mark.parametrize("name", preset_names())
def test_every_preset_travels(name: str) -> None:
    config = ModelConfig.from_preset(name)
    assert ModelConfig.from_dict(config.to_dict()) == config
    if config.arch == "llama":
        assert ModelConfig.from_hf(config.to_hf()) == config
    table = tensor_table(config)
    padding = (config.padded_vocab_size - config.vocab_size) * config.dim
    assert sum(math.prod(t.shape) for t in table) == config.n_params() + padding


def test_flops_are_as_defined() -> None:
    config = ModelConfig.from_preset("stories15m")
    weights = config.n_params() - 13 * 288  # the norms multiply no matrix; the tied table counts as the classifier
    assert config.flops_per_token(256) == 6 * weights + 6 * 6 * 288 * 256
    untied = config.replace(tie_embeddings=False)
    assert untied.flops_per_token(256) == config.flops_per_token(256)


def test_defaults_follow_from_the_rest() -> None:
    config = ModelConfig(dim=16, hidden_dim=24, n_layers=1, n_heads=4, vocab_size=32, max_seq_len=8)
    assert (config.n_kv_heads, config.head_dim) == (4, 4)
    given_none: Any = None
    config = ModelConfig(**{**TINY, "head_dim": given_none, "n_kv_heads": None})
    assert (config.n_kv_heads, config.head_dim) == (4, 4)
    assert ModelConfig(**TINY, head_dim=10).q_dim == 40


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dim": 0}, "dim: expected 1 to"),
        ({"n_heads": 0}, "n_heads: expected 1 to"),
        ({"n_layers": -1}, "n_layers: expected 1 to"),
        ({"vocab_size": 2**31}, "vocab_size: expected 1 to 2147483647, found 2147483648"),
        ({"hidden_dim": 1.5}, "hidden_dim: expected a whole number, found 1.5"),
        ({"max_seq_len": True}, "max_seq_len: expected a whole number"),
        ({"dim": 18}, "dim: expected a multiple of n_heads=4"),
        ({"dim": 12}, "head_dim: expected an even number"),
        ({"n_kv_heads": 3}, "n_kv_heads: expected a divisor of n_heads=4, found 3"),
        ({"norm_eps": 0.0}, "norm_eps: expected a finite number above 0"),
        ({"rope_theta": float("nan")}, "rope_theta: expected a finite"),
        ({"rope_theta": "x"}, "rope_theta: expected a number"),
        ({"tie_embeddings": 1}, "tie_embeddings: expected true or false"),
        ({"arch": "gpt3"}, "arch: expected one of llama, gpt2, found 'gpt3'"),
        ({"dims": 3}, "unknown key 'dims'; did you mean dim?"),
    ],
)
def test_impossible_shapes_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message.replace("?", r"\?").replace(".", r"\.")):
        ModelConfig.from_dict({**TINY, **change})


GPT2: dict[str, Any] = {"arch": "gpt2", "dim": 16, "n_layers": 2, "n_heads": 4, "vocab_size": 30, "max_seq_len": 8}


def test_a_gpt2_by_default() -> None:
    config = ModelConfig.from_dict(GPT2)
    assert (config.hidden_dim, config.n_kv_heads, config.head_dim, config.padded_vocab_size) == (64, 4, 4, 30)
    assert (config.bias, config.gelu, config.norm_eps, config.tie_embeddings) == (False, "tanh", 1e-5, True)
    assert ModelConfig.from_dict({**GPT2, "n_heads": 16}).head_dim == 1  # no rotary embedding that turns pairs
    names = [t.name for t in tensor_table(config.replace(bias=True))]
    layer = ["ln_1", "attn.c_attn", "attn.c_proj", "ln_2", "mlp.c_fc", "mlp.c_proj"]
    parts = [*(f"h.{i}.{name}" for i in range(2) for name in layer), "ln_f"]
    both = [f"transformer.{part}.{kind}" for part in parts for kind in ("weight", "bias")]
    assert names == ["transformer.wte.weight", "transformer.wpe.weight", *both]
    assert [t.name for t in tensor_table(config)] == [n for n in names if n.endswith("weight")]


@pytest.mark.parametrize("bias", [False, True])
def test_flops_and_size_of_a_gpt2(bias: bool) -> None:
    config = ModelConfig.from_dict({**GPT2, "bias": bias, "padded_vocab_size": 128})
    table = tensor_table(config)
    matrices = sum(math.prod(t.shape) for t in table if t.kind == "matrix")
    assert matrices == 2 * 12 * 16 * 16
    assert config.flops_per_token(8) == 6 * (matrices + 30 * 16) + 6 * 2 * 16 * 8
    vectors = sum(math.prod(t.shape) for t in table if t.kind == "vector")
    assert config.n_params() == matrices + vectors + (30 + 8) * 16
    assert config.n_params_without_embeddings() == matrices + vectors


def test_padding_follows_the_vocabulary() -> None:
    config = ModelConfig.from_preset("gpt2")
    assert (config.vocab_size, config.padded_vocab_size) == (50257, 50304)
    assert config.replace(vocab_size=1000).padded_vocab_size == 1024
    assert config.replace(vocab_size=1000, padded_vocab_size=1001).padded_vocab_size == 1001
    assert config.replace(max_seq_len=96).padded_vocab_size == 50304
    assert ModelConfig.from_preset("gpt2", vocab_size=130).padded_vocab_size == 256
    assert ModelConfig.from_preset("gpt2-char").padded_vocab_size == 65
    assert ModelConfig.from_preset("gpt2-char", vocab_size=66).padded_vocab_size == 66
    assert ModelConfig(**TINY).replace(vocab_size=33).padded_vocab_size == 33
    with pytest.raises(ConfigError, match="vocab_size: expected a whole number, found 'x'"):
        config.replace(vocab_size="x")


@pytest.mark.parametrize(
    ("base", "change", "message"),
    [
        (TINY, {"bias": True}, "bias: expected false with arch llama, found true"),
        (TINY, {"gelu": "erf"}, "gelu: expected tanh with arch llama, found erf"),
        (TINY, {"padded_vocab_size": 64}, "padded_vocab_size: expected 32 with arch llama, found 64"),
        (GPT2, {"n_kv_heads": 2}, "n_kv_heads: expected 4 with arch gpt2, found 2"),
        (GPT2, {"head_dim": 8}, "head_dim: expected 4 with arch gpt2, found 8"),
        (GPT2, {"head_dim": 4, "dim": 18}, "dim: expected a multiple of n_heads=4, found 18"),
        (GPT2, {"dim": 18}, "dim: expected a multiple of n_heads=4"),
        (GPT2, {"dim": 0, "head_dim": 4}, "dim: expected 1 to 2147483647, found 0"),
        (GPT2, {"rope_theta": 500.0}, "rope_theta: expected 10000.0 with arch gpt2, found 500.0"),
        (GPT2, {"tie_embeddings": False}, "tie_embeddings: expected true with arch gpt2, found false"),
        (GPT2, {"qk_norm": True}, "qk_norm: expected false with arch gpt2, found true"),
        (GPT2, {"padded_vocab_size": 29}, "padded_vocab_size: expected at least vocab_size=30, found 29"),
        (GPT2, {"padded_vocab_size": -1}, "padded_vocab_size: expected 1 to 2147483647, found -1"),
        (GPT2, {"gelu": "relu"}, "gelu: expected one of tanh, erf, found 'relu'"),
        (GPT2, {"bias": 1}, "bias: expected true or false, found 1"),
        (GPT2, {"norm_eps": -1.0}, "norm_eps: expected a finite number above 0"),
    ],
)
def test_what_an_architecture_does_not_have_is_refused(base: dict[str, Any], change: Any, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        ModelConfig.from_dict({**base, **change})
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("base", "field", "value", "message"),
    [
        (TINY, "arch", 2, "arch = 2, must be 0..1"),
        (TINY, "bias", 1, "bias = 1, must be 0"),
        (TINY, "gelu", 1, "gelu = 1, must be 0"),
        (TINY, "padded_vocab_size", 64, "padded_vocab_size = 64, must be 0 or vocab_size = 32"),
        (TINY, "head_dim", 3, "head_dim = 3, must be even"),
        (TINY, "rope_theta", 0.0, "rope_theta = 0, must be >= 1"),
        (GPT2, "bias", 2, "bias = 2, must be 0..1"),
        (GPT2, "gelu", -1, "gelu = -1, must be 0..1"),
        (GPT2, "padded_vocab_size", 29, "padded_vocab_size = 29, must be 30.."),
        (GPT2, "n_kv_heads", 2, "n_kv_heads = 2, must be n_heads = 4"),
        (GPT2, "head_dim", 8, "must make up dim = 16"),
        (GPT2, "tie_embeddings", 0, "tie_embeddings = 0, must be 1"),
        (GPT2, "qk_norm", 1, "qk_norm = 1, must be 0"),
        (GPT2, "rope_theta", float("nan"), "rope_theta = nan, must be 0"),
        (GPT2, "norm_eps", 2.0, "norm_eps = 2, must be 0..1"),
    ],
)
def test_the_core_refuses_the_same(base: dict[str, Any], field: str, value: Any, message: str) -> None:
    c = c_config(ModelConfig.from_dict(base))
    c.padded_vocab_size = 0  # as good as vocab_size
    check(lib.anellm_config_check(c))
    setattr(c, field, value)
    with pytest.raises(InvalidError, match=message.replace(".", r"\.")):
        check(lib.anellm_config_check(c))


def test_names_are_checked() -> None:
    with pytest.raises(ConfigError, match=r"unknown name 'stories15'; did you mean stories15m\?"):
        ModelConfig.from_preset("stories15")
    with pytest.raises(ConfigError, match=r"preset tiny: unknown key 'layers'; did you mean n_layers\?"):
        ModelConfig.from_preset("tiny", layers=3)
    with pytest.raises(ConfigError, match="missing dim, hidden_dim"):
        ModelConfig.from_dict({})
    with pytest.raises(ConfigError, match="missing dim, n_layers"):
        ModelConfig.from_dict({"arch": "gpt2"})


HF: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": 32,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
}


def test_defaults_of_transformers() -> None:
    config = ModelConfig.from_hf(HF)
    assert (config.n_kv_heads, config.head_dim, config.max_seq_len) == (4, 4, 2048)
    assert (config.norm_eps, config.rope_theta, config.tie_embeddings, config.qk_norm) == (1e-6, 10000.0, False, False)
    config = ModelConfig.from_hf({**HF, "model_type": "qwen3", "num_key_value_heads": None, "rope_theta": 5})
    assert (config.head_dim, config.max_seq_len, config.qk_norm, config.rope_theta) == (128, 32768, True, 5.0)


@pytest.mark.parametrize(
    "change",
    [
        {"rope_theta": 5e5},
        {"rope_parameters": {"rope_theta": 5e5, "rope_type": "default"}},
        {"rope_parameters": {"rope_theta": 5e5}, "rope_theta": 1.0},
        {"rope_theta": 500000, "rope_scaling": {"rope_type": "default"}, "rope_parameters": None},
        {"rope_theta": 5e5, "sliding_window": 4096, "use_sliding_window": False, "layer_types": ["full_attention"]},
    ],
)
def test_where_theta_may_stand(change: dict[str, Any]) -> None:
    assert ModelConfig.from_hf({**HF, **change}).rope_theta == 5e5


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "mistral"}, "model_type: expected one of llama, qwen3, gpt2, found 'mistral'"),
        ({"model_type": None}, "model_type"),
        ({"attention_bias": True}, "attention_bias: expected false"),
        ({"mlp_bias": True}, "mlp_bias: expected false"),
        ({"mlp_bias": 1}, "mlp_bias: expected true or false, found 1"),
        ({"hidden_act": "gelu"}, "hidden_act: expected silu, found 'gelu'"),
        ({"rope_scaling": {"type": "linear", "factor": 2}}, "rope_scaling: expected null"),
        ({"rope_scaling": "x"}, "rope_scaling: expected null"),
        ({"rope_parameters": {"rope_type": "llama3"}}, "rope_type: expected default"),
        ({"rope_parameters": {"full_attention": {"rope_theta": 1}}}, "one set for all layers"),
        ({"rope_parameters": {"rope_theta": 1, "partial_rotary_factor": 0.5}}, "partial_rotary_factor: expected 1"),
        ({"rope_parameters": []}, "rope_parameters: expected an object"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor: expected 1"),
        ({"sliding_window": 4096}, "sliding_window: expected null"),
        ({"use_sliding_window": True}, "use_sliding_window: expected false"),
        ({"layer_types": ["sliding_attention"]}, "layer_types: expected only full_attention"),
        ({"layer_types": 3}, "layer_types"),
        ({"hidden_size": None}, "missing key hidden_size"),
        ({"hidden_size": "16"}, "hidden_size: expected a whole number above 0, found '16'"),
        ({"hidden_size": 10**400}, "dim: expected 1 to"),
        ({"num_attention_heads": 0}, "num_attention_heads: expected a whole number above 0"),
        ({"num_key_value_heads": 3}, "n_kv_heads: expected a divisor"),
        ({"rms_norm_eps": "x"}, "rms_norm_eps: expected a number"),
        ({"rms_norm_eps": 10**400}, "rms_norm_eps: expected a finite number"),
        ({"rope_theta": -1}, "rope_theta: expected a finite number above 0"),
    ],
)
def test_what_is_not_supported_is_named(change: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError) as caught:
        ModelConfig.from_hf({**HF, **change}, source="m/config.json")
    assert str(caught.value).startswith("m/config.json: ")
    assert message in str(caught.value)


anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=5), inner, max_size=2),
    max_leaves=4,
)


@example("model_type", [])
@given(st.sampled_from([*ModelConfig(**TINY).to_hf(), "rope_scaling", "rope_parameters", "layer_types"]), anything)
def test_a_hostile_config_gives_a_shape_or_a_data_error(key: str, value: Any) -> None:
    try:
        config = ModelConfig.from_hf({**ModelConfig(**TINY).to_hf(), key: value})
    except DataError:
        return
    config.validate()
