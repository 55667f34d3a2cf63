"""Record what coremltools computes for MIL ops over constants, for tests/backend/test_sim_coremltools.py.

Run with `python tests/golden/make_coremltools_goldens.py` where coremltools 9.0 is installed (any system: only its
value inference is used); the test needs only the file that it writes, coremltools/ops.npz. Value inference is NumPy in
fp16, not the Neural Engine's arithmetic, so the test compares within a bound for each op. Ops without value inference
are listed as such. Left out is what coremltools infers against its own description (concat ignores interleave) or
leaves to NumPy (casts out of range); no value lies half way between two whole numbers, where it rounds to even.
"""

# ruff: noqa: E501 (cases stand in long lines)
from __future__ import annotations

import json
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import coremltools as ct
import numpy as np
from coremltools.converters.mil.mil import Builder, Function

HALF = np.float16
RNG = np.random.default_rng(20)


def draw(shape: tuple[int, ...], scale: float = 1.0) -> np.ndarray:
    """Draw normal fp16 numbers."""
    return (RNG.standard_normal(shape) * scale).astype(HALF)


def positive(shape: tuple[int, ...]) -> np.ndarray:
    """Draw fp16 numbers of at least 0.1."""
    return (np.abs(RNG.standard_normal(shape)) + 0.1).astype(HALF)


INPUTS: dict[str, np.ndarray] = {
    "a": draw((1, 4, 2, 32)), "b": draw((1, 4, 2, 32)), "row": draw((1, 1, 1, 32)), "channel": positive((1, 4, 1, 1)),
    "positive": positive((1, 4, 2, 32)), "wide": draw((1, 4, 2, 32), 2.5), "large": draw((1, 4, 2, 32), 60.0),
    "q": draw((1, 2, 16, 32)), "k": draw((1, 2, 16, 32)), "v": draw((1, 2, 16, 32)), "m": draw((1, 2, 32, 16)),
    "rows": draw((2, 5, 48)), "weight": draw((16, 48)), "bias": draw((16,)), "image": draw((1, 4, 2, 32)),
    "kernel": draw((8, 4, 1, 1)), "gamma": draw((32,)), "beta": draw((32,)), "far": draw((1, 4, 2, 32), 20.0),
}  # fmt: skip
INPUTS["choice"] = RNG.integers(0, 2, INPUTS["a"].shape) == 1
INPUTS["whole"] = RNG.integers(-128, 128, INPUTS["a"].shape).astype(np.int8)
for key, steps in (("wide", 2), ("large", 4)):  # no ties for round, nor for quantize with a scale of 0.5
    whole = (INPUTS[key] * steps) % 1 == 0
    INPUTS[key] = np.where(whole, INPUTS[key] + HALF(0.5 / steps), INPUTS[key])
INPUTS["signed"] = np.clip(INPUTS["large"], -127, 127)
INPUTS["unsigned"] = np.abs(INPUTS["large"])
INPUTS["same"] = np.where(RNG.integers(0, 2, INPUTS["a"].shape) == 1, INPUTS["a"], INPUTS["b"])


@dataclass(frozen=True)
class Case:
    """One call: operands by their names in INPUTS (weights: constants of the program), parameters as they are."""

    op: str
    inputs: dict[str, Any]
    parameters: dict[str, Any] = field(default_factory=dict)
    weights: dict[str, str] = field(default_factory=dict)


BINARY = ("add", "sub", "mul", "real_div", "maximum", "minimum", "floor_div")
COMPARE = ("greater", "greater_equal", "less", "less_equal", "equal", "not_equal")
UNARY = ("abs", "sign", "square", "ceil", "floor", "round", "relu", "relu6", "sigmoid", "tanh", "silu", "exp", "exp2", "erf",
         "softplus", "softsign", "atan", "sin", "cos", "identity")  # fmt: skip
REDUCE = ("reduce_sum", "reduce_mean", "reduce_max", "reduce_min", "reduce_l1_norm", "reduce_l2_norm", "reduce_log_sum_exp",
          "reduce_sum_square")  # fmt: skip
FOUR = [0, 0, 0, 0]

CASES = [
    *(Case(op, {"x": "a", "y": y}) for op in BINARY for y in ("positive", "row", "channel") if (op, y) != ("real_div", "row")),
    *(Case("pow", {"x": "positive"}, {"y": y}) for y in (-0.5, 0.5, 2.0, 3.0)),
    *(Case(op, {"x": "a", "y": "same"}) for op in COMPARE),
    *(Case(op, {"x": "wide"}) for op in UNARY),
    Case("sigmoid", {"x": "far"}),
    Case("tanh", {"x": "far"}),
    Case("sqrt", {"x": "positive"}),
    *(Case(op, {"x": "positive"}, {"epsilon": e}) for op in ("rsqrt", "log", "inverse") for e in (0.0009765625, 0.25)),
    *(Case("gelu", {"x": "wide"}, {"mode": m}) for m in ("EXACT", "TANH_APPROXIMATION", "SIGMOID_APPROXIMATION")),
    Case("clip", {"x": "wide"}, {"alpha": -0.5, "beta": 1.5}),
    Case("leaky_relu", {"x": "wide"}, {"alpha": 0.25}),
    *(Case(op, {"x": "a"}, {"axes": axes, "keep_dims": keep}) for op in REDUCE for axes, keep in (([1], True), ([-1], False), ([1, 2], True))),
    *(Case("softmax", {"x": "wide"}, {"axis": axis}) for axis in (-1, 1)),
    Case("layer_norm", {"x": "a"}, {"axes": [-1], "epsilon": 0.0009765625}, {"gamma": "gamma", "beta": "beta"}),
    Case("layer_norm", {"x": "a"}, {"axes": [-1], "epsilon": 0.25}),
    Case("matmul", {"x": "q", "y": "m"}, {"transpose_x": False, "transpose_y": False}),
    Case("matmul", {"x": "q", "y": "k"}, {"transpose_x": False, "transpose_y": True}),
    Case("matmul", {"x": "q", "y": "k"}, {"transpose_x": True, "transpose_y": False}),
    Case("linear", {"x": "rows"}, {}, {"weight": "weight", "bias": "bias"}),
    Case("conv", {"x": "image"}, {"strides": [1, 1], "pad_type": "valid", "pad": FOUR, "dilations": [1, 1], "groups": 1}, {"weight": "kernel"}),
    Case("scaled_dot_product_attention", {"query": "q", "key": "k", "value": "v"}),
    Case("reshape", {"x": "a"}, {"shape": [1, 2, -1, 16]}),
    Case("transpose", {"x": "a"}, {"perm": [0, 3, 1, 2]}),
    Case("expand_dims", {"x": "a"}, {"axes": [2]}),
    Case("squeeze", {"x": "a"}, {"axes": [0]}),
    Case("slice_by_size", {"x": "a"}, {"begin": [0, 1, 0, 8], "size": [1, 2, -1, 16]}),
    Case("slice_by_index", {"x": "a"}, {"begin": [0, 1, 0, 30], "end": [1, 4, 2, 2], "stride": [1, 2, 1, -3]}),
    Case("slice_by_index", {"x": "a"}, {"begin": FOUR, "end": [1, 2, 0, 7], "begin_mask": [True, False, True, False],
                                        "end_mask": [True, False, True, True], "squeeze_mask": [False, False, False, False]}),
    Case("split", {"x": "a"}, {"num_splits": 2, "axis": 1}),
    Case("concat", {"values": ["a", "b"]}, {"axis": 2, "interleave": False}),
    Case("stack", {"values": ["a", "b"]}, {"axis": 2}),
    Case("tile", {"x": "a"}, {"reps": [1, 2, 1, 3]}),
    Case("pad", {"x": "a"}, {"pad": [1, 2, 3, 0], "mode": "constant", "constant_val": 2.5}),
    *(Case("cast", {"x": x}, {"dtype": kind}) for x, kind in (("signed", "int8"), ("unsigned", "uint8"), ("large", "int16"),
                                                              ("choice", "fp16"), ("large", "bool"), ("large", "fp32"))),
    Case("quantize", {"input": "large"}, {"scale": 0.5, "output_dtype": "int8"}),
    Case("dequantize", {"input": "whole"}, {"scale": 0.125}),
    Case("select", {"cond": "choice", "a": "a", "b": "b"}),
    Case("logical_not", {"x": "choice"}),
]  # fmt: skip


def evaluate(case: Case) -> list[np.ndarray] | None:
    """Return the values that coremltools infers, or None."""
    arguments: dict[str, Any] = {
        name: tuple(INPUTS[k] for k in key) if isinstance(key, list) else INPUTS[key]
        for name, key in (case.inputs | case.weights).items()
    }
    for name, value in case.parameters.items():
        arguments[name] = HALF(value) if isinstance(value, float) else value
    out = getattr(Builder, case.op)(**arguments)
    values = [v.val for v in (out if isinstance(out, (list, tuple)) else [out])]
    if values[0] is None and hasattr(out, "op") and hasattr(out.op, "materialized_val_inference"):
        values = [out.op.materialized_val_inference()]
    return None if any(v is None for v in values) else [np.asarray(v) for v in values]


def main() -> None:
    """Write ops.npz into the folder given, or the one beside this file."""
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent / "coremltools"
    arrays: dict[str, np.ndarray] = {}
    cases, without = [], set()
    with Function({}, opset_version=ct.target.iOS18):
        for case in CASES:
            values = evaluate(case)
            if values is None:
                without.add(case.op)
                continue
            for i, value in enumerate(values):
                arrays[f"out/{len(cases)}/{i}"] = value
            cases.append({"op": case.op, "inputs": case.inputs, "parameters": case.parameters, "weights": case.weights,
                          "outputs": len(values)})  # fmt: skip
    for case in cases:
        for key in (case["inputs"] | case["weights"]).values():
            arrays |= {f"in/{k}": INPUTS[k] for k in (key if isinstance(key, list) else [key])}
    about = {
        "made_with": f"coremltools {ct.__version__}, opset iOS18, NumPy {np.__version__}",
        "without_value_inference": sorted(without),
        "cases": cases,
    }
    folder.mkdir(exist_ok=True)
    np.savez_compressed(folder / "ops.npz", about=np.array(json.dumps(about)), **arrays)
    print(f"{len(cases)} cases of {len({c['op'] for c in cases})} ops; without value inference: {sorted(without)}")


if __name__ == "__main__":
    main()
