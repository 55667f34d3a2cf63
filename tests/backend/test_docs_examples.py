"""The programs of docs/examples give the numbers of docs/simulator.md, those with a fault its errors."""

from __future__ import annotations

import json
import re
import runpy
from pathlib import Path

import numpy as np
import pytest

from anellm import sim
from anellm.errors import CompileError

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "docs" / "examples"
TEXT = (ROOT / "docs" / "simulator.md").read_text(encoding="utf-8")
INPUTS = {
    "rmsnorm": {"a_x": "x"},
    "dynamic_linear": {"a_packed": "packed"},
    "causal_attention": {"a_q": "q", "b_k": "k", "c_v": "v"},
    "swiglu": {"a_x": "x"},
}
# Program -> first three numbers, absmax, mean.
NUMBERS = {
    name: tuple(float(cell) for cell in cells.split("|"))
    for name, cells in re.findall(r"^\| `(\w+)\.mil` \|(.+)\|$", TEXT, re.MULTILINE)
}
# Program, command, answer.
FAULTS = re.findall(r"^\| `(faults/\w+\.mil)` \| `([^`]+)` \| `([^`]+)` \|$", TEXT, re.MULTILINE)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("examples")
    runpy.run_path(str(EXAMPLES / "make_inputs.py"))["main"](folder)
    return folder


def run(name: str, made: Path, out: Path, *flags: str) -> dict[str, object]:
    words = [f"--input={port}={made / file}.npy" for port, file in INPUTS[name].items()]
    code = sim.main(["run", str(EXAMPLES / f"{name}.mil"), "--weights", str(made / "weights"), *words,
                     "--output", str(out), "--json", str(out / "r.json"), *flags])  # fmt: skip
    assert code == 0
    return json.loads((out / "r.json").read_text())


def test_every_program_is_in_a_table() -> None:
    assert {path.stem for path in EXAMPLES.glob("*.mil")} == set(NUMBERS) == set(INPUTS)
    assert {f"faults/{path.name}" for path in (EXAMPLES / "faults").iterdir()} == {name for name, _, _ in FAULTS}
    assert len(FAULTS) == TEXT.count("\n| `faults/")
    assert len(FAULTS) >= 10


@pytest.mark.parametrize("name", INPUTS)
def test_examples_give_the_documented_numbers(name: str, made: Path, tmp_path: Path) -> None:
    result = run(name, made, tmp_path)
    y = np.load(tmp_path / "z_out.npy", allow_pickle=False)
    found = (*y.reshape(-1)[:3].astype(float), result["outputs"]["z_out"]["absmax"], result["outputs"]["z_out"]["mean"])
    np.testing.assert_allclose(found, NUMBERS[name], atol=2e-6, rtol=1e-5)
    assert result["findings"] == []


@pytest.mark.parametrize("name", INPUTS)
@pytest.mark.parametrize(
    "flags",
    [
        ("--numerics", "fast"),
        ("--mac", "wide_fp32"),
        ("--chip", "m1"),
        ("--chip", "m2"),
        ("--chip", "m3ultra"),
        ("--chip", "m6", "--strict"),
    ],
)
def test_examples_run_everywhere(name: str, flags: tuple[str, ...], made: Path, tmp_path: Path) -> None:
    """And compute what they say, within what fp16 and the tables allow."""
    run(name, made, tmp_path, *flags)
    arrays = {port: np.load(made / f"{file}.npy").astype(float) for port, file in INPUTS[name].items()}
    w = {p.stem: np.frombuffer(p.read_bytes()[128:], np.float16).astype(float) for p in (made / "weights").iterdir()}
    if name == "rmsnorm":
        x = arrays["a_x"]
        want = x / np.sqrt((x * x).mean(1, keepdims=True) + 1e-5) * w["gamma"].reshape(1, 64, 1, 1)
    elif name == "dynamic_linear":
        packed = arrays["a_packed"][0, :, 0]
        want = (packed[:, 32:].T @ packed[:, :32])[None, :, None]
    elif name == "causal_attention":
        q, k, v = (arrays[n].reshape(4, 16, 32) for n in ("a_q", "b_k", "c_v"))
        s = np.exp(np.einsum("hdi,hdj->hij", q, k) / 4 + w["mask"].reshape(32, 32))
        want = np.einsum("hij,hdj->hdi", s / s.sum(-1, keepdims=True), v).reshape(1, 64, 1, 32)
    else:
        x = arrays["a_x"][0, :, 0]
        gate, up = (w[n].reshape(128, 64) @ x for n in ("gate", "up"))
        want = (w["down"].reshape(64, 128) @ (gate / (1 + np.exp(-gate)) * up))[None, :, None]
    np.testing.assert_allclose(
        np.load(tmp_path / "z_out.npy").astype(float), want, atol=8e-3 * np.abs(want).max(), rtol=5e-3
    )


@pytest.mark.parametrize(("name", "command", "answer"), FAULTS, ids=[f"{n[7:-4]}-{c}" for n, c, _ in FAULTS])
def test_faults_are_answered_as_documented(
    name: str, command: str, answer: str, made: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = EXAMPLES / name
    words = command.replace("/tmp/in", str(made)).split()
    code = sim.main([words[0], str(path), *words[1:], "--weights", str(made / "weights")])
    out, err = capsys.readouterr()
    if words[0] == "lint":
        assert code == 0
        lines = [line for line in out.splitlines() if line.startswith(f"{path}:{answer}")]
    else:
        assert code == 5
        place = f"{path}:" if answer[0].isdigit() else ""
        lines = [line for line in err.splitlines() if line.startswith(f"anellm sim: error: {place}{answer}")]
        assert err.count("\n") == 1
    assert len(lines) == 1, out + err


@pytest.mark.parametrize("name", sorted({name for name, _, _ in FAULTS}))
def test_a_fault_is_the_only_one(name: str, made: Path) -> None:
    """No rule speaks up but those of the table."""
    rules = {match[1] for n, _, answer in FAULTS if n == name and (match := re.search(r"(Q\d\d): ", answer))}
    files = sim.read_weights(made / "weights")
    simulator = sim.Simulator("m4")
    try:
        found = {finding.rule for finding in simulator.compile((EXAMPLES / name).read_bytes(), files).findings()}
    except CompileError:
        found = set(re.findall(r"^\d+:\d+: (Q\d\d)", simulator.failure().detail))
    assert found <= rules


# ---- the table of rules --------------------------------------------------------------------------------------------


def test_every_rule_names_tests_that_exist() -> None:
    """And a test that goes through programs by rule (test_compiling) has one for each rule that names it."""
    part = TEXT[TEXT.index("## Rules") : TEXT.index("## Ops")]
    rows = re.findall(r"^\| (Q\d\d) \|.*\| ([^|]+) \|$", part, re.MULTILINE)
    elsewhere = re.findall(r"Q\d\d", part[part.index("Not here:") : part.index("Errors are")])
    assert len(rows) == len(dict(rows))
    assert {rule for rule, _ in rows} | set(elsewhere) == {f"Q{n:02}" for n in range(1, 73)}
    files = {alias: Path(__file__).parent / name for alias, name in re.findall(r"`(\w+)`:\s+(test_\w+\.py)", part)}
    sources = {alias: path.read_text(encoding="utf-8") for alias, path in files.items()}
    functions = {
        alias: set(re.findall(r"^def (test_\w+)\(", source, re.MULTILINE)) for alias, source in sources.items()
    }
    programs = set(re.findall(r'\bCase\(\s*"(Q\d\d)"', sources["rules"]))
    by_program = set()
    for rule, cell in rows:
        tests = re.findall(r"`(\w+)::(\w+)`", cell)
        assert tests, rule
        assert cell.count("::") == len(tests), cell
        for alias, name in tests:
            assert name in functions[alias], f"{rule}: {alias}::{name}"
            if name == "test_compiling":
                by_program.add(rule)
    assert by_program == programs
