"""Where the time of a step goes: the C core's sums of spans, and the report that is made of them."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest

from anellm import train
from anellm._ffi import check, ffi, lib
from anellm.efficiency import Efficiency, describe, read_sums
from anellm.errors import InvalidError

ROWS = ("compile_ms", "ane_eval_ms", "io_ms", "classifier_ms", "rmsnorm_ms", "elementwise_ms", "blocks_ms", "wait_ms",
        "optimizer_ms", "other_ms")  # fmt: skip


def run(out: Path, *more: str) -> dict:
    argv = ["--preset", "tiny", "--seq-len", "16", "--batch-size", "1", "--steps", "3", "--eval-windows", "2"]
    argv += ["--sample-tokens", "0", "--out", str(out), "--json", str(out) + ".json", "--quiet"]
    assert train.main([*argv, *more]) == 0
    return json.loads(Path(str(out) + ".json").read_text())


def test_a_run_on_the_engine(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = run(tmp_path / "run", "--device", "ane-sim")["efficiency"]
    assert found.keys() == {*ROWS, "total_ms", "weight_gradients_ms", "tflops", "ane_tflops"}
    assert sum(found[row] for row in ROWS) == pytest.approx(found["total_ms"])
    for row in ("ane_eval_ms", "io_ms", "classifier_ms", "rmsnorm_ms", "elementwise_ms", "optimizer_ms", "other_ms"):
        assert found[row] > 0, row
    assert found["blocks_ms"] == 0
    assert found["weight_gradients_ms"] > 0
    assert min(found["ane_tflops"], found["tflops"]) > 0
    records = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    (last,) = [record for record in records if record["kind"] == "efficiency"]
    assert last == {"kind": "efficiency", "step": 3, **found}
    # the steps' own time, and nothing of what is between them
    steps = max(record["seconds"] for record in records if record["kind"] == "step")
    assert 0.5 * steps < found["total_ms"] * 3 / 1e3 <= steps
    shown = capsys.readouterr().out
    assert "ANE eval" in shown
    assert "beside: weight gradients" in shown


def test_a_run_on_the_cpu_has_none(tmp_path: Path) -> None:
    assert "efficiency" not in run(tmp_path / "run")
    assert '"efficiency"' not in (tmp_path / "run" / "metrics.jsonl").read_text()


def test_only_steps_count() -> None:
    efficiency = Efficiency()
    assert efficiency.summary() == {}
    assert describe({}) == []
    efficiency.end((9e9, 9e9))  # no step was begun
    for step in range(2):
        efficiency.begin((10e9 * step, 5e9 * step))
        time.sleep(0.01)
        with efficiency.optimizer():
            time.sleep(0.02)
        efficiency.end((10e9 * step + 6e9, 5e9 * step + 2e9))
        time.sleep(0.02)
    found = efficiency.summary()
    assert found["total_ms"] >= 30
    assert found["optimizer_ms"] >= 20
    assert found["other_ms"] == pytest.approx(found["total_ms"] - found["optimizer_ms"])
    assert found["tflops"] == pytest.approx(8e9 / (found["total_ms"] / 1e3) / 1e12)
    assert "ane_tflops" not in found
    lines = describe(found)
    assert "TFLOPS" in lines[0]
    assert [line.split()[0] for line in lines[1:]] == ["AdamW", "other"]


def test_sums_are_taken_while_somebody_counts() -> None:
    with pytest.raises(InvalidError, match="nobody counts"):
        check(lib.anellm_trace_count(0))
    check(lib.anellm_trace_count(1))
    with pytest.raises(InvalidError, match="on = 2, must be 0 or 1"):
        check(lib.anellm_trace_count(2))
    check(lib.anellm_trace_count(0))
    with pytest.raises(InvalidError, match="nobody counts"):
        check(lib.anellm_trace_count(0))
    n = ffi.new("int64_t *")
    with pytest.raises(InvalidError, match="n = -1"):
        check(lib.anellm_trace_sums(ffi.NULL, -1, n))
    with pytest.raises(InvalidError, match="n = 1 with sums NULL"):
        check(lib.anellm_trace_sums(ffi.NULL, 1, n))
    with pytest.raises(InvalidError, match="n_found is NULL"):
        check(lib.anellm_trace_sums(ffi.NULL, 0, ffi.NULL))
    check(lib.anellm_trace_sums(ffi.NULL, 0, n))
    assert n[0] == len(read_sums())
    closed = Efficiency()
    closed.begin((0.0, 0.0))
    closed.close()
    closed.close()
    with pytest.raises(InvalidError, match="nobody counts"):
        check(lib.anellm_trace_count(0))


def test_another_process_counts_on() -> None:
    def sums() -> dict[tuple[str, int], int]:
        return {("norm", lib.ANELLM_TRACE_CALLER): next(clock)}

    clock = iter(range(10, 1000, 10))
    first = Efficiency(sums)
    first.begin((1e9, 2e9))
    state = json.loads(json.dumps(first.state((3e9, 2e9))))
    first.close()
    second = Efficiency(sums)
    second.go_on(state)
    second.begin((0.0, 0.0))
    second.end((1e9, 1e9))
    assert second.steps == 1
    assert second.summary()["rmsnorm_ms"] == pytest.approx(20e-6)
    assert second.state((0.0, 0.0))["flops"] == [3e9, 1e9]
    for name in state:
        for value in (None, -1, "x", [1], [True, 1.0]):
            with pytest.raises(InvalidError, match=f"efficiency: {name}: expected"):
                second.go_on({**state, name: value})
    for value in (None, [], {}, {**state, "more": 1}):
        with pytest.raises(InvalidError, match="efficiency: expected sums, ns"):
            second.go_on(value)
