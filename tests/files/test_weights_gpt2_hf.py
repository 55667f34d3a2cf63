"""Hugging Face directories of GPT-2: Conv1D's (in, out), names with and without their prefix, no biases, padding."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gpt2files import SHAPE, gpt2_params
from modelfiles import SMALL, Params, message, random_params, read, same, survives
from safetensors.numpy import load_file, save_file

from anellm import checkpoint, generate, train, weights
from anellm.config import ModelConfig
from anellm.errors import CheckpointError, DataError, InvalidError
from anellm.model import Model

CONFIG = ModelConfig(**SHAPE)
PADDED = ModelConfig(**SHAPE, padded_vocab_size=128)
BARE = ModelConfig(**{**SHAPE, "bias": False}, gelu="erf")
MATRICES = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")


def stored(params: Params) -> Params:
    """Return parameters as transformers has them."""
    return {name: np.ascontiguousarray(a.T) if name.endswith(MATRICES) else a for name, a in params.items()}


def make(folder: Path, config: ModelConfig, tensors: Params, **changes: Any) -> Path:
    """Write a directory by hand."""
    folder.mkdir()
    values = {**config.to_hf(), **changes}
    (folder / "config.json").write_text(json.dumps(values), encoding="utf-8")
    save_file(tensors, folder / "model.safetensors")
    return folder


# ---- what is read and written ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("config", [CONFIG, PADDED, BARE, CONFIG.replace(hidden_dim=20)])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_written_and_read_back(tmp_path: Path, config: ModelConfig, dtype: str) -> None:
    params = {name: a.astype(np.float16).astype(np.float32) for name, a in gpt2_params(config).items()}
    weights.save_hf(tmp_path / "m", config, params, dtype)
    again, found = read(tmp_path / "m")
    assert again == config
    assert list(found) == list(params)
    for name, array in found.items():
        np.testing.assert_allclose(array, params[name], rtol=0 if dtype == "float32" else 4e-3)


def test_names_and_shapes_are_transformers(tmp_path: Path) -> None:
    params = gpt2_params(PADDED)
    weights.save_hf(tmp_path / "m", PADDED, params)
    found = load_file(tmp_path / "m" / "model.safetensors")
    expected = stored(params)
    expected["transformer.wte.weight"] = expected["transformer.wte.weight"][:11]
    assert found.keys() == expected.keys()
    for name, array in found.items():
        np.testing.assert_array_equal(array, expected[name])
    assert found["transformer.h.0.attn.c_attn.weight"].shape == (8, 24)
    values = json.loads((tmp_path / "m" / "config.json").read_text(encoding="utf-8"))
    assert (values["model_type"], values["architectures"], values["n_inner"]) == ("gpt2", ["GPT2LMHeadModel"], None)
    assert (values["activation_function"], values["padded_vocab_size"]) == ("gelu_new", 128)
    assert values["eos_token_id"] is None
    assert ModelConfig.from_preset("gpt2").to_hf()["eos_token_id"] == 50256


def test_without_biases_zeros_are_stored(tmp_path: Path) -> None:
    params = gpt2_params(BARE)
    assert not any(name.endswith(".bias") for name in params)
    weights.save_hf(tmp_path / "m", BARE, params)
    found = load_file(tmp_path / "m" / "model.safetensors")
    assert found.keys() == gpt2_params(CONFIG).keys()  # what transformers wants
    assert not any(array.any() for name, array in found.items() if name.endswith(".bias"))
    assert found["transformer.h.0.attn.c_attn.bias"].shape == (24,)
    values = json.loads((tmp_path / "m" / "config.json").read_text(encoding="utf-8"))
    assert (values["bias"], values["activation_function"]) == (False, "gelu")
    lean = {name: array for name, array in found.items() if not name.endswith(".bias")}
    assert same(read(make(tmp_path / "lean", BARE, lean))[1], params)
    found["transformer.ln_f.bias"][3] = 2
    folder = make(tmp_path / "bad", BARE, found)
    assert "tensor transformer.ln_f.bias: expected zeros, as config.json says" in message(folder)
    del values["bias"]  # without that word it is a model whose biases happen to be zeros
    config, again = read(make(tmp_path / "full", CONFIG, {**found}, activation_function="gelu"))
    assert config == CONFIG.replace(gelu="erf")
    assert again["transformer.ln_f.bias"][3] == 2


@pytest.mark.parametrize("prefix", [True, False])
@pytest.mark.parametrize("extra", [True, False])
def test_prefix_buffers_and_tied_head(tmp_path: Path, prefix: bool, extra: bool) -> None:
    params = gpt2_params(CONFIG)
    tensors = stored(params)
    if not prefix:
        tensors = {name.removeprefix("transformer."): array for name, array in tensors.items()}
    start = "transformer." if prefix else ""
    if extra:
        tensors["lm_head.weight"] = params["transformer.wte.weight"].copy()
        tensors[f"{start}h.0.attn.bias"] = np.tril(np.ones((1, 1, 6, 6), np.float32))
        tensors[f"{start}h.1.attn.bias"] = np.tril(np.ones((1, 1, 6, 6), np.uint8))
        tensors[f"{start}h.1.attn.masked_bias"] = np.array(-1e4, np.float32)
    config, found = read(make(tmp_path / "m", CONFIG, tensors))
    assert config == CONFIG
    assert same(found, params)


def test_another_head_is_ignored_with_a_warning(tmp_path: Path) -> None:
    params = gpt2_params(CONFIG)
    folder = make(tmp_path / "m", CONFIG, {**stored(params), "lm_head.weight": np.ones((11, 8), np.float32)})
    with pytest.warns(UserWarning, match=r"lm_head\.weight differs from transformer\.wte\.weight"):
        assert same(read(folder)[1], params)


def test_shards(tmp_path: Path) -> None:
    params = gpt2_params(PADDED)
    weights.save_hf(tmp_path / "m", PADDED, params, max_shard_bytes=2000)
    assert len(list((tmp_path / "m").glob("model-*.safetensors"))) > 3
    config, found = read(tmp_path / "m")
    assert config == PADDED
    assert same(found, params)


# ---- what is refused ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"model_type": "gpt_neo"}, "model_type: expected one of llama, qwen3, gpt2, found 'gpt_neo'"),
        ({"activation_function": "relu"}, "activation_function: expected one of gelu_new, gelu_pytorch_tanh, gelu"),
        ({"activation_function": ["gelu"]}, "activation_function: expected one of"),
        ({"scale_attn_weights": False}, "scale_attn_weights: expected true, found false"),
        ({"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx: expected false, found true"),
        ({"add_cross_attention": True}, "add_cross_attention: expected false, found true"),
        ({"tie_word_embeddings": False}, "tie_word_embeddings: expected true, found false"),
        ({"n_embd": None}, "missing key n_embd"),
        ({"n_layer": "2"}, "n_layer: expected a whole number above 0, found '2'"),
        ({"n_head": 3}, "dim: expected a multiple of n_heads=3"),
        ({"n_inner": 0}, "n_inner: expected a whole number above 0, found 0"),
        ({"n_positions": 7}, "tensor transformer.wpe.weight: shape: expected (7, 8) by config.json, found (6, 8)"),
        ({"n_inner": 16}, "h.0.mlp.c_fc.weight: shape: expected (8, 16) by config.json, found (8, 32)"),
        ({"vocab_size": 12}, "tensor transformer.wte.weight: shape: expected (12, 8)"),
        ({"padded_vocab_size": 10}, "padded_vocab_size: expected at least vocab_size=11, found 10"),
        ({"bias": 1}, "bias: expected true or false, found 1"),
        ({"layer_norm_epsilon": "x"}, "layer_norm_epsilon: expected a number, found 'x'"),
        ({"layer_norm_epsilon": -1}, "norm_eps: expected a finite number above 0"),
        ({"n_layer": 1}, "unexpected tensors for its config.json"),
        ({"n_layer": 3}, "missing tensors for its config.json: transformer.h.2."),
        ({"n_layer": 10**9}, "n_layer: expected at most one a tensor (28), found 1000000000"),
    ],
)
def test_config_that_does_not_fit(tmp_path: Path, changes: dict[str, Any], expected: str) -> None:
    folder = make(tmp_path / "m", CONFIG, stored(gpt2_params(CONFIG)), **changes)
    with pytest.raises(DataError) as caught:
        weights.load_pretrained(folder)
    assert str(folder) in str(caught.value)
    assert expected in str(caught.value)


def test_tensors_that_do_not_fit(tmp_path: Path) -> None:
    good = stored(gpt2_params(CONFIG))
    cases: dict[str, tuple[Params, str]] = {
        "twice": ({**good, "wpe.weight": good["transformer.wpe.weight"]}, "transformer.wpe.weight: expected once"),
        "not_transposed": (gpt2_params(CONFIG), "shape: expected (8, 24) by config.json, found (24, 8)"),
        "other": ({**good, "score.weight": good["transformer.ln_f.bias"]}, "unexpected tensors"),
        "lacks": ({k: v for k, v in good.items() if k != "transformer.ln_f.bias"}, "missing tensors"),
        "integers": ({**good, "transformer.ln_f.bias": np.zeros(8, np.uint8)}, "dtype: expected F32, F16 or BF16"),
    }
    for name, (tensors, expected) in cases.items():
        assert expected in message(make(tmp_path / name, CONFIG, tensors))


def test_a_llama_config_with_gpt2_weights_and_the_other_way_round(tmp_path: Path) -> None:
    llama = ModelConfig(**SMALL)
    folder = make(tmp_path / "a", llama, stored(gpt2_params(CONFIG)))
    assert "missing tensors for its config.json: model.embed_tokens.weight" in message(folder)
    folder = make(tmp_path / "b", CONFIG, random_params(llama))
    assert "missing tensors for its config.json: transformer." in message(folder)


def test_bit_flips_of_the_header(tmp_path: Path) -> None:
    folder = make(tmp_path / "m", CONFIG, stored(gpt2_params(CONFIG)))
    path = folder / "model.safetensors"
    data = path.read_bytes()
    rng = np.random.default_rng(3)
    for place in rng.integers(0, 8 * 2500, 150):
        damaged = bytearray(data)
        damaged[place // 8] ^= 1 << (place % 8)
        path.write_bytes(damaged)
        survives(folder, 4 << 20)


def test_padding_that_is_not_zero_is_not_written(tmp_path: Path) -> None:
    params = gpt2_params(PADDED)
    params["transformer.wte.weight"][-1, -1] = 1
    with pytest.raises(InvalidError, match="expected zeros from row 11 on"):
        weights.save_hf(tmp_path / "m", PADDED, params)
    assert not list(tmp_path.iterdir())


# ---- checkpoints ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("config", [CONFIG, PADDED, BARE])
def test_a_checkpoint_holds_transformers_tensors_and_comes_back(tmp_path: Path, config: ModelConfig) -> None:
    model = Model(config, device="cpu", seed=3)
    model.enable_training()
    for name, array in model.params.items():
        array[...] = gpt2_params(config)[name]
    for offset, moments in enumerate((model.moments_m, model.moments_v)):
        for name, array in moments.items():
            array[...] = np.abs(gpt2_params(config, 5 + offset)[name])
    folder = checkpoint.save(tmp_path, 1, model, {})
    assert load_file(folder / "model.safetensors")["transformer.h.0.attn.c_attn.weight"].shape == (8, 24)
    assert same(read(folder)[1], {name: np.array(array) for name, array in model.params.items()})
    other = Model(config, device="cpu", seed=4)
    other.enable_training()
    checkpoint.load_tensors(checkpoint.Checkpoint(folder, 1, {}), other)
    for ours, theirs in ((model.params, other.params), (model.moments_m, other.moments_m),
                         (model.moments_v, other.moments_v)):  # fmt: skip
        assert same({k: np.array(a) for k, a in ours.items()}, {k: np.array(a) for k, a in theirs.items()})
    if config is BARE:
        tensors = load_file(folder / "model.safetensors")
        tensors["transformer.ln_f.bias"][0] = 1
        save_file(tensors, folder / "model.safetensors")
        with pytest.raises(CheckpointError, match=r"transformer\.ln_f\.bias: expected zeros, as config\.json says"):
            checkpoint.load_tensors(checkpoint.Checkpoint(folder, 1, {}), other)


def test_training_by_characters_goes_on_and_writes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("text.txt").write_text("to be or not to be, that is the question\n" * 40, encoding="utf-8")
    words = ["--preset", "gpt2-char", "--data", "text.txt", "--tokenizer", "char", "--batch-size", "2", "--seq-len",
             "16", "--quiet", "--sample-tokens", "4", "--device", "cpu", "--schedule", "constant"]  # fmt: skip
    assert train.main([*words, "--steps", "4", "--out", "whole"]) == 0
    assert train.main([*words, "--steps", "2", "--out", "parts"]) == 0
    assert train.main(["--resume", "--out", "parts", "--steps", "4", "--quiet"]) == 0
    for name in ("model.safetensors", "optimizer.safetensors", "config.json", "tokenizer.json"):
        assert Path("parts/step_00000004", name).read_bytes() == Path("whole/step_00000004", name).read_bytes()
    found = weights.load_pretrained("whole").config
    assert (found.arch, found.bias, found.gelu) == ("gpt2", False, "erf")
    capsys.readouterr()
    assert generate.main(["--model", "whole", "--max-new-tokens", "5", "--no-stream", "--device", "cpu"]) == 0
