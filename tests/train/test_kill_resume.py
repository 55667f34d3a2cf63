"""A run that is killed at any time and goes on with --resume ends with the bytes of a run that was not."""

from __future__ import annotations

import hashlib
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

from anellm import checkpoint, metrics

STEPS = 20
OPTIONS = ["--preset", "stories260k", "--steps", str(STEPS), "--batch-size", "2", "--seq-len", "64", "--seed", "1",
           "--save-interval", "2", "--eval-interval", "5", "--eval-windows", "2", "--sample-tokens", "0"]  # fmt: skip


def start(out: Path, *more: str) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "anellm.train", *OPTIONS, "--quiet", "--out", str(out), *more]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def digests(run: Path) -> dict[str, str]:
    step = checkpoint.step_dir(run, STEPS)
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in step.glob("*.safetensors")}


def test_killed_and_resumed_is_as_never_killed(tmp_path: Path) -> None:
    whole, run = tmp_path / "whole", tmp_path / "run"
    process = start(whole)
    _, err = process.communicate()
    assert process.returncode == 0, err
    chance = random.Random(5)
    for least in (1, 6, 11):  # anywhere behind these steps: while it computes, saves, evaluates or removes
        process = start(run, "--resume")
        deadline = time.monotonic() + 60
        while all(record["step"] < least for record in metrics.read(run)):
            assert process.poll() is None, process.communicate()
            assert time.monotonic() < deadline
            time.sleep(0.001)
        time.sleep(chance.random() * 0.02)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        assert process.returncode == -signal.SIGKILL, "it was done before it was killed"
    process = start(run, "--resume")
    _, err = process.communicate()
    assert process.returncode == 0, err
    assert len(digests(whole)) == 2
    assert digests(run) == digests(whole)
    for kind, key in (("step", "loss"), ("eval", "val_loss")):
        curves = [[(r["step"], r[key]) for r in metrics.read(path) if r["kind"] == kind] for path in (whole, run)]
        assert curves[0] == curves[1]
    assert checkpoint.list_steps(run) == checkpoint.list_steps(whole)
    assert checkpoint.read_best(run) == checkpoint.read_best(whole)
