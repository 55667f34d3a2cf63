"""Full disks, read-only folders, missing files and second trainers, through the verb: an exit code and one line."""

from __future__ import annotations

import errno
import functools
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from anellm import checkpoint, metrics, safeio, saferead, train
from anellm.model import Model
from anellm.rundir import RunDirectory
from anellm.tokenizer import Tokenizer

SMALL = ["--preset", "stories260k", "--batch-size", "1", "--seq-len", "16", "--eval-windows", "2", "--plain",
         "--sample-tokens", "0", "--save-interval", "1", "--steps", "3"]  # fmt: skip
FILES = (checkpoint.MODEL, checkpoint.OPTIMIZER)


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("ANELLM_DEBUG", raising=False)


def verb(*argv: str, prepare: Callable[[], None] | None = None) -> subprocess.CompletedProcess[str]:
    """Run the verb in a process of its own."""
    command = [sys.executable, "-m", "anellm.train", *argv]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=120, preexec_fn=prepare)


def one_line(text: str) -> str:
    lines = text.splitlines()
    assert len(lines) == 1, text
    assert lines[0].startswith("anellm train: error: ")
    return lines[0]


def tensors(run: str, step: int) -> list[bytes]:
    return [(checkpoint.step_dir(Path(run), step) / name).read_bytes() for name in FILES]


def test_a_file_size_limit_ends_in_one_line() -> None:
    """RLIMIT_FSIZE cuts a write in the middle, as a disk that fills up does."""
    import resource

    assert train.main([*SMALL, "--out", "whole", "--quiet"]) == 0
    assert train.main([*SMALL, "--out", "r", "--quiet", "--steps", "1", "--schedule", "constant"]) == 0
    size = (Path("whole/step_00000003") / checkpoint.MODEL).stat().st_size
    for limit in (size // 2, size + 100, 2 * size):  # the model, early and late in the moments
        prepare = functools.partial(resource.setrlimit, resource.RLIMIT_FSIZE, (limit, limit))
        done = verb("--resume", "--out", "r", "--steps", "3", prepare=prepare)
        assert done.returncode == 4
        line = one_line(done.stderr)
        assert "the checkpoint of step 2 could not be written: File too large; the run keeps step_00000001" in line
        assert checkpoint.find_checkpoint(Path("r")) == Path("r/step_00000001")
        assert not [name for name in os.listdir("r") if name.startswith(".")]
        assert all(json.loads(text) for text in Path("r/metrics.jsonl").read_text().splitlines())
    assert train.main(["--resume", "--out", "r", "--steps", "3", "--schedule", "cosine", "--quiet"]) == 0
    assert checkpoint.verify(Path("r/step_00000003")) == 3


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO, errno.EDQUOT])
def test_metrics_that_cannot_be_written(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], code: int
) -> None:
    real = safeio.AppendFile.write
    assert train.main([*SMALL, "--out", "whole", "--quiet"]) == 0

    def full(self: safeio.AppendFile, data: bytes) -> None:
        if b'"step": 3' in data:
            real(self, data[: len(data) // 2])
            raise OSError(code, os.strerror(code))
        real(self, data)

    with monkeypatch.context() as patch:
        patch.setattr(safeio.AppendFile, "write", full)
        capsys.readouterr()
        assert train.main([*SMALL, "--out", "r", "--quiet"]) == 4
    line = one_line(capsys.readouterr().err)
    assert f"r: metrics.jsonl could not be written: {os.strerror(code)}; the run keeps step_00000002" in line
    assert [r["step"] for r in metrics.read(Path("r")) if r["kind"] == "step"] == [1, 2]
    assert train.main(["--resume", "--out", "r", "--quiet"]) == 0
    assert tensors("r", 3) == tensors("whole", 3)
    assert [r["step"] for r in metrics.read(Path("r")) if r["kind"] == "step"] == [1, 2, 3]


def test_a_disk_that_is_full_from_the_start(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(fd: int, data: memoryview) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(safeio, "write", full)
        assert train.main([*SMALL, "--out", "r", "--quiet"]) == 4
    line = one_line(capsys.readouterr().err)
    assert "r: config.toml could not be written: No space left on device; there is no older checkpoint" in line
    assert train.main([*SMALL, "--out", "r", "--quiet", "--resume"]) == 0


def test_short_and_interrupted_writes_are_finished(monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.write

    def short(fd: int, data: Any) -> int:
        return real(fd, bytes(data[: max(1, len(data) // 3)]))

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", short)
        safeio.write_bytes(Path("x"), bytes(range(256)) * 999)
    assert Path("x").read_bytes() == bytes(range(256)) * 999
    with monkeypatch.context() as patch:
        patch.setattr(os, "write", lambda fd, data: 0)
        with pytest.raises(OSError, match="nothing was written"):
            safeio.write_bytes(Path("y"), b"1")
    assert os.listdir() == ["x"]


def test_too_few_file_descriptors_are_no_damage(monkeypatch: pytest.MonkeyPatch) -> None:
    assert train.main([*SMALL, "--out", "r", "--quiet"]) == 0
    real = os.open

    def scarce(path: Any, *args: Any, **kwargs: Any) -> int:
        if "step_00000003" in os.fspath(path):
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE), path)
        return real(path, *args, **kwargs)

    monkeypatch.setattr(os, "open", scarce)
    with pytest.raises(OSError, match="Too many open files"):  # and does not go on from step 2
        checkpoint.find_checkpoint(Path("r"))


def test_an_unreadable_sector_is_damage(monkeypatch: pytest.MonkeyPatch) -> None:
    assert train.main([*SMALL, "--out", "r", "--quiet"]) == 0
    real = os.open
    bad: set[int] = set()

    def remember(path: Any, *args: Any, **kwargs: Any) -> int:
        fd = real(path, *args, **kwargs)
        bad.discard(fd)
        if os.fspath(path).endswith("step_00000003/optimizer.safetensors"):
            bad.add(fd)
        return fd

    class Sector(saferead.FileIO):
        def read(self, size: int = -1) -> bytes:
            if self.fileno() in bad:
                raise OSError(errno.EIO, os.strerror(errno.EIO))
            return super().read(size)

    monkeypatch.setattr(os, "open", remember)
    monkeypatch.setattr(saferead, "FileIO", Sector)
    reasons: list[str] = []
    assert checkpoint.find_checkpoint(Path("r"), reasons) == Path("r/step_00000002")
    assert reasons == ["r/step_00000003/optimizer.safetensors: Input/output error"]


def test_a_read_only_place_is_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    real = RunDirectory.__init__
    root = os.geteuid() == 0

    def without_rights(self: RunDirectory, *args: Any) -> None:
        """Open the directory without the rights that let root write anywhere."""
        os.seteuid(65534 if root else os.geteuid())
        try:
            real(self, *args)
        finally:
            os.seteuid(0 if root else os.geteuid())

    monkeypatch.setattr(RunDirectory, "__init__", without_rights)
    with tempfile.TemporaryDirectory() as name:  # pytest's own folders are closed to other users
        place = Path(name)
        (place / "run").mkdir()
        for folder in (place / "run", place):
            folder.chmod(0o555)
        for out in ("new", "run"):
            assert train.main([*SMALL, "--out", str(place / out)]) == 4
            assert str(place / out) in (line := one_line(capsys.readouterr().err))
            assert "Permission denied" in line
        assert os.listdir(place) == ["run"]
        assert os.listdir(place / "run") == []
        place.chmod(0o755)


def test_two_trainers_on_one_directory(capsys: pytest.CaptureFixture[str]) -> None:
    code = (
        "import sys, time\n"
        "from anellm import train, rundir\n"
        "real = rundir.RunDirectory.begin\n"
        "def begin(self, *args, **more):\n"
        "    real(self, *args, **more)\n"
        "    print('begun', flush=True)\n"
        "    sys.stdin.read()\n"
        "rundir.RunDirectory.begin = begin\n"
        f"raise SystemExit(train.main({[*SMALL, '--out', 'r', '--quiet']!r}))\n"
    )
    first = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert first.stdin is not None
    assert first.stdout is not None
    assert first.stdout.readline() == "begun\n"
    before = {name: (Path("r") / name).read_bytes() for name in os.listdir("r")}
    for more in ([], ["--resume"]):
        assert train.main([*SMALL, "--out", "r", *more]) == 1
        assert f"run r: in use by another process (pid {first.pid})" in one_line(capsys.readouterr().err)
    assert {name: (Path("r") / name).read_bytes() for name in os.listdir("r")} == before
    first.stdin.close()
    assert first.wait(60) == 0
    first.stdout.close()
    assert checkpoint.list_steps(Path("r")) == [2, 3]


def test_what_a_kill_left_is_swept() -> None:
    assert train.main([*SMALL, "--out", "r", "--quiet"]) == 0
    for name in (".tmp-step_00000004-12-3", ".trash-step_00000001-12-4"):
        (Path("r") / name / "inner").mkdir(parents=True)
    for name in (".tmp-best.json-1-1", ".tmp-notes", ".git"):
        (Path("r") / name).write_text("")
    assert train.main(["--resume", "--out", "r", "--quiet"]) == 0
    assert {name for name in os.listdir("r") if name.startswith(".")} == {".tmp-notes", ".git"}


# ---- resuming without what the run began with ------------------------------------------------------------------


def test_resume_needs_no_model_file(capsys: pytest.CaptureFixture[str]) -> None:
    Model.from_preset("stories260k", seed=3, vocab_size=Tokenizer.shipped().vocab_size).save_pretrained("base")
    argv = ["--model", "base", *SMALL[2:], "--learning-rate", "0.001"]
    assert train.main([*argv, "--out", "whole", "--quiet"]) == 0
    assert train.main([*argv, "--out", "r", "--quiet", "--save-interval", "1"]) == 0
    shutil.rmtree("r/step_00000003")
    shutil.rmtree("base")
    assert train.main(["--resume", "--out", "r", "--dry-run"]) == 0
    assert train.main(["--resume", "--out", "r", "--quiet"]) == 0
    assert tensors("r", 3) == tensors("whole", 3)
    assert "model = " in Path("r/config.toml").read_text()
    # Another model in its place is refused.
    Model.from_preset("stories260k", n_layers=1, vocab_size=Tokenizer.shipped().vocab_size).save_pretrained("base")
    capsys.readouterr()
    assert train.main(["--resume", "--out", "r", "--quiet"]) == 4
    assert "another model's checkpoint: n_layers: expected 5, found 1" in one_line(capsys.readouterr().err)


def test_resume_needs_no_tokenizer_file(capsys: pytest.CaptureFixture[str]) -> None:
    Tokenizer.shipped().save("tok.bin")
    Path("a.txt").write_text("To be, or not to be, that is the question. " * 100)
    argv = [*SMALL, "--data", "a.txt", "--tokenizer", "tok.bin", "--quiet"]
    assert train.main([*argv, "--out", "whole"]) == 0
    assert train.main([*argv, "--out", "r"]) == 0
    shutil.rmtree("r/step_00000003")
    Path("tok.bin").unlink()
    assert train.main(["--resume", "--out", "r", "--quiet"]) == 0
    assert tensors("r", 3) == tensors("whole", 3)
    # Another one in its place is refused, unless that is wanted.
    shipped = Tokenizer.shipped()
    Tokenizer(shipped.pieces, [score - 1 for score in shipped.scores]).save("tok.bin")
    capsys.readouterr()
    more = ["--resume", "--out", "r", "--quiet", "--steps", "4"]
    assert train.main(more) == 4
    line = one_line(capsys.readouterr().err)
    assert "trained with another tokenizer: expected SHA-256" in line
    assert "tok.bin" in line
    assert train.main([*more, "--allow-changed-data"]) == 0


def test_changed_data_is_refused_unless_allowed(capsys: pytest.CaptureFixture[str]) -> None:
    ids = np.random.default_rng(0).integers(0, 512, 3000).astype(np.uint16)
    ids.tofile("a.bin")
    ids[:400].tofile("v.bin")
    argv = [*SMALL, "--data", "a.bin", "--val-data", "v.bin", "--quiet", "--out", "r"]
    assert train.main(argv) == 0
    before = json.loads(Path("r/step_00000003/state.json").read_text())
    assert before["best_step"] == 3
    capsys.readouterr()
    more = ["--resume", "--out", "r", "--quiet", "--steps", "5"]
    ids[:500].tofile("v.bin")
    assert train.main(more) == 4
    assert "of the held-out tokens" in one_line(capsys.readouterr().err)
    ids[:400].tofile("v.bin")
    ids[7] ^= 1
    ids.tofile("a.bin")
    assert train.main(more) == 4
    assert "of the training tokens" in (line := one_line(capsys.readouterr().err))
    assert "(a.bin); --allow-changed-data goes on with it" in line
    ids[:500].tofile("v.bin")
    assert train.main([*more, "--allow-changed-data"]) == 0
    after = json.loads(Path("r/step_00000005/state.json").read_text())
    assert after["data_sha256"] != before["data_sha256"]
    assert after["val_sha256"] != before["val_sha256"]
    assert after["best_step"] == 5
    # Once taken over, the new data is the run's data.
    assert train.main([*more[:-1], "6"]) == 0
    # No flag takes another shape.
    capsys.readouterr()
    assert train.main(["--resume", "--out", "r", "--preset", "tiny", "--allow-changed-data"]) == 4
    assert "another model's checkpoint: dim" in one_line(capsys.readouterr().err)
