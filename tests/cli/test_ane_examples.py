"""examples/ane_sim.py runs; examples/ane_scaling.py draws three runs and judges them."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree as ET

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"


def a_run(path: Path, factor: float, *, steps: int = 60, skip: int = 0) -> Path:
    path.mkdir()
    lines = [
        {"kind": "step", "step": i, "loss": 9.0 / (1 + i / 20) * (factor if i >= 50 else 1)}
        for i in range(1, steps + 1)
    ]
    lines += [{"kind": "skip", "step": i, "tensor": None} for i in range(skip)]
    lines += [{"kind": "eval", "step": i, "val_loss": 9.0 / (1 + i / 20) * factor} for i in (0, steps)]
    (path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def run(*args: object, name: str = "ane_scaling.py") -> tuple[int, str]:
    command = [sys.executable, EXAMPLES / name, *map(str, args)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.returncode, done.stdout + done.stderr


@pytest.mark.parametrize(("factor", "code"), [(1.004, 0), (1.015, 1), (1.03, 1)])
def test_the_verdict(tmp_path: Path, factor: float, code: int) -> None:
    runs = [a_run(tmp_path / "cpu", 1.0), a_run(tmp_path / "sim", factor), a_run(tmp_path / "off", 2.0, skip=3)]
    figure = tmp_path / "f.svg"
    found, out = run(*runs, figure)
    assert found == code, out
    assert f"{factor - 1:.3%} off" in out
    assert "100.000% off" in out
    assert "3 steps skipped" in out
    root = ET.fromstring(figure.read_text())
    kinds = [element.tag.rpartition("}")[2] for element in root]
    assert kinds.count("polyline") == 3
    assert kinds.count("circle") == 6
    assert any("without scaling" in (element.text or "") for element in root)


def test_runs_of_other_lengths_do_not_compare(tmp_path: Path) -> None:
    runs = [a_run(tmp_path / "cpu", 1.0), a_run(tmp_path / "sim", 1.0, steps=58), a_run(tmp_path / "off", 2.0)]
    code, out = run(*runs, tmp_path / "f.svg")
    assert code == 1
    assert "inf% off" in out


def test_what_is_refused(tmp_path: Path) -> None:
    assert "usage" in run()[1]
    (tmp_path / "empty").mkdir()
    code, out = run(*[tmp_path / "empty"] * 3, tmp_path / "f.svg")
    assert code == 1
    assert "expected a run with training and validation losses" in out
    assert not (tmp_path / "f.svg").exists()


def test_the_example() -> None:
    code, out = run(3, name="ane_sim.py")
    assert code == 0, out
    lines = out.splitlines()
    assert lines[0].startswith("cpu      loss ")
    assert lines[1].startswith("ane-sim  loss ")
    assert "step 3 skipped: program wo_bwd, layer 1: " in out
    assert lines[-1] == "1 of 6 steps skipped"
