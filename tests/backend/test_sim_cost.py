"""``anellm sim cost`` for a model: times of programs, the parts of a step, and what is published beside it."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import pytest

from anellm import sim
from anellm.config import ModelConfig
from anellm.mil import AneProgram, ane_programs
from anellm.sim import chip_names, load_chip
from anellm.sim_cost import (
    Recipe,
    Step,
    block_params,
    changed,
    cpu_bytes,
    evaluation,
    fit,
    machine,
    machine_of,
    recipe_of,
    step,
)

ROOT = Path(__file__).parents[2]
DATA = json.loads((ROOT / "python" / "anellm" / "data" / "steps.json").read_text(encoding="utf-8"))
TINY = ModelConfig.from_preset("tiny")


def used(
    config: ModelConfig, batch_size: int, seq_len: int, softmax: str = "ane", mode: str = "dynamic"
) -> list[AneProgram]:
    found = ane_programs(config, batch_size, seq_len, mode=mode)
    return [p for p in found if p.used(training=True, softmax=softmax, mode=mode)]


# ---- programs --------------------------------------------------------------------------------------------------------


def test_a_product_by_hand() -> None:
    """wo_bwd is one product of (256, 768) and (768, 768): constants of m4 give its parts."""
    program = next(p for p in ane_programs(ModelConfig.from_preset("stories110m"), 1, 256) if p.name == "wo_bwd")
    found = evaluation(program, load_chip("m4"))
    computing = 2 * 256 * 768 * 768 / 5.4e12 * 1e3
    moving = 2 * (256 * 768 + 768 * 768) / 30e9 * 1e3
    assert dataclasses.astuple(found) == pytest.approx((0.095, computing, moving, 0.095 + computing), rel=1e-6)


@pytest.mark.parametrize("chip", ["m1", "m4", "m5"])
def test_parts_of_a_program_bound_it(chip: str) -> None:
    for program in used(TINY, 1, 64):
        found = evaluation(program, load_chip(chip))
        assert found.dispatch + max(found.computing, found.moving) <= found.ms * (1 + 1e-9)
        assert found.ms <= (found.dispatch + found.computing + found.moving) * (1 + 1e-9)
        assert min(found.computing, found.moving) > 0


def test_slower_chips_take_longer() -> None:
    """Each constant that the model knows makes some program slower when it gets worse."""
    programs, chip = used(TINY, 1, 64), load_chip("m4")
    before = [evaluation(p, chip).ms for p in programs]
    for key, factor in (
        ("dispatch_us", 2.0),
        ("activation_gb_s", 0.01),
        ("elementwise_gb_s", 0.5),
        ("matmul_tflops", 0.01),
    ):
        after = [evaluation(p, changed(chip, {key: chip.constants[key] * factor})).ms for p in programs]
        assert all(a >= b for a, b in zip(after, before, strict=True))
        assert any(a > b for a, b in zip(after, before, strict=True)), key


# ---- steps -----------------------------------------------------------------------------------------------------------


def tiny_step(recipe: Recipe, gb_s: float = 10.0) -> Step:
    return step(TINY, used(TINY, 1, 64), 64, machine("m4"), recipe, gb_s)


def test_a_step_is_its_parts() -> None:
    found = tiny_step(Recipe(TINY.vocab_size))
    programs, chip = used(TINY, 1, 64), load_chip("m4")
    assert found.forward + found.backward == pytest.approx(
        TINY.n_layers * sum(evaluation(p, chip).ms for p in programs)
    )
    assert found.products == pytest.approx(6 * 64 * TINY.dim * TINY.vocab_size / 1.326e9)
    assert found.passes == pytest.approx(cpu_bytes(TINY, programs, 64, Recipe(TINY.vocab_size)) / 10e6)
    assert found.ms == pytest.approx(found.forward + found.backward + found.products + found.exposed + found.passes)


def test_weight_gradients_show_when_they_last_longer_than_the_engine() -> None:
    slow = dataclasses.replace(machine("m4"), sgemm_tflops=1e-4)
    found = step(TINY, used(TINY, 1, 64), 64, slow, Recipe(TINY.vocab_size), 10.0)
    assert found.exposed == pytest.approx(2 * 64 * block_params(TINY) / 1e5 - found.forward - found.backward)
    assert tiny_step(Recipe(TINY.vocab_size)).exposed == 0.0


def test_recipes_differ_as_they_should() -> None:
    plain = Recipe(TINY.vocab_size)
    before = tiny_step(plain)
    pipelined = tiny_step(dataclasses.replace(plain, pipelined=True))
    assert pipelined.ms == pytest.approx(before.ms - min(before.forward, before.products + before.passes))
    assert tiny_step(dataclasses.replace(plain, accumulation=1)).passes > before.passes
    assert before.compiling == 0.0
    assert tiny_step(Recipe(TINY.vocab_size // 2)).products == pytest.approx(before.products / 2)


def test_constant_weights_stream_and_are_compiled() -> None:
    """Products of static programs are convolutions; only what has weights is compiled again, for each update."""
    config = ModelConfig.from_preset("stories15m")
    rows, recipe = 256, Recipe(config.vocab_size)
    dynamic, static = (used(config, 1, rows, mode=mode) for mode in ("dynamic", "static"))
    before = step(config, dynamic, rows, machine("m4"), recipe, 10.0)
    after = step(config, static, rows, machine("m4"), recipe, 10.0)
    assert after.forward < before.forward
    assert after.backward < before.backward
    assert (before.compiling, after.compiling) == (0.0, 0.0)
    counted = step(config, static, rows, machine("m4"), dataclasses.replace(recipe, recompiled=True), 10.0)
    costs = load_chip("m4").constants
    each = costs["compile_ms"] + costs["load_ms"] + costs["unload_ms"]
    assert counted.compiling == pytest.approx(5 * config.n_layers * each / 10)
    assert counted.ms == pytest.approx(after.ms + counted.compiling)


def test_softmax_on_the_cpu_costs_passes_and_dispatches() -> None:
    recipe = Recipe(TINY.vocab_size)
    ane, cpu = (step(TINY, used(TINY, 1, 64, s), 64, machine("m4"), recipe, 10.0) for s in ("ane", "cpu"))
    assert cpu.passes > ane.passes
    assert cpu.forward > ane.forward


# ---- published -------------------------------------------------------------------------------------------------------


def test_published_figures_have_a_place_and_a_source() -> None:
    assert DATA["schema"] == 1
    assert [(e["machine"], e["ms"]) for e in DATA["steps"] if e["role"] == "fitted"] == [
        ("m4", [91, 91]),
        ("m3pro", [121.5, 121.5]),
    ]
    for name, entry in DATA["machines"].items():
        assert entry["chip"] in chip_names()
        assert machine(name).sgemm_tflops > 0
        assert all(c["source"] for c in [entry["sgemm_tflops"], *entry["changes"].values()])
        assert set(entry["changes"]) <= set(load_chip(entry["chip"]).constants)
    for entry in DATA["steps"] + DATA["engine"]:
        assert entry["source"]
        assert entry["machine"] in DATA["machines"]
        assert recipe_of(entry["recipe"]).vocab_size > 0
    for name in chip_names():
        assert machine_of(load_chip(name)).name == name


def test_fitted_steps_are_met_and_held_ones_not_touched() -> None:
    """A held figure has no way into the fit: two rates from two steps."""
    rates = fit()
    fitted = [c for c in rates.steps if c.role == "fitted"]
    assert [c.modelled for c in fitted] == pytest.approx([91.0, 121.5], rel=1e-9)
    assert set(rates.gb_s) == {machine(c.machine).cores for c in fitted}
    assert all(5 < gb_s < 100 for gb_s in rates.gb_s.values())  # one thread of an M-series core


def documented() -> dict[tuple[str, str, str], tuple[float, float]]:
    """Return the table of docs/simulator.md: product, recipe, part -> modelled, residual in %."""
    text = (ROOT / "docs" / "simulator.md").read_text(encoding="utf-8")
    row = r"^\| (\w+) \| (\w+) \| (step|engine|forward) \| [\w]+ \| [\d.–]+ \| ([\d.]+) \| ([+-][\d.]+) \|$"
    return {m[:3]: (float(m[3]), float(m[4])) for m in re.findall(row, text, re.MULTILINE)}


def test_residuals_are_those_of_the_documentation() -> None:
    rates, table = fit(), documented()
    assert len(table) == len(rates.steps) + len(rates.engine)
    for entry in rates.steps + rates.engine:
        modelled, residual = table[entry.machine, entry.recipe, entry.part]
        assert entry.modelled == pytest.approx(modelled, abs=0.051)
        assert 100 * entry.residual == pytest.approx(residual, abs=0.051)


def test_what_is_held_and_what_is_not() -> None:
    """M5 and the pipelined step on M4 within 20 %, M4 Max not, nor M4 Pro's engine: the documentation says why."""
    rates = fit()
    held = {(c.machine, c.recipe): abs(c.residual) for c in rates.steps if c.role == "held"}
    far = {key for key, residual in held.items() if residual > 0.2}
    assert {("m5", "static"), ("m4", "pipelined"), ("m4", "static")} <= held.keys() - far
    assert far == {("m4max", "static"), ("m3pro", "pipelined")}
    engine = {(c.machine, c.recipe) for c in rates.engine if abs(c.residual) > 0.2}  # nothing is fitted in these
    assert engine == {("m4pro", "static")}


# ---- the verb --------------------------------------------------------------------------------------------------------


def cost(path: Path, *flags: str) -> dict[str, Any]:
    assert sim.main(["cost", *flags, "--json", str(path)]) == 0
    found: dict[str, Any] = json.loads(path.read_text())
    return found


@pytest.mark.parametrize("softmax", ["ane", "cpu"])
def test_what_is_printed(softmax: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = cost(tmp_path / "c.json", "--preset", "tiny", "--chip", "m5", "--batch-size", "2", "--seq-len", "40",
                 "--ane-softmax", softmax)  # fmt: skip
    out = capsys.readouterr().out
    assert (found["chip"], found["batch_size"], found["seq_len"], found["softmax"]) == ("m5", 2, 40, softmax)
    assert [p["name"] for p in found["programs"]] == [p.name for p in used(TINY, 2, 40, softmax)]
    assert {p["evaluations_per_step"] for p in found["programs"]} == {TINY.n_layers}
    assert sum(p["ms_per_step"] for p in found["programs"]) == pytest.approx(found["step"]["engine_ms"])
    assert 0 < found["step"]["engine_share"] < 1
    for program in found["programs"]:
        assert re.search(rf"^{program['name']} .* {program['ms']:.4f} ", out, re.MULTILINE)
    for entry in found["published"] + found["published_engine"]:
        assert entry["source"] in out
        assert f"{entry['modelled']:.1f}" in out
    for key, entry in found["constants"].items():
        assert entry["source"], key
        assert f"{key} " in out
    assert found["machines"]["m4max"]["constants"]["conv_tflops"]["value"] == 10.9


def test_the_shape_of_a_model_file_and_a_chip_of_ones_own(tmp_path: Path, data_dir: Path) -> None:
    chip = json.loads((ROOT / "python" / "anellm" / "data" / "chips" / "m4.json").read_text())
    chip["name"] = "mine"
    chip["constants"]["dispatch_us"] = {"value": 1000.0, "source": "here"}
    (tmp_path / "mine.json").write_text(json.dumps(chip))
    model = data_dir / "weights" / "stories260K" / "stories260K.bin"
    found = cost(tmp_path / "c.json", "--checkpoint", str(model), "--chip", str(tmp_path / "mine.json"))
    assert found["config"]["dim"] == 64
    assert all(p["dispatch_ms"] == 1.0 for p in found["programs"])
    assert found["constants"]["dispatch_us"]["source"] == "here"


@pytest.mark.parametrize(
    ("flags", "code", "words"),
    [
        ([], 2, "expected a file of MIL text, --preset or --checkpoint"),
        (["x.mil", "--preset", "tiny"], 2, "found both"),
        (["--preset", "tinny"], 2, "did you mean tiny?"),
        (["--preset", "tiny", "--chip", "m44"], 2, "unknown name 'm44'; did you mean m4?"),
        (["--preset", "tiny", "--checkpoint", "x"], 2, "expected one of the two"),
        (["--checkpoint", "nowhere"], 4, "nowhere"),
        (["x.mil", "--batch-size", "2"], 2, "--batch-size: only with --preset or --checkpoint"),
        (["x.mil", "--ane-mode", "static"], 2, "--ane-mode: only with --preset or --checkpoint"),
        (
            ["--preset", "tiny", "--ane-mode", "static", "--ane-softmax", "cpu"],
            2,
            "expected ane with --ane-mode static",
        ),
        (["--preset", "tiny", "--weights", "w"], 2, "--weights: only with a file of MIL text"),
        (["--preset", "tiny", "--strict"], 2, "--strict: only with a file of MIL text"),
        (["--preset", "tiny", "--numerics", "fast"], 2, "--numerics: only with a file of MIL text"),
        (["--preset", "tiny", "--seq-len", "0"], 2, "seq-len"),
        (["--preset", "tiny", "--seq-len", "40000"], 5, "no chip takes more than"),
    ],
)
def test_mistakes_are_named(flags: list[str], code: int, words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert sim.main(["cost", *flags]) == code
    error = capsys.readouterr().err
    assert words in error
    assert error.count("\n") == 1


def test_what_is_printed_of_static_programs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = cost(tmp_path / "c.json", "--preset", "tiny", "--chip", "m4", "--ane-mode", "static")
    out = capsys.readouterr().out
    assert "static programs" in out
    assert found["mode"] == "static"
    assert [p["name"] for p in found["programs"]] == [p.name for p in used(TINY, 1, 256, mode="static")]
    parts = found["step"]
    assert parts["compiling_ms"] == pytest.approx(5 * TINY.n_layers * 27.5 / 10)
    assert parts["ms"] == pytest.approx(
        sum(
            parts[k]
            for k in ("engine_ms", "classifier_ms", "exposed_weight_gradients_ms", "cpu_passes_ms", "compiling_ms")
        )
    )


def test_a_preset_is_only_for_cost(capsys: pytest.CaptureFixture[str]) -> None:
    assert sim.main(["lint", "--preset", "tiny"]) == 2
    assert "--preset: only for cost" in capsys.readouterr().err
