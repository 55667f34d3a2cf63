"""``train --profile``: a trace that the viewers read, of every phase of every step."""

from __future__ import annotations

import json
import threading
from pathlib import Path

import pytest

from anellm import train
from anellm.profile import Tracer

PHASES = {"batch", "forward", "backward", "grad_norm", "optimizer"}


def read(path: Path) -> list[dict]:
    """Return the spans of a trace, after checking that every event is one that the format knows."""
    events = json.loads(path.read_text())
    for event in events:
        assert event["ph"] in ("X", "M")
        assert {"name", "pid", "tid", "args"} <= event.keys()
    spans = [event for event in events if event["ph"] == "X"]
    for event in spans:
        assert event["ts"] >= 0
        assert event["dur"] >= 0
        assert event["args"]["cpu_ms"] >= 0
    return spans


def inside(inner: dict, outer: dict) -> bool:
    slack = 0.01  # microseconds: times are rounded
    return outer["ts"] - slack <= inner["ts"] and inner["ts"] + inner["dur"] <= outer["ts"] + outer["dur"] + slack


def test_a_run(tmp_path: Path) -> None:
    path = tmp_path / "trace.json"
    argv = ["--preset", "tiny", "--seq-len", "16", "--batch-size", "2", "--steps", "3", "--eval-windows", "2"]
    argv += ["--gradient-accumulation-steps", "2", "--sample-tokens", "2", "--out", str(tmp_path / "run"), "--quiet"]
    assert train.main([*argv, "--profile", str(path)]) == 0
    spans = read(path)
    names = [span["name"] for span in spans]
    assert set(names) == PHASES | {"step", "eval", "sample", "save"}
    steps = [span for span in spans if span["name"] == "step"]
    assert [span["args"]["step"] for span in steps] == [1, 2, 3]
    for name, count in (("batch", 6), ("forward", 6), ("backward", 6), ("grad_norm", 3), ("optimizer", 3), ("eval", 2)):
        assert names.count(name) == count
    for span in spans:
        assert (span["name"] in PHASES) == any(inside(span, step) and span is not step for step in steps)
    assert "profile" not in (tmp_path / "run" / "config.toml").read_text()


def test_without_a_path_nothing_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with Tracer(None) as tracer, tracer.span("x"):
        pass
    assert list(tmp_path.iterdir()) == []


def test_spans_nest_and_survive_errors(tmp_path: Path) -> None:
    path = tmp_path / "trace.json"
    path.write_text("what was there before")
    with pytest.raises(KeyError, match="k"), Tracer(path) as tracer, tracer.span("outer", note="ü"):
        with tracer.span("inner"):
            pass
        raise KeyError("k")
    inner, outer = read(path)
    assert (inner["name"], outer["name"]) == ("inner", "outer")
    assert inside(inner, outer)
    assert outer["args"]["note"] == "ü"


def test_threads_have_names(tmp_path: Path) -> None:
    path = tmp_path / "trace.json"
    with Tracer(path) as tracer:

        def work() -> None:
            with tracer.span("there"):
                pass

        with tracer.span("here"):
            thread = threading.Thread(target=work, name="helper")
            thread.start()
            thread.join()
    there, here = read(path)
    assert there["tid"] != here["tid"]
    names = {e["tid"]: e["args"]["name"] for e in json.loads(path.read_text()) if e["name"] == "thread_name"}
    assert names == {there["tid"]: "helper", here["tid"]: "MainThread"}


def test_a_killed_run_leaves_a_readable_trace(tmp_path: Path) -> None:
    """Without its last bracket the file is what the format allows: an array that is not closed."""
    path = tmp_path / "trace.json"
    tracer = Tracer(path).__enter__()
    with tracer.span("x"):
        pass
    assert tracer._file is not None
    tracer._file.flush()
    events = json.loads(path.read_text() + "]")
    assert [event["name"] for event in events] == ["process_name", "thread_name", "x"]
    tracer.__exit__(None, None, None)
