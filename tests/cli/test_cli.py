"""The commands: verbs, one-line errors, exit codes, --json."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from anellm import __main__, cli, errors
from anellm.cli import Result, Verb
from anellm.options import CommonOptions, option


@dataclass(frozen=True, kw_only=True)
class PokeConfig(CommonOptions):
    """Options of a verb made for these tests."""

    number: int = option(1, "a number, 100 % of it")


def run_with(raised: BaseException | None, values: dict[str, object] | None = None, code: int = 0) -> Verb[PokeConfig]:
    def run(config: PokeConfig) -> Result:
        if raised is not None:
            raise raised
        return Result({"number": config.number, **(values or {})}, code)

    return Verb("poke", "poke at it", PokeConfig, run)


@pytest.mark.parametrize(
    ("raised", "code", "line"),
    [
        (errors.ConfigError("--x: no"), 2, "anellm poke: error: --x: no"),
        (errors.InvalidError("x"), 2, "anellm poke: error: x"),
        (errors.DivergedError("x"), 3, "anellm poke: error: x"),
        (errors.DataError("a\n  b"), 4, "anellm poke: error: a b"),
        (errors.CheckpointError("x"), 4, "anellm poke: error: x"),
        (FileNotFoundError(2, "No such file or directory", "f"), 4, "anellm poke: error: f: No such file or directory"),
        (errors.UnavailableError("x"), 5, "anellm poke: error: x"),
        (errors.OutOfMemoryError("x"), 5, "anellm poke: error: x"),
        (MemoryError(), 5, "anellm poke: error: out of memory"),
        (KeyboardInterrupt(), 130, "anellm poke: interrupted"),
        (ZeroDivisionError("x"), 1, "anellm poke: error: unexpected ZeroDivisionError: x (ANELLM_DEBUG=1 shows where"),
    ],
)
def test_errors_are_one_line_and_a_code(
    raised: BaseException, code: int, line: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("ANELLM_DEBUG", raising=False)
    assert run_with(raised).main([]) == code
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith(line)
    assert err.count("\n") == 1
    if code != 130:
        monkeypatch.setenv("ANELLM_DEBUG", "1")
        with pytest.raises(type(raised)):
            run_with(raised).main([])


def test_usage_errors_come_before_the_work(capsys: pytest.CaptureFixture[str]) -> None:
    verb = run_with(AssertionError("ran"))
    assert verb.main(["--numbr", "3"]) == 2
    assert capsys.readouterr().err == "anellm poke: error: unknown flag --numbr; did you mean --number?\n"
    assert verb.main(["--number", "x"]) == 2
    assert capsys.readouterr().err == "anellm poke: error: --number: expected a whole number, found 'x'\n"
    assert verb.main(["--number"]) == 2
    assert "--number" in capsys.readouterr().err
    assert verb.main(["--help"]) == 0
    assert "a number, 100 % of it" in capsys.readouterr().out


def test_json_is_written_whole(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "out.json"
    verb = run_with(None, {"loss": float("nan"), "text": "ü"}, code=7)
    assert verb.main(["--json", str(path), "--number", "3"]) == 7
    assert json.loads(path.read_text(encoding="utf-8")) == {"number": 3, "loss": None, "text": "ü"}
    assert os.listdir(tmp_path) == ["out.json"]
    assert verb.main(["--json", str(tmp_path / "missing" / "out.json")]) == 4
    assert str(tmp_path / "missing") in capsys.readouterr().err
    assert verb.main(["--json", "/dev/null"]) == 2


def test_the_list_of_verbs(capsys: pytest.CaptureFixture[str]) -> None:
    for argv in ([], ["--help"], ["help"]):
        assert __main__.main(argv) == 0
        out = capsys.readouterr().out
        for name, (_, summary) in cli.VERBS.items():
            assert f"  {name}" in out
            assert summary in out
    assert __main__.main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("anellm 0.")
    assert __main__.main(["trian", "--steps", "3"]) == 2
    assert capsys.readouterr().err == "anellm: error: unknown verb 'trian'; did you mean train?\n"
    for name, (module, summary) in cli.VERBS.items():
        verb = __import__(module, fromlist=["VERB"]).VERB
        assert (verb.name, verb.summary) == (name, summary)


def test_three_ways_to_call_a_verb() -> None:
    for start in (["-m", "anellm.train"], ["-m", "anellm", "train"]):
        found = subprocess.run(
            [sys.executable, *start, "--stepz", "3"], capture_output=True, text=True, check=False, timeout=60
        )
        assert (found.returncode, found.stdout) == (2, "")
        assert found.stderr == "anellm train: error: unknown flag --stepz; did you mean --steps?\n"


def test_a_reader_that_goes_away_is_no_error() -> None:
    code = (
        "import sys; from anellm.cli import guarded\n"
        "def body():\n    while True: print('x' * 1000)\n"
        "sys.exit(guarded('anellm poke', body))"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None
    process.stdout.read(10)
    process.stdout.close()
    assert process.stderr is not None
    assert process.stderr.read() == b""
    assert process.wait(30) == 141
