"""The verb check: the table, what fails it, and what it writes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkverb import refused, run_check

from anellm import check, debug_state
from anellm.config import ModelConfig
from anellm.errors import ConfigError, DataError
from anellm.model import Model
from anellm.weights_llmc import file_order

GOLDEN = Path(__file__).parents[1] / "golden" / "gpt2"
MODEL, STATE, LOSSES = GOLDEN / "v3.bin", GOLDEN / "state.bin", GOLDEN / "losses.json"
CONFIG = ModelConfig(arch="gpt2", dim=8, n_layers=2, n_heads=2, vocab_size=11, max_seq_len=6, bias=True)


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("ANELLM_DEBUG", raising=False)


def run(*argv: Any, model: Path | str = MODEL, code: int = 0) -> dict[str, Any]:
    return run_check("--model", model, *argv, code=code)


@pytest.mark.parametrize("name", ["v3.bin", "hf"])
def test_what_pytorch_wrote(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    values = run("--debug-state", STATE, "--losses", LOSSES, model=GOLDEN / name)
    assert (values["ok"], values["wrong"]) == (True, [])
    assert values["tensors"][0]["name"] == "logits"
    assert len(values["tensors"]) == 1 + 2 + 2 * 12 + 2
    assert all(row["difference"] <= 1e-5 * row["largest"] for row in values["tensors"])
    assert [step["expected"] for step in values["steps"]] == json.loads(LOSSES.read_text())
    assert all(abs(step["loss"] - step["expected"]) < 1e-5 for step in values["steps"])
    out = capsys.readouterr().out
    assert "batch_size: 2\nseq_len: 8\n" in out
    assert out.count("\nOK ") == 1 + 28 + 1  # logits, gradients, loss
    assert out.count("  OK  (") == 10
    assert "transformer.h.1.attn.c_attn.weight  dqkvw " in out
    assert out.endswith("overall okay: 1\n")


def test_other_weights_fail(capsys: pytest.CaptureFixture[str]) -> None:
    model = Model.from_pretrained(MODEL, device="cpu")
    model.params["transformer.h.0.mlp.c_fc.weight"][3, 2] += 0.1
    model.save_pretrained("other.bin", "llmc")
    values = run("--debug-state", STATE, "--losses", LOSSES, model="other.bin", code=1)
    assert {"logits", "loss", "transformer.wte.weight", "loss of step 0", "loss of step 9"} <= set(values["wrong"])
    assert "\nNOT OK  transformer.wte.weight" in capsys.readouterr().out


@pytest.mark.parametrize("index", [0, 1, 5, 16, 27])
def test_one_damaged_gradient_is_named(index: int, capsys: pytest.CaptureFixture[str]) -> None:
    model = Model.from_pretrained(MODEL, device="cpu")
    state = debug_state.read(STATE, model.config)
    name = list(state.grads)[index]
    grads = {key: grad.copy() for key, grad in state.grads.items()}
    at = np.unravel_index(np.abs(grads[name]).argmax(), grads[name].shape)
    grads[name][at] *= 1.001
    damaged = debug_state.DebugState(
        tokens=state.tokens, targets=state.targets, logits=state.logits, loss=state.loss, grads=grads
    )
    debug_state.write("damaged.bin", damaged, model.config)
    values = run("--debug-state", "damaged.bin", "--losses", LOSSES, code=1)
    assert values["wrong"] == [name]
    out = capsys.readouterr().out
    assert out.endswith(f"overall okay: 0; not within tolerance: {name}\n")
    assert out.count("NOT OK") == 1
    assert run("--debug-state", "damaged.bin", "--tolerance", "0.01")["ok"]


@pytest.mark.parametrize(
    ("what", "named"), [("logits", ["logits"]), ("loss", ["loss"]), ("losses", ["loss of step 4"])]
)
def test_each_other_part_is_named(what: str, named: list[str]) -> None:
    model = Model.from_pretrained(MODEL, device="cpu")
    state = debug_state.read(STATE, model.config)
    losses = json.loads(LOSSES.read_text())
    logits = state.logits.copy()
    if what == "logits":
        logits[1, 7, 36] += 0.01
    if what == "losses":
        losses[4] += 0.001
    loss = state.loss + (0.001 if what == "loss" else 0.0)
    wrong = debug_state.DebugState(
        tokens=state.tokens, targets=state.targets, logits=logits, loss=loss, grads=dict(state.grads)
    )
    debug_state.write("s.bin", wrong, model.config)
    Path("s.bin.losses.json").write_text(json.dumps(losses))
    assert run("--debug-state", "s.bin", code=1)["wrong"] == named
    assert run("--debug-state", "s.bin", "--loss-tolerance", "0.01", "--tolerance", "0.01")["ok"]


def test_what_is_written_is_read_again(capsys: pytest.CaptureFixture[str]) -> None:
    written = run("--write-debug-state", "s.bin", "--batch-size", "3", "--seq-len", "5", "--seed", "7")
    assert (written["tensors"], written["loss"], written["ok"]) == ([], None, True)
    assert "overall" not in capsys.readouterr().out
    state = debug_state.read("s.bin", ModelConfig.from_hf(json.loads((GOLDEN / "hf/config.json").read_text()), "hf"))
    assert state.tokens.shape == (3, 5)
    np.testing.assert_array_equal(state.tokens[:, 1:], state.targets[:, :-1])
    values = run("--debug-state", "s.bin")
    assert all(row["difference"] == 0 for row in values["tensors"])
    assert [step["loss"] for step in values["steps"]] == [step["loss"] for step in written["steps"]]
    assert all(step["expected"] == step["loss"] for step in values["steps"])
    assert capsys.readouterr().out.endswith("overall okay: 1\n")
    run("--write-debug-state", "other.bin", "--batch-size", "3", "--seq-len", "5", "--seed", "8")
    assert Path("other.bin").read_bytes() != Path("s.bin").read_bytes()


def test_the_batch_of_a_state_is_written_with_our_numbers() -> None:
    run("--debug-state", STATE, "--write-debug-state", "ours.bin")
    assert Path("ours.bin").stat().st_size == STATE.stat().st_size
    ids = slice(0, 1024 + 2 * 4 * 16)  # the header, tokens and targets
    assert Path("ours.bin").read_bytes()[ids] == STATE.read_bytes()[ids]
    assert run("--debug-state", "ours.bin", "--losses", LOSSES)["ok"]


def test_without_losses_it_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copy(STATE, "s.bin")
    values = run("--debug-state", "s.bin")
    assert values["ok"]
    assert [step["expected"] for step in values["steps"]] == [None] * 10
    assert "losses of the steps: no reference (--losses FILE.json)" in capsys.readouterr().out


def test_bf16_is_within_its_own_tolerance() -> None:
    words = ["--debug-state", STATE, "--losses", LOSSES, "--dtype", "bf16"]
    assert run(*words, code=1)["wrong"]
    assert run(*words, "--tolerance", "0.05", "--loss-tolerance", "0.02")["ok"]


def test_the_published_losses_are_for_the_published_state() -> None:
    tokens = np.zeros((4, 64), np.int32)
    logits = np.zeros((4, 64, 1), np.float32)
    state = debug_state.DebugState(tokens=tokens, targets=tokens, logits=logits, loss=5.270009, grads={})
    config = check.CheckConfig(model="m", debug_state="no such state")
    gpt2 = ModelConfig.from_preset("gpt2")
    losses, tolerance = check._reference_losses(config, gpt2, state)
    assert (losses[0], losses[9], tolerance) == (5.270007133483887, 0.37651097774505615, 1e-2)
    strict = check.CheckConfig(model="m", debug_state="no such state", loss_tolerance=1e-3)
    assert check._reference_losses(strict, gpt2, state)[1] == 1e-3
    other = debug_state.DebugState(tokens=tokens, targets=tokens, logits=logits, loss=5.3, grads={})
    assert check._reference_losses(config, gpt2, other) == ((), 1e-4)
    assert check._reference_losses(config, ModelConfig.from_preset("gpt2-medium"), state) == ((), 1e-4)


def test_names_of_llmc() -> None:
    names = dict.fromkeys(check.llmc_name(name) for name in file_order(CONFIG))
    assert list(names) == ["dwte", "dwpe", "dln1w", "dln1b", "dqkvw", "dqkvb", "dattprojw", "dattprojb", "dln2w",
                           "dln2b", "dfcw", "dfcb", "dfcprojw", "dfcprojb", "dlnfw", "dlnfb"]  # fmt: skip


def test_what_is_not_finite_is_not_ok() -> None:
    ones = np.ones(3, np.float32)
    assert check.compare("x", ones, ones, 1e-4) == ("x", 0.0, 1.0, 0.0, pytest.approx(1.0), True)
    assert not check.compare("x", np.array([1, np.nan, 1], np.float32), ones, 1e-4).ok
    assert not check.compare("x", np.array([1, np.inf, 1], np.float32), ones, 1e-4).ok
    zeros = np.zeros(3, np.float32)
    assert check.compare("x", zeros, zeros, 1e-4).ok
    assert not check.compare("x", zeros + np.float32(1e-30), zeros, 1e-4).ok


def test_impossible_flags(capsys: pytest.CaptureFixture[str]) -> None:
    assert "--model: needed" in refused(capsys, 2, "--debug-state", STATE)
    assert "expected --debug-state to compare with" in refused(capsys, 2, "--model", MODEL)
    both = ("--model", MODEL, "--debug-state", STATE)
    for flag in ("--batch-size", "--seq-len", "--seed"):
        assert f"{flag}: only without --debug-state" in refused(capsys, 2, *both, flag, 1)
    writes = ("--model", MODEL, "--write-debug-state", "s.bin")
    assert "--losses: only with --debug-state" in refused(capsys, 2, *writes, "--losses", LOSSES)
    assert "--loss-tolerance: only with" in refused(capsys, 2, *writes, "--loss-tolerance", "1")
    assert "--seq-len: expected at most the model's longest, 12, found 13" in refused(
        capsys, 2, *writes, "--seq-len", 13
    )
    assert "expected another file than --debug-state" in refused(capsys, 2, *both, "--write-debug-state", STATE)
    for flag in ("--tolerance", "--loss-tolerance"):
        assert f"{flag}: expected more than 0" in refused(capsys, 2, *both, flag, 0)
    for flag in ("--model", "--debug-state", "--losses", "--write-debug-state"):
        assert f"{flag}: expected a path" in refused(capsys, 2, *both, f"{flag}=")
    assert not Path("s.bin").exists()
    with pytest.raises(ConfigError):
        check.CheckConfig(model="m")


def test_files_that_are_none(capsys: pytest.CaptureFixture[str]) -> None:
    both = ("--model", MODEL, "--debug-state", "s.bin")
    assert "s.bin" in refused(capsys, 4, *both)
    Path("s.bin").write_bytes(STATE.read_bytes()[:-1])
    assert "truncated" in refused(capsys, 4, *both)
    shutil.copy(STATE, "s.bin")
    Model(CONFIG, "cpu").save_pretrained("other.bin", "llmc")
    assert "s.bin" in refused(capsys, 4, "--model", "other.bin", "--debug-state", "s.bin")
    Model.from_preset("tiny", "cpu", vocab_size=32, n_layers=1).save_pretrained("llama")
    assert "llm.c debug state" in refused(capsys, 2, "--model", "llama", "--debug-state", "s.bin")
    assert "no such.json" in refused(capsys, 4, *both, "--losses", "no such.json")


@pytest.mark.parametrize(
    "text", ["", "{}", "[1]", "[" + "1, " * 10 + "1]", "[NaN" + ", 1" * 9 + "]", '["1"' + ", 1" * 9 + "]",
             "[true" + ", 1" * 9 + "]", "[" * 5000, "[1e999" + ", 1" * 9 + "]", "\xff"]
)  # fmt: skip
def test_losses_that_are_none(text: str) -> None:
    Path("l.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(DataError, match=r"l\.json: expected a list of 10 finite numbers, found "):
        check.read_losses(Path("l.json"))
