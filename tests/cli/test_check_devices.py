"""The verb check on the Neural Engine's simulator: against a debug state, and layer by layer against the CPU."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkverb import refused
from checkverb import run_check as run

from anellm import check, check_layers, debug_state
from anellm.config import ModelConfig
from anellm.model import Model

GOLDEN = Path(__file__).parents[1] / "golden" / "gpt2"
MODEL, STATE, LOSSES = GOLDEN / "v3.bin", GOLDEN / "state.bin", GOLDEN / "losses.json"
SIM = ("--device", "ane-sim")
LAYERS = ("--layer-by-layer", *SIM)
SMALL = ("--batch-size", "2", "--seq-len", "9")
U = 2.0**-11


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("ANELLM_DEBUG", raising=False)
    monkeypatch.delenv("ANELLM_DEVICE", raising=False)


def names(values: dict[str, Any]) -> list[str]:
    return [layer["name"] for layer in values["layers"]]


def bad(capsys: pytest.CaptureFixture[str]) -> list[str]:
    """Return the layers that the table says are wrong."""
    lines = capsys.readouterr().out.splitlines()
    return [line[8:17].strip() for line in lines if line.startswith("NOT OK")]


# ---- against a debug state -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("flags", [(), ("--ane-mode", "static"), ("--ane-softmax", "cpu"), ("--chip", "m1"),
                                   ("--numerics", "exact")], ids=lambda flags: " ".join(flags))  # fmt: skip
def test_what_pytorch_wrote(flags: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    values = run("--model", MODEL, "--debug-state", STATE, "--losses", LOSSES, *SIM, *flags)
    assert values["wrong"] == []
    assert values["device"] == "ane-sim"
    assert (values["tolerance"], values["loss_tolerance"], values["norm"]) == (35 * U, 0.05, True)
    assert 0 < max(row["error"] for row in values["tensors"]) < 35 * U
    assert all(row["cosine"] > 0.9999 for row in values["tensors"])
    out = capsys.readouterr().out
    assert "\ntolerances: a tensor 0.017 of its Frobenius norm, 0.085 of the largest for a single value; " in out
    assert "; a loss 0.05\n" in out
    assert "of the FLOPs on the Neural Engine" in out
    assert out.endswith("overall okay: 1\n")


def test_the_table_of_the_cpu_says_its_tolerances(capsys: pytest.CaptureFixture[str]) -> None:
    values = run("--model", MODEL, "--debug-state", STATE, "--losses", LOSSES)
    assert (values["tolerance"], values["loss_tolerance"], values["norm"]) == (1e-4, 1e-4, False)
    assert "\ntolerances: a tensor 0.0001 of its largest; a loss 0.0001\n" in capsys.readouterr().out


def test_tolerances_that_are_given() -> None:
    words = ["--model", MODEL, "--debug-state", STATE, "--losses", LOSSES, *SIM]
    values = run(*words, "--tolerance", "1e-5", "--loss-tolerance", "1e-7", code=1)
    assert {"logits", "loss", "transformer.h.1.attn.c_attn.weight", "loss of step 9"} <= set(values["wrong"])
    assert (values["tolerance"], values["loss_tolerance"]) == (1e-5, 1e-7)


@pytest.mark.parametrize("index", [0, 4, 27])
def test_a_damaged_gradient_is_named(index: int) -> None:
    config = ModelConfig.from_hf(json.loads((GOLDEN / "hf/config.json").read_text()), "hf")
    state = debug_state.read(STATE, config)
    name = list(state.grads)[index]
    grads = {key: grad.copy() for key, grad in state.grads.items()}
    at = np.unravel_index(np.abs(grads[name]).argmax(), grads[name].shape)
    grads[name][at] *= 1.2
    damaged = debug_state.DebugState(
        tokens=state.tokens, targets=state.targets, logits=state.logits, loss=state.loss, grads=grads
    )
    debug_state.write("damaged.bin", damaged, config)
    assert run("--model", MODEL, "--debug-state", "damaged.bin", *SIM, code=1)["wrong"] == [name]


def test_other_weights_fail() -> None:
    model = Model.from_pretrained(MODEL, device="cpu")
    model.params["transformer.h.0.mlp.c_fc.weight"][3] *= 3
    model.save_pretrained("other.bin", "llmc")
    values = run("--model", "other.bin", "--debug-state", STATE, "--losses", LOSSES, *SIM, code=1)
    assert "transformer.h.0.mlp.c_fc.weight" in values["wrong"]


def test_a_state_of_the_simulator_holds_for_it_alone() -> None:
    words = ["--model", MODEL, "--write-debug-state", "s.bin", *SMALL]
    assert run(*words, *SIM)["device"] == "ane-sim"
    values = run("--model", MODEL, "--debug-state", "s.bin", *SIM)
    assert all(row["difference"] == 0 for row in values["tensors"])
    assert run("--model", MODEL, "--debug-state", "s.bin", code=1)["wrong"]


# ---- layer by layer --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("flags", [(), ("--ane-mode", "static")], ids=["dynamic", "static"])
@pytest.mark.parametrize("model", ["v3.bin", "hf"])
def test_a_gpt2_with_the_batch_of_a_state(
    model: str, flags: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    values = run("--model", GOLDEN / model, "--debug-state", STATE, *LAYERS, *flags)
    assert (values["ok"], values["wrong"]) == (True, [])
    assert names(values) == ["embedding", "layer 0", "layer 1", "head"]
    assert values["tolerances"] == {"forward": 15 * U, "backward": 20 * U, "cancelling": 64 * U}
    assert (values["reference"], values["device"]) == ("cpu, fp32", "ane-sim")
    assert len(values["layers"][1]["gradients"]) == 12
    loss = debug_state.read(STATE, Model.from_pretrained(MODEL, device="cpu").config).loss
    assert values["layers"][-1]["forward"]["largest"] == pytest.approx(loss, abs=1e-5)
    out = capsys.readouterr().out
    assert out.startswith("batch_size: 2\nseq_len: 8\nreference: cpu, fp32\ntested: ane-sim, chip m4, fast numerics, ")
    assert out.count("\nOK ") == 4
    assert " transformer.h.1." in out
    assert "tolerances: error 0.0073 forward, 0.0098 backward and of gradients, 0.031 of those of queries " in out
    assert out.endswith("overall okay: 1\n")


def test_any_model_of_any_format() -> None:
    model = Model.from_preset("tiny", "cpu", n_layers=1, vocab_size=50, qk_norm=True, n_kv_heads=2)
    model.save_pretrained("hf")
    assert names(run("--model", "hf", *LAYERS, *SMALL)) == ["embedding", "layer 0", "head"]
    Model.from_preset("tiny", "cpu", n_layers=2, vocab_size=50).save_pretrained("l.bin", "llama2c")
    values = run("--model", "l.bin", *LAYERS, *SMALL, "--ane-mode", "static", "--chip", "m1")
    assert names(values) == ["embedding", "layer 0", "layer 1", "head"]
    assert (values["ane_mode"], values["chip"]) == ("static", "m1")


def test_a_trained_llama(data_dir: Path) -> None:
    values = run("--model", data_dir / "weights/stories260K", *LAYERS, "--seq-len", "32", "--batch-size", "1")
    assert values["wrong"] == []
    assert len(values["layers"]) == 7


def test_new_weights_and_the_seed() -> None:
    words = ["--preset", "stories260k", *LAYERS, *SMALL]
    first, again = run(*words), run(*words, "--seed", "1")
    assert first["layers"] == again["layers"]
    assert run(*words, "--seed", "2")["layers"] != first["layers"]


def test_bf16_and_a_simulated_reference() -> None:
    words = ["--preset", "gpt2-char", "--layer-by-layer", "--dtype", "bf16", *SMALL]
    values = run(*words)
    assert (values["reference"], values["tested"]) == ("cpu, fp32", "cpu, bf16")
    assert values["tolerances"]["forward"] == 15 * 2.0**-8
    assert values["layers"][-1]["backward"]["error"] > 0
    assert run(*words, "--tolerance", "1e-4", code=1)["tolerances"] == dict.fromkeys(
        ("forward", "backward", "cancelling"), 1e-4
    )
    values = run(*words, "--reference", "ane-sim")
    assert values["reference"] == "ane-sim, chip m4, fast numerics, dynamic"
    values = run("--preset", "gpt2-char", "--layer-by-layer", *SMALL, "--reference", "ane-sim")
    assert (values["tested"], values["tolerances"]["forward"]) == ("cpu, fp32", 15 * U)


def damage(monkeypatch: pytest.MonkeyPatch, tensor: str) -> None:
    """Let the weights of what is tested differ from the reference's in a tensor, of the model with its ends."""
    between = check_layers.between_ends

    def damaged(*args: Any) -> list[Model]:
        models = between(*args)
        models[1].params[tensor][0] += 0.25
        models[1].weights_changed()
        return models

    monkeypatch.setattr(check_layers, "between_ends", damaged)


@pytest.mark.parametrize("mode", ["dynamic", "static"])
def test_a_layer_with_a_fault_is_named(
    mode: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    damage(monkeypatch, "model.layers.3.mlp.down_proj.weight")
    values = run("--preset", "tiny", *LAYERS, *SMALL, "--ane-mode", mode, code=1)
    assert values["wrong"][0] == "layer 2 forward"
    assert all("layer 2" in name or "layers.2" in name for name in values["wrong"])
    assert bad(capsys) == ["layer 2"]
    run("--preset", "tiny", *LAYERS, *SMALL, "--ane-mode", mode, code=1)
    end = f"overall okay: 0; not within tolerance: layer 2; first layer 2 forward, {len(values['wrong'])} in all\n"
    assert capsys.readouterr().out.endswith(end)


def test_without_scaling_every_layer_is_wrong(capsys: pytest.CaptureFixture[str]) -> None:
    values = run("--preset", "tiny", *LAYERS, *SMALL, "--ane-scaling", "off", code=1)
    assert bad(capsys) == [f"layer {i}" for i in range(4)]
    backward = [name for name in values["wrong"] if "forward" not in name]
    assert backward[0] == "layer 3 dx"  # from the last to the first
    assert "model.layers.0.mlp.gate_proj.weight" in backward


def test_a_device_that_fails_in_a_layer(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    between = check_layers.between_ends

    def failing(*args: Any) -> Iterable[Model]:
        models = between(*args)
        models[1].ane.device.simulator.inject("eval-fails", after=2 * 8 + 1, count=1)
        return models

    monkeypatch.setattr(check_layers, "between_ends", failing)
    values = run("--preset", "tiny", *LAYERS, *SMALL, code=1)
    assert values["wrong"] == ["layer 1 forward"]
    assert values["layers"][2]["forward"] is None
    assert values["layers"][2]["error"].startswith("program ffn_fwd, layer 1: evaluation failed: ")
    assert "program ffn_fwd, layer 1: evaluation failed: " in capsys.readouterr().out


def test_what_the_cpu_computed_instead_is_said(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    between = check_layers.between_ends

    def refusing(*args: Any) -> Iterable[Model]:
        models = between(*args)
        models[1].ane.device.simulator.inject("compile-fails", after=1, count=1)
        return models

    monkeypatch.setattr(check_layers, "between_ends", refusing)
    values = run("--preset", "gpt2-char", *LAYERS, *SMALL)
    assert [refusal["program"] for refusal in values["fallbacks"]] == ["ffn_fwd"]
    captured = capsys.readouterr()
    assert "on the CPU for want of a program: mlp forward (for ffn_fwd is refused)" in captured.out
    assert "anellm check: warning: the Neural Engine refused program ffn_fwd for B = 2, T = 9" in captured.err
    assert run("--preset", "gpt2-char", *LAYERS, *SMALL, "--ane-fallback", "cpu")["ok"]
    assert check.main(["--preset", "gpt2-char", *LAYERS, *SMALL, "--ane-fallback", "error"]) == 5


# ---- what cannot be --------------------------------------------------------------------------------------------------


def test_impossible_flags(capsys: pytest.CaptureFixture[str]) -> None:
    preset = ("--preset", "tiny", *LAYERS)
    assert "--model, --preset: expected one of the two" in refused(capsys, 2, *LAYERS)
    assert "--model, --preset: expected one of the two" in refused(capsys, 2, *preset, "--model", MODEL)
    assert "did you mean tiny?" in refused(capsys, 2, "--preset", "tine", *LAYERS)
    assert "--preset: only without --debug-state" in refused(capsys, 2, *preset, "--debug-state", STATE)
    for flag, value in (("--losses", "l"), ("--loss-tolerance", "1"), ("--write-debug-state", "s")):
        assert f"{flag}: only without --layer-by-layer" in refused(capsys, 2, *preset, flag, value)
    whole = ("--model", MODEL, "--debug-state", STATE)
    assert "--preset: only with --layer-by-layer" in refused(capsys, 2, *whole, "--preset", "tiny")
    assert "--reference: only with --layer-by-layer" in refused(capsys, 2, *whole, "--reference", "cpu")
    assert "--reference: expected one of cpu, ane-sim, found 'gpu'" in refused(capsys, 2, *preset, "--reference", "gpu")
    for flag in ("--batch-size", "--seq-len", "--seed"):
        assert f"{flag}: only without --debug-state" in refused(
            capsys, 2, *whole, "--layer-by-layer", *SIM, flag, 2
        )  # fmt: skip
    assert "--seq-len: expected at most the model's longest, 256, found 257" in refused(
        capsys, 2, *preset, "--seq-len", 257
    )
    assert "seq_len: expected at least 2 tokens" in refused(capsys, 2, *preset, "--seq-len", 1)
    for flag in ("--model", "--debug-state"):
        assert f"{flag}: expected a path" in refused(capsys, 2, *LAYERS, f"{flag}=")
    assert "--seed: expected at most" in refused(capsys, 2, *preset, "--seed", 2**64)
    assert "--chip: expected a name" in refused(capsys, 2, *preset, "--chip=")
    assert "--ane-softmax: expected ane" in refused(capsys, 2, *preset, "--ane-mode", "static", "--ane-softmax", "cpu")
    assert "bf16 is for models that compute on the CPU" in refused(capsys, 5, *preset, "--dtype", "bf16")
    assert "device ane" in refused(capsys, 5, "--layer-by-layer", "--preset", "tiny", "--device", "ane")


@pytest.mark.parametrize("reference", ["cpu", "ane-sim"])
def test_a_device_is_not_compared_with_itself(
    reference: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ("--layer-by-layer", "--preset", "tiny", "--reference", reference)
    assert f"found {reference}, fp32: it would be compared with itself" in refused(
        capsys, 2, *words, "--device", reference
    )
    monkeypatch.setenv("ANELLM_DEVICE", reference)
    assert "compared with itself" in refused(capsys, 2, *words)


@pytest.mark.parametrize("flag", ["--chip=m1", "--numerics=exact", "--ane-scaling=off", "--ane-softmax=cpu",
                                  "--ane-fallback=error", "--ane-mode=static", "--ane-qos=default"])  # fmt: skip
def test_flags_of_other_devices(flag: str, capsys: pytest.CaptureFixture[str]) -> None:
    words = ("--model", MODEL, "--debug-state", STATE, "--device", "cpu", flag)
    assert f"{flag.split('=', maxsplit=1)[0]}: only for --device ane" in refused(capsys, 2, *words)


def test_files_that_are_none(capsys: pytest.CaptureFixture[str]) -> None:
    assert "nothing" in refused(capsys, 4, "--model", "nothing", *LAYERS)
    both = ("--model", MODEL, "--debug-state", "s.bin", *LAYERS)
    assert "s.bin" in refused(capsys, 4, *both)
    Path("s.bin").write_bytes(STATE.read_bytes()[:-1])
    assert "truncated" in refused(capsys, 4, *both)
    shutil.copy(STATE, "s.bin")
    other = ModelConfig(arch="gpt2", dim=8, n_layers=2, n_heads=2, vocab_size=11, max_seq_len=6, bias=True)
    Model(other, "cpu").save_pretrained("other.bin", "llmc")
    assert "s.bin" in refused(capsys, 4, "--model", "other.bin", "--debug-state", "s.bin", *LAYERS)
    Model.from_preset("tiny", "cpu", vocab_size=32, n_layers=1).save_pretrained("llama")
    assert "llm.c debug state" in refused(capsys, 2, "--model", "llama", "--debug-state", "s.bin", *LAYERS)
    assert "no such.json" in refused(capsys, 4, "--preset", "tiny", *LAYERS, "--chip", "no such.json")
