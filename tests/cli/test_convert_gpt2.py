"""The verb convert for GPT-2: every format into every other, what a format cannot hold, and its tokenizer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from anellm import convert, evaluate, generate, tokenizer_llmc, train, weights
from anellm.config import ModelConfig
from anellm.model import Model
from anellm.tokenizer import Tokenizer
from anellm.tokenizer_json import GPT2_VOCAB_SIZE, JsonTokenizer

SHAPE: dict[str, Any] = {"arch": "gpt2", "dim": 8, "n_layers": 2, "n_heads": 2, "vocab_size": 11, "max_seq_len": 16}
LLMC = tuple(weights.LLMC_VERSIONS)


@pytest.fixture(autouse=True)
def _there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def make(path: str, kind: str = "hf", **changes: Any) -> Model:
    model = Model(ModelConfig(**{**SHAPE, "bias": True, **changes}), device="cpu", seed=5)
    model.save_pretrained(path, kind)  # type: ignore[arg-type]
    return model


def run(*argv: str) -> dict[str, Any]:
    assert convert.main([*argv, "--json", "o.json"]) == 0
    return dict(json.loads(Path("o.json").read_text(encoding="utf-8")))


def refused(capsys: pytest.CaptureFixture[str], code: int, *argv: str) -> str:
    assert convert.main([*argv]) == code
    return capsys.readouterr().err


@pytest.mark.parametrize("padded", [0, 128])
def test_every_format_into_every_other(padded: int) -> None:
    model = make("hf", padded_vocab_size=padded)
    for kind in LLMC:
        values = run("--model", "hf", "--out", f"{kind}.bin", "--format", kind)
        assert values["dtype"] == ("bfloat16" if kind == "llmc-v5" else "float32")
        assert (values["max_logit_difference"] > 0) == (kind == "llmc-v5")
        for other in ("hf", *LLMC):
            values = run("--model", f"{kind}.bin", "--out", f"{kind}-{other}", "--format", other)
            rounds = other == "llmc-v5" != kind  # what was rounded stays as it is
            assert (values["max_logit_difference"] > 0) == rounds
            found = dict(weights.load_pretrained(f"{kind}-{other}").tensors)
            for name, array in found.items():
                rows = slice(11) if name == "transformer.wte.weight" else slice(None)
                atol = 1e-2 if "llmc-v5" in (kind, other) else 0
                np.testing.assert_allclose(array[rows], model.params[name][rows], rtol=0, atol=atol)
    assert Path("llmc.bin").read_bytes() == Path("llmc-v1-llmc").read_bytes()
    assert Path("llmc-v1.bin").read_bytes() == Path("llmc-llmc-v1").read_bytes()


def test_what_a_format_cannot_hold(capsys: pytest.CaptureFixture[str]) -> None:
    make("gpt2")
    make("erf", gelu="erf")
    make("bare", bias=False)
    llama = ModelConfig(dim=8, hidden_dim=16, n_layers=1, n_heads=2, vocab_size=11, max_seq_len=16)
    Model(llama, device="cpu", seed=1).save_pretrained("llama")
    for source, kind, part in (
        ("gpt2", "llama2c", "llama2.c version 0 cannot express this model: arch is 'gpt2', not 'llama'"),
        ("gpt2", "llama2c-v1", "llama2.c version 1 cannot express this model: arch is 'gpt2', not 'llama'"),
        ("llama", "llmc", "llm.c version 3 cannot express this model: arch is 'llama', not 'gpt2'"),
        ("llama", "llmc-v1", "llm.c version 1 cannot express this model: arch is 'llama', not 'gpt2'"),
        ("erf", "llmc", "gelu is 'erf', not 'tanh'. Save it as a Hugging Face directory"),
        ("bare", "llmc-v5", "it has no biases. Save it as a Hugging Face directory"),
    ):
        assert part in refused(capsys, 2, "--model", source, "--out", "x", "--format", kind)
        assert not Path("x").exists()
    for kind, dtype in (("llmc", "float32"), ("llmc-v5", "bfloat16")):
        words = ("--model", "gpt2", "--out", "x", "--format", kind, "--dtype", "float16")
        assert f"--dtype float16: a {kind} file holds {dtype}" in refused(capsys, 2, *words)
    for bare in ("erf", "bare"):
        assert run("--model", bare, "--out", f"{bare}2", "--format", "hf")["max_logit_difference"] == 0


def test_residual_scale() -> None:
    model = make("hf")
    run("--model", "hf", "--out", "x.bin", "--format", "llmc", "--residual-scale", "0.5")
    for name, array in weights.load_pretrained("x.bin").tensors:
        factor = np.float32(0.5 if "c_proj" in name else 1)
        np.testing.assert_array_equal(array[:11], (model.params[name] * factor)[:11])


def test_llmc_tables_go_along_as_tokenizer_json() -> None:
    gpt2 = JsonTokenizer.gpt2()
    Path("m").mkdir()
    make("m/gpt2_124M.bin", "llmc", dim=2, n_heads=1, vocab_size=GPT2_VOCAB_SIZE)
    Path("m/gpt2_tokenizer.bin").write_bytes(tokenizer_llmc.to_bytes(gpt2))
    values = run("--model", "m/gpt2_124M.bin", "--out", "hf", "--format", "hf")
    assert values["tokenizer"] == "hf/tokenizer.json"
    assert Path("hf/tokenizer.json").read_bytes() == gpt2.to_bytes()


def test_gpt2s_vocabulary_needs_no_tokenizer_beside_it(capsys: pytest.CaptureFixture[str]) -> None:
    make("gpt2.bin", "llmc-v1", dim=2, n_heads=1, vocab_size=GPT2_VOCAB_SIZE)
    words = ["--model", "gpt2.bin", "--max-new-tokens", "3", "--no-stream", "--device", "cpu"]
    assert generate.main([*words, "--prompt", "Hello, world!"]) == 0
    assert generate.main(words) == 0
    Path("t.txt").write_text("Hello, world! " * 90, encoding="utf-8")
    assert evaluate.main(["--model", "gpt2.bin", "--data", "t.txt", "--seq-len", "8", "--device", "cpu"]) == 0
    words = ["--model", "gpt2.bin", "--data", "t.txt", "--seq-len", "8", "--batch-size", "1", "--steps", "1",
             "--sample-tokens", "2", "--quiet", "--device", "cpu", "--out", "run"]  # fmt: skip
    assert train.main(words) == 0
    assert JsonTokenizer.from_file("run/step_00000001/tokenizer.json").is_gpt2()
    make("other.bin", "llmc-v1", vocab_size=GPT2_VOCAB_SIZE - 1, dim=2, n_heads=1)
    capsys.readouterr()
    assert generate.main(["--model", "other.bin", "--prompt", "x", "--device", "cpu"]) != 0
    assert "tokenizer" in capsys.readouterr().err
    Tokenizer.shipped().save("tokenizer.bin")  # one that lies there is what is meant
    assert generate.main(["--model", "gpt2.bin", "--prompt", "x", "--max-new-tokens", "1", "--device", "cpu"]) == 0
