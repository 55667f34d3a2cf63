"""``anellm sim``, chip files, fuzz seeds; test_docs_examples.py runs the programs of docs/examples."""

from __future__ import annotations

import json
import re
import runpy
from pathlib import Path

import numpy as np
import pytest
from milprograms import unary

from anellm import sim
from anellm.errors import AnellmError, DataError, InvalidError
from anellm.sim import Simulator, chip_names, load_chip
from anellm.sim_chips import parse_chip

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "docs" / "examples"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("examples")
    runpy.run_path(str(EXAMPLES / "make_inputs.py"))["main"](folder)
    return folder


def test_lint_cost_and_ops(tmp_path: Path, made: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bad = tmp_path / "bad.mil"
    bad.write_text(unary("gelu"))
    assert sim.main(["lint", str(bad)]) == 5
    assert "bad.mil:6:33: Q02: " in capsys.readouterr().err
    odd = tmp_path / "odd.mil"
    odd.write_text(unary("abs", 20))
    assert sim.main(["lint", str(odd), "--rows", "truncate", "--json", str(tmp_path / "l.json")]) == 0
    assert "Q33" in capsys.readouterr().out
    assert json.loads((tmp_path / "l.json").read_text())["findings"][0]["rule"] == "Q33"
    assert (
        sim.main(
            [
                "cost",
                str(EXAMPLES / "swiglu.mil"),
                "--weights",
                str(made / "weights"),
                "--json",
                str(tmp_path / "c.json"),
            ]
        )
        == 0
    )
    cost = json.loads((tmp_path / "c.json").read_text())
    assert 0.095 < cost["ms"] < 0.2
    assert 260 < cost["first_ms"] < 261
    assert sim.main(["ops"]) == 0
    out = capsys.readouterr().out
    assert re.search(r"^gather +refused", out, re.MULTILINE)
    assert re.search(r"^matmul +computed", out, re.MULTILINE)


@pytest.mark.parametrize(
    ("argv", "code", "words"),
    [
        (["run"], 2, "expected a file of MIL text"),
        (["run", "MIL", "--input", "x"], 2, "expected NAME=x.npy"),
        (["run", "MIL", "--input"], 2, "input"),
        (["run", "MIL", "--input", "x=NPY", "--input", "x=NPY"], 2, "given twice"),
        (["run", "MIL", "--input", "x=MIL"], 4, "expected a .npy file"),
        (["run", "MIL", "--input", "x=PICKLE"], 4, "expected a .npy file"),
        (["run", "MIL", "--input", "z=NPY"], 2, "inputs: expected x, found z"),
        (["run", "MIL", "--weights", "nowhere", "--input", "x=NPY"], 4, "expected a folder"),
        (["run", "MIL", "--chip", "m44"], 2, "unknown name 'm44'; did you mean m4?"),
        (["run", "nowhere.mil"], 4, "nowhere.mil"),
        (["lint", "MIL", "--output", "o"], 2, "only for run"),
        (["run", "MIL", "--function", "3", "--input", "x=NPY"], 4, "procedure 3"),
        (["bake"], 2, "expected one of run, lint, cost, ops"),
    ],
)
def test_mistakes_are_named(
    argv: list[str], code: int, words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "m.mil").write_text(unary("abs"))
    np.save(tmp_path / "x.npy", np.zeros((1, 1, 1, 32), np.float16))
    np.save(tmp_path / "p.npy", np.array([{}], dtype=object), allow_pickle=True)
    names = {"MIL": tmp_path / "m.mil", "NPY": tmp_path / "x.npy", "PICKLE": tmp_path / "p.npy"}
    for key, path in names.items():
        argv = [word.replace(key, str(path)) for word in argv]
    assert sim.main(argv) == code
    assert words in capsys.readouterr().err


# ---- chips ---------------------------------------------------------------------------------------------------------


def test_chips_come_with_sources() -> None:
    assert chip_names() == ["m1", "m2", "m3", "m3ultra", "m4", "m5", "m6"]
    for name in chip_names():
        chip = load_chip(name)
        assert chip.name == name
        assert all(chip.sources.values())
        Simulator(chip).compile(unary("abs"))


def test_documented_constants_are_all_there() -> None:
    text = (ROOT / "docs" / "simulator.md").read_text(encoding="utf-8")
    for key in load_chip("m4").constants:
        assert f"`{key}`" in text, key


def test_chip_files_are_checked(tmp_path: Path) -> None:
    source = ROOT / "python" / "anellm" / "data" / "chips" / "m4.json"
    good = json.loads(source.read_text())
    mine = tmp_path / "mine.json"
    mine.write_text(
        json.dumps(
            {**good, "name": "mine", "constants": {**good["constants"], "max_rank": {"value": 4, "source": "here"}}}
        )
    )
    assert load_chip(str(mine)).constants["max_rank"] == 4

    def refused(change: object, words: str) -> None:
        values = json.loads(source.read_text())
        change(values)
        with pytest.raises(DataError, match=words):
            parse_chip(json.dumps(values).encode(), "c.json")

    refused(lambda v: v.update(schema=2), "schema: expected 1, found 2")
    refused(lambda v: v.update(nome="x"), "unknown key 'nome'; did you mean name")
    refused(lambda v: v.update(name="x" * 16), "name: expected a text")
    refused(lambda v: v["constants"].pop("max_rank"), "max_rank missing")
    refused(lambda v: v["constants"].update(max_ronk={}), "unknown key 'max_ronk'; did you mean max_rank")
    refused(lambda v: v["constants"].update(max_rank=5), "constants.max_rank: expected")
    refused(lambda v: v["constants"].update(max_rank={"value": 5.5, "source": "s"}), "expected a whole number")
    refused(lambda v: v["constants"].update(max_rank={"value": True, "source": "s"}), "expected a whole number")
    refused(lambda v: v["constants"].update(io_gb_s={"value": "1", "source": "s"}), "expected a finite number")
    refused(lambda v: v["constants"].update(io_gb_s={"value": 1, "source": ""}), "where the number comes from")
    with pytest.raises(DataError):
        parse_chip(b"[]", "c.json")
    for key, value in (("max_rank", 6), ("strict_blobs", 2), ("min_surface_bytes", -1), ("sigmoid_high", -8.0)):
        values = json.loads(source.read_text())
        values["constants"][key]["value"] = value
        with pytest.raises(InvalidError):
            Simulator(parse_chip(json.dumps(values).encode(), "c.json"))


# ---- fuzz seeds ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"numerics": "fast"}, {"mac": "wide_fp32"}], ids=str)
@pytest.mark.parametrize("path", sorted((Path(__file__).parent / "corpus").iterdir()), ids=lambda p: p.name)
def test_fuzz_seeds(path: Path, options: dict[str, str]) -> None:
    """What csrc/fuzz/fuzz_mil.c starts from, and what it found: evaluated, or refused with a place."""
    data = path.read_bytes()
    simulator = Simulator("m4", rows="any", max_memory_bytes=1 << 24, **options)
    try:
        compiled = simulator.compile(data, {"@model_path/weights/w.bin": data})
        compiled.run({port.name: np.zeros(port.shape) for port in compiled.inputs()})
    except AnellmError as error:
        assert path.suffix != ".mil", error  # seeds compile; findings may not
        assert str(error)
