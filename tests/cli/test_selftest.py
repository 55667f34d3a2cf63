"""info --ane-selftest: a row for each program, what is wrong or refused, and a chip for the simulator."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from anellm import ane, ane_selftest, info, sim
from anellm.ane import AneDevice
from anellm.ane_reference import Arrays, Batch, program_outputs
from anellm.config import ModelConfig
from anellm.device import AneOptions
from anellm.mil import AneProgram
from anellm.sim_chips import load_chip, nearest_chip

NORMED = ModelConfig(
    dim=32, hidden_dim=48, n_layers=1, n_heads=4, n_kv_heads=2, head_dim=10, vocab_size=32, max_seq_len=64, qk_norm=True
)
SMALL = (
    ane_selftest.Size("padded", Batch(NORMED, 2, 40)),
    ane_selftest.Size("one", Batch(ModelConfig.from_preset("tiny"), 1, 32), ("wo_fwd", "ffn_fwd")),
)
PROGRAMS = [
    "attn_fwd", "ffn_fwd", "ffn_bwd_w2", "ffn_bwd_w13", "wo_bwd", "sdpa_bwd1", "sdpa_bwd2", "qkv_bwd", "attn_scores",
    "attn_values", "wo_fwd", "sdpa_bwd1_given", "sdpa_bwd2_given",
]  # fmt: skip


@pytest.fixture(autouse=True)
def _small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(ane_selftest, "SIZES", SMALL)
    for name in ("ANELLM_DEBUG", "ANELLM_DEVICE", "ANELLM_ANE_DEVICE"):
        monkeypatch.delenv(name, raising=False)


def selftest(capsys: pytest.CaptureFixture[str], code: int, *more: str) -> tuple[list[str], dict[str, Any]]:
    """Run the verb on the simulator; return the lines that it prints and its JSON file."""
    assert info.main(["--ane-selftest", "--device", "ane-sim", "--json", "s.json", *more]) == code
    return capsys.readouterr().out.splitlines(), json.loads(Path("s.json").read_text())


def inject(monkeypatch: pytest.MonkeyPatch, fault: str, after: int, count: int = 1) -> None:
    """Let the next device fail."""

    def opened(name: str, options: AneOptions) -> AneDevice:
        device = AneDevice(name, options)
        assert device.simulator is not None
        device.simulator.inject(fault, after=after, count=count)
        return device

    monkeypatch.setattr(ane, "AneDevice", opened)


def test_all_is_well(capsys: pytest.CaptureFixture[str]) -> None:
    lines, found = selftest(capsys, 0)
    assert lines[0] == "ane-sim, m4, h16g; nearest chip: m4; times are modelled, in ms"
    rows = [line.split() for line in lines[2:-3]]
    assert [row[0] for row in rows] == [*PROGRAMS, "ffn_fwd", "wo_fwd"]
    assert {row[1] for row in rows} == {"padded", "one"}
    for row in rows:
        assert row[2:4] == ["ok", "23.000"]
        assert 0.095 <= float(row[4]) < 0.2
        assert 1e-5 < float(row[5]) < 3e-3
        assert float(row[6]) > 0.99999
    assert lines[-2] == "15 programs: 15 ok, 0 wrong, 0 refused"
    report = found["selftest"]
    assert [p["program"] for p in report["programs"]] == [row[0] for row in rows]
    first = report["programs"][0]
    assert [o["name"] for o in first["outputs"]] == ["y", "attn", "q", "k", "v", "q_raw", "k_raw"]
    assert (first["state"], first["stage"], first["compile_ms"], first["load_ms"]) == ("ok", "", 23.0, 4.0)
    assert (first["unload_ms"], first["outputs"][0]["bad"], first["outputs"][0]["from_simulator"]) == (0.5, 0, None)
    assert report["information"]["architecture"] == "h16g"
    assert report["info"]["cpu_variant"]
    assert report["modelled_times"] is True


def test_the_file_is_a_chip(capsys: pytest.CaptureFixture[str]) -> None:
    """Where nothing is too short to tell, what is measured is what the simulated chip has."""
    simulated, found = load_chip("m2"), selftest(capsys, 0, "--chip", "m2")[1]
    chip, measured = load_chip("s.json"), found["selftest"]["measured"]
    assert (chip.name, chip.architecture) == ("m2-tested", "h14g")
    assert measured.keys() == {"dispatch_us", "compile_ms", "cached_compile_ms", "load_ms", "unload_ms"}
    for name, value in chip.constants.items():
        if name in measured:
            assert value == measured[name] == pytest.approx(simulated.constants[name], rel=0.01)
            assert chip.sources[name] == "measured by --ane-selftest on ane-sim, m2, h14g"
        else:
            assert (value, chip.sources[name]) == (simulated.constants[name], simulated.sources[name])
    Path("p.mil").write_text(SMALL[1].programs()[-1].mil)
    assert sim.main(["cost", "p.mil", "--chip", "s.json"]) == 0
    assert re.search(r"0\.2\d+ ms an evaluation", capsys.readouterr().out)
    # It can be tested itself.
    _, again = selftest(capsys, 0, "--chip", "s.json")
    assert again["selftest"]["measured"] == pytest.approx(measured, rel=0.01)


def test_rates_come_out_as_simulated(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    shape = ModelConfig.from_preset("stories110m", hidden_dim=32)
    sizes = (
        SMALL[1],
        ane_selftest.Size("few", Batch(shape, 1, 32), ("wo_bwd",)),
        ane_selftest.Size("many", Batch(shape, 32, 32), ("wo_bwd",)),
    )
    monkeypatch.setattr(ane_selftest, "SIZES", sizes)
    _, found = selftest(capsys, 0, "--chip", "m5")
    chip = load_chip("m5")
    for name in ("dispatch_us", "activation_gb_s", "matmul_tflops"):
        assert found["constants"][name]["value"] == pytest.approx(chip.constants[name], rel=0.04), name
    assert found["constants"]["matmul_tflops"]["source"].endswith(": the most that a product reached")


def test_static_programs(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """With weights in them, held against float64 like the others; wide ones tell how fast weights stream."""
    wide = ModelConfig(
        dim=1024, hidden_dim=32, n_layers=1, n_heads=32, n_kv_heads=32, head_dim=64, vocab_size=32, max_seq_len=32
    )
    sizes = (
        SMALL[1],
        ane_selftest.Size("padded", Batch(NORMED, 2, 40), mode="static"),
        ane_selftest.Size("wide", Batch(wide, 1, 32), ("qkv_bwd_static",), "static"),
    )
    monkeypatch.setattr(ane_selftest, "SIZES", sizes)
    lines, found = selftest(capsys, 0, "--chip", "m5")
    static = ["attn_fwd_static", "ffn_fwd_static", "ffn_bwd_static", "sdpa_bwd1_static", "qkv_bwd_static"]
    rows = [line.split() for line in lines[2:-3]]
    assert [row[0] for row in rows[2:]] == [*static, "qkv_bwd_static"]
    assert all(row[2] == "ok" and 1e-5 < float(row[5]) < 3e-3 for row in rows)
    rate = found["constants"]["weight_gb_s"]["value"] / load_chip("m5").constants["weight_gb_s"]
    assert 0.8 < rate < 1.0  # activations take time as well
    assert found["constants"]["weight_gb_s"]["source"].endswith(": the most that a product reached")
    assert "conv_tflops" in found["selftest"]["measured"]


@pytest.mark.parametrize(
    ("fault", "after", "stage", "program", "domain", "code"),
    [
        ("compile-fails", 2, "compile", "ffn_bwd_w2", "com.apple.appleneuralengine.compiler", 1),
        ("load-fails", 0, "load", "attn_fwd", "com.apple.appleneuralengine", 6),
        ("eval-fails", 2, "evaluate", "ffn_fwd", "com.apple.appleneuralengine", 8),  # each is evaluated twice
    ],
)
def test_a_refusal_names_program_and_error(
    fault: str, after: int, stage: str, program: str, domain: str, code: int,
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    inject(monkeypatch, fault, after)
    lines, found = selftest(capsys, 5)
    refused = [line for line in lines if "refused at" in line]
    assert len(refused) == 1
    assert re.match(rf"{program} +padded +refused at {stage}: {domain}\S*, code {code}: \S", refused[0]), refused
    assert lines[-2] == "15 programs: 14 ok, 0 wrong, 1 refused"
    row = next(p for p in found["selftest"]["programs"] if p["state"] == "refused")
    assert (row["program"], row["stage"], row["code"], row["outputs"]) == (program, stage, code, [])
    assert row["text"]
    assert row["domain"].startswith(domain)
    assert load_chip("s.json").constants["dispatch_us"] == pytest.approx(95.0, rel=0.01)


def test_nothing_works(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Every program is refused: the table is whole, and the chip is the known one."""
    inject(monkeypatch, "compile-fails", 0, -1)
    lines, _ = selftest(capsys, 5)
    assert sum("refused at compile" in line for line in lines) == 15
    assert "measured: nothing" in lines
    assert load_chip("s.json").constants == load_chip("m4").constants


@pytest.mark.parametrize(("fault", "words"), [("eval-inf", "infinite"), ("eval-stale", "not written")])
def test_bad_values(
    fault: str, words: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A success that gives infinities, or writes nothing."""
    inject(monkeypatch, fault, 0)
    lines, found = selftest(capsys, 5)
    assert re.match(rf"attn_fwd +padded +wrong .*: \d+ values .*{words}", lines[2])
    assert lines[-2] == "15 programs: 14 ok, 1 wrong, 0 refused"
    outputs = found["selftest"]["programs"][0]["outputs"]
    assert any(o["bad"] > 0 and o["error"] is None for o in outputs)


def test_wrong_by_how_much(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """One field of one program is 3 % from what it should be."""

    def other(program: AneProgram, values: Arrays, batch: Batch) -> Arrays:
        found = program_outputs(program, values, batch)
        if program.name == "sdpa_bwd2":
            found["dk"] = np.asarray(found["dk"] / 1.03)
        return found

    monkeypatch.setattr(ane_selftest, "program_outputs", other)
    lines, _ = selftest(capsys, 5)
    wrong = [line for line in lines if " wrong " in line and "programs:" not in line]
    assert len(wrong) == 1
    assert re.match(r"sdpa_bwd2 +padded +wrong .* 0\.0(?:29|30)\d+ +0\.99999\d+ .* in dk$", wrong[0]), wrong


def test_the_nearest_chip() -> None:
    found = {a: nearest_chip(a, "m5") for a in ("h16g", "h13g", "h15", "h15s", "H17s", "h11", "h19c", "", "ane", "h")}
    assert found == {
        "h16g": "m4", "h13g": "m1", "h15": "m3ultra", "h15s": "m3", "H17s": "m5", "h11": "m1", "h19c": "m6",
        "": "m5", "ane": "m5", "h": "m5",
    }  # fmt: skip


def test_refusals(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("platform.system", lambda: "Linux")
    for argv, code, words in (
        (["--ane-selftest"], 5, "the Apple Neural Engine needs macOS"),
        (["--ane-selftest", "--device", "cpu"], 2, "--ane-selftest: expected --device ane or ane-sim, found cpu"),
        (["--ane-selftest", "--device", "ane-sim", "--report"], 2, "--ane-selftest, --report: expected one of the two"),
        (["--ane-selftest", "--device", "ane-sim", "--chip", "m44"], 2, "chip: unknown name 'm44'"),
        (["--ane-selftest", "--chip", "m4"], 5, "needs macOS"),
        (["--chip", "m4"], 2, "--chip: only with --ane-selftest"),
    ):
        assert info.main(argv) == code, argv
        captured = capsys.readouterr()
        assert words in captured.err
        assert captured.out == ""
    monkeypatch.setenv("ANELLM_ANE_DEVICE", "x.so")
    assert info.main(["--ane-selftest", "--chip", "m4"]) == 2
    assert "--chip: only for --device ane-sim, found --device ane" in capsys.readouterr().err


def test_a_simulator_that_refuses() -> None:
    """The program is not what is at fault: it is compared with float64 alone."""
    size, chip = SMALL[1], load_chip("m4")
    program, plane = size.programs()[1], np.zeros(size.programs()[1].input.shape, np.float16)
    found = ane_selftest._simulated(chip, program, plane, size.batch)
    assert found is not None
    assert not found["y"].any()
    narrow = dataclasses.replace(chip, constants={**chip.constants, "max_channels": 64})
    assert ane_selftest._simulated(narrow, program, plane, size.batch) is None
