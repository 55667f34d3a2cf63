"""The verb plan: what it prints, what it writes, and what it refuses."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from anellm import ane, plan
from anellm.config import ModelConfig
from anellm.model import Model
from anellm.pipeline import CompileBudget
from anellm.pipeline import plan as plan_of
from anellm.pipeline_schedule import Schedule


def planned(tmp_path: Path, *flags: str) -> dict[str, Any]:
    path = tmp_path / "plan.json"
    assert plan.main([*flags, "--json", str(path)]) == 0
    values: dict[str, Any] = json.loads(path.read_text())
    return values


def test_the_plan_of_llama7b(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """With few tokens, so that its programs are priced quickly."""
    found = planned(
        tmp_path, "--preset", "llama7b", "--activation-checkpoint", "sqrt", "--budget", "119", "--headroom", "0.1",
        "--chip", "m4", "--seq-len", "32", "--gradient-accumulation-steps", "3",
    )  # fmt: skip
    assert found["budget"] == {"limit": 119, "headroom": 0.1, "usable": 107}
    assert [(g["start"], g["end"], g["programs"]) for g in found["groups"]] == [(0, 17, 102), (17, 32, 90)]
    assert (found["restarts_per_step"], found["restarts_per_step_average"], found["restarts"]) == (3, 3, 5)
    assert found["activation_checkpoint"]["inputs"] == [0, 5, 10, 15, 17, 22, 27]
    for kind in ("memory_bytes", "flops", "time_ms"):
        rows = {name: value for name, value in found[kind].items() if name not in ("total", "engine")}
        assert sum(rows.values()) == pytest.approx(found[kind]["total"])
    kinds = [entry["kind"] for entry in found["trace"]]
    assert kinds.count("restart") == 5
    assert {entry["step"] for entry in found["trace"]} == {0, 1}
    text = capsys.readouterr().out
    assert "step 1     restart\n             compile group 0: layers 0-16, 102 programs\n" in text
    assert "             forward + backward group 1, micro-batches 0-2\n" in text
    assert "restarts: 3 a step; one less in the first of a run\n" in text
    assert "a forecast for programs that hold their weights\n" in text


def test_the_trace_is_the_schedules(tmp_path: Path) -> None:
    found = planned(
        tmp_path, "--preset", "tiny", "--budget", "20", "--steps", "3", "--gradient-accumulation-steps", "2"
    )
    expected = Schedule(plan_of(ModelConfig.from_preset("tiny"), CompileBudget(20)), 2).trace(3)
    assert found["trace"] == [
        {"step": state.step, "kind": action.kind, "group": None if action.group < 0 else action.group,
         "micro": None if action.micro < 0 else action.micro}
        for state, action in expected
    ]  # fmt: skip


def test_stories110m_is_one_group_of_72_programs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = planned(tmp_path, "--preset", "stories110m", "--seq-len", "64")
    assert (len(found["groups"]), found["programs"], found["steps_per_process"]) == (1, 72, 1)
    assert "restarts: 1 a step; none before the first of a run\n" in capsys.readouterr().out


def test_the_shape_of_a_checkpoint(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Model.from_preset("tiny", n_layers=2, seed=1).save_pretrained(tmp_path / "model")
    found = planned(tmp_path, "--model", str(tmp_path / "model"), "--seq-len", "32")
    assert (found["config"]["n_layers"], found["seq_len"]) == (2, 32)
    assert "restarts: 1 in 8 steps" in capsys.readouterr().out


def test_no_device_is_touched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("a device was opened")

    monkeypatch.setattr(ane.AneDevice, "__init__", refuse)
    assert planned(tmp_path, "--preset", "tiny", "--seq-len", "32")["chip"] == "m4"


@pytest.mark.parametrize(
    ("flags", "code", "message"),
    [
        ([], 2, "--preset, --model: expected one of the two"),
        (["--preset", "tiny", "--model", "x"], 2, "--preset, --model: expected one of the two"),
        (["--model", "/nowhere"], 4, "/nowhere: expected a model"),
        (["--preset", "tiny", "--headroom", "1"], 2, "headroom: expected a number between 0 and 1, both excluded"),
        (["--preset", "tiny", "--headroom", "-0.1"], 2, "headroom: expected a number between 0 and 1, both excluded"),
        (["--preset", "tiny", "--budget", "6"], 2, "expected room for the 6 programs of a layer, found 5"),
        (["--preset", "tiny", "--budget", "0"], 2, "--budget: expected at least 1, found 0"),
        (["--preset", "tiny", "--activation-checkpoint", "every:0"], 2, "expected all, boundary, sqrt, every:N"),
        (["--preset", "tiny", "--seq-len", "257"], 2, "--seq-len: expected at most the model's max_seq_len 256"),
        (["--preset", "tiny", "--chip", "m9"], 2, "chip: unknown name 'm9'"),
        (
            ["--preset", "tiny", "--steps", "60000", "--gradient-accumulation-steps", "60000"],
            2,
            "--steps, --gradient-accumulation-steps: expected at most 1000000 actions",
        ),
    ],
)
def test_what_is_impossible_is_refused(
    flags: list[str], code: int, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert plan.main(flags) == code
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("command", [["anellm.plan"], ["anellm", "plan"]])
def test_both_commands_plan(command: list[str]) -> None:
    flags = ["--preset", "tiny", "--seq-len", "32", "--steps", "1"]
    done = subprocess.run([sys.executable, "-m", *command, *flags], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines()[-1].split() == ["update"]
