"""Programs with a layer's weights in them, on the simulator, against float64; see test_ane_programs.py for units."""

from __future__ import annotations

import dataclasses
import json
import struct
from pathlib import Path

import numpy as np
import pytest
from anereference import Arrays, Batch, attention_backward, attention_forward, evaluate, gpt2, make_values, model

from anellm import mil, sim
from anellm.ane_reference import (
    ffn_backward,
    ffn_forward,
    gelu,
    matrices,
    mlp_backward,
    mlp_forward,
    program_inputs,
    program_outputs,
)
from anellm.config import ModelConfig
from anellm.errors import CompileError, InvalidError, UnsupportedError
from anellm.mil import AneProgram, ane_programs, bake
from anellm.model import Model
from anellm.sim import Simulator, chip_names

U = 2.0**-11
BOUNDS = {
    "attn_fwd_static": {"y": 5, "attn": 5, "q": 3, "k": 3, "v": 2, "q_raw": 2, "k_raw": 2},
    "ffn_fwd_static": {"y": 5, "gate": 2, "up": 2, "pre": 2},
    "ffn_bwd_static": {"dx": 5, "dgate": 5, "dup": 5, "dpre": 5},
    "sdpa_bwd1_static": {"dv": 3, "p": 3, "dp": 3},
    "qkv_bwd_static": {"dx": 2},
    "sdpa_bwd2": {"dq": 4, "dk": 4},
}
CASES = {
    "mha": Batch(model(64, 172, 8, 8, 8), 1, 64),
    "gqa-norm": Batch(model(48, 80, 6, 2, 22, qk_norm=True), 3, 41),  # padding
    "mqa": Batch(model(40, 56, 4, 1, 30), 2, 32),
    "one-head": Batch(model(24, 40, 1, 1, 6), 1, 7),
    "gpt2": Batch(gpt2(48, 110, 4, bias=True, gelu="tanh"), 3, 41),
    "gpt2-plain": Batch(gpt2(64, 256, 8, bias=False, gelu="erf"), 1, 64),
}


def programs(batch: Batch, values: Arrays) -> dict[str, AneProgram]:
    """Return the static programs of a batch's shape with these weights."""
    found = ane_programs(batch.config, batch.B, batch.T, mode="static")
    baked = [dataclasses.replace(p, files=bake(p.files, matrices(values, batch))) for p in found]
    return {p.name: p for p in baked if p.used(training=True, softmax="ane", mode="static")}


def assert_close(name: str, found: Arrays, expected: Arrays) -> None:
    assert found.keys() <= BOUNDS[name].keys()
    for field, value in found.items():
        a, b, units = value, expected[field], BOUNDS[name][field]
        error = np.linalg.norm(a - b) / np.linalg.norm(b)
        assert error <= units * U, (name, field, error / U)
        assert np.abs(a - b).max() <= 4 * units * U * np.abs(b).max(), (name, field)


def check(batch: Batch, simulator: Simulator) -> None:
    values = program_inputs(batch)
    for name, program in programs(batch, values).items():
        found, compiled = evaluate(simulator, program, values, batch)
        assert_close(name, found, program_outputs(program, values, batch))
        findings = compiled.findings() if batch.Tp == batch.T else []  # products with padding are exactly 0 (Q43)
        assert findings == []


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("chip", ["m4", "m6"])
def test_each_program_is_what_it_should_be(case: str, chip: str) -> None:
    check(CASES[case], Simulator(chip, numerics="exact"))


@pytest.mark.parametrize("mac", ["q15.16", "wide_fp32"])
def test_programs_of_stories110m(mac: str) -> None:
    check(Batch(model(768, 2048, 12, 12, 64), 1, 256), Simulator("m4", numerics="fast", mac=mac))


@pytest.mark.parametrize("kind", ["tanh", "erf"])
def test_slope_of_gelu_of_any_size(kind: str) -> None:
    """dpre = slope * dact, of pre from -3000 to 3000: the slope is 0 and 1 there."""
    batch = Batch(gpt2(64, 64, 2, bias=False, gelu=kind), 1, 32)
    values = make_values(batch)
    pre = np.linspace(-6.0, 6.0, 32 * 64).reshape(1, 32, 64)
    pre[0, 0], pre[0, 1] = 3000.0, -3000.0
    values |= {"pre": pre, "dy": np.ones((1, 32, 64)), "w2": np.eye(64)}
    pre16 = pre.astype(np.float16).astype(np.float64)
    found = evaluate(Simulator("m4", numerics="exact"), programs(batch, values)["ffn_bwd_static"], values, batch)[0]
    # sums and products of fp16 near 1, and the fit (kernels/gelu.c)
    assert np.abs(found["dpre"] - gelu(pre16, kind)[1]).max() <= 3 * U + (1.6e-4 if kind == "erf" else 0.0)
    np.testing.assert_array_equal(found["dpre"][0, :2], [[1.0] * 64, [0.0] * 64])


@pytest.mark.parametrize("absmax", [1e-1, 1e-5, 1e-8])
def test_gradients_of_any_size_with_an_exponent(absmax: float) -> None:
    """In go d 2^e with the largest in [8, 16), out come gradients times 2^e; the second half takes the first's."""
    batch, simulator = CASES["gqa-norm"], Simulator("m4", numerics="exact")
    values = make_values(batch)
    forward = attention_forward(values, batch)
    values |= forward | {name: v for name, v in ffn_forward(values).items() if name != "y"}
    up = 2.0 ** int(np.floor(np.log2(16.0 / absmax)))
    g = np.random.default_rng(1).standard_normal((batch.B, batch.T, batch.config.dim))
    d = g * absmax / np.abs(g).max()
    found = programs(batch, values)

    def run(name: str, **inputs: np.ndarray) -> Arrays:
        outputs = evaluate(simulator, found[name], {**values, **inputs}, batch)[0]
        return {key: value if key == "p" else value / up for key, value in outputs.items()}

    assert_close("ffn_bwd_static", run("ffn_bwd_static", dy=d * up), ffn_backward({**values, "dy": d}))
    expected = {**forward, **attention_backward(forward, d @ values["wo"], batch)}
    first = run("sdpa_bwd1_static", dmid=d * up)
    assert_close("sdpa_bwd1_static", first, expected)
    assert_close("sdpa_bwd2", run("sdpa_bwd2", p=first["p"], dp=first["dp"] * up), expected)


@pytest.mark.parametrize("case", ["one-head", "gpt2", "gpt2-plain"])
def test_the_reference_of_the_mlp_by_finite_differences(case: str) -> None:
    batch = CASES[case]
    values, g = make_values(batch), np.random.default_rng(5)
    dy, step = g.standard_normal(values["h"].shape), g.standard_normal(values["h"].shape)
    found = mlp_backward({**values, **mlp_forward(values, batch), "dy": dy}, batch)["dx"]
    moved = [(mlp_forward({**values, "h": values["h"] + h * step}, batch)["y"] * dy).sum() for h in (1e-5, -1e-5)]
    assert (moved[0] - moved[1]) / 2e-5 == pytest.approx((found * step).sum(), rel=1e-6)


# ---- text ------------------------------------------------------------------------------------------------------------

PRESETS = [
    ("gpt2", 4, 64),
    ("gpt2-char", 12, 64),
    ("stories110m", 1, 256),
    ("stories260k", 2, 512),
    ("qwen3-0.6b", 1, 64),
]


@pytest.mark.parametrize("shape", PRESETS, ids=lambda s: s[0])
def test_programs_compile_on_every_chip(shape: tuple[str, int, int]) -> None:
    """Without any finding: no weights lie in the width, so nothing is sliced there."""
    preset, B, T = shape
    config = ModelConfig.from_preset(preset)
    found = ane_programs(config, B, T, mode="static")
    used = [p for p in found if p.used(training=True, softmax="ane", mode="static")]
    assert [p.name for p in used] == [
        "sdpa_bwd2", "attn_fwd_static", "ffn_fwd_static", "ffn_bwd_static", "sdpa_bwd1_static", "qkv_bwd_static",
    ]  # fmt: skip
    of_attention = 2 + (2 if config.qk_norm else 0) + (1 if config.bias else 0)
    of_mlp = 3 if config.arch == "llama" or config.bias else 2
    assert [len(p.weights) for p in used] == [0, of_attention, of_mlp, of_mlp, 1, 1]
    assert sum(p.used(training=False, softmax="ane", mode="static") for p in found) == 2
    for chip in chip_names():
        for program in used:
            assert Simulator(chip).compile(program.mil, program.files).findings() == [], (chip, program.name)


def test_flops_are_those_of_the_dynamic_programs() -> None:
    c = ModelConfig.from_preset("stories110m")
    flops = {
        mode: sum(
            p.flops for p in ane_programs(c, 1, 256, mode=mode) if p.used(training=True, softmax="ane", mode=mode)
        )
        for mode in ("dynamic", "static")
    }
    assert flops["static"] == flops["dynamic"]


def test_weights_are_constants_and_nothing_else_is_an_input() -> None:
    batch = CASES["gqa-norm"]
    values = program_inputs(batch)
    c = batch.config
    shapes = {
        "wqkv": (c.q_dim + 2 * c.kv_dim, c.dim), "wo": (c.dim, c.q_dim), "w1": (c.hidden_dim, c.dim),
        "w3": (c.hidden_dim, c.dim), "w2": (c.dim, c.hidden_dim), "q_norm": (1, c.head_dim), "k_norm": (1, c.head_dim),
    }  # fmt: skip
    for program in programs(batch, values).values():
        assert program.input.width == batch.B * batch.Tp
        assert all(field.kind in ("rows", "scores") for field in program.input.fields)
        for path in program.weights:
            name = Path(path).stem
            rows, columns = shapes[name.removesuffix("_t")]
            given = matrices(values, batch)[name.removesuffix("_t")].reshape(rows, columns)
            if name.endswith("_t"):
                given, rows, columns = given.T, columns, rows
            data = program.files[path]
            assert struct.unpack_from("<IIQQ", data, 64) == (0xDEADBEEF, 1, 2 * rows * columns, 128)
            np.testing.assert_array_equal(np.frombuffer(data, np.float16, offset=128).reshape(rows, columns), given)
            shape = f"[1, 1, 1, {columns}]" if name.endswith("norm") else f"[{rows}, {columns}, 1, 1]"
            assert f"tensor<fp16, {shape}> w_{name} = const()" in program.mil
    with pytest.raises(InvalidError, match="wo: expected"):
        bake(programs(batch, values)["attn_fwd_static"].files, {**matrices(values, batch), "wo": np.zeros((2, 2))})


CONV = "the input channels of a convolution [(]Q04[)],"


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        (
            (64, 32000, 4, 4, 16),
            "hidden_dim, the input channels of a convolution [(]Q04[)], is 32000; no chip takes more",
        ),
        ((32000, 64, 4, 4, 16), "dim, the input channels of a convolution [(]Q04[)], is 32000"),
        (
            (64, 64, 12, 12, 900),
            "n_kv_heads[)] times head_dim, the input channels of a convolution [(]Q04[)], is 32400",
        ),
        ((20000, 20000, 4, 4, 16), "bytes of its weights [(]Q60[)] is 2400000000"),
    ],
)
def test_dimensions_that_no_chip_takes(shape: tuple[int, ...], message: str) -> None:
    with pytest.raises(UnsupportedError, match=message):
        ane_programs(model(*shape), 1, 32, mode="static")


def test_wide_models_that_only_static_programs_take() -> None:
    """The dynamic ones sum over twice hidden_dim."""
    config = model(64, 20000, 4, 4, 16)
    with pytest.raises(UnsupportedError, match="twice hidden_dim"):
        ane_programs(config, 1, 32)
    found = {p.name: p for p in ane_programs(config, 1, 32, mode="static")}
    for chip in ("m4", "m6"):
        Simulator(chip).compile(found["ffn_bwd_static"].mil, found["ffn_bwd_static"].files)
    with pytest.raises(CompileError, match="Q30"):
        Simulator("m1").compile(found["ffn_bwd_static"].mil, found["ffn_bwd_static"].files)


# ---- mil dump --------------------------------------------------------------------------------------------------------


def test_dump_of_a_layer_of_a_model(tmp_path: Path, data_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = data_dir / "weights" / "stories260K" / "stories260K.bin"
    flags = ["dump", "--model", str(path), "--ane-mode", "static", "--seq-len", "32"]
    for layer in (0, 3):
        assert mil.main([*flags, "--out", str(tmp_path / str(layer)), "--layer", str(layer)]) == 0
    capsys.readouterr()
    manifest = json.loads((tmp_path / "3" / "programs.json").read_text())
    assert manifest["mode"] == "static"
    assert manifest["programs"][1]["matrices"] == ["@model_path/weights/wqkv.bin", "@model_path/weights/wo.bin"]
    params = dict(mil.weights.load_pretrained(str(path)).tensors)
    for layer in (0, 3):
        found = np.fromfile(tmp_path / str(layer) / "weights" / "w2_t.bin", np.float16, offset=128)
        down = params[f"model.layers.{layer}.mlp.down_proj.weight"]
        np.testing.assert_array_equal(found.reshape(down.T.shape), down.T.astype(np.float16))
    for entry in manifest["programs"]:
        file = str(tmp_path / "3" / entry["mil"])
        assert sim.main(["lint", file, "--weights", str(tmp_path / "3" / "weights"), "--chip", "m3ultra"]) == 0
    capsys.readouterr()
    assert mil.main([*flags, "--out", str(tmp_path / "x"), "--layer", "5"]) == 2
    assert "--layer: expected 0 to 4, found 5" in capsys.readouterr().err
    assert mil.main([*flags, "--out", str(tmp_path / "x"), "--ane-softmax", "cpu"]) == 2
    assert "--ane-softmax: expected ane with --ane-mode static, found cpu" in capsys.readouterr().err
    assert not (tmp_path / "x").exists()


def test_dump_of_a_layer_of_a_gpt2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = ModelConfig.from_preset("gpt2-char", vocab_size=65, bias=True, n_layers=2)
    model = Model(config, "cpu", seed=4)
    model.params["transformer.h.1.attn.c_attn.bias"][...] = np.arange(384) / 256.0
    model.save_pretrained(tmp_path / "m", format="hf")
    flags = ["dump", "--model", str(tmp_path / "m"), "--ane-mode", "static", "--seq-len", "32", "--layer", "1"]
    assert mil.main([*flags, "--out", str(tmp_path / "d")]) == 0
    capsys.readouterr()
    weights = tmp_path / "d" / "weights"
    for file, name in (("bqkv", "attn.c_attn.bias"), ("b1", "mlp.c_fc.bias"), ("w1", "mlp.c_fc.weight")):
        found, expected = (
            np.fromfile(weights / f"{file}.bin", np.float16, offset=128),
            model.params[f"transformer.h.1.{name}"],
        )
        np.testing.assert_array_equal(found, expected.astype(np.float16).reshape(-1))
    assert not (weights / "w3.bin").exists()
    for path in (tmp_path / "d").glob("*.mil"):
        assert sim.main(["lint", str(path), "--weights", str(weights), "--chip", "m3ultra"]) == 0


def test_dump_of_a_shape_has_weights_of_zeros(tmp_path: Path) -> None:
    assert mil.main(["dump", "--preset", "tiny", "--ane-mode", "static", "--out", str(tmp_path), "--no-training"]) == 0
    assert {p.name for p in tmp_path.glob("*.mil")} == {"attn_fwd_static.mil", "ffn_fwd_static.mil"}
    assert not np.fromfile(tmp_path / "weights" / "w1.bin", np.float16, offset=128).any()
