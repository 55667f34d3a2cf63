"""The verb sweep, and the pictures it draws."""

from __future__ import annotations

import json
import tomllib
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from anellm import cli, line_chart, sweep, train
from anellm.errors import ConfigError, InvalidError, UnavailableError
from anellm.line_chart import Curve

SMALL = ["--preset", "stories260k", "--batch-size", "2", "--seq-len", "16", "--eval-windows", "4", "--sample-tokens",
         "0", "--quiet", "--device", "cpu"]  # fmt: skip
NAMESPACE = "{http://www.w3.org/2000/svg}"


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("ANELLM_DEBUG", "ANELLM_DEVICE", "ANELLM_THREADS", "OMP_NUM_THREADS"):
        monkeypatch.delenv(name, raising=False)


def parse(*argv: str) -> sweep.SweepConfig:
    return cli.parse(sweep.SweepConfig, argv, "sweep", base=sweep.options_of_sweep)


def refused(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    assert sweep.main(list(argv)) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    return captured.err


def test_what_a_sweep_leaves(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--learning-rate", "1e-5, 1e-3", "--steps", "4", "--out", "s"]
    assert sweep.main([*SMALL, *words, "--json", "o.json"]) == 0
    out = capsys.readouterr().out
    assert "--- learning rate 1e-5\n" in out
    values: dict[str, Any] = json.loads(Path("s/sweep.json").read_text())
    assert values == json.loads(Path("o.json").read_text())
    assert (values["name"], values["best"]) == ("stories260k", 1e-3)
    assert [each["learning_rate"] for each in values["runs"]] == [1e-5, 1e-3]
    for text, each in zip(("1e-5", "1e-3"), values["runs"], strict=True):
        assert each["out"] == f"s/lr-{text}"
        saved = tomllib.loads(Path(each["out"], "config.toml").read_text())
        assert (saved["learning_rate"], saved["steps"], saved["eval_interval"]) == (float(text), 4, 1)
        assert [step for step, _ in each["curve"]] == [0, 1, 2, 3, 4]
        assert each["curve"][-1][1] == each["val_loss"]
        assert f"{each['best_val_loss']:.4f}" in out
    (marked,) = [line for line in out.splitlines() if line.endswith("<- best")]
    assert marked.split()[0] == "0.001"
    # The same as a run of its own.
    assert train.main([*SMALL, "--learning-rate", "1e-3", "--steps", "4", "--eval-interval", "1", "--out", "r"]) == 0
    a, b = (Path(run, "step_00000004", "model.safetensors").read_bytes() for run in ("r", "s/lr-1e-3"))
    assert a == b
    root = ET.fromstring(Path("s/sweep.svg").read_text())
    assert len(root.findall(NAMESPACE + "polyline")) == 2
    if Path("s/sweep.png").exists():
        assert Path("s/sweep.png").read_bytes().startswith(b"\x89PNG\r\n")
    else:
        assert "no sweep.png: a PNG needs matplotlib: pip install 'anellm[plot]'\n" in out


def test_without_matplotlib_it_says_how_to_install_it(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(line_chart.importlib.util, "find_spec", lambda _: None)
    assert sweep.main([*SMALL, "--learning-rate", "1e-4", "--steps", "1", "--out", "s"]) == 0
    assert capsys.readouterr().out.endswith("no sweep.png: a PNG needs matplotlib: pip install 'anellm[plot]'\n")
    assert not Path("s/sweep.png").exists()
    with pytest.raises(UnavailableError):
        line_chart.png("t", "x", "y", [Curve("a", [(0, 1)])])


def test_a_run_that_diverges_is_a_row(capsys: pytest.CaptureFixture[str]) -> None:
    more = ["--learning-rate", "1e-3,1e30", "--steps", "6", "--out", "s", "--max-bad-steps", "2"]
    more += ["--max-grad-norm", "0", "--warmup-steps", "0"]
    assert sweep.main([*SMALL, *more]) == 0
    values = json.loads(Path("s/sweep.json").read_text())
    assert [each["diverged"] is None for each in values["runs"]] == [True, False]
    assert "non-finite gradients" in values["runs"][1]["diverged"]
    assert values["best"] == 1e-3
    assert "  diverged\n" in capsys.readouterr().out
    ET.fromstring(Path("s/sweep.svg").read_text())


def test_an_interrupt_ends_the_sweep(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[float] = []

    def stop(config: Any) -> cli.Result:
        asked.append(config.learning_rate)
        return cli.Result({"interrupted": True, "step": 1}, 130)

    monkeypatch.setattr(train, "run", stop)
    assert sweep.main(["--learning-rate", "1e-4,1e-3", "--out", "s"]) == 130
    assert asked == [1e-4]
    assert [each["interrupted"] for each in json.loads(Path("s/sweep.json").read_text())["runs"]] == [True]


def test_no_run_replaces_the_process(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[bool] = []

    def look(config: Any) -> cli.Result:
        seen.append(cli.is_whole_process())
        return cli.Result({"interrupted": False})

    monkeypatch.setattr(train, "run", look)
    monkeypatch.setattr(cli, "_whole_process", True)
    assert sweep.main(["--learning-rate", "1e-4,1e-3", "--out", "s"]) == 0
    assert seen == [False, False]


def test_with_nothing_held_out_there_is_no_picture(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--learning-rate", "1e-4", "--steps", "1", "--val-fraction", "0", "--out", "s"]
    assert sweep.main([*SMALL, *words]) == 0
    assert "no picture: nothing was held out" in capsys.readouterr().out
    assert not Path("s/sweep.svg").exists()
    values = json.loads(Path("s/sweep.json").read_text())
    assert (values["best"], values["runs"][0]["val_loss"]) == (None, None)


def test_recipes_and_files() -> None:
    config = parse("--recipe", "gpt2-char", "--learning-rate", "3e-4,1e-3", "--steps", "100")
    assert (config.batch_size, config.eval_interval, config.rates()) == (12, 10, {"3e-4": 3e-4, "1e-3": 1e-3})
    one = config.train_config("3e-4", "o")
    assert (one.learning_rate, one.out, one.recipe, one.json) == (3e-4, "o", "gpt2-char", None)
    assert parse("--recipe", "gpt2-shakespeare", "--learning-rate", "1e-4").eval_interval == 4
    assert parse("--learning-rate", "1e-4", "--eval-interval", "7").eval_interval == 7
    assert parse("--learning-rate", "1e-4", "--epochs", "2").eval_interval == 100
    assert parse("--recipe", "stories15m", "--learning-rate", "1e-4").eval_interval == 2000
    Path("c.toml").write_text('learning_rate = "1e-4,2e-4"\nsteps = 50\n')
    assert parse("--config", "c.toml").rates() == {"1e-4": 1e-4, "2e-4": 2e-4}
    Path("c.toml").write_text("learning_rate = 1e-4\n")
    with pytest.raises(ConfigError, match=r"c\.toml: learning_rate: expected text"):
        parse("--config", "c.toml")


@pytest.mark.parametrize("text", ["", ",", "1e-3,", "x", "1e-3;1e-4", "0", "-1e-3", "nan", "inf", "1e-3,0.001", "１"])
def test_rates_that_are_none(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert "--learning-rate: expected " in refused(capsys, f"--learning-rate={text}", "--out", "s")
    assert not Path("s").exists()


def test_impossible_flags(capsys: pytest.CaptureFixture[str]) -> None:
    rate = ["--learning-rate", "1e-3"]
    assert "--learning-rate: expected rates separated by commas" in refused(capsys, "--recipe", "gpt2-char")
    for flag in ("--resume", "--dry-run", "--profile", "--allow-changed-data"):
        assert f"unknown flag {flag}" in refused(capsys, *rate, flag)
    assert "expected at most --learning-rate=0.001" in refused(capsys, *rate, "--min-learning-rate", "0.01")
    assert "--steps and --epochs exclude" in refused(capsys, *rate, "--steps", "1", "--epochs", "1")
    assert "--out: expected a path" in refused(capsys, *rate, "--out=")
    Path("full").mkdir()
    Path("full/x").write_text("")
    assert "--out full: expected a new or empty folder" in refused(capsys, *rate, "--out", "full")
    assert "--out full/x: expected a new or empty folder" in refused(capsys, *rate, "--out", "full/x")


# ---- the picture ----------------------------------------------------------------------------------------------------


def test_svg_places_points_on_linear_axes() -> None:
    text = line_chart.svg("a < b", "x & y", "nats", [Curve("one", [(0, 1), (10, 3)]), Curve("none", [])])
    root = ET.fromstring(text)
    circles = [(float(c.get("cx", "")), float(c.get("cy", ""))) for c in root.findall(NAMESPACE + "circle")]
    assert circles == [(70, 368), (530, 52)]
    words = [element.text for element in root.findall(NAMESPACE + "text")]
    assert {"a < b", "x & y", "nats", "one: 3.0000", "none: -"} <= set(words)
    assert line_chart.colour(0) != line_chart.colour(1)
    flat = line_chart.svg("t", "x", "y", [Curve("one", [(5, 2)])])
    assert 'cx="300.0" cy="210.0"' in flat


@pytest.mark.parametrize("draw", [line_chart.svg, line_chart.png])
def test_points_that_cannot_be_drawn(draw: Any) -> None:
    for points in ([(0, float("nan"))], [(float("inf"), 1)], []):
        with pytest.raises(InvalidError):
            draw("t", "x", "y", [Curve("a", points)])


def test_png() -> None:
    pytest.importorskip("matplotlib", reason="matplotlib is not installed: pip install 'anellm[plot]'")
    curves = [Curve("one", [(0, 1), (10, 3)]), Curve("none", [])]
    data = line_chart.png("t", "x", "y", curves)
    assert data.startswith(b"\x89PNG\r\n")
    assert data != line_chart.png("t", "x", "y", [Curve("one", [(0, 1), (10, 2)])])


@given(st.floats(-1e6, 1e6), st.floats(1e-3, 1e6))
def test_ticks_are_few_and_inside(low: float, span: float) -> None:
    high = low + span
    found = line_chart.ticks(low, high)
    assert 2 <= len(found) <= 7
    slack = 1e-8 * max(abs(low), abs(high), 1)
    assert all(low - slack <= value <= high + slack for value in found)
    assert found == sorted(set(found))


def test_ticks_are_round() -> None:
    assert line_chart.ticks(0, 100) == [0, 20, 40, 60, 80, 100]
    assert line_chart.ticks(2.5, 4.3) == [2.5, 3.0, 3.5, 4.0]
    assert line_chart.ticks(1, 1) == [1]
