"""The verb evaluate: the numbers it gives, and what it refuses."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from anellm import evaluate, weights
from anellm.cli import VERBS
from anellm.config import ModelConfig
from anellm.model import Model
from anellm.tokenizer import Tokenizer

TEXT = "What light through yonder window breaks?\nIt is the east, and Juliet is the sun.\n<|endoftext|>\nArise! " * 9


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    """Return the shipped tokenizer."""
    return Tokenizer.shipped()


@pytest.fixture(scope="module")
def model(tokenizer: Tokenizer) -> Model:
    """Return a small random model with a few more tokens than the tokenizer knows."""
    vocab = tokenizer.vocab_size + 5
    config = ModelConfig(dim=24, hidden_dim=40, n_layers=2, n_heads=4, n_kv_heads=2, vocab_size=vocab, max_seq_len=32)
    model = Model(config, "cpu", seed=11)
    for array in model.params.values():
        array *= 5 if array.ndim == 2 else 1
    model.weights_changed()
    return model


@pytest.fixture
def hf(model: Model, tmp_path: Path) -> Path:
    """Return the model as a Hugging Face directory without a tokenizer."""
    model.save_pretrained(tmp_path / "hf")
    return tmp_path / "hf"


@pytest.fixture
def tokens(tmp_path: Path, tokenizer: Tokenizer) -> Path:
    """Return a raw token file."""
    tokenizer.encode_documents(TEXT).astype("<u2").tofile(tmp_path / "tokens.bin")
    return tmp_path / "tokens.bin"


def run(*args: object) -> tuple[int, dict[str, Any]]:
    """Run the verb in this process; returns its exit code and what --json wrote."""
    words = [str(a) for a in args]
    code = evaluate.main(words)
    path = Path(words[words.index("--json") + 1]) if "--json" in words else None
    return code, json.loads(path.read_text()) if path is not None and path.exists() else {}


def reference(model: Model, ids: np.ndarray, seq_len: int, windows: int) -> float:
    """Return the mean loss in float64, one window at a time, from the logits."""
    total = 0.0
    for w in range(windows):
        window = ids[w * seq_len : (w + 1) * seq_len + 1].astype(np.int32)
        logits = model.forward(window[None, :-1].copy())[0].astype(np.float64)
        top = logits.max(axis=1)
        lse = top + np.log(np.exp(logits - top[:, None]).sum(axis=1))
        total += float((lse - logits[np.arange(seq_len), window[1:]]).sum())
    return total / (windows * seq_len)


@pytest.mark.parametrize(("seq_len", "batch_size", "max_windows"), [(32, 8, 0), (7, 3, 0), (10, 4, 6), (32, 1, 1)])
def test_numbers(
    model: Model, hf: Path, tokens: Path, tmp_path: Path, seq_len: int, batch_size: int, max_windows: int
) -> None:
    ids = np.fromfile(tokens, "<u2")
    out = tmp_path / "out.json"
    args = ("--seq-len", seq_len, "--batch-size", batch_size, "--max-windows", max_windows, "--json", out)
    code, found = run("--model", hf, "--data", tokens, *args)
    assert code == 0
    windows = (len(ids) - 1) // seq_len
    windows = min(windows, max_windows) if max_windows else windows
    assert found["windows"] == windows
    assert found["tokens"] == windows * seq_len
    assert found["loss"] == pytest.approx(reference(model, ids, seq_len, windows), abs=1e-5)
    assert found["perplexity"] == pytest.approx(math.exp(found["loss"]))
    assert found["bits_per_byte"] is None  # without a tokenizer nobody knows the bytes
    assert found["seconds"] > 0
    assert found["tokens_per_s"] == pytest.approx(found["tokens"] / found["seconds"])
    assert (found["model"], found["data"], found["seq_len"]) == (str(hf), str(tokens), seq_len)


def test_bits_per_byte(hf: Path, tokens: Path, tmp_path: Path, tokenizer: Tokenizer) -> None:
    tokenizer.save(hf / "tokenizer.bin")
    _, found = run("--model", hf, "--data", tokens, "--seq-len", 20, "--json", tmp_path / "out.json")
    ids = np.fromfile(tokens, "<u2").tolist()
    n_bytes = len(tokenizer.decode_bytes(ids[: found["tokens"] + 1])) - len(tokenizer.decode_bytes(ids[:1]))
    assert found["bits_per_byte"] == pytest.approx(found["loss"] * found["tokens"] / math.log(2) / n_bytes)
    assert found["tokenizer_sha256"] == tokenizer.sha256


def test_text_and_other_formats_give_the_same(
    model: Model, hf: Path, tokens: Path, tmp_path: Path, tokenizer: Tokenizer
) -> None:
    out = ("--seq-len", 16, "--json", tmp_path / "out.json")
    _, expected = run("--model", hf, "--data", tokens, *out)
    (tmp_path / "text.txt").write_text(TEXT, encoding="utf-8")
    np.fromfile(tokens, "<u2").astype("<i4").tofile(tmp_path / "wide.bin")
    model.save_pretrained(tmp_path / "model.bin", format="llama2c")
    tokenizer.save(tmp_path / "tok.bin")
    for args in (
        ("--model", hf, "--data", tmp_path / "text.txt", "--tokenizer", tmp_path / "tok.bin"),
        ("--model", hf, "--data", tmp_path / "wide.bin", "--token-dtype", "int32"),
        ("--model", tmp_path / "model.bin", "--data", tokens),
    ):
        code, found = run(*args, *out)
        assert code == 0
        assert found["tokens"] == expected["tokens"]
        assert found["loss"] == pytest.approx(expected["loss"], rel=1e-12)


def test_result_line(hf: Path, tokens: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--model", hf, "--data", tokens)[0] == 0
    out = capsys.readouterr().out
    assert out.startswith("loss ")
    assert "windows of 32" in out  # the model's longest is the default
    assert "bits per byte" not in out


def test_refusals(
    model: Model, hf: Path, tokens: Path, tmp_path: Path, tokenizer: Tokenizer, capsys: pytest.CaptureFixture[str]
) -> None:
    np.fromfile(tokens, "<u2").astype("<i4").tofile(tmp_path / "wide.bin")
    np.full(100, model.config.vocab_size, "<u2").tofile(tmp_path / "beyond.bin")
    (tmp_path / "text.txt").write_text(TEXT, encoding="utf-8")
    small = ModelConfig(dim=8, hidden_dim=8, n_layers=1, n_heads=1, n_kv_heads=1, vocab_size=20, max_seq_len=8)
    Model(small, "cpu").save_pretrained(tmp_path / "small")
    tokenizer.save(tmp_path / "tok.bin")
    for args, code, expected in [
        ((), 2, "--model: needed"),
        (("--model", hf), 2, "--data: needed"),
        (("--model", hf, "--data", tokens, "--seq-len", 33), 2, "max_seq_len 32, found 33"),
        (("--model", hf, "--data", tokens, "--seq-len", 0), 2, "--seq-len"),
        (("--model", hf, "--data", tokens, "--batch-siz", 1), 2, "--batch-size"),
        (("--model", tmp_path / "absent", "--data", tokens), 4, "absent: expected a model"),
        (("--model", hf, "--data", tmp_path / "absent.bin"), 4, "absent.bin"),
        (("--model", hf, "--data", tmp_path / "wide.bin"), 4, "--token-dtype int32"),
        (("--model", hf, "--data", tmp_path / "beyond.bin"), 4, f"found {model.config.vocab_size}"),
        (("--model", hf, "--data", tmp_path / "text.txt"), 2, "tokenizer"),
        (("--model", tmp_path / "small", "--data", tokens, "--tokenizer", tmp_path / "tok.bin"), 4, "another model"),
        (("--model", hf, "--data", tokens, "--device", "gpu"), 2, "--device"),
    ]:
        found, _ = run(*args)
        error = capsys.readouterr().err
        assert (found, error.count("\n")) == (code, 1), error
        assert expected in error


def test_json_is_not_written_on_failure(hf: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    assert run("--model", hf, "--data", tmp_path / "absent.bin", "--json", out)[0] == 4
    assert not out.exists()


def test_damaged_model(hf: Path, tokens: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = hf / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    assert run("--model", hf, "--data", tokens)[0] == 4
    assert str(path) in capsys.readouterr().err


@pytest.mark.parametrize("command", [["anellm.evaluate"], ["anellm", "evaluate"]])
def test_as_a_command(command: list[str], hf: Path, tokens: Path, tmp_path: Path) -> None:
    args = ["--model", hf, "--data", tokens, "--max-windows", "2", "--json", tmp_path / "out.json"]
    done = subprocess.run([sys.executable, "-m", *command, *args], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert json.loads((tmp_path / "out.json").read_text())["tokens"] == 64


def test_summary_is_the_one_in_the_list_of_verbs() -> None:
    assert VERBS["evaluate"][0] == evaluate.__name__
    assert evaluate.VERB.name == "evaluate"


@pytest.mark.parametrize(("windows", "seq_len", "loss"), [(20, 512, 1.3079150621347748), (33, 97, 1.4351968311078038)])
def test_stories260k(data_dir: Path, tmp_path: Path, windows: int, seq_len: int, loss: float) -> None:
    """Losses that PyTorch gave in float64, with the model of tests/golden/make_goldens.py; from either format."""
    folder = data_dir / "weights" / "stories260K"
    data = data_dir / "text" / "tinystories" / "sample_val.tok512.uint16.bin"
    for model in (folder, folder / "stories260K.bin"):
        args = ("--max-windows", windows, "--seq-len", seq_len, "--json", tmp_path / "out.json")
        code, found = run("--model", model, "--data", data, *args)
        assert code == 0
        assert found["loss"] == pytest.approx(loss, abs=2e-6)
        assert found["tokens"] == windows * seq_len
    assert weights.load_pretrained(folder).tokenizer_path is None
