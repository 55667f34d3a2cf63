"""Each op of the simulator against float64 NumPy; test_sim_coremltools.py has the same for coremltools."""

# ruff: noqa: E501 (programs stand in long lines)
from __future__ import annotations

import re
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from milprograms import blob, files, ints, program, scalar, tensor, weight

from anellm.errors import CompileError
from anellm.sim import Simulator, op_table

HALF = np.float16
_random = np.random.default_rng()


@pytest.fixture(autouse=True)
def _seed(request: pytest.FixtureRequest) -> None:
    """Give each test numbers of its own, whatever ran before it."""
    global _random
    _random = np.random.default_rng(zlib.crc32(request.node.name.encode()))


def draw(shape: tuple[int, ...], scale: float = 1.0) -> np.ndarray:
    return (_random.standard_normal(shape) * scale).astype(HALF)


def bools(text: str) -> str:
    return "true" if text else "false"


def evaluate(op: str, call: str, inputs: dict[str, np.ndarray], shape: tuple[int, ...], constants: str = "",
             weights: dict[str, bytes] | None = None, chip: str = "m4", dtype: str = "fp16") -> np.ndarray:  # fmt: skip
    """Return y = op(call), behind an abs and before an add with 0, so that no program is of one op alone."""
    parameters = ", ".join(f"{tensor(v.shape)} {k}" for k, v in inputs.items())
    if dtype == "fp16":
        body = f"{constants}\n{tensor(shape)} y0 = {op}({call});\n{scalar('zero', 'fp16', '0.0')}{tensor(shape)} y = add(x = y0, y = zero);"
    else:
        body = (f"{constants}\n{tensor(shape, dtype)} y0 = {op}({call});\n{scalar('dt', 'string', chr(34) + 'fp16' + chr(34))}"
                f"{tensor(shape)} y = cast(x = y0, dtype = dt);")  # fmt: skip
    simulator = Simulator(chip, rows="any")
    return simulator.compile(program(parameters, body, "y"), weights).run(inputs)["y"].astype(np.float64)


def wide(array: np.ndarray) -> np.ndarray:
    return array.astype(np.float64)


BINARY: dict[str, Callable[..., Any]] = {
    "add": np.add, "sub": np.subtract, "mul": np.multiply, "real_div": np.divide, "maximum": np.maximum,
    "minimum": np.minimum, "floor_div": lambda a, b: np.floor(a / b),
}  # fmt: skip
SHAPES = [
    ((1, 8, 1, 32), (1, 8, 1, 32)),
    ((2, 8, 4, 32), (1, 8, 1, 1)),
    ((1, 8, 1, 32), (1, 1, 1, 32)),
    ((1, 1, 4, 1), (2, 3, 1, 32)),
    ((32,), (2, 4, 32)),
    ((1, 1, 1, 1), (1, 5, 1, 32)),
]


@pytest.mark.parametrize("op", BINARY)
@pytest.mark.parametrize("shapes", SHAPES)
def test_binary(op: str, shapes: tuple[tuple[int, ...], tuple[int, ...]]) -> None:
    a, b = draw(shapes[0]), draw(shapes[1])
    b = np.where(np.abs(b) < 0.1, HALF(0.5), b)
    want = BINARY[op](wide(a), wide(b))
    got = evaluate(op, "x = a, y = b", {"a": a, "b": b}, want.shape)
    np.testing.assert_allclose(got, want, rtol=2**-11, atol=2**-24)


@pytest.mark.parametrize("exponent", [-0.5, 0.5, 2.0, 3.0, -1.0])
def test_pow(exponent: float) -> None:
    x = np.abs(draw((1, 8, 1, 32))) + HALF(0.1)
    got = evaluate("pow", "x = x, y = e", {"x": x}, x.shape, scalar("e", "fp16", str(exponent)))
    np.testing.assert_allclose(got, wide(x) ** exponent, rtol=2**-11)  # IM: 4e-4, which is half an ulp


UNARY: dict[str, tuple[Callable[..., Any], float]] = {
    "abs": (np.abs, 0), "sign": (np.sign, 0), "square": (np.square, 2**-11), "sqrt": (lambda x: np.sqrt(np.maximum(x, 0)), 1e-3),
    "ceil": (np.ceil, 0), "floor": (np.floor, 0), "round": (lambda x: np.copysign(np.floor(np.abs(x) + 0.5), x), 0),
    "relu": (lambda x: np.maximum(x, 0), 0), "relu6": (lambda x: np.clip(x, 0, 6), 0), "sigmoid": (lambda x: 1 / (1 + np.exp(-x)), 4e-3),
    "tanh": (np.tanh, 2e-3), "silu": (lambda x: x / (1 + np.exp(-x)), 1.6e-2), "exp": (np.exp, 2e-2), "exp2": (np.exp2, 2e-2),
    "softplus": (lambda x: np.log1p(np.exp(x)), 1e-2), "softsign": (lambda x: x / (1 + np.abs(x)), 1e-3), "atan": (np.arctan, 1e-3),
    "sin": (np.sin, 1e-3), "cos": (np.cos, 1e-3), "erf": (np.vectorize(__import__("math").erf), 5e-3),
}  # fmt: skip


@pytest.mark.parametrize("op", UNARY)
@pytest.mark.parametrize("n", [32, 1024])
def test_unary(op: str, n: int) -> None:
    """Small tensors are computed one by one, large ones through a table of all results."""
    function, tolerance = UNARY[op]
    x = draw((1, 16, 1, n), 2.0)
    got = evaluate(op, "x = x", {"x": x}, x.shape)
    want = function(wide(x))
    np.testing.assert_allclose(got, want, atol=tolerance, rtol=1e-2 if op.startswith("exp") else 2**-10)
    small = evaluate(op, "x = x", {"x": x[:, :1, :, :32].copy()}, (1, 1, 1, 32))
    np.testing.assert_array_equal(small, got[:, :1, :, :32])


@pytest.mark.parametrize(
    ("op", "function"), [("rsqrt", lambda x: x**-0.5), ("log", np.log), ("inverse", lambda x: 1 / x)]
)
def test_unary_with_epsilon(op: str, function: Callable[..., Any]) -> None:
    x = np.abs(draw((1, 8, 1, 32))) + HALF(0.05)
    got = evaluate(op, "x = x, epsilon = ep", {"x": x}, x.shape, scalar("ep", "fp16", "0.25"))
    np.testing.assert_allclose(got, function(wide(x) + 0.25), rtol=2.5e-3, atol=1e-3)


def test_clip_gelu_leaky_relu() -> None:
    x = draw((1, 8, 1, 32), 2)
    got = evaluate(
        "clip",
        "x = x, alpha = lo, beta = hi",
        {"x": x},
        x.shape,
        scalar("lo", "fp16", "-0.5") + scalar("hi", "fp16", "1.5"),
    )
    np.testing.assert_array_equal(got, np.clip(wide(x), -0.5, 1.5))
    got = evaluate("gelu", "x = x, mode = md", {"x": x}, x.shape, scalar("md", "string", '"TANH_APPROXIMATION"'))
    erf = np.vectorize(__import__("math").erf)
    np.testing.assert_allclose(got, 0.5 * wide(x) * (1 + erf(wide(x) / 2**0.5)), atol=6.5e-3)
    got = evaluate("leaky_relu", "x = x, alpha = al", {"x": x}, x.shape, scalar("al", "fp16", "0.25"))
    np.testing.assert_allclose(got, np.where(x >= 0, wide(x), wide(x) / 4), rtol=2**-11)


@pytest.mark.parametrize("op", ["greater", "greater_equal", "less", "less_equal", "equal", "not_equal"])
def test_compare_and_select(op: str) -> None:
    a, b = draw((1, 8, 1, 32)), draw((1, 8, 1, 32))
    b[0, 0] = a[0, 0]
    want = getattr(np, op)(a, b)
    got = evaluate(op, "x = a, y = b", {"a": a, "b": b}, a.shape, dtype="bool")
    np.testing.assert_array_equal(got, want)
    kind = tensor(a.shape)
    text = program(f"{kind} a, {kind} b", f"{tensor(a.shape, 'bool')} c = {op}(x = a, y = b);{tensor(a.shape, 'bool')} n = logical_not(x = c);"
                   f"{kind} y = select(cond = n, a = a, b = b);", "y")  # fmt: skip
    np.testing.assert_array_equal(Simulator("m4").compile(text).run({"a": a, "b": b})["y"], np.where(~want, a, b))


def nearest(x: np.ndarray) -> np.ndarray:
    """Round normal numbers to fp16, ties away from zero (Q45)."""
    fraction, exponent = np.frexp(x)
    return np.ldexp(np.copysign(np.floor(np.abs(fraction) * 2.0**11 + 0.5), x), exponent - 11)


def running(x: np.ndarray) -> np.ndarray:
    """Return the sum of the last axis in order, rounded after each addition (Q47)."""
    total = np.zeros(x.shape[:-1])
    for i in range(x.shape[-1]):
        total = nearest(total + x[..., i])
    return total


TABLES = ("reduce_l2_norm", "reduce_log_sum_exp")  # sqrt, exp and log have errors of their own

# op -> its meaning; what the engine makes of it, but for the last rounding
REDUCE: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {
    "reduce_sum": (np.sum, running),
    "reduce_mean": (np.mean, lambda x: running(x) / x.shape[-1]),
    "reduce_max": (np.max, lambda x: x.max(-1)),
    "reduce_min": (np.min, lambda x: x.min(-1)),
    "reduce_l1_norm": (lambda x, **k: np.abs(x).sum(**k), lambda x: running(np.abs(x))),
    "reduce_l2_norm": (lambda x, **k: np.sqrt((x * x).sum(**k)), lambda x: np.sqrt(running(nearest(x * x)))),
    "reduce_sum_square": (lambda x, **k: (x * x).sum(**k), lambda x: running(nearest(x * x))),
    "reduce_log_sum_exp": (lambda x, **k: np.log(np.exp(x).sum(**k)), lambda x: np.log(np.exp(x).sum(-1))),
}


@pytest.mark.parametrize("op", REDUCE)
@pytest.mark.parametrize("axes", [(1,), (-1,), (1, 3), (0, 2), (2,)])
@pytest.mark.parametrize("keep", [True, False])
def test_reduce(op: str, axes: tuple[int, ...], keep: bool) -> None:
    x = draw((2, 12, 3, 32))
    meaning, rounded = REDUCE[op]
    true = meaning(wide(x), axis=axes, keepdims=keep)
    constants = ints("ax", list(axes)) + scalar("kd", "bool", bools(keep))
    got = evaluate(op, "x = x, axes = ax, keep_dims = kd", {"x": x}, true.shape, constants)
    last = np.moveaxis(wide(x), axes, range(-len(axes), 0))
    want = rounded(last.reshape(*last.shape[: -len(axes)], -1)).reshape(true.shape)
    exact = op in ("reduce_max", "reduce_min")
    rtol, atol = (0.0, 0.0) if exact else (2**-9, 2**-10) if op in TABLES else (2**-11, 2**-25)
    np.testing.assert_allclose(got, want, rtol, atol)
    terms = x.size // true.size  # each may add half an ulp of a partial sum, none of which is above that of magnitudes
    bound = terms * 2**-11 * np.abs(wide(x)).sum(axis=axes, keepdims=keep).max()
    assert np.abs(got - true).max() <= (0 if exact else max(bound, 2**-8))


@pytest.mark.parametrize("width", [1, 127, 128, 256, 300])
@pytest.mark.parametrize("n", [2, 3, 40])
def test_softmax_of_columns_is_that_of_rows(n: int, width: int) -> None:
    """Many short rows side by side are computed together; their values are those of one row at a time."""
    x = draw((2, n, 1, width), 3.0)
    x[0, :, 0, 0] = -np.inf  # equal shares
    columns = evaluate("softmax", "x = x, axis = ax", {"x": x}, x.shape, scalar("ax", "int32", "1"))
    moved = np.ascontiguousarray(x.transpose(0, 3, 2, 1))
    rows = evaluate("softmax", "x = x, axis = ax", {"x": moved}, moved.shape, scalar("ax", "int32", "-1"))
    ulp = n > 2  # sums of more than two are added in another order
    np.testing.assert_allclose(columns, rows.transpose(0, 3, 2, 1), rtol=ulp * 2.0**-10, atol=ulp * 2.0**-24)


def test_softmax_and_layer_norm() -> None:
    x = draw((2, 12, 3, 32))
    for axis in (1, 3, -2):
        got = evaluate("softmax", "x = x, axis = ax", {"x": x}, x.shape, scalar("ax", "int32", str(axis)))
        e = np.exp(wide(x))
        np.testing.assert_allclose(got, e / e.sum(axis, keepdims=True), atol=2e-3)
    g, b = draw((32,)), draw((32,))
    constants = ints("ax", [-1]) + scalar("ep", "fp16", "0.001") + weight("g", (32,)) + weight("b", (32,), offset=192)
    got = evaluate(
        "layer_norm",
        "x = x, axes = ax, gamma = g, beta = b, epsilon = ep",
        {"x": x},
        x.shape,
        constants,
        files(blob(g, b)),
    )
    centred = wide(x) - wide(x).mean(-1, keepdims=True)
    want = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-3) * wide(g) + wide(b)
    np.testing.assert_allclose(got, want, atol=4e-3)


def test_views() -> None:
    x = draw((1, 8, 4, 32))
    for op, call, constants, want in (
        ("reshape", "x = x, shape = sh", ints("sh", [1, 4, -1, 16]), x.reshape(1, 4, 16, 16)),
        ("expand_dims", "x = x, axes = ax", ints("ax", [2]), x[:, :, None]),
        ("squeeze", "x = x, axes = ax", ints("ax", [0]), x[0]),
        ("identity", "x = x", "", x),
        ("transpose", "x = x, perm = pm", ints("pm", [0, 3, 1, 2]), x.transpose(0, 3, 1, 2)),
        ("transpose", "x = x, perm = pm", ints("pm", [0, 1, -1, 2]), x.transpose(0, 1, 3, 2)),
        ("tile", "x = x, reps = rp", ints("rp", [1, 2, 1, 3]), np.tile(x, (1, 2, 1, 3))),
        ("slice_by_size", "x = x, begin = bg, size = sz", ints("bg", [0, 2, 1, 8]) + ints("sz", [1, 3, -1, 16]), x[:, 2:5, 1:, 8:24]),
        ("slice_by_index", "x = x, begin = bg, end = en", ints("bg", [0, 1, 0, 4]) + ints("en", [1, 7, 4, 28]), x[:, 1:7, :, 4:28]),
        ("slice_by_index", "x = x, begin = bg, end = en, strides = st", ints("bg", [0, 1, 0, -1]) + ints("en", [1, 8, 4, -17]) + ints("st", [1, 3, 1, -2]),
         x[:, 1:8:3, :, -1:-17:-2]),
        ("slice_by_index", "x = x, begin = bg, end = en, begin_mask = bm, end_mask = em, squeeze_mask = sm",
         ints("bg", [0, 3, 0, 0]) + ints("en", [1, 4, 0, 2])
         + "".join(f"tensor<bool, [4]> {n} = const()[val = tensor<bool, [4]>([{v}])];" for n, v in
                   (("bm", "true, false, true, true"), ("em", "true, false, true, true"), ("sm", "false, true, false, false"))),
         x[:, 3]),
        ("pad", "x = x, pad = pa, mode = md, constant_val = cv", ints("pa", [1, 2, 3, 0]) + scalar("md", "string", '"constant"') + scalar("cv", "fp16", "2.5"),
         np.pad(x, ((0, 0), (0, 0), (1, 2), (3, 0)), constant_values=2.5)),
    ):  # fmt: skip
        got = evaluate(op, call, {"x": x}, want.shape, constants)
        np.testing.assert_array_equal(got, wide(want), err_msg=f"{op} {call}")


def test_concat_stack_split() -> None:
    a, b = draw((1, 4, 2, 32)), draw((1, 4, 2, 32))
    il = scalar("il", "bool", "false")
    for axis in range(4):
        constants = scalar("ax", "int32", str(axis)) + il
        got = evaluate(
            "concat",
            "values = (a, b), axis = ax, interleave = il",
            {"a": a, "b": b},
            np.concatenate([a, b], axis).shape,
            constants,
        )
        np.testing.assert_array_equal(got, np.concatenate([a, b], axis))
    got = evaluate(
        "concat",
        "values = (a, b), axis = ax, interleave = il",
        {"a": a, "b": b},
        (1, 8, 2, 32),
        scalar("ax", "int32", "1") + scalar("il", "bool", "true"),
    )
    np.testing.assert_array_equal(got, np.stack([a, b], 2).reshape(1, 8, 2, 32))
    got = evaluate(
        "stack", "values = (a, b), axis = ax", {"a": a, "b": b}, (1, 4, 2, 2, 32), scalar("ax", "int32", "2")
    )
    np.testing.assert_array_equal(got, np.stack([a, b], 2))
    kind, part = tensor(a.shape), tensor((1, 2, 2, 32))
    text = program(f"{kind} x", f"{scalar('ns', 'int32', '2')}{scalar('ax', 'int32', '1')}\n{part} p, {part} q = split(x = x, num_splits = ns, axis = ax);"
                   f"{part} y = sub(x = p, y = q);", "y")  # fmt: skip
    np.testing.assert_allclose(
        wide(Simulator("m4").compile(text).run({"x": a})["y"]), wide(a[:, :2]) - wide(a[:, 2:]), rtol=2**-11
    )


MATMULS = [((4, 16, 32), (4, 32, 48), False, False), ((1, 3, 32, 16), (1, 3, 32, 48), True, False), ((2, 3, 16, 32), (2, 3, 48, 32), False, True),
           ((1, 1, 32, 17), (1, 1, 48, 32), True, True), ((2, 3, 16, 32), (1, 1, 32, 32), False, False), ((1, 16, 32), (5, 32, 16), False, False)]  # fmt: skip


@pytest.mark.parametrize("case", MATMULS)
@pytest.mark.parametrize("mac", ["q15.16", "wide_fp32"])
def test_matmul(case: Any, mac: str) -> None:
    sx, sy, tx, ty = case
    x, y = draw(sx), draw(sy)
    want = np.matmul(wide(x).swapaxes(-1, -2) if tx else wide(x), wide(y).swapaxes(-1, -2) if ty else wide(y))
    constants = scalar("tx", "bool", bools(tx)) + scalar("ty", "bool", bools(ty))
    text = program(
        f"{tensor(sx)} a, {tensor(sy)} b",
        f"{constants}{tensor(want.shape)} y = matmul(x = a, y = b, transpose_x = tx, transpose_y = ty);",
        "y",
    )
    got = Simulator("m4", rows="any", mac=mac).compile(text).run({"a": x, "b": y})["y"]
    np.testing.assert_allclose(wide(got), want, rtol=2**-11, atol=1e-3)


def test_linear() -> None:
    x, w, b = draw((2, 5, 48)), draw((32, 48)), draw((32,))
    constants = weight("W", w.shape) + weight("B", b.shape, offset=64 + 64 + w.nbytes)
    got = evaluate("linear", "x = x, weight = W, bias = B", {"x": x}, (2, 5, 32), constants, files(blob(w, b)))
    np.testing.assert_allclose(got, wide(x) @ wide(w).T + wide(b), rtol=2**-10, atol=2e-3)


def convolve(
    x: np.ndarray,
    w: np.ndarray,
    stride: tuple[int, int],
    pad: tuple[int, int, int, int],
    dilation: tuple[int, int],
    groups: int,
) -> np.ndarray:
    x = np.pad(wide(x), ((0, 0), (0, 0), pad[:2], pad[2:]))
    kh, kw = w.shape[2:]
    H = (x.shape[2] - (kh - 1) * dilation[0] - 1) // stride[0] + 1
    W = (x.shape[3] - (kw - 1) * dilation[1] - 1) // stride[1] + 1
    out = np.zeros((x.shape[0], w.shape[0], H, W))
    per = w.shape[0] // groups
    for g in range(groups):
        part = x[:, g * w.shape[1] : (g + 1) * w.shape[1]]
        for i in range(kh):
            for j in range(kw):
                top, left = i * dilation[0], j * dilation[1]
                cut = part[
                    :,
                    :,
                    top : top + (H - 1) * stride[0] + 1 : stride[0],
                    left : left + (W - 1) * stride[1] + 1 : stride[1],
                ]
                out[:, g * per : (g + 1) * per] += np.einsum(
                    "nchw,oc->nohw", cut, wide(w)[g * per : (g + 1) * per, :, i, j]
                )
    return out


CONVS = [((1, 16, 1, 32), (8, 16, 1, 1), (1, 1), (0, 0, 0, 0), (1, 1), 1), ((2, 8, 9, 32), (6, 8, 3, 3), (1, 1), (1, 1, 1, 1), (1, 1), 1),
         ((1, 8, 8, 32), (8, 4, 3, 5), (2, 3), (0, 1, 2, 3), (1, 1), 2), ((1, 6, 10, 32), (6, 1, 3, 3), (1, 1), (0, 0, 0, 0), (2, 3), 6),
         ((2, 4, 3, 32), (4, 4, 1, 1), (2, 2), (0, 0, 0, 0), (1, 1), 1)]  # fmt: skip


@pytest.mark.parametrize("case", CONVS)
@pytest.mark.parametrize("runtime", [False, True])
def test_conv(case: Any, runtime: bool) -> None:
    sx, sw, stride, pad, dilation, groups = case
    x, w = draw(sx), draw(sw)
    want = convolve(x, w, stride, pad, dilation, groups)
    constants = (
        ints("st", list(stride))
        + ints("pd", list(pad))
        + ints("dl", list(dilation))
        + scalar("gr", "int32", str(groups))
        + scalar("pt", "string", '"custom"')
    )
    constants += "" if runtime else weight("W", sw)
    inputs = {"x": x, "W": w} if runtime else {"x": x}
    got = evaluate(
        "conv",
        "x = x, weight = W, strides = st, pad_type = pt, pad = pd, dilations = dl, groups = gr",
        inputs,
        want.shape,
        constants,
        files(blob(w)),
    )
    np.testing.assert_allclose(got, want, rtol=2**-10, atol=1e-3)


@pytest.mark.parametrize("kind", ["same", "same_lower", "valid"])
def test_conv_padding_by_name(kind: str) -> None:
    x, w = draw((1, 4, 5, 32)), draw((4, 4, 2, 4))
    pad = {"same": (0, 1, 1, 2), "same_lower": (1, 0, 2, 1), "valid": (0, 0, 0, 0)}[kind]
    want = convolve(x, w, (1, 1), pad, (1, 1), 1)
    got = evaluate(
        "conv",
        "x = x, weight = W, pad_type = pt",
        {"x": x},
        want.shape,
        scalar("pt", "string", f'"{kind}"') + weight("W", w.shape),
        files(blob(w)),
    )
    np.testing.assert_allclose(got, want, rtol=2**-10, atol=1e-3)


def test_casts_and_quantisation() -> None:
    x = (draw((1, 4, 1, 32), 60)).astype(HALF)
    string = lambda name, value: scalar(name, "string", f'"{value}"')  # noqa: E731
    for dtype, low, high in (("int8", -128, 127), ("uint8", 0, 255), ("int16", -32768, 32767)):
        got = evaluate("cast", "x = x, dtype = to", {"x": x}, x.shape, string("to", dtype), dtype=dtype)
        np.testing.assert_array_equal(got, np.clip(np.trunc(wide(x)), low, high))
    got = evaluate("cast", "x = x, dtype = to", {"x": x}, x.shape, string("to", "bool"), dtype="bool")
    np.testing.assert_array_equal(got, x != 0)
    for scale in ("0.5", "0.25"):
        got = evaluate(
            "quantize",
            "input = x, scale = sc, output_dtype = od",
            {"x": x},
            x.shape,
            scalar("sc", "fp16", scale) + string("od", "int8"),
            dtype="int8",
        )
        ratio = wide(x) / float(scale)
        np.testing.assert_array_equal(got, np.clip(np.copysign(np.floor(np.abs(ratio) + 0.5), ratio), -128, 127))
    kind = tensor(x.shape)
    per_channel = (
        "tensor<fp16, [4]> sc = const()[val = tensor<fp16, [4]>([0.5, 1, 2, 4])];"
        + scalar("ax", "int32", "1")
        + string("od", "int8")
    )
    text = program(f"{kind} x", f"{per_channel}{tensor(x.shape, 'int8')} q = quantize(input = x, scale = sc, output_dtype = od, axis = ax);"
                   f"{kind} y = dequantize(input = q, scale = sc, axis = ax);", "y")  # fmt: skip
    scales = np.array([0.5, 1, 2, 4]).reshape(1, 4, 1, 1)
    ratio = wide(x) / scales
    want = np.clip(np.copysign(np.floor(np.abs(ratio) + 0.5), ratio), -128, 127) * scales
    np.testing.assert_array_equal(Simulator("m4").compile(text).run({"x": x})["y"], want)


def constexpr(call: str, dense: np.ndarray, data: bytes) -> None:
    x = np.ones((1, dense.shape[1], 1, 32), HALF)
    shape = (1, dense.shape[0], 1, 32)
    body = f"{tensor(dense.shape)} W = {call}\n{tensor(shape)} y = conv(x = x, weight = W);"
    got = Simulator("m4").compile(program(f"{tensor(x.shape)} x", body, "y"), files(data)).run({"x": x})["y"]
    np.testing.assert_allclose(wide(got[0, :, 0, 0]), wide(dense).sum((1, 2, 3)), rtol=2**-10, atol=1e-3)


def ref(kind: str, offset: int) -> str:
    return f'{kind}(BLOBFILE(path = string("@model_path/weights/w.bin"), offset = uint64({offset})))'


def test_constexpr() -> None:
    q = _random.integers(-128, 128, (8, 16, 1, 1)).astype(np.int8)
    scale = (np.abs(draw((8,))) / 16).astype(HALF)
    kind = tensor(q.shape, "int8")
    dense = (wide(q) * wide(scale).reshape(8, 1, 1, 1)).astype(HALF)
    constexpr(f"constexpr_affine_dequantize()[axis = int32(0), quantized_data = {ref(kind, 64)}, scale = {ref('tensor<fp16, [8]>', 256)}, zero_point = int8(0), name = string(\"W\")];",
              dense, blob(q, scale))  # fmt: skip
    indices = _random.integers(0, 16, (8, 16, 1, 1)).astype(np.uint8)
    flat = indices.reshape(-1)
    packed = (flat[::2] | flat[1::2] << 4).astype(np.uint8)
    lut = draw((16,))
    constexpr(f"constexpr_lut_to_dense()[indices = {ref(tensor(indices.shape, 'uint4'), 64)}, lut = {ref('tensor<fp16, [1, 1, 1, 1, 16, 1]>', 192).replace('1, 1, 1, 1, 16, 1', '1, 1, 1, 16, 1')}, name = string(\"W\")];",
              lut[indices], blob(("uint4", packed.tobytes()), lut))  # fmt: skip
    mask = _random.integers(0, 2, (8, 16, 1, 1))
    values = draw((int(mask.sum()),))
    dense = np.zeros(mask.shape, HALF)
    dense[mask == 1] = values
    bits = np.packbits(mask.reshape(-1).astype(np.uint8), bitorder="little").tobytes()
    second = 64 + 64 + -(-values.nbytes // 64) * 64
    constexpr(f"constexpr_sparse_to_dense()[nonzero_data = {ref(tensor(values.shape), 64)}, mask = {ref(tensor(mask.shape, 'uint1'), second)}, name = string(\"W\")];",
              dense, blob(values, ("uint1", bits)))  # fmt: skip
    blocks = (np.abs(draw((8, 4, 1, 1))) / 16).astype(HALF)
    constexpr(f'constexpr_blockwise_shift_scale()[data = {ref(kind, 64)}, scale = {ref(tensor(blocks.shape), 256)}, name = string("W")];',
              (wide(q) * np.repeat(wide(blocks), 4, 1)).astype(HALF), blob(q, blocks))  # fmt: skip


def test_fp32_and_integer_ports() -> None:
    shape = (1, 2, 1, 16)
    text = program(f"{tensor(shape, 'fp32')} a, {tensor(shape, 'int8')} b, {tensor(shape, 'bool')} c",
                   f"{scalar('h', 'string', chr(34) + 'fp32' + chr(34))}{tensor(shape, 'fp32')} d = cast(x = b, dtype = h);{tensor(shape, 'fp32')} e = add(x = a, y = d);"
                   f"{tensor(shape, 'fp32')} y = select(cond = c, a = e, b = a);", "y")  # fmt: skip
    a = (np.arange(32).reshape(shape) / 3).astype(np.float32)
    b, c = (np.arange(32).reshape(shape) - 16).astype(np.int8), np.arange(32).reshape(shape) % 2 == 0
    y = Simulator("m4").compile(text).run({"a": a, "b": b, "c": c})["y"]
    assert y.dtype == np.float32
    np.testing.assert_allclose(y, np.where(c, a + b, a), atol=2e-2)
    np.testing.assert_array_equal(y, y.astype(HALF).astype(np.float32))  # nothing wider than fp16 is inside


def test_fp16_add_refuses_fp32() -> None:
    kind = tensor((1, 1, 1, 32))
    with pytest.raises(CompileError, match="add of fp16 and fp32"):
        Simulator("m4").compile(
            program(f"{kind} a, {tensor((1, 1, 1, 32), 'fp32')} b", f"{kind} y = add(x = a, y = b);", "y")
        )


def test_programs_do_not_see_each_others_values() -> None:
    """What programs compute shares memory on a device: each fills what it reads, whatever stood there."""

    def text(n: int, width: int) -> str:
        kind = tensor((1, n, 1, width))
        body = f"{kind} a = add(x = x, y = x);\n{kind} r = reshape(shape = s, x = a);\n{kind} y = mul(x = r, y = a);"
        return program(f"{kind} x", ints("s", [1, n, 1, width]) + "\n" + body, "y")

    shapes = [(8, 32), (64, 96), (3, 64), (64, 96), (128, 160)]
    together = Simulator("m4", numerics="exact")
    programs = [together.compile(text(*shape)) for shape in shapes]
    given = [draw((1, n, 1, width)) for n, width in shapes]
    for order in (range(5), (4, 0, 3, 1, 2)):
        for i in order:
            found = programs[i].run({"x": given[i]})["y"]
            np.testing.assert_array_equal(found, Simulator("m4").compile(text(*shapes[i])).run({"x": given[i]})["y"])
            np.testing.assert_allclose(found, 4.0 * given[i].astype(np.float64) ** 2, rtol=2e-3, atol=1e-6)


def test_every_computed_op_is_tested() -> None:
    """What the table says is computed stands in a program above, by its name alone or behind an equals sign."""
    own, _, _ = Path(__file__).read_text(encoding="utf-8").rpartition("\ndef ")
    named = set(re.findall(r""""(\w+)"|["'](constexpr_\w+)\(|= (\w+)\(""", own))
    elsewhere = {"scaled_dot_product_attention"}  # test_sim_rules.py
    computed = {entry["op"] for entry in op_table() if entry["computed"]}
    assert computed - {name for groups in named for name in groups} - elsewhere == set()
    assert all(entry["evidence"] for entry in op_table())
