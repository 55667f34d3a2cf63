"""train, evaluate and generate with --device ane-sim: what they do, what they say, and what they refuse."""

from __future__ import annotations

import json
import tomllib
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from anellm import ane, bench, evaluate, generate, info, metrics, train
from anellm.ane import AneDevice
from anellm.config import ModelConfig
from anellm.device import AneOptions
from anellm.model import Model
from anellm.tokenizer import Tokenizer

SMALL = ["--preset", "stories260k", "--batch-size", "2", "--seq-len", "16", "--eval-windows", "4", "--sample-tokens"]
SMALL += ["5", "--steps", "4", "--plain"]


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("ANELLM_DEBUG", "ANELLM_DEVICE", "ANELLM_ANE_DEVICE"):
        monkeypatch.delenv(name, raising=False)


def losses(run: str) -> list[float]:
    return [record["loss"] for record in metrics.read(Path(run)) if record["kind"] == "step"]


def test_train_on_the_simulated_engine(capsys: pytest.CaptureFixture[str]) -> None:
    for device in ("cpu", "ane-sim"):
        assert train.main([*SMALL, "--device", device, "--out", device, "--json", f"{device}.json"]) == 0
    out = capsys.readouterr().out
    assert "device  ane-sim, chip m4, fast numerics" in out
    assert "ane-sim m4: " in out
    assert "of the FLOPs on the Neural Engine" in out
    assert "ms a step" in out
    summaries = [json.loads(Path(f"{device}.json").read_text()) for device in ("cpu", "ane-sim")]
    assert summaries[1]["val_loss"] == pytest.approx(summaries[0]["val_loss"], rel=1e-3)
    assert losses("ane-sim") == pytest.approx(losses("cpu"), rel=1e-3)
    assert [summaries[1][key] for key in ("device", "chip", "numerics")] == ["ane-sim", "m4", "fast"]
    assert 0.3 < summaries[1]["ane_flops_share"] < 0.95
    assert summaries[1]["modelled_ms_per_step"] > 0
    assert not summaries[0].keys() & {"chip", "ane_flops_share", "loss_scale", "skips"}
    cpu_keys = {key for record in metrics.read(Path("cpu")) for key in record}
    assert not cpu_keys & {"loss_scale", "skipped", "rescales", "max_activation", "modelled_ms"}
    config = tomllib.loads(Path("ane-sim/config.toml").read_text())
    names = ("device", "chip", "numerics", "ane_scaling", "ane_softmax", "ane_fallback", "ane_mode")
    assert [config[name] for name in names] == ["ane-sim", "m4", "fast", "on", "ane", "cpu", "dynamic"]
    config = tomllib.loads(Path("cpu/config.toml").read_text())
    assert [name for name in names if name in config] == ["device"]


def test_the_options_reach_the_engine() -> None:
    more = ["--chip", "m2", "--numerics", "exact", "--ane-scaling", "off", "--ane-softmax", "cpu"]
    more += ["--ane-fallback", "error", "--quiet"]
    assert train.main([*SMALL, "--device", "ane-sim", *more, "--out", "r"]) == 0
    first = next(iter(metrics.read(Path("r"))))
    assert first == {
        "kind": "device", "step": 0, "device": "ane-sim", "chip": "m2", "numerics": "exact", "ane_scaling": "off",
        "ane_softmax": "cpu", "ane_fallback": "error", "ane_mode": "dynamic",
    }  # fmt: skip
    # The run's own config repeats it, and --resume stays with its device, whatever the environment says.
    assert train.main(["--config", "r/config.toml", "--out", "again", "--quiet"]) == 0
    assert losses("again") == losses("r")


def test_resume_stays_on_the_runs_device(monkeypatch: pytest.MonkeyPatch) -> None:
    assert train.main([*SMALL, "--device", "ane-sim", "--chip", "m3", "--out", "r", "--quiet"]) == 0
    monkeypatch.setenv("ANELLM_DEVICE", "cpu")
    assert train.main(["--resume", "--out", "r", "--steps", "6", "--quiet"]) == 0
    monkeypatch.delenv("ANELLM_DEVICE")
    assert train.main(["--resume", "--out", "r", "--steps", "7", "--chip", "m5", "--quiet"]) == 0
    assert train.main(["--resume", "--out", "r", "--steps", "8", "--device", "cpu", "--quiet"]) == 0
    devices = [(r["step"], r["device"], r["chip"]) for r in metrics.read(Path("r")) if r["kind"] == "device"]
    assert devices == [(0, "ane-sim", "m3"), (4, "ane-sim", "m3"), (6, "ane-sim", "m5")]
    assert tomllib.loads(Path("r/config.toml").read_text())["device"] == "cpu"
    assert train.main(["--resume", "--out", "r", "--steps", "9", "--device", "ane-sim", "--quiet"]) == 0
    config = tomllib.loads(Path("r/config.toml").read_text())
    assert (config["device"], config["chip"]) == ("ane-sim", "m4")


def test_skips_are_named_in_the_end(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    from anellm import trainer
    from anellm.errors import EvalError, NonFiniteError

    whole = trainer.Trainer._gradient

    def fail(self: Any, n_micro: int) -> Any:
        if self.state.step == 1:
            raise NonFiniteError("program ffn_bwd_w2, layer 3: max |dy| is inf, beyond fp16 (65504)")
        if self.state.step == 2:
            raise EvalError("program attn_fwd, layer 0: evaluation failed: why")
        return whole(self, n_micro)

    monkeypatch.setattr(trainer.Trainer, "_gradient", fail)
    assert train.main([*SMALL, "--device", "ane-sim", "--out", "r", "--json", "o.json", "--log-interval", "1"]) == 0
    out = capsys.readouterr().out
    assert "step 2  skipped: program ffn_bwd_w2, layer 3: max |dy| is inf" in out
    assert "skipped 2 steps: program ffn_bwd_w2, layer 3, dy (1), program attn_fwd, layer 0 (1)" in out
    assert "2 skipped" in out
    summary = json.loads(Path("o.json").read_text())
    assert summary["skips"] == {"program ffn_bwd_w2, layer 3, dy": 1, "program attn_fwd, layer 0": 1}
    assert summary["skipped_steps"] == 2
    assert summary["loss_scale"] == 128.0


@pytest.mark.parametrize("quiet", [False, True])
def test_a_refused_program_is_one_line(
    quiet: bool, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The warning is there with --quiet too; the last lines and the JSON say what the CPU computed instead."""
    opened = ane.AneDevice.__init__

    def with_a_fault(self: AneDevice, name: str, options: AneOptions) -> None:
        opened(self, name, options)
        assert self.simulator is not None
        self.simulator.inject("load-fails", after=0, count=1)

    monkeypatch.setattr(ane.AneDevice, "__init__", with_a_fault)
    argv = [*SMALL, "--device", "ane-sim", *(["--quiet"] if quiet else [])]
    assert train.main([*argv, "--out", "r", "--json", "o.json"]) == 0
    captured = capsys.readouterr()
    assert captured.err == (
        "anellm train: warning: the Neural Engine refused program attn_fwd for B = 2, T = 16: an injected fault "
        "(com.apple.appleneuralengine code 6: Program load failure (0x20004)); the CPU computes attention forward and "
        "backward in all layers\n"
    )
    assert "on the CPU for want of a program: attention forward and backward (for attn_fwd is refused)" in captured.out
    summary = json.loads(Path("o.json").read_text())
    assert [each["program"] for each in summary["fallbacks"]] == ["attn_fwd"]
    assert 0.1 < summary["ane_flops_share"] < 0.6
    assert train.main([*argv, "--out", "s", "--ane-fallback", "error"]) == 5
    err = capsys.readouterr().err
    assert err.startswith("anellm train: error: program attn_fwd for B = 2, T = 16: an injected fault")
    assert err.count("\n") == 1


def test_a_trace_has_a_row_for_the_engine(tmp_path: Path) -> None:
    argv = [*SMALL, "--device", "ane-sim", "--out", "r", "--quiet", "--profile", "t.json"]
    assert train.main(argv) == 0
    events = json.loads(Path("t.json").read_text())
    rows = {e["args"]["name"]: e["tid"] for e in events if e["name"] == "thread_name"}
    assert {"MainThread", "Neural Engine", "weight gradients"} <= rows.keys()
    spans = [e for e in events if e["ph"] == "X"]
    engine = [e for e in spans if e["tid"] == rows["Neural Engine"]]
    assert {"compile", "attn_fwd", "ffn_fwd", "sdpa_bwd2"} <= {e["name"] for e in engine}
    assert {e["args"].get("layer") for e in engine if e["name"] == "attn_fwd"} == set(range(5))
    assert any(e["tid"] == rows["weight gradients"] for e in spans)
    steps = [e for e in spans if e["name"] in ("step", "eval")]
    for event in engine:  # nothing on the engine outside of steps and evaluations
        assert any(s["ts"] - 1 <= event["ts"] and event["ts"] + event["dur"] <= s["ts"] + s["dur"] + 1 for s in steps)


@pytest.fixture
def model() -> Path:
    """Return a random model with the shipped tokenizer's vocabulary."""
    vocab = Tokenizer.shipped().vocab_size
    shape = ModelConfig(dim=32, hidden_dim=48, n_layers=2, n_heads=4, n_kv_heads=2, vocab_size=vocab, max_seq_len=64)
    made = Model(shape, "cpu", seed=11)
    for array in made.params.values():
        array *= 5 if array.ndim == 2 else 1
    made.weights_changed()
    made.save_pretrained("m")
    Tokenizer.shipped().save("tok.bin")
    np.random.default_rng(0).integers(0, vocab, 7 * 64 + 9, np.uint16).tofile("d.bin")
    return Path("m")


@pytest.mark.parametrize("numerics", ["exact", "fast"])
def test_evaluate(model: Path, capsys: pytest.CaptureFixture[str], numerics: str) -> None:
    argv = ["--model", str(model), "--data", "d.bin", "--batch-size", "4"]
    assert evaluate.main([*argv, "--device", "cpu", "--json", "cpu.json"]) == 0
    more = ["--device", "ane-sim", "--numerics", numerics, "--chip", "m4"]
    assert evaluate.main([*argv, *more, "--json", "ane.json"]) == 0
    out = capsys.readouterr().out.splitlines()
    assert len(out) == 3  # one line on the CPU, two on the engine
    assert out[2].startswith("ane-sim m4: ")
    assert "of the FLOPs on the Neural Engine" in out[2]
    cpu, ane = (json.loads(Path(name).read_text()) for name in ("cpu.json", "ane.json"))
    assert ane["loss"] == pytest.approx(cpu["loss"], abs=2e-3)
    assert (ane["windows"], ane["tokens"], ane["numerics"]) == (7, 7 * 64, numerics)
    assert ane.keys() - cpu.keys() == {
        "device", "chip", "numerics", "ane_scaling", "ane_softmax", "ane_flops_share", "ane_flops", "cpu_flops",
        "modelled_ms", "ane_fallback", "ane_mode", "fallbacks",
    }  # fmt: skip
    # Seven windows are a batch of four and one of three: the second is evaluated by the same programs.
    assert evaluate.main([*argv, *more, "--max-windows", "4", "--json", "four.json"]) == 0
    four = json.loads(Path("four.json").read_text())
    assert ane["modelled_ms"] - four["modelled_ms"] < 0.1 * four["modelled_ms"]


def test_generate_decodes_on_the_cpu_and_says_so(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["--model", str(model), "--tokenizer", "tok.bin", "--max-new-tokens", "8", "--seed", "3"]
    texts = []
    for device in ("cpu", "ane-sim"):
        assert generate.main([*argv, "--device", device]) == 0
        captured = capsys.readouterr()
        texts.append(captured.out)
        assert ("device ane-sim: text is decoded on the CPU" in captured.err) == (device == "ane-sim")
    assert texts[0] == texts[1]


def refused(main: Any, capsys: pytest.CaptureFixture[str], code: int, *argv: str) -> str:
    assert main(list(argv)) == code
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    return captured.err


def test_what_is_refused(model: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    data = ("--model", str(model), "--data", "d.bin")
    for main, given in ((train.main, tuple(SMALL)), (evaluate.main, data)):
        for flag, value in (
            ("--chip", "m4"),
            ("--numerics", "exact"),
            ("--ane-scaling", "on"),
            ("--ane-softmax", "ane"),
            ("--ane-fallback", "cpu"),
            ("--ane-mode", "static"),
            ("--ane-qos", "auto"),
        ):
            for device in ((), ("--device", "cpu")):
                err = refused(main, capsys, 2, *given, flag, value, *device)
                assert f"{flag}: only for --device ane" in err
                assert "found --device cpu" in err
        err = refused(main, capsys, 2, *given, "--device", "ane-sim", "--chip", "m44")
        assert "chip: unknown name 'm44'; did you mean m4?" in err
        assert "none.json" in refused(main, capsys, 4, *given, "--device", "ane-sim", "--chip", "none.json")
        for flag, known in (
            ("--numerics", "exact, fast"),
            ("--ane-scaling", "on, off"),
            ("--ane-softmax", "ane, cpu"),
            ("--ane-fallback", "cpu, error"),
            ("--ane-mode", "dynamic, static"),
        ):
            err = refused(main, capsys, 2, *given, "--device", "ane-sim", flag, "x")
            assert f"{flag}: expected one of {known}, found 'x'" in err
        both = ("--ane-mode", "static", "--ane-softmax", "cpu")
        err = refused(main, capsys, 2, *given, "--device", "ane-sim", *both)
        assert "--ane-softmax: expected ane with --ane-mode static, found cpu" in err
        err = refused(main, capsys, 2, *given, "--device", "ane-sim", "--ane-qos", "default")
        assert "--ane-qos: only for --device ane, found --device ane-sim" in err
        err = refused(main, capsys, 2, *given, "--device", "ane", "--ane-qos", "utilty")
        assert "--ane-qos: expected one of auto, background" in err
        assert "did you mean utility?" in err
        monkeypatch.setattr("platform.system", lambda: "Linux")
        assert "device ane: the Apple Neural Engine needs macOS" in refused(main, capsys, 5, *given, "--device", "ane")
        assert "expected one of auto, cpu, ane, ane-sim" in refused(main, capsys, 2, *given, "--device", "npu")
    assert "unknown flag --chip" in refused(generate.main, capsys, 2, "--model", str(model), "--chip", "m4")
    assert "--device: bench measures the CPU, found ane-sim" in refused(bench.main, capsys, 2, "--device", "ane-sim")
    assert "--dtype bf16: only for --device cpu" in refused(
        train.main, capsys, 2, *SMALL, "--dtype", "bf16", "--device", "ane-sim"
    )
    assert not Path("runs").exists()


def test_a_dry_run_counts_the_surfaces(capsys: pytest.CaptureFixture[str]) -> None:
    for device in ("cpu", "ane-sim"):
        assert train.main([*SMALL, "--dry-run", "--device", device, "--json", f"{device}.json"]) == 0
    cpu, ane = (json.loads(Path(f"{device}.json").read_text()) for device in ("cpu", "ane-sim"))
    assert ane["workspace_bytes"] - cpu["workspace_bytes"] == ane["total_bytes"] - cpu["total_bytes"] > 8 * 49152


def test_info_knows_the_devices(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert info.main(["--json", "i.json"]) == 0
    assert info.main(["--device", "ane-sim", "--json", "s.json"]) == 0
    assert [json.loads(Path(f"{x}.json").read_text())["device"] for x in "is"] == ["cpu", "ane-sim"]
    found = json.loads(Path("i.json").read_text())["devices"]
    assert found.keys() == {"cpu", "ane", "ane-sim"}
    assert found["cpu"] is found["ane-sim"] is None
    assert "Neural Engine" in found["ane"]
    monkeypatch.setenv("ANELLM_ANE_DEVICE", "x.so")
    assert info.main(["--json", "i.json"]) == 0
    assert "x.so" in json.loads(Path("i.json").read_text())["devices"]["ane"]
    assert "ane           not available: Neural Engine device: " in capsys.readouterr().out
