"""What a run shows: the live line, plain lines, the curve; and what a machine has left."""

from __future__ import annotations

import io
import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from anellm import curve, machine
from anellm.progress import Progress, duration, printable


def step(n: int, loss: float = 2.0) -> dict[str, Any]:
    return {"kind": "step", "step": n, "loss": loss, "lr": 1e-3, "grad_norm": 0.5, "tokens_per_s": 1000.0}


EVAL = {"kind": "eval", "step": 5, "val_loss": 1.5, "perplexity": 4.48, "bits_per_byte": None}
SAMPLE = {"kind": "sample", "step": 5, "text": "To be\nor [bold]not[/bold] \x1b[31m\a"}


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    encoding = "utf-8"

    def isatty(self) -> bool:
        return True


def shown(stream: io.StringIO, records: list[dict[str, Any]], **options: Any) -> str:
    with Progress(20, stream=stream, **options) as progress:
        for record in records:
            progress(record)
    return stream.getvalue()


def test_plain_lines() -> None:
    text = shown(io.StringIO(), [*(step(n) for n in range(1, 21)), EVAL, SAMPLE], log_interval=10)
    lines = text.splitlines()
    assert [line.split("  ")[0] for line in lines[:3]] == ["step 1/20", "step 10/20", "step 20/20"]
    assert "loss 2.0000  lr 1.00e-03  norm 0.50  1000 tok/s" in lines[0]
    assert lines[3] == "step 5  validation loss 1.5000  perplexity 4.48"
    assert lines[4:] == ["step 5  sample:", "  | To be", "  | or [bold]not[/bold] \ufffd[31m\ufffd"]


def test_a_terminal_gets_a_live_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    records = [step(1), EVAL, SAMPLE, {"kind": "interrupt", "step": 3}, {"kind": "save", "step": 3, "path": "x"}]
    text = shown(Terminal(), records)
    assert "step 1/20" in text
    assert "validation loss 1.5000" in text
    assert "[bold]not[/bold]" in text
    assert "\x1b[31m" not in text
    assert "interrupted: saving" in text
    assert "\r" in text or "\x1b[" in text
    assert "\x1b[" not in shown(Terminal(), records, plain=True)
    assert shown(Terminal(), records, quiet=True) == ""


def test_a_skipped_step_does_not_blank_the_loss() -> None:
    skip = {"kind": "skip", "step": 2, "tensor": "w", "n_nonfinite": 3}
    text = shown(io.StringIO(), [step(1), step(2, math.nan), skip, step(3)], log_interval=1)
    assert "skipped: 3 non-finite gradients, first in w" in text
    assert "step 3/20  loss 2.0000" in text


def test_what_cannot_be_shown_is_replaced() -> None:
    assert printable("aü\u2603\x07", "latin-1") == "aü??"
    assert printable("a\tb\n") == "a\tb\n"


@pytest.mark.parametrize(("seconds", "text"), [(-1, "0s"), (59.4, "59s"), (60, "1m00s"), (3725, "1h02m")])
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text


loss = st.floats(0, 100, allow_nan=False)


@given(
    train=st.lists(loss, max_size=50),
    val=st.lists(loss, max_size=5),
    width=st.integers(1, 80),
    height=st.integers(1, 12),
    ascii_only=st.booleans(),
)
def test_a_curve_fits_its_frame(
    train: list[float], val: list[float], width: int, height: int, ascii_only: bool
) -> None:
    points = list(enumerate(train, 1))
    marks = [(index * 7, value) for index, value in enumerate(val)]
    text = curve.draw(points, marks, width, height, ascii_only=ascii_only)
    if len(train) + len(val) < 2:
        assert text == ""
        return
    lines = text.splitlines()
    assert len(lines) == height + 2
    assert all(len(line) <= width + 10 for line in lines[:height])
    assert text.isascii() or not ascii_only
    assert f"{max(train + val):8.3f}" in lines[0]


def test_a_falling_loss_falls() -> None:
    text = curve.draw([(n, 10.0 - n) for n in range(1, 9)], [(1, 9.0), (8, 2.0)], 8, 4)
    assert text.splitlines()[:4] == [
        "   9.000 |◆▄",
        "         |██▇▃",
        "   4.333 |████▆▂",
        "   2.000 |██████▅◆",
    ]


def test_points_of_records() -> None:
    records = [step(1), {"kind": "step", "step": 2, "loss": None}, {**EVAL}, {**EVAL, "val_loss": None}, SAMPLE]
    assert curve.points(records) == ([(1, 2.0)], [(5, 1.5)])


def test_memory_that_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = machine.available_bytes()
    assert found is None or 1 << 20 < found < 1 << 60
    group = tmp_path / "a" / "b"
    group.mkdir(parents=True)
    (tmp_path / "a" / "memory.max").write_text("1000000\n")
    (tmp_path / "a" / "memory.current").write_text("900000\n")
    (tmp_path / "a" / "memory.stat").write_text("anon 7\ninactive_file 300000\n")
    (group / "memory.max").write_text("max\n")
    (group / "memory.current").write_text("1\n")
    own = tmp_path / "cgroup"
    own.write_text("0::/a/b\n")
    folders = machine._cgroup_folders(own, tmp_path)
    assert [folder for folder, _, _ in folders] == [group, tmp_path / "a", tmp_path]
    with monkeypatch.context() as patch:
        patch.setattr(machine, "_cgroup_folders", lambda: folders)
        assert machine.available_bytes() == 400000
    old = tmp_path / "memory" / "x"
    old.mkdir(parents=True)
    own.write_text("5:cpu,memory:/x\n4:pids:/x\n")
    (first, *_) = machine._cgroup_folders(own, tmp_path)
    assert first == (old, "memory.limit_in_bytes", "memory.usage_in_bytes")
    own.unlink()
    assert machine._cgroup_folders(own, tmp_path) == []


@pytest.mark.parametrize(
    ("n", "size", "count"),
    [(0, "0 B", "0"), (999, "999 B", "999"), (1536, "1.5 KiB", "1.5 k"), (3e15, "2728.5 TiB", "3.0 P")],
)
def test_numbers_for_people(n: float, size: str, count: str) -> None:
    assert machine.human_bytes(n) == size
    assert machine.human_count(n) == count
