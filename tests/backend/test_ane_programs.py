"""Each program of a model on the simulator, against float64.

Errors are relative Frobenius norms, in units of fp16's rounding error u = 2^-11. A program's output has been rounded
when its inputs were written, after each op, and at the end; each time by at most u per element, and by 0.4 u to 0.6 u
in the norm, and these add up like independent errors or less. BOUNDS holds what is allowed per output, about twice of
what is found.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator

import numpy as np
import pytest
from anereference import (
    Arrays,
    Batch,
    attention_backward,
    attention_forward,
    attention_values,
    evaluate,
    gpt2,
    make_values,
    mlp_forward,
    model,
    pack,
    scores,
    softmax,
)

from anellm._ffi import check, ffi, lib
from anellm.ane_reference import gelu
from anellm.config import ModelConfig
from anellm.errors import CompileError, InvalidError, TokenRangeError, UnsupportedError
from anellm.mil import AneProgram, ane_programs
from anellm.model import _c_config
from anellm.sim import Simulator, chip_names

U = 2.0**-11
COSINE = 0.9995
BOUNDS = {
    "attn_fwd": {"y": 5, "attn": 5, "q": 3, "k": 3, "v": 2, "q_raw": 2, "k_raw": 2},
    "attn_scores": {"q": 3, "k": 3, "v": 2, "q_raw": 2, "k_raw": 2, "scores": 5},
    "attn_values": {"attn": 2},
    "ffn_fwd": {"y": 5, "gate": 2, "up": 2, "pre": 2},
    "wo_fwd": {"y": 2},
    "ffn_bwd_w2": {"dact": 2},
    "ffn_bwd_w13": {"dx": 2},
    "wo_bwd": {"dattn": 2},
    "qkv_bwd": {"dx": 2},
    "sdpa_bwd1": {"dv": 3, "p": 3, "dp": 2},
    "sdpa_bwd1_given": {"dv": 2, "dp": 2},
    "sdpa_bwd2": {"dq": 4, "dk": 4},
    "sdpa_bwd2_given": {"dq": 2, "dk": 2},
}
CASES = {
    "mha": Batch(model(64, 172, 8, 8, 8), 1, 64),
    "gqa-norm": Batch(model(48, 80, 6, 2, 22, qk_norm=True), 3, 41),  # q_dim 132, kv_dim 44, padding
    "mqa": Batch(model(40, 56, 4, 1, 30), 2, 32),
    "one-head": Batch(model(24, 40, 1, 1, 6), 1, 7),
    "gpt2": Batch(gpt2(48, 110, 4, bias=True, gelu="tanh"), 3, 41),  # b1 fills two columns and a part of a third
    "gpt2-plain": Batch(gpt2(64, 256, 8, bias=False, gelu="erf"), 1, 64),
}
LARGE = {
    "stories110m": Batch(model(768, 2048, 12, 12, 64), 1, 256),
    "gqa-norm": Batch(model(256, 768, 8, 2, 96, qk_norm=True), 2, 120),
    "gpt2": Batch(gpt2(768, 3072, 12, bias=True, gelu="tanh"), 4, 64),
}
FORWARD = ["attn_fwd", "attn_scores", "attn_values", "ffn_fwd", "wo_fwd"]
BACKWARD = [name for name in BOUNDS if name not in FORWARD]


class Bench:
    """A batch with its programs, inputs and reference."""

    def __init__(self, batch: Batch, sim: Simulator) -> None:
        self.batch, self.sim, self.values = batch, sim, make_values(batch)
        self.programs = {p.name: p for p in ane_programs(batch.config, batch.B, batch.T)}
        self.forward = attention_forward(self.values, batch)
        self.inputs = {**self.values, **self.forward}

    def run(self, name: str, **inputs: np.ndarray) -> Arrays:
        return evaluate(self.sim, self.programs[name], {**self.inputs, **inputs}, self.batch)[0]

    def gradient(self, channels: int, absmax: float, seed: int = 1) -> np.ndarray:
        g = np.random.default_rng(seed).standard_normal((self.batch.B, self.batch.T, channels))
        return g * absmax / np.abs(g).max()


def assert_close(name: str, found: Arrays, expected: Arrays, slack: float = 1.0) -> None:
    for field, units in BOUNDS[name].items():
        if field not in found:
            continue  # q_raw and k_raw without q/k-norm
        a, b = found[field], expected[field]
        cosine = np.vdot(a, b) / (np.linalg.norm(a) * np.linalg.norm(b))
        error = np.linalg.norm(a - b) / np.linalg.norm(b)
        assert cosine >= COSINE, (name, field, cosine)
        assert error <= slack * units * U, (name, field, error / U)
        assert np.abs(a - b).max() <= 4 * slack * units * U * np.abs(b).max(), (name, field)


def check_forward(bench: Bench) -> None:
    for name in ("attn_fwd", "attn_scores", "attn_values"):
        found = bench.run(name)
        assert_close(name, found, bench.forward)
        assert set(found) <= set(BOUNDS[name])
    assert_close("wo_fwd", bench.run("wo_fwd"), bench.forward)
    assert_close("ffn_fwd", bench.run("ffn_fwd"), mlp_forward(bench.values, bench.batch))


def check_backward(bench: Bench, absmax: float) -> None:
    """Gradients of this size go in as value * 2^exponent, largest in [8, 16), and come out as value * 2^exponent."""
    c, w = bench.batch.config, bench.values
    exponent = int(np.floor(np.log2(16.0 / absmax)))
    up, down = 2.0**exponent, 2.0**-exponent

    def scaled(found: Arrays) -> Arrays:
        return {name: value * (1.0 if name == "p" else down) for name, value in found.items()}

    for name, given, weight, given_name, out in (
        ("ffn_bwd_w2", c.dim, "w2", "dy", "dact"),
        ("ffn_bwd_w13", c.gate_up_dim, "w13", "dgate_up", "dx"),
        ("wo_bwd", c.dim, "wo", "dmid", "dattn"),
        ("qkv_bwd", c.q_dim + 2 * c.kv_dim, "wqkv", "dqkv", "dx"),
    ):
        d = bench.gradient(given, absmax)
        assert_close(name, scaled(bench.run(name, **{given_name: d * up})), {out: d @ w[weight]})
    dattn = bench.gradient(c.q_dim, absmax)
    expected = {**bench.forward, **attention_backward(bench.forward, dattn, bench.batch)}
    first = bench.run("sdpa_bwd1", dattn=dattn * up)
    assert_close("sdpa_bwd1", scaled(first), expected)
    # what the first gives goes into the second, where p and dp carry the errors of the first
    assert_close("sdpa_bwd2", scaled(bench.run("sdpa_bwd2", p=first["p"], dp=first["dp"])), expected)
    assert_close("sdpa_bwd1_given", scaled(bench.run("sdpa_bwd1_given", dattn=dattn * up)), expected)
    assert_close("sdpa_bwd2_given", scaled(bench.run("sdpa_bwd2_given", ds=expected["ds"] * up)), expected)


@pytest.fixture(scope="module", params=CASES)
def small(request: pytest.FixtureRequest) -> Bench:
    return Bench(CASES[request.param], Simulator("m4", numerics="exact"))


def test_forward_programs(small: Bench) -> None:
    check_forward(small)


@pytest.mark.parametrize("absmax", [1e-1, 1e-3, 1e-5, 1e-8])
def test_backward_programs(small: Bench, absmax: float) -> None:
    check_backward(small, absmax)


@pytest.mark.parametrize(
    ("case", "mac"),
    [("stories110m", "q15.16"), ("gpt2", "q15.16"), ("gqa-norm", "q15.16"), ("gqa-norm", "wide_fp32")],
)
def test_large_programs(case: str, mac: str) -> None:
    bench = Bench(LARGE[case], Simulator("m4", numerics="fast", mac=mac))
    check_forward(bench)
    check_backward(bench, 3e-4)


@pytest.mark.parametrize("chip", ["m1", "m6"])
def test_other_arithmetic(chip: str) -> None:
    """M1 sums groups of products in fp16, and rounds half to even."""
    bench = Bench(CASES["mqa"], Simulator(chip, numerics="exact"))
    for name in ("attn_fwd", "attn_values"):
        assert_close(name, bench.run(name), bench.forward, slack=3.0 if chip == "m1" else 1.0)


def test_gradients_of_the_reference_by_finite_differences() -> None:
    batch = Batch(model(12, 16, 4, 2, 6, qk_norm=False), 2, 5)
    values = make_values(batch, 3)
    f = attention_forward(values, batch)
    g = np.random.default_rng(0)
    dattn = g.standard_normal(f["attn"].shape)
    found = attention_backward(f, dattn, batch)

    def loss(q: np.ndarray, k: np.ndarray, v: np.ndarray) -> float:
        return float((attention_values(softmax(scores(q, k, batch)), v, batch) * dattn).sum())

    for name in ("q", "k", "v"):
        step = g.standard_normal(f[name].shape)
        moved = [loss(**{n: f[n] + (h * step if n == name else 0) for n in ("q", "k", "v")}) for h in (1e-5, -1e-5)]
        np.testing.assert_allclose((moved[0] - moved[1]) / 2e-5, (found[f"d{name}"] * step).sum(), rtol=1e-6)
    np.testing.assert_allclose(found["ds"].sum(-1), 0.0, atol=1e-12)  # a softmax does not see a constant


def test_small_weights_need_an_exponent() -> None:
    """As a model is initialised: std 0.02, and 0.02 / sqrt(2 * 12) for wo and w2, whose products fall below 2^-16."""
    bench = Bench(LARGE["stories110m"], Simulator("m4", numerics="exact"))
    c, g = bench.batch.config, np.random.default_rng(2)
    wo, attn = 0.004 * g.standard_normal((c.dim, c.q_dim)), 0.03 * g.standard_normal(bench.forward["attn"].shape)
    expected = attn @ wo.T

    def error(exponent: int) -> float:
        y = bench.run("wo_fwd", attn=attn, wo=wo * 2.0**exponent)["y"] * 2.0**-exponent
        return float(np.linalg.norm(y - expected) / np.linalg.norm(expected))

    assert error(0) > 20 * U
    assert error(7) < 2 * U


def test_flat_attention_to_small_values() -> None:
    """256 probabilities of 1/256 times 0.1: the program scales v up, or the accumulator's steps would show (Q44)."""
    batch = Batch(model(64, 64, 2, 2, 32), 1, 256)
    bench = Bench(batch, Simulator("m4", numerics="exact"))
    p = np.tile(softmax(np.zeros((1, 1, 256, 256))), (1, 2, 1, 1))
    v = 0.1 * np.random.default_rng(4).standard_normal((1, 256, 64))
    assert_close("attn_values", bench.run("attn_values", p=p, v=v), {"attn": attention_values(p, v, batch)})


@pytest.mark.parametrize("rms", [0.1, 1.0, 60.0])
def test_norm_of_heads_of_any_size(rms: float) -> None:
    """The sum of squares stays within what the accumulator holds (Q42, Q44, Q64)."""
    bench = Bench(CASES["gqa-norm"], Simulator("m4", numerics="exact"))
    size = np.sqrt((bench.forward["q_raw"] ** 2).mean())
    values = {**bench.values, "wqkv": bench.values["wqkv"] * rms / size}
    found = bench.run("attn_scores", **values)
    assert_close("attn_scores", found, attention_forward(values, bench.batch), slack=1.0 if rms > 0.5 else 3.0)


@pytest.mark.parametrize("kind", ["tanh", "erf"])
@pytest.mark.parametrize("size", [0.01, 1.0, 8.0, 3000.0])
def test_gelu_of_any_size(kind: str, size: float) -> None:
    """Its polynomial is taken of x limited to 8: x^3 leaves fp16 at 40."""
    batch = Batch(gpt2(32, 64, 2, bias=True, gelu=kind), 1, 32)
    bench = Bench(batch, Simulator("m4", numerics="exact"))
    pre = bench.values["h"] @ bench.values["w1"].T
    values = {**bench.values, "w1": bench.values["w1"] * size / np.abs(pre).max(), "b1": bench.values["b1"] * 0.0}
    values["w2"] = np.eye(32, 64) * 2.0 ** -np.floor(np.log2(max(size, 1.0)))  # y = the first half of gelu(pre)
    found = bench.run("ffn_fwd", **values)
    expected = gelu(found["pre"], kind)[0] @ values["w2"].T
    # what fp16 keeps of gelu, a product that rounds to 2^-16, and the fit of the exact one (kernels/gelu.c)
    bound = 3 * U * np.abs(expected) + 2.0**-16 + 1.5 * U * 0.25 + (4.7e-5 if kind == "erf" else 0.0)
    assert (np.abs(found["y"] - expected) <= bound).all()
    assert np.abs(found["pre"]).max() == pytest.approx(size, rel=0.01)


def test_slope_of_gelu_by_finite_differences() -> None:
    x = np.linspace(-6.0, 6.0, 241)
    for kind in ("tanh", "erf"):
        values = [gelu(x + h, kind)[0] for h in (1e-5, -1e-5)]
        np.testing.assert_allclose((values[0] - values[1]) / 2e-5, gelu(x, kind)[1], atol=1e-9)


# ---- padding, fields, text -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["attn_fwd", "ffn_fwd", "attn_scores"])
def test_padding_does_not_reach_real_tokens(name: str) -> None:
    bench = Bench(CASES["gqa-norm"], Simulator("m4", numerics="exact"))
    batch, program = bench.batch, bench.programs[name]
    compiled = bench.sim.compile(program.mil, program.files)
    clean = pack(program, bench.inputs, batch)
    dirty = clean.copy()
    where = program.input.fields[0]
    view = dirty.reshape(program.input.channels, program.input.width)[where.slices].reshape(-1, batch.B, batch.Tp)
    view[:, :, batch.T :] = 3.0
    a, b = (compiled.run({"a_input0": x})["z_output0"].reshape(-1, batch.B, batch.Tp) for x in (clean, dirty))
    assert np.isfinite(a).all()
    assert np.isfinite(b).all()
    assert (a[:, :, batch.T :] != b[:, :, batch.T :]).any()
    real = a[:, :, : batch.T] == b[:, :, : batch.T]
    if name != "attn_scores":
        assert real.all()
        return
    first = program.output["scores"].channel
    assert real[:first].all()


def test_nothing_between_the_fields_is_read(small: Bench) -> None:
    """pack() leaves NaN there, which an op would turn into infinities."""
    for name, program in small.programs.items():
        plane = np.zeros((program.input.channels, program.input.width), bool)
        for where in program.input.fields:
            assert not plane[where.slices].any(), (name, where.name)
            plane[where.slices] = True
            assert where.channels > 0
            assert where.columns > 0
        assert program.input.width % 32 == 0
        assert program.output.width == small.batch.B * small.batch.Tp
        covered = [f.channels for f in program.output.fields]
        assert sum(covered) == program.output.channels
        for surface in (program.input, program.output):
            assert surface.bytes == max(49152, 2 * surface.channels * surface.width)


PRESETS = [
    ("gpt2", 4, 64),
    ("gpt2-char", 12, 64),
    ("gpt2-xl", 1, 1024),
    ("stories15m", 2, 256),
    ("stories110m", 1, 256),
    ("stories260k", 1, 512),
    ("qwen3-0.6b", 1, 128),
]


def compiled_everywhere(preset: str, B: int, T: int) -> Iterator[tuple[str, AneProgram]]:
    for program in ane_programs(ModelConfig.from_preset(preset), B, T):
        for chip in chip_names():
            yield chip, program


@pytest.mark.parametrize("shape", PRESETS, ids=lambda s: s[0])
def test_programs_compile_on_every_chip(shape: tuple[str, int, int]) -> None:
    """The only finding is that M1 and M2 cut slices of the width above 4094 (Q48): the weights, which are smaller."""
    for chip, program in compiled_everywhere(*shape):
        findings = Simulator(chip).compile(program.mil, program.files).findings()
        if chip in ("m1", "m2"):
            findings = [f for f in findings if (f.rule, f.times) != ("Q48", 0)]
        assert findings == [], (chip, program.name, findings)


def test_strict_options_refuse_only_concat(small: Bench) -> None:
    """Programs with one output field compile as they are; the others end in a concat, ffn_fwd has one more (Q01)."""
    strict = Simulator("m4", strict=True)
    for program in small.programs.values():
        if len(program.output.fields) == 1:
            strict.compile(program.mil, program.files)
            continue
        with pytest.raises(CompileError, match="Q01"):
            strict.compile(program.mil, program.files)
        lines = program.mil.splitlines()
        refused = int(strict.failure().detail.split(":")[0])
        concats = [i for i, line in enumerate(lines) if " concat(" in line]
        assert concats[0] == refused - 1
        assert len(concats) == (2 if program.name == "ffn_fwd" else 1)
        assert "->" in lines[concats[-1] + 1]  # nothing comes behind it


def test_evaluation_leaves_no_finding() -> None:
    for batch in (CASES["mha"], CASES["mqa"], CASES["gpt2-plain"]):
        bench = Bench(batch, Simulator("m4"))
        c = batch.config
        gradients = {
            "dy": c.dim, "dmid": c.dim, "dgate_up": c.gate_up_dim, "dqkv": c.q_dim + 2 * c.kv_dim, "dattn": c.q_dim
        }  # fmt: skip
        inputs = {**bench.inputs, **{k: bench.gradient(n, 12.0) for k, n in gradients.items()}}
        inputs |= attention_backward(bench.forward, inputs["dattn"], batch)
        for program in bench.programs.values():
            assert evaluate(bench.sim, program, inputs, batch)[1].findings() == []


ALLOWED = {
    "const", "slice_by_size", "reshape", "transpose", "matmul", "add", "mul", "sub", "pow", "softmax",
    "concat"
}  # fmt: skip


def test_text_keeps_to_what_is_known_to_compile(small: Bench) -> None:
    for program in small.programs.values():
        body = [line.strip() for line in program.mil.splitlines() if line.startswith("        ")]
        ops = {line.split(" = ", 1)[1].split("(")[0] for line in body}
        limits = {"minimum", "maximum"} if small.batch.config.arch == "gpt2" and program.name == "ffn_fwd" else set()
        assert ops <= ALLOWED | limits, program.name
        names = [line.split(" = ")[0].split()[-1] for line in body]
        assert len(names) == len(set(names))
        assert all(name[0] in "kvwz" and ("_" in name or name[1:].isdigit()) for name in names)
        for line in body:
            arguments = line.split("(", 1)[1].rsplit(")[name", 1)[0]
            if " = const(" not in line:  # named constants only, no inline values
                assert "<" not in arguments
                assert '"' not in arguments
        assert program.mil.count("func ") == 1
        assert program.mil.isascii()


def test_blobs_are_milblob_v2(small: Bench) -> None:
    for program in small.programs.values():
        for path, data in program.files.items():
            assert path.startswith("@model_path/weights/")
            assert path in program.mil
            count, version = struct.unpack_from("<II", data, 0)
            sentinel, dtype, size, start, padding = struct.unpack_from("<IIQQQ", data, 64)
            assert (count, version, sentinel, dtype, start, padding) == (1, 2, 0xDEADBEEF, 1, 128, 0)
            assert len(data) == start + size
            assert data[8:64] + data[96:128] == bytes(88)


def test_constants_are_what_they_should_be() -> None:
    batch = CASES["gqa-norm"]
    files = {p.split("/")[-1]: d for p, d in ane_programs(batch.config, 3, 41)[0].files.items()}
    arrays = {name: np.frombuffer(data[128:], np.float16).astype(np.float64) for name, data in files.items()}
    Tp, n, half = batch.Tp, 22, 11
    mask = arrays["mask.bin"].reshape(Tp, Tp)
    np.testing.assert_array_equal(mask, np.where(np.tri(Tp, dtype=bool), 0.0, -10000.0))
    angle = np.arange(Tp)[:, None] * 10000.0 ** (-np.arange(half) / half)
    for name, values in (("rope_cos.bin", np.cos(angle)), ("rope_sin.bin", np.sin(angle))):
        np.testing.assert_allclose(arrays[name].reshape(Tp, n), np.tile(values, 2), atol=U / 2)
    x = np.arange(n)[None]
    turned = x @ arrays["rope_turn.bin"].reshape(n, n)
    np.testing.assert_array_equal(turned[0], np.concatenate([-x[0, half:], x[0, :half]]))


def test_flops_are_those_of_the_products() -> None:
    batch = LARGE["stories110m"]
    c, S = batch.config, 256
    flops = {p.name: p.flops for p in ane_programs(c, 1, 256)}
    assert flops["ffn_fwd"] == 2 * S * c.dim * c.hidden_dim * 3
    assert flops["ffn_bwd_w2"] == 2 * S * c.dim * c.hidden_dim
    assert flops["ffn_bwd_w13"] == 2 * flops["ffn_bwd_w2"]
    assert flops["wo_bwd"] == flops["wo_fwd"] == 2 * S * c.dim * c.q_dim
    assert flops["qkv_bwd"] == 2 * S * c.dim * 3 * c.q_dim
    assert flops["sdpa_bwd2_given"] == flops["attn_values"] * 2 == 2 * 2 * S * S * c.q_dim
    rotation = 2 * (2 * S * c.q_dim * c.head_dim)
    assert flops["attn_fwd"] == 2 * S * c.dim * 4 * c.q_dim + 2 * 2 * S * S * c.q_dim + rotation


def test_flops_of_gpt2() -> None:
    batch = LARGE["gpt2"]
    c, S, pairs = batch.config, 256, 4 * 64 * 64
    flops = {p.name: p.flops for p in ane_programs(c, 4, 64)}
    assert flops["ffn_fwd"] == 2 * S * c.dim * c.hidden_dim * 2
    assert flops["ffn_bwd_w13"] == flops["ffn_bwd_w2"] == 2 * S * c.dim * c.hidden_dim
    assert flops["attn_fwd"] == 2 * S * c.dim * 4 * c.dim + 2 * 2 * pairs * c.dim  # nothing is rotated


def test_at_most_16_programs_in_any_mode() -> None:
    found = ane_programs(ModelConfig.from_preset("tiny"), 1, 32)
    assert [p.name for p in found] == [*dict.fromkeys(p.name for p in found)]
    for softmax_on, forward, all_of_them in (("ane", 2, 8), ("cpu", 4, 10)):
        assert sum(p.used(training=False, softmax=softmax_on) for p in found) == forward
        assert sum(p.used(training=True, softmax=softmax_on) for p in found) == all_of_them
    assert {p.evaluations for p in found} == {1}


def test_text_depends_on_the_padded_length_only() -> None:
    config = ModelConfig.from_preset("tiny")
    a, b = (ane_programs(config, 2, T) for T in (33, 64))
    assert [(p.mil, p.files, p.input, p.output) for p in a] == [(p.mil, p.files, p.input, p.output) for p in b]


# ---- what cannot be --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shape", "batch", "message"),
    [
        ((64, 64, 4, 4, 16), (1, 40000), "padded sequence length is 40000; no chip takes more than 32768"),
        ((64, 64, 4, 4, 16), (64, 2048), "batch size times padded sequence length is 131072"),
        ((64, 64, 64, 64, 2), (1, 2048), "n_heads times padded sequence length is 131072"),
        ((64, 20000, 4, 4, 16), (1, 32), "twice hidden_dim is 40000; no chip takes more than 32768"),
        ((40000, 64, 4, 4, 16), (1, 32), "dim is 40000"),
        ((64, 64, 16, 1, 16), (1, 4096), "query heads of a key head times padded sequence length is 65536"),
        ((64, 64, 24, 24, 2), (1, 2720), "sdpa_bwd1: the number of output channels"),
        ((64, 16384, 1, 1, 16), (513, 32), "ffn_fwd: the input's width is 65568"),
    ],
)
def test_dimensions_that_no_chip_takes(shape: tuple[int, ...], batch: tuple[int, int], message: str) -> None:
    config = model(*shape)
    if batch == (513, 32):
        ane_programs(config, 512, 32)  # 65536 is taken
    with pytest.raises(UnsupportedError, match=message):
        ane_programs(config, *batch)


def test_bad_requests_are_refused() -> None:
    config, info = ModelConfig.from_preset("tiny"), ffi.new("anellm_ane_program_info *")
    for B, T in ((0, 32), (1, 0), (-1, 32)):
        with pytest.raises(InvalidError, match="must be positive"):
            ane_programs(config, B, T)
    with pytest.raises(UnsupportedError):
        ane_programs(config, 2**62, 2**62)
    c = _c_config(config)
    with pytest.raises(TokenRangeError, match="18 Neural Engine programs"):
        check(lib.anellm_ane_describe(18, c, 1, 32, info))
    for index in (-1, 18):
        with pytest.raises(TokenRangeError, match="18 Neural Engine programs"):
            check(lib.anellm_ane_program_mode(index, ffi.new("int32_t *")))
    with pytest.raises(InvalidError, match="mode is NULL"):
        check(lib.anellm_ane_program_mode(0, ffi.NULL))
    with pytest.raises(InvalidError, match="mode: expected one of dynamic, static, found 'both'"):
        ane_programs(config, 1, 32, mode="both")
    with pytest.raises(TokenRangeError):
        check(lib.anellm_ane_describe(-1, c, 1, 32, info))
    with pytest.raises(InvalidError, match="info"):
        check(lib.anellm_ane_describe(0, c, 1, 32, ffi.NULL))
    with pytest.raises(InvalidError, match="config"):
        check(lib.anellm_ane_describe(0, ffi.NULL, 1, 32, info))
    check(lib.anellm_ane_describe(0, c, 1, 32, info))
    out = ffi.new("char[]", 10)
    with pytest.raises(InvalidError, match=f"bytes is 10; it must be {info.mil_bytes}"):
        check(lib.anellm_ane_describe_text(0, c, 1, 32, out, 10))
    with pytest.raises(TokenRangeError, match="file is 4; attn_fwd has 4"):
        check(lib.anellm_ane_describe_file(0, c, 1, 32, 4, out, 10))
    c.head_dim = 3
    with pytest.raises(InvalidError, match="head_dim"):
        check(lib.anellm_ane_describe(0, c, 1, 32, info))
