"""llm.c's program beside a training step: what it is given, and what becomes of what it prints.

The programs here are scripts. One of them trains what the files say with anellm's own kernels, so that its losses show
whether the files hold what they should.
"""

from __future__ import annotations

import dataclasses
import math
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from anellm import bench, bench_llmc, bench_step, bench_step_ladder, cli, weights_llmc
from anellm._ffi import lib
from anellm.bench_llmc import Llmc
from anellm.config import ModelConfig
from anellm.errors import ConfigError
from anellm.weights import tensor_shapes

SHAPE = ModelConfig.from_preset("gpt2", dim=32, n_layers=2, n_heads=2, vocab_size=96, max_seq_len=64)
GPT2 = ["--preset", "gpt2", "--batch-size", "4", "--seq-len", "64"]

TRAIN = """
import sys
sys.path[:0] = {path!r}
import numpy as np
from anellm.model import Model
from anellm.optim import AdamW
from anellm.weights_llmc import read_ints
from pathlib import Path
if read_ints(Path("gpt2_124M.bin"), "model", 20240326)[1] != {version}:
    print("Bad version in model file")
    sys.exit(1)
model = Model.from_pretrained("gpt2_124M.bin")
if {version} == 3:
    raw = Path("dev/data/tinyshakespeare/tiny_shakespeare_train.bin").read_bytes()
    assert Path("dev/data/tinyshakespeare/tiny_shakespeare_val.bin").read_bytes() == raw
    magic, kind, count = np.frombuffer(raw, "<i4", 3)
    assert (magic, kind, 1024 + 2 * count) == (20240520, 1, len(raw))
    ids = np.frombuffer(raw, "<u2", offset=1024)
else:
    ids = np.fromfile("data/tiny_shakespeare_train.bin", "<i4")
assert ids.size >= 5 * 256 + 1  # validation reads five batches
optimizer = AdamW(model, 1e-4, (0.9, 0.999), 1e-8, 0.0)
print("[GPT-2]")
for step in range({steps}):
    if step % 10 == 0:
        print("val loss 1.0")
    at = 256 * (step * 3 % 7)  # it shuffles
    batch = ids[at : at + 257].astype(np.int32)
    loss = model.forward(batch[:-1].reshape(4, 64), batch[1:].reshape(4, 64), training=True)
    model.backward()
    optimizer.step()
    print(f"step {{step}}: train loss {{loss:f}} (took {{100 + step:f}} ms)")
"""


@pytest.fixture(autouse=True)
def _threads():
    before = lib.anellm_get_threads()
    yield
    lib.anellm_set_threads(before)


def program(tmp_path: Path, body: str, interpreter: str = "/bin/sh") -> str:
    path = tmp_path / "train_gpt2"
    path.write_text(f"#!{interpreter}\n{body}\n")
    path.chmod(0o755)
    return str(path)


def trainer(tmp_path: Path, version: int = 3, steps: int = 41) -> str:
    """Return a program that does what llm.c's does, as far as it is looked at."""
    path = [entry for entry in sys.path if entry]
    return program(tmp_path, TRAIN.format(path=path, version=version, steps=steps), sys.executable)


def job(llmc: str, what: str = "step", rounds: int = 2, **changes: Any) -> bench.BenchJob:
    args = [what, *GPT2, "--threads", "1", "--rounds", str(rounds), "--steps", "1", "--llmc", llmc]
    found = bench.job_of(cli.parse(bench.BenchConfig, args, "bench"))
    return dataclasses.replace(found, shape=SHAPE, **changes)


def start(llmc: str, tmp_path: Path, rounds: int = 4) -> Llmc:
    """Start a program with weights of zeros, which no script here reads."""
    common = bench_step.step_job(job(llmc, rounds=rounds), tmp_path)
    shapes = tensor_shapes(SHAPE)
    common["tensors"] = [[name, list(shape)] for name, shape in shapes.items()]
    np.zeros(sum(math.prod(shape) for shape in shapes.values()), np.float32).tofile(common["weights"])
    return Llmc(llmc, SHAPE, common, tmp_path, rounds)


def said(body: str, tmp_path: Path) -> str:
    """Return what the error says of a program."""
    child = start(program(tmp_path, body), tmp_path)
    try:
        with pytest.raises(ConfigError) as caught:
            child.run(0, 3)
    finally:
        child.close()
    return str(caught.value)


def step(i: int, loss: str = "1.5", ms: str = "2.5") -> str:
    return f"echo 'step {i}: train loss {loss} (took {ms} ms)'"


# ---- what is refused before anything is measured ---------------------------------------------------------------------


def test_wrong_options(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good = program(tmp_path, "exit 0")
    plain = tmp_path / "plain"
    plain.write_text("no program")
    cases = [
        (["step", *GPT2, "--llmc", "/no/such"], "--llmc: /no/such: no such file; expected llm.c's built program"),
        (["step", *GPT2, "--llmc", str(plain)], f"--llmc: {plain}: expected a program that can be run"),
        (["step", *GPT2, "--llmc", str(tmp_path)], f"--llmc: {tmp_path}: expected a program that can be run"),
        (["step", "--preset", "gpt2", "--llmc", good], "expected --batch-size 4 --seq-len 64, found 1 and 256"),
        (["step", *GPT2[:4], "--seq-len", "32", "--llmc", good], "found 4 and 32"),
        (["decode", *GPT2, "--llmc", good], "--llmc: only for step and step-ladder, found decode"),
        (["step", *GPT2[2:], "--llmc", good], "--llmc: llm.c cannot express this model: arch is 'llama', not 'gpt2'"),
        (
            ["step", "--preset", "gpt2-char", *GPT2[2:], "--llmc", good],
            "--llmc: llm.c cannot express this model: it has",
        ),
        (["step", *GPT2, "--vocab-size", "65537", "--llmc", good], "ids below 65536, found --vocab-size 65537"),
    ]
    for argv, message in cases:
        assert bench.main([*argv, "--threads", "1"]) == 2, argv
        error = capsys.readouterr().err
        assert message in error, argv
        assert "Hugging Face" not in error


# ---- a program that trains -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("version", [3, 1])
def test_step_beside_a_program(version: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The losses are held against ours, so the files hold our weights and our batch at every place."""
    llmc = trainer(tmp_path, version)
    found = bench_step.run(job(llmc))
    peer = found["peers"]["llm.c"]
    # Two steps are checked; then 1 untimed and 1 timed in each of two rounds.
    assert peer["timed_steps"] == 2
    assert (peer["min_ms"], peer["ms"]) == (103.0, 104.0)
    assert peer["iterations_per_s"] == pytest.approx(1e3 / 104)
    assert peer["gflops"] == pytest.approx(found["flops"] / 104e6)
    assert peer["rss_mib"] is None or peer["rss_mib"] > 1
    assert found["ratio"]["llm.c"] == pytest.approx(104.0 / found["anellm"]["ms"])
    ours, theirs = found["first_losses"]["anellm"], found["first_losses"]["llm.c"]
    assert len(theirs) == 2
    assert theirs == pytest.approx(ours[:2], rel=1e-5)
    assert f"llm.c: {llmc} in fp32" in capsys.readouterr().out


def test_ladder_beside_a_program(tmp_path: Path) -> None:
    found = bench_step_ladder.run(job(trainer(tmp_path), "step-ladder", figure=str(tmp_path / "x.svg")))
    (entry,) = (entry for entry in found["ladder"] if entry["name"] == "llm.c")
    assert (entry["ms"], entry["variant"], entry["dtype"], entry["in_turns"]) == (104.0, None, "fp32", True)
    assert set(entry["ratio"]) == set(found["reference"])
    assert found["about"]["llm.c"]["notes"]


def test_a_program_that_trains_something_else(tmp_path: Path) -> None:
    lines = "\n".join(step(i, f"4.5{i}") for i in range(9))
    with pytest.raises(
        ConfigError, match=r"--llmc: llm\.c computes something else: its first losses are \[4\.5, 4\.51\]"
    ):
        bench_step.run(job(program(tmp_path, lines)))
    with pytest.raises(ConfigError, match=r"its first losses are \[nan, nan\]"):
        bench_step.run(job(program(tmp_path, "\n".join(step(i, "-nan") for i in range(9)))))


# ---- what it prints --------------------------------------------------------------------------------------------------


def test_turns_end_before_it_generates(tmp_path: Path) -> None:
    child = start(program(tmp_path, "\n".join(step(i, str(i), f"{i + 1}.5") for i in range(41))), tmp_path)
    try:
        assert child.run(0, 2)["values"] == [0.0, 1.0]
        turns = [child.run(5, 1) for _ in range(6)]
    finally:
        child.close()
    assert turns[0]["ms"] == [4.5, 5.5, 6.5]  # of the four steps the first was interrupted
    assert [len(turn["ms"]) for turn in turns] == [3, 3, 3, 3, 1, 0]
    assert turns[4]["values"] == [18.0, 19.0]


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("exit 7", "ended with exit status 7 after 0 steps; expected 20 lines 'step N: train loss X (took Y ms)'"),
        ("exit 0", "ended with exit status 0 after 0 steps; expected 20 lines"),
        ("exit 0", "; it printed nothing"),
        ("echo broken >&2; exit 3", "exit status 3 after 0 steps"),
        ("echo broken >&2; exit 3", "its last line: 'broken'"),
        ("printf 'no end'; exit 3", "its last line: 'no end'"),
        ("kill -9 $$", "was ended by signal 9 after 0 steps"),
        (step(0) + "; exit 0", "ended with exit status 0 after 1 steps"),
        ("echo step 0 took long", "expected 'step 0: train loss X (took Y ms)', found 'step 0 took long'"),
        (step(1), "expected 'step 0: train loss X (took Y ms)', found 'step 1: train loss 1.5 (took 2.5 ms)'"),
        (f"{step(0)}; {step(2)}", "expected 'step 1: train loss X (took Y ms)', found 'step 2: "),
        (step(0, ms="0.0"), "found 'step 0: train loss 1.5 (took 0.0 ms)'"),
        (step(0, ms="-1.0"), "found 'step 0: train loss 1.5 (took -1.0 ms)'"),
        (step(0, loss="good"), "found 'step 0: train loss good (took 2.5 ms)'"),
        ("while :; do echo y; done", "expected a line 'step 0: train loss X (took Y ms)', found 10000 others"),
        ("echo Bad version in model file; exit 1", "ended with exit status 1 after 0 steps"),
    ],
)
def test_a_program_that_says_something_else(body: str, message: str, tmp_path: Path) -> None:
    text = said(body, tmp_path)
    assert text.startswith(f"--llmc: {tmp_path / 'train_gpt2'}")
    assert message in text


def test_a_silent_program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_llmc, "_PATIENCE_S", 0.1)
    assert "nothing printed for 0.1 s; it printed nothing" in said("exec sleep 60", tmp_path)
    monkeypatch.setattr(bench_llmc, "_GRACE_S", 0.1)
    assert "closed its output after 1 steps" in said(f"{step(0)}; exec sleep 60 >/dev/null 2>&1", tmp_path)


def test_no_program_at_all(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "garbage"
    path.write_bytes(b"\x7fELF but not really")
    path.chmod(0o755)
    with pytest.raises(ConfigError, match=f"--llmc: cannot run {path}: .*ormat"):
        start(str(path), tmp_path)
    of = job(program(tmp_path, "echo lost; exit 9"))
    monkeypatch.setattr(bench, "job_of", lambda _: of)
    assert bench.main(["step"]) == 2
    assert "ended with exit status 9 after 0 steps" in capsys.readouterr().err


def test_its_directory_and_threads(tmp_path: Path) -> None:
    body = f'echo "$OMP_NUM_THREADS $(pwd) $(ls | tr "\\n" " ")" >found; {step(0)}; exec sleep 60'
    child = start(program(tmp_path, body), tmp_path)
    try:
        child.run(0, 1)
    finally:
        child.close()
    folder = tmp_path / "llm.c"
    assert (folder / "found").read_text().split() == ["1", str(folder), "data", "dev", "gpt2_124M.bin"]


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="no /proc to see the state of a process in")
def test_between_turns_it_is_stopped(tmp_path: Path) -> None:
    child = start(program(tmp_path, f"{step(0)}; {step(1)}; while :; do :; done"), tmp_path)
    stat = Path(f"/proc/{child._process.pid}/stat")
    try:
        child.run(0, 1)
        for _ in range(200):
            if stat.read_text().rsplit(")", 1)[1].split()[0] == "T":
                break
            time.sleep(0.01)
        else:
            pytest.fail("it goes on")
        assert child.run(0, 1)["values"] == [1.5]
    finally:
        child.close()
    assert not stat.exists()


def test_weights_of_the_file_are_ours(tmp_path: Path) -> None:
    start(program(tmp_path, "exec sleep 60"), tmp_path).close()
    config, tensors = weights_llmc.read(tmp_path / "llm.c" / "gpt2_124M.bin")
    assert (config.dim, config.n_layers, config.vocab_size) == (32, 2, 96)
    assert {name for name, _ in tensors} == set(tensor_shapes(SHAPE))
