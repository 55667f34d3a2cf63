"""Recipes: what they hold, what beats them, and what a run with one leaves."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

import pytest

from anellm import cli, train
from anellm.config import ModelConfig, TrainConfig
from anellm.errors import ConfigError
from anellm.model import Model
from anellm.options import from_mapping
from anellm.recipes import load_recipe, notes, options_of_recipe, recipe_names

QUICK = ["--recipe", "gpt2-char", "--steps", "2", "--eval-windows", "2", "--sample-tokens", "3", "--device", "cpu"]


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("ANELLM_DEBUG", "ANELLM_DEVICE", "ANELLM_THREADS", "OMP_NUM_THREADS"):
        monkeypatch.delenv(name, raising=False)


def parse(*argv: str) -> TrainConfig:
    return cli.parse(TrainConfig, argv, "train", base=train.weaker_options)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("gpt2-shakespeare", {"batch_size": 4, "seq_len": 64, "steps": 40, "learning_rate": 1e-4, "weight_decay": 0.0,
                              "schedule": "constant", "warmup_steps": 0, "eval_interval": 10, "max_grad_norm": 0.0,
                              "adam_beta2": 0.999, "tokenizer": "gpt2"}),
        ("gpt2-char", {"batch_size": 12, "seq_len": 64, "steps": 2000, "learning_rate": 1e-3, "warmup_steps": 100,
                       "schedule": "cosine", "adam_beta2": 0.99, "weight_decay": 0.1, "tokenizer": "char"}),
        ("stories110m", {"batch_size": 1, "gradient_accumulation_steps": 10, "seq_len": 256, "learning_rate": 3e-4,
                         "max_grad_norm": 1.0, "compact_vocab": True}),
        ("stories15m", {"batch_size": 128, "gradient_accumulation_steps": 4, "seq_len": 256, "learning_rate": 5e-4,
                        "min_learning_rate": 0.0, "warmup_steps": 1000, "steps": 100000}),
    ],
)  # fmt: skip
def test_what_a_recipe_sets(name: str, expected: dict[str, Any]) -> None:
    config = parse("--recipe", name)
    assert config == TrainConfig.from_recipe(name)
    assert {key: getattr(config, key) for key in expected} == expected
    shape = ModelConfig.from_preset(config.preset or "")
    assert config.seq_len is not None
    assert config.seq_len <= shape.max_seq_len


def test_every_file_is_tested_above_and_has_only_options() -> None:
    assert recipe_names() == ("gpt2-char", "gpt2-shakespeare", "stories110m", "stories15m")
    for name in recipe_names():
        recipe = load_recipe(name)
        assert from_mapping(TrainConfig, recipe.options, name) == recipe.options
        assert recipe.about


def test_flags_and_config_file_beat_a_recipe_and_it_beats_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "c.toml"
    file.write_text("batch_size = 3\nsteps = 7\n")
    config = parse("--recipe", "gpt2-char", "--config", str(file), "--steps", "9")
    assert (config.batch_size, config.steps, config.seq_len) == (3, 9, 64)
    assert parse("--recipe", "gpt2-char", "--learning-rate", "1e-5").learning_rate == 1e-5
    monkeypatch.setenv("ANELLM_THREADS", "1")
    assert parse("--recipe", "gpt2-char").threads == 1  # no recipe says anything about the machine


def test_what_is_given_puts_away_what_it_excludes() -> None:
    assert parse("--recipe", "gpt2-shakespeare", "--model", "gpt2_124M.bin").preset is None
    config = parse("--recipe", "stories110m", "--model", "stories110M.bin")
    assert (config.preset, config.compact_vocab) == (None, False)
    assert parse("--recipe", "gpt2-char", "--epochs", "1").steps is None
    with pytest.raises(ConfigError, match="--steps and --epochs exclude each other"):
        parse("--recipe", "gpt2-char", "--epochs", "1", "--steps", "5")
    assert options_of_recipe({"recipe": None, "steps": 5}) == {}


@pytest.mark.parametrize("name", ["gpt2", "", "../presets", "gpt2-char.toml"])
def test_an_unknown_recipe_brings_the_list(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert train.main([f"--recipe={name}"]) == 2
    message = capsys.readouterr().err
    assert "--recipe: expected one of gpt2-char, gpt2-shakespeare, stories110m, stories15m" in message
    with pytest.raises(ConfigError, match="gpt2-char, gpt2-shakespeare"):
        TrainConfig.from_recipe(name)
    with pytest.raises(ConfigError, match="gpt2-char, gpt2-shakespeare"):
        load_recipe(name)


def test_a_config_file_has_no_recipe(tmp_path: Path) -> None:
    file = tmp_path / "c.toml"
    file.write_text('recipe = "gpt2-char"\n')
    with pytest.raises(ConfigError, match="unknown key 'recipe'"):
        parse("--config", str(file))


def test_a_run_leaves_the_resolved_options_which_repeat_it(capsys: pytest.CaptureFixture[str]) -> None:
    assert train.main([*QUICK, "--out", "a"]) == 0
    out = capsys.readouterr().out
    assert "recipe  nanoGPT's character model" in out
    saved = tomllib.loads(Path("a/config.toml").read_text())
    expected = {**load_recipe("gpt2-char").options, "steps": 2, "eval_windows": 2, "sample_tokens": 3}
    assert {key: saved[key] for key in expected} == expected
    assert "recipe" not in saved
    assert train.main(["--config", "a/config.toml", "--out", "b", "--quiet"]) == 0
    a, b = (Path(run, "step_00000002", "model.safetensors").read_bytes() for run in "ab")
    assert a == b


def test_a_resumed_run_keeps_its_own_options(capsys: pytest.CaptureFixture[str]) -> None:
    assert train.main([*QUICK, "--out", "a", "--batch-size", "2", "--quiet"]) == 0
    assert train.main(["--recipe", "gpt2-char", "--resume", "--out", "a", "--steps", "3"]) == 0
    assert tomllib.loads(Path("a/config.toml").read_text())["batch_size"] == 2
    assert "recipe" not in capsys.readouterr().out
    assert train.main([*QUICK, "--resume", "--out", "new", "--quiet"]) == 0
    assert tomllib.loads(Path("new/config.toml").read_text())["batch_size"] == 12


def test_random_weights_are_told(capsys: pytest.CaptureFixture[str]) -> None:
    small = ["--recipe", "gpt2-shakespeare", "--steps", "1", "--eval-windows", "1", "--seq-len", "8"]
    small += ["--sample-tokens", "2", "--tokenizer", "char", "--device", "cpu"]
    assert train.main([*small, "--preset", "gpt2-char", "--out", "a"]) == 0
    out = capsys.readouterr().out
    assert "from random weights; --model gpt2_124M.bin starts from OpenAI's" in out
    assert "step 1  sample:" in out
    assert train.main([*small, "--model", "a", "--out", "b"]) == 0
    assert "from random weights" not in capsys.readouterr().out


def test_the_text_that_comes_along_is_told() -> None:
    for name in ("stories15m", "stories110m"):
        assert "--data DIR with TinyStories" in notes(name, None, None)[1]
        assert notes(name, None, "d") == [load_recipe(name).about]


def test_the_text_that_comes_along_is_encoded_with_the_tokenizer_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    model = Model.from_preset("gpt2-char", seed=1, device="cpu", n_layers=1, dim=8, vocab_size=50257)
    model.save_pretrained("m")
    words = ["--recipe", "gpt2-shakespeare", "--model", "m", "--steps", "1", "--seq-len", "4", "--eval-windows", "1"]
    assert train.main([*words, "--sample-tokens", "0", "--device", "cpu", "--out", "r"]) == 0
    out = capsys.readouterr().out
    assert "shakespeare.txt: " in out
    # Longer pieces than those of the tokenizer that comes along, which has 1,024: fewer tokens.
    n = float(out.split("shakespeare.txt: ")[1].split(" k")[0])
    assert 250 < n < 400
