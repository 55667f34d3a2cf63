"""``anellm mil dump``: what it writes compiles with ``anellm sim``, and its manifest says what lies where."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from anellm import mil, sim
from anellm.config import ModelConfig
from anellm.mil import ane_programs

FORWARD = {"ane": ["attn_fwd", "ffn_fwd"], "cpu": ["ffn_fwd", "attn_scores", "attn_values", "wo_fwd"]}


def dump(out: Path, *flags: str) -> dict[str, Any]:
    assert mil.main(["dump", "--out", str(out), *flags]) == 0
    return json.loads((out / "programs.json").read_text())


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("dump") / "new" / "programs"
    dump(out, "--preset", "stories15m", "--batch-size", "2", "--seq-len", "40")
    return out


def test_the_programs_of_training(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    manifest = json.loads((folder / "programs.json").read_text())
    names = [p["name"] for p in manifest["programs"]]
    assert names == [
        "attn_fwd", "ffn_fwd", "ffn_bwd_w2", "ffn_bwd_w13", "wo_bwd", "sdpa_bwd1", "sdpa_bwd2", "qkv_bwd"
    ]  # fmt: skip
    assert {p.name for p in folder.iterdir()} == {*(f"{name}.mil" for name in names), "weights", "programs.json"}
    assert (manifest["padded_seq_len"], manifest["softmax"], manifest["model"]) == (64, "ane", "stories15m")
    for entry in manifest["programs"]:
        for path, size in entry["weights"].items():
            assert (folder / path.removeprefix("@model_path/")).stat().st_size == size
        assert sim.main(["lint", str(folder / entry["mil"]), "--weights", str(folder / "weights"), "--chip", "m5"]) == 0
        found = capsys.readouterr().out.splitlines()
        shapes = [tuple(entry[side]["shape"]) for side in ("input", "output")]
        assert found == [f"input 0: a_input0 float16 {shapes[0]}", f"output 0: z_output0 float16 {shapes[1]}"]
        assert sum(f["channels"] for f in entry["output"]["fields"].values()) == shapes[1][1]


def test_files_are_those_of_the_library(folder: Path) -> None:
    for program in ane_programs(ModelConfig.from_preset("stories15m"), 2, 40):
        if program.softmax == "cpu":
            continue
        assert (folder / f"{program.name}.mil").read_text() == program.mil
        for path, data in program.files.items():
            assert (folder / path.removeprefix("@model_path/")).read_bytes() == data


@pytest.mark.parametrize("softmax", ["ane", "cpu"])
def test_less_or_other_programs(tmp_path: Path, softmax: str) -> None:
    manifest = dump(tmp_path, "--preset", "tiny", "--no-training", "--ane-softmax", softmax)
    assert sorted(p["name"] for p in manifest["programs"]) == sorted(FORWARD[softmax])
    assert {p["pass"] for p in manifest["programs"]} == {"forward"}
    assert manifest["seq_len"] == 256


def test_the_shape_of_a_model_file(tmp_path: Path, data_dir: Path) -> None:
    path = data_dir / "weights" / "stories260K" / "stories260K.bin"
    manifest = dump(tmp_path, "--model", str(path), "--json", str(tmp_path / "result.json"))
    assert manifest["config"]["dim"] == 64
    assert json.loads((tmp_path / "result.json").read_text()) == manifest


def test_what_is_wrong_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").write_text("x")
    for flags, code, message in (
        ([], 2, "--preset, --model: expected one of the two"),
        (["--preset", "tiny", "--model", "x"], 2, "expected one of the two"),
        (["--preset", "tiny"], 2, "--out: needed, and not given"),
        (["--preset", "tiny", "--out", str(tmp_path / "full")], 2, "not empty: --overwrite"),
        (
            ["--preset", "tiny", "--out", str(tmp_path / "full" / "x")],
            2,
            "expected a directory or nothing, found a file",
        ),
        (["--preset", "tinny", "--out", "x"], 2, "did you mean tiny?"),
        (["--model", str(tmp_path / "none"), "--out", "x"], 4, "none"),
        (["--preset", "tiny", "--out", str(tmp_path / "y"), "--seq-len", "40000"], 5, "no chip takes more than"),
    ):
        assert mil.main(["dump", *flags]) == code
        error = capsys.readouterr().err
        assert message in error
        assert error.count("\n") == 1
    assert not (tmp_path / "y").exists()
    dump(tmp_path / "full", "--preset", "tiny", "--seq-len", "32", "--overwrite")
