"""Files of a run that were damaged on purpose, with hashes made to fit: one clear line, never a crash or a bomb."""

from __future__ import annotations

import json
import os
import random
import shutil
import struct
import sys
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from anellm import checkpoint, metrics, rundir, train
from anellm.config import TrainConfig
from anellm.errors import AnellmError, CheckpointError, ConfigError, DataError
from anellm.rundir import RunDirectory

sys.path.insert(0, str(Path(__file__).parents[1] / "fuzz"))
import targets

LIMIT = 50 << 20  # bytes that refusing a file may take


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """Return a checkpoint to damage."""
    return Path(shutil.copytree(targets.whole_checkpoint(), tmp_path / "step_00000003"))


@contextmanager
def little_memory() -> Iterator[None]:
    """Check that what is done takes less than the limit."""
    tracemalloc.start()
    try:
        yield
        assert tracemalloc.get_traced_memory()[1] < LIMIT
    finally:
        tracemalloc.stop()


def resumes(path: Path) -> bool:
    """Return whether a checkpoint can be resumed; if not, check what is said about it."""
    try:
        targets.resume(path)
    except AnellmError as error:
        assert error.exit_code == 4
        targets.one_line(error)
        assert str(path) in str(error)
        return False
    return True


@pytest.mark.parametrize("name", targets.CHECKPOINT_FILES)
def test_cut_files_are_refused(path: Path, name: str) -> None:
    data = (path / name).read_bytes()
    header = len(data)
    if name.endswith("safetensors"):
        header = 8 + struct.unpack_from("<Q", data)[0]
    step = max(1, header // 400)
    body = [int(at) for at in np.linspace(header, len(data) - 1, 50)] if header < len(data) else []
    for length in [*range(0, header, step), *body]:
        (path / name).write_bytes(data[:length])
        if name != checkpoint.MANIFEST:
            targets.remake(path)
        # Only blanks at the end of JSON may go.
        assert not resumes(path) or not data[length:].strip(), length


@pytest.mark.parametrize("name", targets.CHECKPOINT_FILES)
def test_flipped_bits_are_refused_or_harmless(path: Path, name: str) -> None:
    data = (path / name).read_bytes()
    chance = random.Random(name)
    refused = 0
    for _ in range(500):
        broken = bytearray(data)
        broken[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
        (path / name).write_bytes(broken)
        if name != checkpoint.MANIFEST:
            targets.remake(path)
        refused += not resumes(path)
    assert refused > 30


def test_without_new_hashes_every_flip_is_refused(path: Path) -> None:
    chance = random.Random(2)
    for name in set(targets.CHECKPOINT_FILES) - {checkpoint.MANIFEST}:
        data = (path / name).read_bytes()
        for _ in range(30):
            broken = bytearray(data)
            broken[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
            (path / name).write_bytes(broken)
            with pytest.raises(CheckpointError, match=f"{name}: SHA-256: expected .* found"):
                checkpoint.verify(path)
        (path / name).write_bytes(data)


def with_values(name: str, **values: Any) -> Callable[[Path], None]:
    """Return a change of some keys of a JSON file; a value of ... takes the key out."""

    def change(path: Path) -> None:
        found = json.loads((path / name).read_text()) | values
        (path / name).write_text(json.dumps({key: value for key, value in found.items() if value is not ...}))

    return change


def with_text(name: str, text: str | bytes) -> Callable[[Path], None]:
    return lambda path: (path / name).write_bytes(text if isinstance(text, bytes) else text.encode()) and None


def with_tensor(name: str, tensor: str, value: float, dtype: str = "float32") -> Callable[[Path], None]:
    def change(path: Path) -> None:
        tensors = load_file(path / name)
        tensors[tensor] = tensors[tensor].astype(dtype)
        tensors[tensor].reshape(-1)[1] = value
        save_file(tensors, path / name)

    return change


def without_tensor(name: str, tensor: str, other: str | None = None) -> Callable[[Path], None]:
    def change(path: Path) -> None:
        tensors = load_file(path / name)
        array = tensors.pop(tensor)
        save_file(tensors if other is None else {**tensors, other: array}, path / name)

    return change


def header(name: str, edit: Callable[[str], str], extra: bytes = b"") -> Callable[[Path], None]:
    """Return a change of a safetensors file's header, as text."""

    def change(path: Path) -> None:
        data = (path / name).read_bytes()
        (length,) = struct.unpack_from("<Q", data)
        text = edit(data[8 : 8 + length].decode()).encode()
        (path / name).write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :] + extra)

    return change


def sparse(name: str, size: int) -> Callable[[Path], None]:
    return lambda path: os.truncate(path / name, size)


def replaced(name: str, make: Callable[[Path], Any]) -> Callable[[Path], None]:
    def change(path: Path) -> None:
        (path / name).unlink()
        make(path / name)

    return change


STATE, MODEL, OPTIMIZER = "state.json", "model.safetensors", "optimizer.safetensors"
MANIFEST, CONFIG = "checkpoint.json", "config.json"
REQUIRED = (STATE, MODEL, MANIFEST)
NORM = "model.norm.weight"
FILES = {name: {"size": 1, "sha256": "0" * 64} for name in (STATE, MODEL, OPTIMIZER, CONFIG)}
TWICE = '"step": 3, "step": 3'

# What is done -> what the line says.
DAMAGE: list[tuple[Callable[[Path], None], str]] = [
    (with_values(STATE, step=-1), "step: expected a whole number from 0, found -1"),
    (with_values(STATE, step=4, optimizer_step=4), "step: expected 3, found 4"),
    (with_values(STATE, tokens=1e3), "tokens: expected a whole number"),
    (with_values(STATE, tokens=2**60), "tokens: expected a whole number"),
    (with_values(STATE, seconds=[1]), r"seconds: expected a finite number from 0, found \[1\]"),
    (with_values(STATE, seconds="x" * 5000), "seconds: expected a finite number from 0, found .x{99}\\.\\.\\.$"),
    (with_values(STATE, optimizer_step=7), "optimizer_step: expected step 3 less the skipped 0, found 7"),
    (with_values(STATE, best_step=2), "best_step: expected a step up to 3, with a best_val_loss, found 2"),
    (with_values(STATE, extra=1), "'extra' is unknown"),
    (with_values(STATE, tokens=...), "'tokens' is missing"),
    (with_values(STATE, data_sha256="1" * 64), "trained with other data: expected SHA-256 1111"),
    (with_text(STATE, '{"step": NaN}'), "NaN, which JSON does not have"),
    (with_text(STATE, '{"seconds": 1e999}'), "is missing"),
    (with_text(STATE, "[3]"), "expected a JSON object, found list"),
    (with_text(STATE, "{" + TWICE + "}"), "a key given twice"),
    (with_text(STATE, b"\xff\xfe"), "expected JSON"),
    (with_text(STATE, '{"step": ' + "9" * 5000 + "}"), "expected JSON"),
    (with_text(STATE, '{"a":' * 100_000), "expected JSON, found maximum recursion"),
    (sparse(STATE, 200 << 20), "state.json: expected at most 1048576 bytes, found 209715200"),
    (with_tensor(MODEL, NORM, np.nan), f"{NORM}: expected finite, found nan at index 1"),
    (with_tensor(OPTIMIZER, f"m.{NORM}", -np.inf), f"m.{NORM}: expected finite, found -inf"),
    (with_tensor(OPTIMIZER, f"v.{NORM}", -1.0), f"v.{NORM}: expected at least 0, found -1.0"),
    (with_tensor(MODEL, NORM, 1.0, "float16"), f"{NORM}: expected F32 .4,., found F16"),
    (with_tensor(MODEL, NORM, 1.0, "int64"), f"{NORM}: dtype: expected F32, F16 or BF16, found I64"),
    (without_tensor(MODEL, NORM), "model.norm.weight"),
    (without_tensor(OPTIMIZER, f"v.{NORM}", "w." + NORM), "on one side only"),
    (header(MODEL, lambda text: text[:-1].rstrip("} ") + '}, "a": 1}'), "tensor a: description: expected an object"),
    (header(MODEL, lambda text: text.rstrip()[:-1] + ',"model.norm.weight":{}}'), "duplicate model.norm.weight"),
    (header(MODEL, lambda text: text.replace("[4]", "[1099511627776]", 1)), "expected 4398046511104 bytes"),
    (header(MODEL, lambda text: text.replace("[4]", "[-4]", 1)), "shape: expected a list of sizes"),
    (header(MODEL, lambda text: text.replace("data_offsets", "data_offset", 1)), "data_offsets: expected two offsets"),
    (header(MODEL, str, b"1234"), "size: expected"),
    (with_text(MODEL, struct.pack("<Q", 1 << 40) + b"{}"), "header length: expected at most 2, found 1099511627776"),
    (with_text(MODEL, struct.pack("<Q", len(targets.CLAIMS)) + targets.CLAIMS), "data_offsets"),
    (with_text(OPTIMIZER, b""), "optimizer.safetensors"),
    (with_values(CONFIG, num_hidden_layers=2**40), "n_layers: expected 1 to 2147483647, found 1099511627776"),
    (with_values(CONFIG, num_hidden_layers=2**30), "num_hidden_layers: expected at most one a tensor"),
    (with_values(CONFIG, hidden_size="4"), "hidden_size"),
    (with_values(CONFIG, vocab_size=2**70), "vocab_size"),
    (with_values(CONFIG, model_type="gpt_neo"), "model_type"),
    (with_text(CONFIG, "{"), "config.json"),
    (with_values(MANIFEST, format=2), "format: expected 1, found 2"),
    (with_values(MANIFEST, format=True), "format: expected 1, found True"),
    (with_values(MANIFEST, step=-1), "step: expected a number of at least 0, found -1"),
    (with_values(MANIFEST, step=4), "step: expected 3 by its folder's name, found 4"),
    (with_values(MANIFEST, extra=4), "content: expected format, step and files, found 'extra"),
    (with_values(MANIFEST, files=FILES), "size: expected 1 bytes"),
    (with_values(MANIFEST, files={**FILES, "../../x": FILES[STATE]}), "files: expected plain names, found '../../x'"),
    (with_values(MANIFEST, files={**FILES, "a\0b": FILES[STATE]}), "files: expected plain names"),
    (with_values(MANIFEST, files={**FILES, "x" * 300: FILES[STATE]}), "files: expected plain names"),
    (with_values(MANIFEST, files={**FILES, "\ud800": FILES[STATE]}), "files: expected plain names"),
    (with_values(MANIFEST, files={**FILES, STATE: {**FILES[STATE], "size": True}}), "expected a size in bytes"),
    (with_values(MANIFEST, files={**FILES, STATE: {"size": 1, "sha256": "0"}}), f"files: {STATE}: expected a size"),
    (with_values(MANIFEST, files={}), "files: expected an object with config.json"),
    (with_text(MANIFEST, "[" * 100_000), "expected JSON"),
    (sparse(MANIFEST, 1 << 30), "expected at most 1048576 bytes"),
    *((replaced(name, os.mkfifo), "expected a regular file, found a special file") for name in REQUIRED),
    *((replaced(name, os.mkdir), "expected a regular file, found a folder") for name in REQUIRED),
    *((replaced(name, lambda p: p.symlink_to("/dev/zero")), "found a symbolic link") for name in REQUIRED),
]  # fmt: skip


def unchanged(path: Path, content: bytes) -> bool:
    return path.stat().st_size == len(content) and path.read_bytes() == content


@pytest.mark.parametrize("number", range(len(DAMAGE)))
def test_damage_is_named(path: Path, number: int) -> None:
    damage, says = DAMAGE[number]
    before = (path / MANIFEST).read_bytes()
    damage(path)
    if all(p.is_file() and not p.is_symlink() for p in path.iterdir()) and unchanged(path / MANIFEST, before):
        targets.remake(path)
    with little_memory(), pytest.raises(DataError, match=says) as caught:
        targets.resume(path)
    assert str(path) in str(caught.value)
    assert len(str(caught.value)) < 1000
    assert "\n" not in str(caught.value)


# ---- the run directory around it ---------------------------------------------------------------------------------


def begun(path: Path) -> Path:
    """Make a run directory that has no checkpoint yet."""
    run = RunDirectory(path)
    run.begin(TrainConfig(out=str(path)), {})
    run.close()
    return path


def kinds(path: Path) -> Iterator[str]:
    """Put things that are no regular file at a path, one after the other."""
    path.unlink(missing_ok=True)
    os.mkfifo(path)
    yield "special file"
    path.unlink()
    path.symlink_to("/dev/zero")
    yield "symbolic link"
    path.unlink()
    path.mkdir()
    yield "folder"
    path.rmdir()


@pytest.mark.parametrize("name", ["config.toml", "manifest.json", "metrics.jsonl", "best.json", "run.lock"])
def test_special_files_in_a_run_are_refused(
    tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("ANELLM_DEBUG", raising=False)
    run = begun(tmp_path / "run")
    for kind in kinds(run / name):
        assert train.main(["--resume", "--out", str(run)]) == 2
        assert f"{name}: expected a regular file" in (err := capsys.readouterr().err)
        assert f"found a {kind}" in err
        assert err.count("\n") == 1
        with pytest.raises((ConfigError, AnellmError), match=name):
            RunDirectory(run, "auto")


def test_a_linked_step_is_refused(tmp_path: Path, path: Path) -> None:
    run = begun(tmp_path / "run")
    (run / "step_00000003").symlink_to(path)
    with pytest.raises(ConfigError, match="step_00000003: expected a folder, found a symbolic link"):
        RunDirectory(run, "auto")
    (run / "step_00000003").unlink()
    (run / "step_00000003").write_text("x")
    with pytest.raises(ConfigError, match="expected a folder, found a regular file"):
        RunDirectory(run, "auto")
    assert checkpoint.is_whole(path)


BAD_TOML: dict[str, bytes] = {
    "nested": b"a = " + b"[" * 100_000,
    "dotted": b".".join([b"a"] * 60_000) + b" = 1",
    "not utf-8": b"seed = \xff",
    "unfinished": b"seed = ",
    "twice": b"seed = 1\nseed = 2\n",
    "unknown": b"sede = 1\n",
    "another program's": b"[package]\nname = 'x'\n",
    "a date": b"seed = 1979-05-27\n",
    "a large number": b"seed = " + b"9" * 5000,
    "negative": b"steps = -1\n",
    "a list": b"steps = [1]\n",
    "inf": b"learning_rate = inf\n",
    "NUL": b'data = "a\\u0000b"\n',
    "a control character": b'data = "a\x1bb"\n',
    "a long value": b'schedule = "' + b"x" * 100_000 + b'"\n',
    "large": b"# " + b"x" * (1 << 20),
}


@pytest.mark.parametrize("what", BAD_TOML)
def test_bad_toml_is_one_line(tmp_path: Path, what: str, capsys: pytest.CaptureFixture[str]) -> None:
    run = begun(tmp_path / "run")
    for argv in (["--resume", "--out", str(run)], ["--config", str(run / "config.toml"), "--out", str(tmp_path / "x")]):
        (run / "config.toml").write_bytes(BAD_TOML[what])
        with little_memory():
            assert train.main(argv) == 2
        err = capsys.readouterr().err
        assert err.count("\n") == 1
        assert "config.toml" in err
        assert len(err) < 3000
        assert err.rstrip("\n").isprintable()
    with pytest.raises(ConfigError, match=r"config\.toml"):
        RunDirectory(run, "auto")
    assert (run / "config.toml").read_bytes() == BAD_TOML[what]


def test_many_dots_in_values_are_fine(tmp_path: Path) -> None:
    (tmp_path / "config.toml").write_text(f'sample_prompt = "{"a. {" * 1000}"\n')
    assert rundir.read_config(tmp_path)["sample_prompt"].count(".") == 1000
    for text in ("a = {" + ".".join("b" * 1000) + " = 1}", "a = [{" + ".".join("b" * 1000) + " = 1}]"):
        (tmp_path / "config.toml").write_text(text)
        with pytest.raises(ConfigError, match="line 1: expected KEY = VALUE, found 999 dots"):
            rundir.read_config(tmp_path)


def test_config_may_be_a_link_but_no_pipe(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.toml").write_text("steps = 0")
    (tmp_path / "link.toml").symlink_to("a.toml")
    os.mkfifo(tmp_path / "pipe.toml")
    for name, says in (("link", "expected at least 1, found 0"), ("pipe", "found a special file"), ("none", "No such")):
        assert train.main(["--config", str(tmp_path / f"{name}.toml")]) == 2
        assert says in capsys.readouterr().err


def test_metrics_of_any_content(tmp_path: Path) -> None:
    good = [b'{"kind": "step", "step": %d, "loss": 1.5}\n' % n for n in range(1, 4)]
    bad = [
        b"\xff\xfe\n", b"[]\n", b"\n", b"\0\n", b'{"step": true}\n', b'{"step": -1}\n', b'{"step": 1e3}\n',
        b'{"a": 1}\n',
        b'{"step": 1, "loss": NaN}\n', b'{"step": ' + b"9" * 5000 + b"}\n", b'{"a":' * 100_000 + b"\n",
        b'{"step": 1, "text": "' + b"x" * (5 << 20) + b'"}\n', b'{"step": 36893488147419103232}\n',
    ]  # fmt: skip
    file = tmp_path / metrics.NAME
    file.write_bytes(b"".join(line for pair in zip(good * 5, bad, strict=False) for line in pair) + b'{"step": 2')
    assert [record["step"] for record in metrics.read(tmp_path)] == (list(range(1, 4)) * 5)[: len(bad)]
    assert metrics.cut(tmp_path, 2) > len(bad)
    assert set(file.read_bytes().splitlines(keepends=True)) == set(good[:2])
    os.truncate(file, 200 << 20)
    with little_memory():
        assert len(list(metrics.read(tmp_path))) == (2 * len(bad) + 2) // 3


def test_another_program_s_folder_is_not_touched(tmp_path: Path) -> None:
    folders: dict[str, dict[str, str]] = {
        "project": {"config.toml": "[package]\n", ".tmp-theirs-1-0": "x", "run.lock": ""},
        "config alone": {"config.toml": ""},
        "nearly ours": {"config.toml": "seed = 1\n", "manifest.json": "{}"},
        "temporaries": {".tmp-data": "x", ".trash-y": "y"},
        "manifest": {"manifest.json": "{}"},
        "metrics": {"metrics.jsonl": "{}"},
        "lock and more": {"run.lock": "", "notes.txt": ""},
    }
    for name, files in folders.items():
        folder = tmp_path / name
        folder.mkdir()
        for file, text in files.items():
            (folder / file).write_text(text)
        for resume in (None, "auto", str(folder)):
            with pytest.raises(ConfigError, match=str(folder)):
                RunDirectory(folder, resume)
        assert {p.name: p.read_text() for p in folder.iterdir()} == files


def test_a_damaged_newer_checkpoint_is_passed_over_and_not_counted(tmp_path: Path, path: Path) -> None:
    run = begun(tmp_path / "run")
    shutil.copytree(path, run / "step_00000003")
    for name in ("step_00000004", "step_00000005"):
        (run / name).mkdir()
    opened = RunDirectory(run, "auto")
    assert opened.resumed is not None
    assert opened.resumed.step == 3
    assert len(opened.damaged) == 2
    assert "step_00000005/checkpoint.json: expected a regular file, found No such file" in opened.damaged[0]
    config = TrainConfig(keep_last=1, out=str(run))
    opened.begin(config, {})
    opened.retain(config, None, None)
    assert checkpoint.list_steps(run) == [3, 4, 5]
    opened.save(4, targets.model(), {}, None)
    opened.retain(config, None, None)
    assert checkpoint.list_steps(run) == [4, 5]
    assert checkpoint.is_whole(run / "step_00000004")
    opened.close()
    # Naming the run itself does the same, and nothing replaces a checkpoint of the same step from elsewhere.
    opened = RunDirectory(run, str(run))
    assert opened.resumed is not None
    assert opened.resumed.step == 4
    opened.close()
    with pytest.raises(ConfigError, match=r"has a checkpoint \(step 5\)"):
        RunDirectory(run, str(path))


def test_names_that_only_look_like_steps(tmp_path: Path) -> None:
    for name in ("step_000000001", "step_1", "step_٠٠٠٠٠٠٠٣", "step_0000000x", "step_" + "9" * 200, "step_00000002"):
        (tmp_path / name).mkdir()
    assert checkpoint.list_steps(tmp_path) == [2]
    assert rundir.resume_path("auto", str(tmp_path)) is None
