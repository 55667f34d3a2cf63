"""The verb train: from flags to a run directory, and every refusal on the way."""

from __future__ import annotations

import json
import os
import shutil
import tomllib
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from anellm import checkpoint, inputs, metrics, train
from anellm.model import Model
from anellm.tokenizer import Tokenizer

SMALL = [
    "--preset",
    "stories260k",
    "--batch-size",
    "2",
    "--seq-len",
    "16",
    "--eval-windows",
    "4",
    "--sample-tokens",
    "5",
]


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("ANELLM_DEBUG", raising=False)


def run(*argv: str) -> int:
    return train.main([*SMALL, *argv])


def refused(capsys: pytest.CaptureFixture[str], code: int, *argv: str) -> str:
    assert train.main(list(argv)) == code
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("anellm train: error: ")
    assert captured.err.count("\n") == 1
    return captured.err


def test_a_run_leaves_what_it_should(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--steps", "4", "--out", "r", "--eval-interval", "2", "--json", "o.json", "--log-interval", "2") == 0
    out = capsys.readouterr().out
    for part in ("parameters", "tokens held out", "of memory needed", "step 2/4  loss ", "step 4  validation loss",
                 "training loss   ◆ validation loss", "done: step 4", "anellm generate --model r"):  # fmt: skip
        assert part in out
    assert out.count("sample:") == 2
    assert {"config.toml", "manifest.json", "metrics.jsonl", "best.json", "run.lock"} < set(os.listdir("r"))
    config = tomllib.loads(Path("r/config.toml").read_text())
    assert (config["steps"], config["seq_len"], config["preset"]) == (4, 16, "stories260k")
    manifest = json.loads(Path("r/manifest.json").read_text())
    assert len(manifest["data_sha256"]) == len(manifest["tokenizer_sha256"]) == 64
    assert manifest["model"]["dim"] == 64
    assert {"anellm", "numpy", "cpu_variant", "threads", "command"} < manifest.keys()
    records = list(metrics.read(Path("r")))
    assert [r["step"] for r in records if r["kind"] == "step"] == [1, 2, 3, 4]
    assert [r["step"] for r in records if r["kind"] == "eval"] == [0, 2, 4]
    assert [r["step"] for r in records if r["kind"] == "sample"] == [2, 4]
    assert all(1 < r["bits_per_byte"] < 8 for r in records if r["kind"] == "eval")
    summary = json.loads(Path("o.json").read_text())
    assert (summary["step"], summary["interrupted"], summary["out"]) == (4, False, "r")
    assert summary["val_loss"] == [r["val_loss"] for r in records if r["kind"] == "eval"][-1]
    step = checkpoint.find_checkpoint(Path("r"))
    assert step is not None
    assert Tokenizer.from_file(step / "tokenizer.bin").sha256 == manifest["tokenizer_sha256"]


def test_the_default_place_of_a_run(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--steps", "1", "--quiet") == 0
    (name,) = os.listdir("runs")
    assert name.startswith("stories260k-")
    # --resume with nothing else goes on with the newest run, and with its options.
    assert train.main(["--resume", "--steps", "2", "--quiet"]) == 0
    assert os.listdir("runs") == [name]
    assert checkpoint.list_steps(Path("runs") / name) == [1, 2]
    assert tomllib.loads((Path("runs") / name / "config.toml").read_text())["batch_size"] == 2
    assert "done: step 2" in capsys.readouterr().out


def test_resume_without_a_run_starts_one() -> None:
    assert run("--resume", "--steps", "1", "--quiet", "--out", "r") == 0
    assert checkpoint.list_steps(Path("r")) == [1]


def test_resume_from_a_path() -> None:
    assert run("--steps", "4", "--save-interval", "2", "--out", "r", "--quiet") == 0
    assert train.main(["--resume", "r/step_00000002", "--out", "fork", "--quiet"]) == 0
    for name in ("model.safetensors", "optimizer.safetensors"):
        files = [Path(run) / "step_00000004" / name for run in ("r", "fork")]
        assert files[0].read_bytes() == files[1].read_bytes()
    assert train.main(["--resume", "r", "--epochs", "0.001", "--quiet"]) == 0


def test_resume_refuses_another_model(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--steps", "1", "--out", "r", "--quiet") == 0
    capsys.readouterr()
    err = refused(capsys, 4, "--resume", "--out", "r", "--preset", "tiny")
    assert "another model's checkpoint: dim: expected 64, found 128" in err
    err = refused(capsys, 4, "--resume", "--out", "r", "--val-fraction", "0.2")
    assert "other data" in err
    err = refused(capsys, 2, "--out", "r", *SMALL)
    assert "go on with --resume" in err
    assert "found none" in refused(capsys, 4, "--resume", "nowhere", "--out", "new")


def test_dry_run_takes_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    assert train.main(["--dry-run", "--preset", "llama7b", "--batch-size", "1", "--json", "o.json", "--data", "x"]) == 0
    out = capsys.readouterr().out
    for name in ("parameters", "params", "grads", "moments", "activations", "workspace", "total", "available", "FLOPs"):
        assert f"{name} " in out
    values = json.loads(Path("o.json").read_text())
    assert values["n_params"] == 6738415616
    assert values["params_bytes"] == values["grads_bytes"] == values["moments_bytes"] // 2 >= 4 * values["n_params"]
    assert values["flops_per_step"] == values["flops_per_token"] * 512
    assert (
        sum(values[k + "_bytes"] for k in ("params", "grads", "moments", "activations", "workspace"))
        == (values["total_bytes"])
    )
    assert os.listdir() == ["o.json"]


def test_a_model_that_cannot_fit_is_refused(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(inputs, "available_bytes", lambda: 10 << 20)
    monkeypatch.setattr(train, "Model", None)  # making one would fail otherwise
    err = refused(capsys, 5, "--preset", "llama7b", "--out", "r")
    assert "and 10.0 MiB are available" in err
    assert not Path("r").exists()


def test_a_text_and_a_tokenizer(capsys: pytest.CaptureFixture[str]) -> None:
    tokenizer = Tokenizer.shipped()
    tokenizer.save("tok.bin")
    Path("a.txt").write_text("To be, or not to be, that is the question. " * 200)
    Path("v.txt").write_text("Whether it is nobler in the mind to suffer. " * 20)
    more = ["--data", "a.txt", "--val-data", "v.txt", "--tokenizer", "tok.bin", "--steps", "30", "--quiet"]
    assert run(*more, "--out", "r", "--learning-rate", "0.01", "--json", "o.json") == 0
    losses = [record["loss"] for record in metrics.read(Path("r")) if record["kind"] == "step"]
    assert losses[-1] < 0.5 * losses[0]
    # The run is a model to start from, with its tokenizer.
    assert run_model("r", "--data", "a.txt", "--out", "second") == 0
    second = [record["loss"] for record in metrics.read(Path("second")) if record["kind"] == "step"]
    assert second[0] < 0.7 * losses[0]
    capsys.readouterr()
    Path("bare").mkdir()
    for name in ("config.json", "model.safetensors"):
        Path("bare", name).write_bytes(Path("r/step_00000030", name).read_bytes())
    argv = ("--model", "bare", "--data", "a.txt", *SMALL[2:])  # one that is learnt would not be the model's
    assert "a text needs a tokenizer" in refused(capsys, 2, *argv)


def run_model(model: str, *argv: str) -> int:
    return train.main(["--model", model, *SMALL[2:], "--steps", "1", "--quiet", *argv])


def test_bad_files_are_one_line_and_exit_4(capsys: pytest.CaptureFixture[str]) -> None:
    np.arange(1000, dtype=np.uint16).tofile("big.bin")
    np.arange(1000, dtype=np.int32).tofile("i32.bin")
    Path("odd.bin").write_bytes(b"123")
    Path("short.bin").write_bytes(b"\1\0\2\0")
    np.arange(100, dtype=np.uint16).tofile("hundred.bin")
    Path("empty.bin").write_bytes(b"")
    Path("folder").mkdir()
    cases: dict[tuple[str, ...], str] = {
        ("--data", "missing.bin"): "missing.bin",
        ("--data", "big.bin"): "token 512",
        ("--data", "i32.bin"): "--token-dtype int32",
        ("--data", "odd.bin"): "multiple of 2 bytes",
        ("--data", "short.bin", "--val-fraction", "0"): "expected at least 17 tokens",
        ("--data", "hundred.bin"): "the part that --val-fraction 0.05 holds out",
        ("--data", "hundred.bin", "--val-data", "short.bin"): "--val-data: short.bin: expected at least 17 tokens",
        ("--data", "empty.bin"): "empty file",
        ("--data", "folder"): "expected a folder with data",
        ("--tokenizer", "odd.bin"): "odd.bin",
        ("--tokenizer", "missing.bin"): "missing.bin",
    }
    for argv, part in cases.items():
        assert part in refused(capsys, 4, *SMALL, *argv)
    for model in ("odd.bin", "missing", "."):
        assert model in refused(capsys, 4, "--model", model)
    assert not Path("runs").exists()


def test_the_vocabulary_is_checked(capsys: pytest.CaptureFixture[str]) -> None:
    Model.from_preset("stories260k", n_layers=1).save_pretrained("m")
    err = refused(capsys, 4, "--model", "m")
    assert "512" in err
    assert "1024" in err
    Tokenizer.shipped().save("tok.bin")
    err = refused(capsys, 4, "--model", "m", "--tokenizer", "tok.bin", "--data", "x.bin")
    assert "tok.bin" in err
    assert "m " in err


def test_divergence_is_exit_3(capsys: pytest.CaptureFixture[str]) -> None:
    more = ["--learning-rate", "1e30", "--warmup-steps", "0", "--max-bad-steps", "2", "--out", "r", "--quiet"]
    err = refused(capsys, 3, *SMALL, *more, "--steps", "50", "--save-interval", "0")
    assert "2 steps in a row had non-finite gradients, first in model." in err


def test_a_prompt_that_does_not_fit_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--sample-prompt", "word " * 1000, "--out", "r") == 2
    assert "--sample-prompt: expected at most 512 tokens" in capsys.readouterr().err


def test_nothing_held_out(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--steps", "2", "--val-fraction", "0", "--out", "r", "--plain", "--sample-tokens", "0") == 0
    out = capsys.readouterr().out
    assert "nothing held out" in out
    assert "sample" not in out
    assert {record["kind"] for record in metrics.read(Path("r"))} == {"step"}
    assert checkpoint.read_best(Path("r")) is None


def test_a_run_can_be_repeated_from_its_config() -> None:
    assert run("--steps", "3", "--out", "r", "--quiet", "--gradient-accumulation-steps", "2") == 0
    assert train.main(["--config", "r/config.toml", "--out", "again", "--quiet"]) == 0

    def losses(path: str) -> list[Any]:
        return [record["loss"] for record in metrics.read(Path(path)) if record["kind"] == "step"]

    assert losses("again") == losses("r")
    shutil.rmtree("again")
