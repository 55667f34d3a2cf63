"""Models and trainers on the simulated Neural Engine: near the CPU, exact where they go back, honest where it fails."""

from __future__ import annotations

import gc
import json
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from anellm import checkpoint, metrics
from anellm.ane_run import EngineRun, count_skips, describe_engine, place_of, where
from anellm.config import ModelConfig, TrainConfig
from anellm.data import TokenDataset
from anellm.device import AneOptions, resolve_device
from anellm.errors import (
    AnellmError,
    CompileError,
    ConfigError,
    DataError,
    DivergedError,
    EvalError,
    FallbackWarning,
    InvalidError,
    UnavailableError,
    UnsupportedError,
)
from anellm.loss_scaler import LossScaler
from anellm.model import IGNORE_INDEX, Model, memory
from anellm.optim import AdamW
from anellm.sim import chip_names
from anellm.trainer import Trainer

CSRC = Path(__file__).parents[2] / "csrc"
SHAPE = ModelConfig(dim=32, hidden_dim=48, n_layers=2, n_heads=4, n_kv_heads=2, vocab_size=64, max_seq_len=48)
DATA = TokenDataset(np.random.default_rng(0).integers(0, 64, 3000).astype(np.uint16))
HELD_OUT = TokenDataset(np.random.default_rng(1).integers(0, 64, 200).astype(np.uint16))
FORWARD, STEP = 4, 16  # evaluations: two layers of two programs, and of eight


@pytest.fixture(autouse=True)
def _no_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("ANELLM_DEVICE", "ANELLM_ANE_DEVICE"):
        monkeypatch.delenv(name, raising=False)


def a_model(device: str = "ane-sim", seed: int = 3, **options: Any) -> Model:
    """Return a small model whose norms are no ones."""
    model = Model(SHAPE, device, seed=seed, ane=AneOptions(**options) if options else None)
    rng = np.random.default_rng(seed)
    for name, array in model.params.items():
        array *= rng.uniform(0.7, 1.4, array.shape).astype(np.float32) if "norm" in name else np.float32(3)
    model.weights_changed()
    return model


def a_batch(B: int = 2, T: int = 40, seed: int = 5) -> tuple[np.ndarray, np.ndarray]:
    tokens, targets = np.random.default_rng(seed).integers(0, 64, (2, B, T), np.int32)
    return tokens, targets


def gradients(model: Model, scale: float = 1.0) -> dict[str, np.ndarray]:
    model.forward(*a_batch())
    model.backward(scale)
    return {name: array / np.float32(scale) for name, array in model.grads.items()}


def cosine(a: np.ndarray, b: np.ndarray) -> float:
    return float((a * b).sum() / np.linalg.norm(a) / np.linalg.norm(b))


def a_trainer(model: Model, records: list[Any] | None = None, **options: Any) -> Trainer:
    settings: dict[str, Any] = {"steps": 4, "batch_size": 2, "seq_len": 40, "eval_interval": 0, "save_interval": 0}
    callbacks = () if records is None else (records.append,)
    return Trainer(model, TrainConfig(**settings | options), DATA, HELD_OUT, callbacks=callbacks)


def of_kind(records: list[Any], kind: str) -> list[dict[str, Any]]:
    return [record for record in records if record["kind"] == kind]


# ---- models ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"numerics": "exact", "chip": "m1"}, {"softmax": "cpu", "chip": "m5"}])
def test_it_computes_what_the_cpu_does(options: dict[str, Any]) -> None:
    cpu, ane = a_model("cpu"), a_model(**options)
    assert (cpu.device, cpu.ane, ane.device) == ("cpu", None, "ane-sim")
    tokens, targets = a_batch()
    targets[0, 3:9] = IGNORE_INDEX
    assert ane.forward(tokens, targets) == pytest.approx(cpu.forward(tokens, targets), rel=2e-3)
    np.testing.assert_allclose(ane.forward(tokens), cpu.forward(tokens), atol=0.02)
    np.testing.assert_allclose(ane.loss_per_token(tokens, targets), cpu.loss_per_token(tokens, targets), atol=0.03)
    expected = gradients(cpu)
    for name, found in gradients(ane, 2.0**8).items():
        assert cosine(found, expected[name]) > 0.9995, name
    assert ane.ane is not None
    stats = ane.ane.stats()
    assert 0 < stats.programs <= 16
    assert stats.evaluations >= STEP
    share = stats.flops_share
    assert share is not None
    assert 0.3 < share < 0.95
    activations = ane.ane.activations()
    assert len(activations) == SHAPE.n_layers
    assert max(activations) == pytest.approx(stats.max_activation)
    assert activations[stats.max_activation_layer] == max(activations) > 0


def test_it_comes_back_to_the_cpu_with_its_weights() -> None:
    cpu, moved = a_model("cpu"), a_model("cpu")
    expected, before = gradients(cpu), moved.params["model.norm.weight"]
    assert moved.to("ane-sim", AneOptions(chip="m3")) is moved
    assert str(moved.ane.device) == "ane-sim, chip m3, fast numerics"  # type: ignore[union-attr]
    gradients(moved)
    AdamW(moved, 0.0).step()
    assert moved.to("cpu").ane is None
    assert moved.ane_options is None
    for name, found in gradients(moved).items():
        assert np.array_equal(found, expected[name])
    assert before is moved.params["model.norm.weight"]
    assert "device=cpu" in repr(moved)
    assert "device=ane-sim" in repr(moved.to("ane-sim"))


def test_a_forward_does_not_survive_a_move() -> None:
    model = a_model()
    model.forward(*a_batch())
    model.to("cpu")
    with pytest.raises(InvalidError):
        model.backward()


def test_generation_is_the_cpus() -> None:
    prompt = [1, 5, 9]
    assert a_model().generate(prompt, 12, temperature=0, stop_ids=()) == a_model("cpu").generate(
        prompt, 12, temperature=0, stop_ids=()
    )


def test_weights_written_from_outside_reach_the_engine() -> None:
    model, cpu = a_model(), a_model("cpu")
    model.forward(*a_batch())
    for each in (model, cpu):
        each.params["model.layers.1.mlp.up_proj.weight"][...] *= 3
        each.weights_changed()
    assert model.forward(*a_batch()) == pytest.approx(cpu.forward(*a_batch()), rel=2e-3)


def test_views_outlive_the_model_and_its_device() -> None:
    model = a_model()
    model.forward(*a_batch())
    view = model.params["model.norm.weight"]
    expected = view.copy()
    del model
    gc.collect()
    assert np.array_equal(view, expected)


def test_other_batches_use_the_programs_that_are_there() -> None:
    model = a_model()
    assert model.ane is not None
    model.forward(*a_batch(4), training=False)
    compiles = model.ane.device.counters()["compiles"]
    for B, T in ((3, 40), (1, 40), (4, 35)):
        expected = a_model("cpu").forward(*a_batch(B, T))
        assert model.forward(*a_batch(B, T), training=False) == pytest.approx(expected, rel=2e-3)
    assert model.ane.device.counters()["compiles"] == compiles


def test_surfaces_are_part_of_the_memory() -> None:
    cpu, ane = (memory(SHAPE, 2, 40, training=True, ane=options) for options in (None, AneOptions()))
    assert ane.total_bytes - cpu.total_bytes == ane.workspace_bytes - cpu.workspace_bytes > 8 * 49152
    model = a_model()
    assert model.memory(2, 40) == ane
    gradients(model)
    assert model.ane is not None
    assert 0 < model.ane.stats().surface_bytes <= ane.workspace_bytes - cpu.workspace_bytes


def test_pretrained_models_take_a_device(tmp_path: Path) -> None:
    a_model("cpu").save_pretrained(tmp_path / "m")
    model = Model.from_pretrained(tmp_path / "m", "ane-sim", ane=AneOptions(chip="m6"))
    assert model.ane is not None
    assert model.ane.device.describe() == {
        "device": "ane-sim", "chip": "m6", "numerics": "fast", "ane_scaling": "on", "ane_softmax": "ane",
        "ane_fallback": "cpu", "ane_mode": "dynamic",
    }  # fmt: skip
    presets = Model.from_preset("stories260k", "ane-sim", n_layers=1), Model.from_config(SHAPE, "ane-sim")
    assert [each.device for each in presets] == ["ane-sim"] * 2


# ---- what is refused ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("field", "value", "expected"),
    [
        ("numerics", "precise", "exact, fast"),
        ("numerics", None, "exact, fast"),
        ("softmax", "gpu", "ane, cpu"),
        ("fallback", "ane", "cpu, error"),
        ("scaling", "on", "true or false"),
        ("scaling", 1, "true or false"),
        ("chip", "", "a name or the path"),
        ("chip", 4, "a name or the path"),
        ("chip", "m4\0", "a name or the path"),
    ],
)
def test_bad_options(field: str, value: Any, expected: str) -> None:
    with pytest.raises(InvalidError, match=f"{field}: expected .*{expected}.*, found "):
        AneOptions(**{field: value})


def test_bad_chips_and_devices(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="chip: unknown name 'm44'; did you mean m4"):
        a_model(chip="m44")
    (tmp_path / "c.json").write_text("{}")
    with pytest.raises(DataError, match=r"c\.json: schema: expected 1"):
        a_model(chip=str(tmp_path / "c.json"))
    with pytest.raises(DataError, match=r"none\.json"):
        a_model(chip=str(tmp_path / "none.json"))
    model = a_model("cpu")
    for bad in ("gpu", "", "ANE-SIM"):
        with pytest.raises(InvalidError, match="device: expected one of auto, cpu, ane, ane-sim, found"):
            model.to(bad)
    with pytest.raises(InvalidError, match="ane: only for the devices ane and ane-sim, found cpu"):
        Model(SHAPE, "cpu", ane=AneOptions())
    with pytest.raises(ConfigError, match="m44"):
        model.to("ane-sim", AneOptions(chip="m44"))
    assert (model.device, model.ane) == ("cpu", None)


def test_a_chip_of_ones_own(tmp_path: Path) -> None:
    source = Path(__file__).parents[2] / "python" / "anellm" / "data" / "chips" / "m2.json"
    values = json.loads(source.read_text())
    (tmp_path / "mine.json").write_text(json.dumps({**values, "name": "mine"}))
    model = a_model(chip=str(tmp_path / "mine.json"))
    assert model.ane is not None
    assert model.ane.device.describe()["chip"] == "mine"
    assert model.forward(*a_batch()) == pytest.approx(a_model("cpu").forward(*a_batch()), rel=2e-3)


def test_the_help_names_every_chip() -> None:
    (text,) = (
        field.metadata["anellm"].help for field in TrainConfig.__dataclass_fields__.values() if field.name == "chip"
    )
    assert all(f"{name}," in text for name in chip_names())


def test_there_is_no_ane_here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("platform.system", lambda: "Linux")
    with pytest.raises(UnavailableError, match="device ane: .* needs macOS .* this is Linux; ane-sim simulates it"):
        Model(SHAPE, "ane")
    monkeypatch.setenv("ANELLM_DEVICE", "ane")
    with pytest.raises(UnavailableError, match="device ane"):
        resolve_device("auto")
    monkeypatch.setenv("ANELLM_DEVICE", "ane-sim")
    assert Model(SHAPE).device == "ane-sim"


LIBRARY = """
#include "backend/ane/device.h"
static int counters(anellm_ane *device, anellm_ane_counters *out) {
    (void)device;
    *out = (anellm_ane_counters){.compiles = 42};
    return ANELLM_OK;
}
static int compile(anellm_ane *device, anellm_ane_program **program, const char *mil, int64_t mil_bytes,
                   const anellm_ane_file *files, int64_t n_files) {
    (void)device, (void)program, (void)mil, (void)mil_bytes, (void)files, (void)n_files;
    return ANELLM_COMPILE;
}
static void close_it(anellm_ane *device) { (void)device; }
static const struct anellm_ane_table table = {
    .name = "test", .close = close_it, .counters = counters, .compile = compile};
static struct anellm_ane device = {&table};
int anellm_ane_device_open(anellm_ane **out, const anellm_ane_profile *profile) {
    (void)profile;
    *out = &device;
    return ANELLM_OK;
}
"""


def test_a_library_can_be_the_ane(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        pytest.skip("no C compiler")
    (tmp_path / "device.c").write_text(LIBRARY)
    command = [compiler, "-shared", "-fPIC", f"-I{CSRC}", "device.c", "-o", "device.so"]
    subprocess.run(command, cwd=tmp_path, check=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ANELLM_ANE_DEVICE", "device.so")  # a relative path is one from here, and not of the loader's
    model = a_model("ane", fallback="error")
    assert model.ane is not None
    device = model.ane.device
    assert (str(device), device.simulator, device.chip, device.counters()["compiles"]) == ("ane", None, None, 42)
    assert device.describe()["chip"] is device.describe()["numerics"] is None
    with pytest.raises(CompileError, match="program attn_fwd for B = 2, T = 40"):
        model.forward(*a_batch())
    assert "modelled_ms" in EngineRun(model.ane).step_values(0, activations=False)
    assert EngineRun(model.ane).summary()["modelled_ms_per_step"] is None
    assert model.to("cpu").forward(*a_batch()) > 0
    monkeypatch.setenv("ANELLM_ANE_DEVICE", str(tmp_path / "missing.so"))
    with pytest.raises(UnavailableError, match=r"missing\.so"):
        a_model("ane")


# ---- trainers ----------------------------------------------------------------------------------------------------


def test_a_trainer_takes_the_device() -> None:
    model = Model(SHAPE, "cpu", seed=1)
    trainer = Trainer(model, TrainConfig(steps=1, batch_size=2, seq_len=40), DATA, device="ane-sim")
    assert model.device == trainer.config.device == "ane-sim"
    assert (trainer.config.chip, trainer.config.numerics) == ("m4", "fast")
    assert (trainer.config.ane_scaling, trainer.config.ane_softmax) == ("on", "ane")
    a_trainer(model, device="ane-sim", chip="m2", ane_softmax="cpu")
    assert model.ane_options == AneOptions(chip="m2", softmax="cpu")
    engine = model.ane
    trainer = a_trainer(model)  # "auto" leaves the model where it is, and the config says where
    assert model.ane is engine
    assert (trainer.config.device, trainer.config.chip, trainer.config.ane_softmax) == ("ane-sim", "m2", "cpu")
    a_trainer(model, device="ane-sim", chip="m2")
    assert model.ane is engine  # it is what was asked for
    trainer = a_trainer(model, device="cpu")
    assert model.device == "cpu"
    assert trainer.config.chip is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"chip": "m4"}, "--chip: only for --device ane-sim, found --device cpu"),
        ({"numerics": "fast", "device": "cpu"}, "--numerics: only for --device ane-sim, found --device cpu"),
        ({"numerics": "fast", "device": "ane"}, "--numerics: only for --device ane-sim, found --device ane"),
        ({"ane_scaling": "off"}, "--ane-scaling: only for --device ane or ane-sim, found --device cpu"),
        ({"ane_softmax": "cpu"}, "--ane-softmax: only for --device ane or ane-sim, found --device cpu"),
        (
            {"ane_fallback": "cpu", "ane_mode": "dynamic"},
            "--ane-fallback: only for --device ane or ane-sim, found --device cpu",
        ),
        ({"ane_softmax": "gpu", "device": "ane-sim"}, "ane_softmax: expected one of ane, cpu, found 'gpu'"),
        ({"ane_scaling": "maybe", "device": "ane-sim"}, "ane_scaling: expected one of on, off, found 'maybe'"),
        ({"numerics": "x", "device": "ane-sim"}, "numerics: expected one of exact, fast, found 'x'"),
        ({"chip": "", "device": "ane-sim"}, "--chip: expected a name or a path, found nothing"),
        ({"chip": 4, "device": "ane-sim"}, "chip: expected text, found 4"),
        ({"device": "gpu"}, "device: expected one of auto, cpu, ane, ane-sim, found 'gpu'"),
        ({"dtype": "bf16", "device": "ane-sim"}, "--dtype bf16: only for --device cpu, found --device ane-sim"),
    ],
)
def test_options_without_effect_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=f"^{message}"):
        TrainConfig(**options)


def test_the_environments_device_counts_as_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ANELLM_DEVICE", "ane-sim")
    model = Model(SHAPE)
    a_trainer(model, chip="m1")
    assert model.ane_options == AneOptions(chip="m1")


def test_bf16_stays_on_the_cpu() -> None:
    model = a_model("cpu")
    model.set_dtype("bf16")
    with pytest.raises(UnsupportedError, match="expected a model of dtype fp32, found bf16"):
        model.to("ane-sim")
    with pytest.raises(AnellmError):
        a_model().set_dtype("bf16")


def test_what_a_run_says(tmp_path: Path) -> None:
    records: list[Any] = []
    model = a_model()
    trainer = a_trainer(model, records, steps=12, eval_interval=5, out=str(tmp_path / "run"))
    result = trainer.train()
    lines = list(metrics.read(tmp_path / "run"))
    assert lines[0] == {
        "kind": "device", "step": 0, "device": "ane-sim", "chip": "m4", "numerics": "fast", "ane_scaling": "on",
        "ane_softmax": "ane", "ane_fallback": "cpu", "ane_mode": "dynamic",
    }  # fmt: skip
    steps = of_kind(lines, "step")
    for line in steps:
        assert line["loss_scale"] == LossScaler().scale
        assert line["skipped"] == line["retries"] == 0
        assert 0.3 < line["ane_flops_share"] < 0.95
        assert line["modelled_ms"] > 0
        assert line["rescales"] >= 0
    assert [line["step"] for line in steps if "max_activation" in line] == [1, 10, 12]
    assert steps[0]["modelled_ms"] > 2 * steps[1]["modelled_ms"]  # it compiles
    for line in [*of_kind(lines, "eval"), steps[0]]:
        assert len(line["max_activation"]) == SHAPE.n_layers
        assert min(line["max_activation"]) > 0
    manifest = json.loads((tmp_path / "run" / "manifest.json").read_text())
    assert [manifest[key] for key in ("device", "chip", "numerics")] == ["ane-sim", "m4", "fast"]
    assert model.ane is not None
    stats = model.ane.stats()
    assert [result.ane[key] for key in ("ane_flops", "cpu_flops")] == [stats.total_ane_flops, stats.total_cpu_flops]
    total = stats.total_ane_flops + stats.total_cpu_flops
    assert result.ane["ane_flops_share"] == stats.total_ane_flops / total
    # Evaluations have less work for the CPU than steps.
    assert steps[-1]["ane_flops_share"] < result.ane["ane_flops_share"] < steps[-1]["ane_flops_share"] + 0.05
    again = EngineRun(model.ane)  # counts from its own beginning
    assert again.summary()["ane_flops_share"] is None
    model.forward(*a_batch(), training=False)
    assert again.summary()["ane_flops"] == model.ane.stats().ane_flops > 0
    assert result.ane["modelled_ms_per_step"] == pytest.approx(np.mean([line["modelled_ms"] for line in steps[1:]]))
    line = describe_engine(result.ane)
    assert line.startswith("ane-sim m4: ")
    assert "of the FLOPs on the Neural Engine" in line
    cpu = a_trainer(a_model("cpu"), records, steps=12, eval_interval=5).train()
    assert cpu.ane == {}
    losses = [[r["loss"] for r in of_kind(each, "step")] for each in (lines, records[-15:])]
    assert losses[0] == pytest.approx(losses[1], rel=2e-3)


def test_without_scaling_there_is_no_loss_scale() -> None:
    records: list[Any] = []
    trainer = a_trainer(a_model(scaling=False), records, steps=1)
    trainer.train()
    assert of_kind(records, "step")[0]["loss_scale"] == 1.0
    assert of_kind(records, "step")[0]["rescales"] == 0
    assert trainer.config.ane_scaling == "off"


# ---- failures ----------------------------------------------------------------------------------------------------


def after_step(trainer: Trainer, step: int, fault: str, **details: Any) -> None:
    """Let a fault come some evaluations after a step."""

    def inject(record: Mapping[str, Any]) -> None:
        if record["kind"] == "step" and record["step"] == step:
            trainer.model.ane.device.simulator.inject(fault, **details)  # type: ignore[union-attr]

    trainer.callbacks += (inject,)


def bytes_of(model: Model) -> list[bytes]:
    return [a.tobytes() for each in (model.params, model.moments_m, model.moments_v) for a in each.values()]


@pytest.mark.parametrize("evaluation", range(STEP))
@pytest.mark.parametrize(
    ("fault", "reason"), [("eval-inf", "non-finite"), ("eval-fails", "evaluation"), ("eval-stale", "evaluation")]
)
def test_a_failure_anywhere_skips_the_step_and_is_named(fault: str, reason: str, evaluation: int) -> None:
    records: list[Any] = []
    model = a_model()
    trainer = a_trainer(model, records, steps=3, gradient_accumulation_steps=2)
    # In the second micro-step of the second step. An overflow in backward is tried again first: let that fail as well.
    after_step(trainer, 1, fault, after=STEP + evaluation, count=2 if fault == "eval-inf" else 1)
    seen: list[list[bytes]] = []
    trainer.callbacks += (lambda record: seen.append(bytes_of(model)) if record["kind"] == "step" else None,)
    trainer.train()
    (skip,) = of_kind(records, "skip")
    assert skip["step"] == 2
    assert skip["reason"] == reason
    layers = [0, 0, 1, 1] + [1] * 6 + [0] * 6
    assert skip["layer"] == layers[evaluation]
    programs = ["attn_fwd", "ffn_fwd"] * 2
    programs += ["ffn_bwd_w2", "ffn_bwd_w13", "wo_bwd", "sdpa_bwd1", "sdpa_bwd2", "qkv_bwd"] * 2
    assert skip["program"] == programs[evaluation]
    assert where(skip).startswith(f"program {skip['program']}, layer {skip['layer']}")
    assert seen[0] == seen[1] != seen[2]
    steps = of_kind(records, "step")
    assert not np.isfinite(steps[1]["loss"])
    assert [line["skipped"] for line in steps] == [0, 1, 1]
    first = LossScaler().scale
    after = first / 2 if reason == "non-finite" else first
    assert [line["loss_scale"] for line in steps] == [first, first, after]
    assert (trainer.state.skipped_steps, trainer.state.bad_steps, trainer.state.optimizer_step) == (1, 0, 2)
    assert count_skips(records) == {where(skip): 1}


def test_an_overflow_in_backward_is_tried_again() -> None:
    records: list[Any] = []
    trainer = a_trainer(a_model(), records, steps=2)
    after_step(trainer, 1, "eval-inf", after=FORWARD + 2, count=1)
    trainer.train()
    assert not of_kind(records, "skip")
    assert [line["retries"] for line in of_kind(records, "step")] == [0, 1]


def test_too_many_failures_in_a_row_end_the_run(tmp_path: Path) -> None:
    for fault, kind in (("eval-fails", EvalError), ("eval-inf", DivergedError)):
        trainer = a_trainer(a_model(), steps=9, max_bad_steps=3, save_interval=1, out=str(tmp_path / fault))
        after_step(trainer, 2, fault)
        with pytest.raises(
            kind, match=r"step 5: 3 steps in a row .*program attn_fwd, layer 0.*step_00000004"
        ) as caught:
            trainer.train()
        assert caught.value.exit_code == (5 if fault == "eval-fails" else 3)
        assert checkpoint.find_checkpoint(tmp_path / fault) == tmp_path / fault / "step_00000004"


def test_a_failed_evaluation_is_no_best_loss() -> None:
    records: list[Any] = []
    trainer = a_trainer(a_model(), records, steps=2, eval_interval=1)
    after_step(trainer, 1, "eval-fails", count=1)
    trainer.train()
    evaluations = of_kind(records, "eval")
    assert [np.isfinite(line["val_loss"]) for line in evaluations] == [True, False, True]
    assert "program attn_fwd, layer 0: evaluation failed" in evaluations[1]["message"]
    assert trainer.state.best_step == 2


def test_a_program_that_does_not_compile_ends_the_run() -> None:
    model = a_model(fallback="error")
    model.ane.device.simulator.inject("compile-fails", after=3, count=1)  # type: ignore[union-attr]
    with pytest.raises(CompileError, match="program ffn_bwd_w13 for B = 2, T = 40: an injected fault"):
        Trainer(model, TrainConfig(steps=2, batch_size=2, seq_len=40), DATA).train()


def test_a_refused_program_is_on_the_record(tmp_path: Path) -> None:
    """Metrics, manifest and summary name it; the run that goes on from it says it for itself."""
    records: list[Any] = []
    model = a_model()
    model.ane.device.simulator.inject("compile-fails", after=3, count=1)  # type: ignore[union-attr]
    trainer = a_trainer(model, records, steps=2, eval_interval=1, out=str(tmp_path / "run"))
    with pytest.warns(FallbackWarning, match="program ffn_bwd_w13 for B = 2, T = 40: an injected fault") as warned:
        result = trainer.train()
    assert len(warned) == 1
    (line,) = of_kind(list(metrics.read(tmp_path / "run")), "fallback")
    assert of_kind(records, "fallback") == [line]
    assert line.pop("message").startswith("program ffn_bwd_w13 for B = 2, T = 40: an injected fault (com.apple.")
    assert line == {
        "kind": "fallback", "step": 0, "program": "ffn_bwd_w13", "part": "mlp backward", "batch_size": 2,
        "seq_len": 40, "domain": "com.apple.appleneuralengine.compiler", "code": 1,
        "text": "_ANECompiler : ANECCompile() FAILED: err=(CompilationFailure)",
    }  # fmt: skip
    manifest = json.loads((tmp_path / "run" / "manifest.json").read_text())
    assert [each["program"] for each in manifest["fallbacks"]] == ["ffn_bwd_w13"]
    assert manifest["fallbacks"] == result.ane["fallbacks"]
    assert "on the CPU for want of a program: mlp backward (for ffn_bwd_w13 is refused)" in describe_engine(result.ane)
    steps = of_kind(records, "step")
    assert 0.3 < steps[-1]["ane_flops_share"] < 0.75
    kinds = [record["kind"] for record in records]
    assert kinds.index("fallback") < kinds.index("step")  # the first evaluation compiles for forward alone
    # A process that goes on tries again, and here nothing is refused.
    again = a_trainer(a_model(), steps=3, out=str(tmp_path / "run"), resume="auto").train()
    assert again.state.step == 3
    assert again.ane["fallbacks"] == []
    assert "fallbacks" not in json.loads((tmp_path / "run" / "manifest.json").read_text())
    assert len(of_kind(list(metrics.read(tmp_path / "run")), "fallback")) == 1


@pytest.mark.parametrize(
    ("message", "place", "words"),
    [
        ("program ffn_bwd_w2, layer 3: max |dy| is inf, beyond fp16 (65504)", ("ffn_bwd_w2", 3, "dy"), "layer 3, dy"),
        ("x: program attn_fwd, layer 0: output q_raw or k_raw is infinite", ("attn_fwd", 0, "q_raw or k_raw"), "k_raw"),
        ("program wo_bwd, layer 11: evaluation failed: why", ("wo_bwd", 11, None), "program wo_bwd, layer 11"),
        ("something else", (None, None, None), "the loss"),
    ],
)
def test_places_are_read_from_messages(message: str, place: tuple[Any, ...], words: str) -> None:
    assert place_of(message) == place
    assert where(place_of(message)._asdict()).endswith(words)


def test_the_exponents_are_checked() -> None:
    engine = a_model().ane
    assert engine is not None
    good = engine.exponents()
    assert len(good) > SHAPE.n_layers
    for bad in (good[1:], [*good, 0], []):
        with pytest.raises(InvalidError, match=f"expected {len(good)} numbers, found {len(bad)}"):
            engine.set_exponents(bad)
    with pytest.raises(InvalidError, match="exponents"):
        engine.set_exponents([2**31 - 1] * len(good))
    engine.set_exponents(good)
    assert engine.exponents() == good
