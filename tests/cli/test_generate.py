"""The verb generate: what it writes, where it stops, and what it refuses."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from anellm import checkpoint, generate
from anellm.config import ModelConfig
from anellm.model import Model
from anellm.tokenizer import Tokenizer

PROMPT = "Romeo, thou art"


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    """Return the shipped tokenizer."""
    return Tokenizer.shipped()


@pytest.fixture(scope="module")
def model(tokenizer: Tokenizer) -> Model:
    """Return a small random model with a few more tokens than the tokenizer knows."""
    vocab = tokenizer.vocab_size + 5
    shape = {"dim": 24, "hidden_dim": 40, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "max_seq_len": 48}
    # A separate classifier: a tied one of random weights mostly repeats the token it has just seen.
    config = ModelConfig(**shape, vocab_size=vocab, tie_embeddings=False)
    model = Model(config, "cpu", seed=12)
    for array in model.params.values():
        array *= 5 if array.ndim == 2 else 1
    model.weights_changed()
    return model


@pytest.fixture
def hf(model: Model, tokenizer: Tokenizer, tmp_path: Path) -> Path:
    """Return the model as a Hugging Face directory with its tokenizer."""
    model.save_pretrained(tmp_path / "hf")
    tokenizer.save(tmp_path / "hf" / "tokenizer.bin")
    return tmp_path / "hf"


def run(*args: object) -> tuple[int, dict[str, Any]]:
    """Run the verb in this process; returns its exit code and what --json wrote."""
    words = [str(a) for a in args]
    code = generate.main(words)
    path = Path(words[words.index("--json") + 1]) if "--json" in words else None
    return code, json.loads(path.read_text()) if path is not None and path.exists() else {}


def test_greedy(
    model: Model, tokenizer: Tokenizer, hf: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Ids and text without the prompt; the screen shows the prompt before them."""
    args = ("--model", hf, "--prompt", PROMPT, "--temperature", 0, "--max-new-tokens", 20)
    code, found = run(*args, "--json", tmp_path / "out.json")
    assert code == 0
    prompt = tokenizer.encode(PROMPT)
    assert found["ids"] == model.generate(prompt, 20, temperature=0)
    assert len(set(found["ids"])) > 5
    assert found["text"] == tokenizer.decode([*prompt, *found["ids"]])[len(PROMPT) :]
    assert (found["prompt"], found["finish_reason"]) == (PROMPT, "length")
    shown = capsys.readouterr()
    assert shown.out == f"{PROMPT}{found['text']}\n"
    assert "20 tokens in" in shown.err
    assert run(*args, "--no-stream")[0] == 0
    assert capsys.readouterr().out == shown.out


def test_without_a_prompt_it_starts_from_bos(model: Model, tokenizer: Tokenizer, hf: Path, tmp_path: Path) -> None:
    _, found = run("--model", hf, "--temperature", 0, "--max-new-tokens", 9, "--json", tmp_path / "out.json")
    assert found["ids"] == model.generate([tokenizer.bos_id], 9, temperature=0)
    assert len(found["ids"]) == 9
    assert found["text"] == tokenizer.decode([tokenizer.bos_id, *found["ids"]])
    assert found["prompt"] == ""


def test_every_sampling_flag_does_something(hf: Path, tmp_path: Path) -> None:
    def text(*args: object) -> str:
        base = ("--model", hf, "--temperature", 2, "--top-p", 1, "--max-new-tokens", 30)
        _, found = run(*base, *args, "--json", tmp_path / "out.json")
        return str(found["ids"])

    assert text() == text("--seed", 1) == text("--top-k", 0, "--min-p", 0)
    greedy = text("--temperature", 0)
    assert text("--top-k", 1) == greedy
    assert text("--top-p", 1e-6) == greedy
    assert text("--min-p", 1) == greedy
    others = [text(), text("--seed", 2), text("--temperature", 0.3), text("--top-k", 3), text("--top-p", 0.2), greedy]
    assert len(set(others)) == len(others)


def test_weights(hf: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Compressed weights are named in the summary and in the JSON, and write what Model.compress() writes."""
    args = ("--model", hf, "--temperature", 0, "--max-new-tokens", 20, "--json", tmp_path / "out.json")
    _, plain = run(*args)
    assert "20 tokens in" in capsys.readouterr().err
    assert plain["weights"] == "fp32"
    for weights in ("fp32", "bf16", "int8"):
        code, found = run(*args, "--weights", weights)
        assert (code, found["weights"]) == (0, weights)
        assert f"tokens/s, {weights} weights" in capsys.readouterr().err
        model = Model.from_pretrained(hf, "cpu")
        model.compress(weights)
        assert found["ids"] == model.generate([1], 20, temperature=0)
        assert (found["ids"] == plain["ids"]) or weights != "fp32"


def test_samples(tokenizer: Tokenizer, hf: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    args = ("--model", hf, "--max-new-tokens", 12, "--temperature", 1.5, "--json", tmp_path / "out.json")
    _, one = run(*args)
    _, three = run(*args, "--num-samples", 3)
    assert "samples" not in one
    assert len({str(s["ids"]) for s in three["samples"]}) == 3
    assert three["ids"] == three["samples"][0]["ids"] == one["ids"]  # the first does not depend on how many follow
    for sample in three["samples"]:
        assert sample["text"] == tokenizer.decode([tokenizer.bos_id, *sample["ids"]])
    assert "--- 2 of 3\n" in capsys.readouterr().out


def test_stop_text(hf: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    args = ("--model", hf, "--temperature", 0, "--max-new-tokens", 30, "--json", tmp_path / "out.json")
    _, free = run(*args)
    stop = free["text"][8:11]
    capsys.readouterr()
    _, found = run(*args, "--stop", stop)
    assert found["text"] == free["text"].split(stop)[0]
    assert found["finish_reason"] == "stop"
    assert found["ids"] == free["ids"][: len(found["ids"])]
    assert capsys.readouterr().out == found["text"] + "\n"


def test_context_is_full(model: Model, hf: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _, found = run("--model", hf, "--max-new-tokens", 1000, "--seed", 3, "--json", tmp_path / "out.json")
    assert found["finish_reason"] == "context"
    assert len(found["ids"]) == model.config.max_seq_len
    assert "context of 48 tokens was full" in capsys.readouterr().err


def test_prompt_file(tokenizer: Tokenizer, hf: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "prompt.txt"
    path.write_text("To be,\nor not\n", encoding="utf-8")
    args = ("--model", hf, "--max-new-tokens", 3, "--json", tmp_path / "out.json")
    code, found = run(*args, "--prompt-file", path)
    assert (code, found["prompt"]) == (0, "To be,\nor not\n")
    assert found == {**run(*args, "--prompt", "To be,\nor not\n")[1], "seconds": found["seconds"]}
    assert capsys.readouterr().out.startswith("To be,\nor not\n")
    path.write_bytes(b"\xff\xfe")
    assert run(*args, "--prompt-file", path)[0] == 4
    assert run(*args, "--prompt-file", tmp_path / "absent")[0] == 4


def test_tokenizer_of_a_run(model: Model, tokenizer: Tokenizer, hf: Path, tmp_path: Path) -> None:
    """A run is its best or newest checkpoint; the tokenizer is the checkpoint's, or lies in the run."""
    args = ("--temperature", 0, "--max-new-tokens", 5, "--json", tmp_path / "out.json")
    _, expected = run("--model", hf, *args)
    trained = Model.from_pretrained(hf, "cpu")
    trained.enable_training()
    bare = tmp_path / "run"
    bare.mkdir()
    path = checkpoint.save(bare, 10, trained, {})
    assert run("--model", bare, *args)[0] == 4
    tokenizer.save(bare / "tokenizer.bin")
    for source in (bare, path):
        code, found = run("--model", source, *args)
        assert (code, found["ids"]) == (0, expected["ids"])
    whole = tmp_path / "whole"
    whole.mkdir()
    checkpoint.save(whole, 10, trained, {}, tokenizer.files())
    newest = Model(trained.config, "cpu", seed=99)
    newest.enable_training()
    checkpoint.save(whole, 20, newest, {}, tokenizer.files())
    assert run("--model", whole, *args)[1]["ids"] == newest.generate([1], 5, temperature=0)
    checkpoint.write_best(whole, 10, 1.0)
    assert run("--model", whole, *args)[1]["ids"] == expected["ids"]


def test_refusals(hf: Path, tmp_path: Path, tokenizer: Tokenizer, capsys: pytest.CaptureFixture[str]) -> None:
    small = ModelConfig(dim=8, hidden_dim=8, n_layers=1, n_heads=1, n_kv_heads=1, vocab_size=20, max_seq_len=8)
    Model(small, "cpu").save_pretrained(tmp_path / "small")
    token_file = hf / "tokenizer.bin"
    for args, code, expected in [
        ((), 2, "--model: needed"),
        (("--model", hf, "--temperature", -1), 2, "--temperature"),
        (("--model", hf, "--temperature", "nan"), 2, "--temperature"),
        (("--model", hf, "--top-p", 0), 2, "--top-p"),
        (("--model", hf, "--top-p", 1.5), 2, "--top-p"),
        (("--model", hf, "--min-p", 2), 2, "--min-p"),
        (("--model", hf, "--top-k", -1), 2, "--top-k"),
        (("--model", hf, "--seed", -1), 2, "--seed"),
        (("--model", hf, "--max-new-tokens", -1), 2, "--max-new-tokens"),
        (("--model", hf, "--num-samples", 0), 2, "--num-samples"),
        (("--model", hf, "--weights", "int4"), 2, "--weights"),
        (("--model", hf, "--prompt", "a", "--prompt-file", "b"), 2, "exclude each other"),
        (("--model", hf, "--prompt", "word " * 60), 2, "max_seq_len 48 tokens, found"),
        (("--model", tmp_path / "absent"), 4, "absent"),
        (("--model", tmp_path / "small"), 4, "name one with --tokenizer"),
        (("--model", tmp_path / "small", "--tokenizer", token_file), 4, f"found {tokenizer.vocab_size}"),
        (("--model", hf, "--tokenizer", hf / "config.json"), 4, "config.json"),
        (("--model", hf, "--tokenizer", tmp_path / "absent"), 4, "absent"),
    ]:
        found, _ = run(*args)
        shown = capsys.readouterr()
        assert (found, shown.out, shown.err.count("\n")) == (code, "", 1), shown
        assert expected in shown.err


def test_control_characters_do_not_reach_a_terminal() -> None:
    assert generate._printable("a\x1b[2J\x07b\r\n\tc\x9bd\u2028é\ufffd😀") == "a[2Jb\n\tcdé\ufffd😀"


@pytest.mark.parametrize("command", [["anellm.generate"], ["anellm", "generate"]])
def test_as_a_command(command: list[str], model: Model, hf: Path) -> None:
    args = ["--model", str(hf), "--temperature", "0", "--max-new-tokens", "4", "--prompt", "Ay"]
    done = subprocess.run([sys.executable, "-m", *command, *args], capture_output=True, check=False)
    tokenizer = Tokenizer.from_file(hf / "tokenizer.bin")
    prompt = tokenizer.encode("Ay")
    assert done.returncode == 0
    assert done.stdout.decode() == tokenizer.decode([*prompt, *model.generate(prompt, 4, temperature=0)]) + "\n"


def test_any_output_encoding(hf: Path) -> None:
    """A terminal that is not UTF-8 gets question marks instead of an error."""
    args = ["--model", str(hf), "--prompt", "naïve €", "--max-new-tokens", "1"]
    env = {"PYTHONIOENCODING": "ascii", "PATH": "", "PYTHONPATH": ":".join(p for p in sys.path if p)}
    command = [sys.executable, "-m", "anellm.generate", *args]
    done = subprocess.run(command, capture_output=True, env=env, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(b"na?ve ?")


def test_stories260k(data_dir: Path, tmp_path: Path) -> None:
    """The ids and text that run.c writes; see tests/golden/stories260k_greedy.json."""
    recorded = Path(__file__).parents[1] / "golden" / "stories260k_greedy.json"
    expected = json.loads(recorded.read_text())["start"]
    code, found = run(
        "--model", data_dir / "weights" / "stories260K" / "stories260K.bin",
        "--tokenizer", data_dir / "tokenizers" / "tok512" / "tok512.bin",
        "--temperature", 0, "--max-new-tokens", 200, "--json", tmp_path / "out.json",
    )  # fmt: skip
    assert code == 0
    assert (found["ids"], found["text"]) == (expected["ids"], expected["text"])
