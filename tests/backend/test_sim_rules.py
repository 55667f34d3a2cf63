"""The rules of docs/simulator.md, one after the other: a program that breaks each, and what comes of it."""

# ruff: noqa: E501 (programs stand in long lines)
from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
from milprograms import BUILD_INFO, blob, conv1x1, files, ints, program, scalar, tensor, unary, weight

from anellm.errors import AnellmError, CompileError, EvalError
from anellm.sim import Simulator

HALF = np.float16
X = tensor((1, 64, 1, 32))
REFUSED, INVALID, FOUND, FINE = "CompilationFailure", "InvalidMILProgram", "found", "fine"


@dataclass(frozen=True)
class Case:
    """One program and what it must lead to."""

    rule: str
    text: str
    want: str
    chip: str = "m4"
    options: dict[str, Any] = field(default_factory=dict)
    weights: dict[str, bytes] = field(default_factory=dict)
    note: str = ""


def body(statements: str, results: str = "y", parameters: str = f"{X} x") -> str:
    return program(parameters, statements, results)


def conv_body(
    x: tuple[int, ...], w: tuple[int, ...], out: tuple[int, ...], *, groups: int = 1, runtime: bool = False
) -> str:
    parameters = f"{tensor(x)} x" + (f", {tensor(w)} W" if runtime else "")
    constants = "" if runtime else f"{tensor(w)} W = const()[val = {tensor(w)}(1)];"
    return program(
        parameters,
        f"{constants}{scalar('pt', 'string', chr(34) + 'valid' + chr(34))}{scalar('gr', 'int32', str(groups))}\n"
        f"{tensor(out)} y = conv(x = x, weight = W, pad_type = pt, groups = gr);",
        "y",
    )


def matmul(K: int, rank: int = 4) -> str:
    lead = (1,) * (rank - 2)
    a, b, c = (*lead, 16, K), (*lead, K, 32), (*lead, 16, 32)
    return program(f"{tensor(a)} a, {tensor(b)} b", f"{tensor(c)} y = matmul(x = a, y = b);", "y")


def concat(text: str = "values = (x, x)") -> str:
    return body(f"{scalar('ax', 'int32', '1')}{scalar('il', 'bool', 'false')}\n"
                f"{tensor((1, 128, 1, 32))} y = concat({text}, axis = ax, interleave = il);")  # fmt: skip


def rope() -> str:
    """Rotary embedding by reshape, slice and concat along the width."""
    half = tensor((64, 16, 1))
    return body(
        f"{ints('sh', [64, 16, 2])}{ints('b0', [0, 0, 0])}{ints('b1', [0, 0, 1])}{ints('sz', [64, 16, 1])}"
        f"{ints('back', [1, 64, 1, 32])}{scalar('ax', 'int32', '-1')}{scalar('il', 'bool', 'false')}\n"
        f"{tensor((64, 16, 2))} p = reshape(x = x, shape = sh);\n"
        f"{half} p0 = slice_by_size(x = p, begin = b0, size = sz);\n{half} p1 = slice_by_size(x = p, begin = b1, size = sz);\n"
        f"{tensor((64, 16, 2))} q = concat(values = (p1, p0), axis = ax, interleave = il);\n"
        f"{X} y = reshape(x = q, shape = back);"
    )


def sdpa(L: int, mask: bool = False) -> str:
    kind = tensor((1, 1, L, 32))
    m = tensor((1, 1, L, L))
    parameters = f"{kind} q, {kind} k, {kind} v" + (f", {m} m" if mask else "")
    extra = ", attn_mask = m" if mask else ""
    return program(parameters, f"{kind} y = scaled_dot_product_attention(query = q, key = k, value = v{extra});", "y")


def reduce_then(statement: str) -> str:
    kind = tensor((1, 1, 1, 32))
    return body(f"{ints('ax', [1])}{scalar('kd', 'bool', 'true')}{kind} r = reduce_sum(x = x, axes = ax, keep_dims = kd);\n{statement}\n"
                f"{X} y = mul(x = x, y = s);")  # fmt: skip


def layer_norm(rows: int, width: int) -> str:
    kind = tensor((1, 1, rows, width))
    return program(
        f"{kind} x",
        f"{ints('ax', [-1])}{scalar('ep', 'fp16', '0.001')}\n{kind} y = layer_norm(x = x, axes = ax, epsilon = ep);",
        "y",
    )


ONE = np.ones((1, 64, 1, 1), HALF)
NOT_ALPHABETICAL = program(f"{X} b, {X} a", f"{X} y = sub(x = b, y = a);", "y")
BAD_OFFSET = conv1x1(64, 1).replace("uint64(64)", "uint64(128)")
TILE = body(
    f"{ints('rp', [1, 2, 1, 1])}{tensor((1, 128, 1, 32))} t = tile(x = x, reps = rp);{tensor((1, 128, 1, 32))} y = abs(x = t);"
)
BIAS = conv1x1(64, 1, extra=", bias = B", constants="tensor<fp16, [1]> B = const()[val = tensor<fp16, [1]>([0.5])];")
INPUTS = [f"i{n}" for n in range(9)]
NINE = program(", ".join(f"{X} {n}" for n in INPUTS), "\n".join(
    f"{X} {'y' if n == 8 else f't{n}'} = add(x = {'i0' if n == 1 else f't{n - 1}'}, y = i{n});" for n in range(1, 9)), "y")  # fmt: skip

CASES = [
    Case("Q01", concat(), REFUSED, options={"strict": True}),
    Case("Q01", concat(), FINE),
    Case("Q02", unary("gelu"), REFUSED),
    Case("Q03", BIAS, REFUSED, options={"strict": True}, weights=files(blob(ONE))),
    Case("Q03", BIAS, FINE, weights=files(blob(ONE))),
    Case("Q04", conv_body((1, 32000, 1, 32), (1, 32000, 1, 1), (1, 1, 1, 32)), REFUSED, chip="m4"),
    Case("Q04", conv_body((1, 32000, 1, 32), (1, 32000, 1, 1), (1, 1, 1, 32)), FINE, chip="m5"),
    Case("Q04", conv_body((1, 64, 1, 32), (32000, 64, 1, 1), (1, 32000, 1, 32)), FINE, chip="m4", note="as outputs"),
    Case("Q05", matmul(64).replace("y = b)", "y = b, transpose_x = false)"), INVALID, options={"strict": True}),
    Case("Q05", matmul(64).replace("y = b)", "y = b, transpose_x = false)"), FINE),
    Case("Q06", body(f"{X} y = abs(x = nobody);"), INVALID),
    Case("Q06", body(f"{X} y = abs(x = x);{X} y = abs(x = x);"), INVALID),
    Case("Q06", body(f"{X} y = abs(x = x);", "z"), INVALID),
    Case("Q08", body(f"{X} b = abs(x = x);{X} a = relu(x = x);", "b, a"), FOUND),
    Case("Q08", body(f"{X} b = abs(x = x);{X} a = relu(x = x);", "a, b"), FINE),
    Case("Q11", NOT_ALPHABETICAL, FOUND),
    Case("Q12", BAD_OFFSET, FOUND, weights=files(blob(ONE))),
    Case("Q12", BAD_OFFSET, REFUSED, options={"strict": True}, weights=files(blob(ONE))),
    Case("Q12", BAD_OFFSET, REFUSED, chip="m1", weights=files(blob(ONE))),
    Case("Q12", BAD_OFFSET, FOUND, chip="m1", options={"lenient_blobs": True}, weights=files(blob(ONE))),
    Case("Q21", sdpa(64, mask=True), FOUND),
    Case("Q21", sdpa(64), FINE),
    Case("Q22", sdpa(512), FOUND),
    Case("Q22", sdpa(496), FINE),
    Case("Q23", unary("rsqrt"), REFUSED),
    Case("Q23", unary("log", extra=", epsilon = ep", constants=scalar("ep", "fp16", "0.0")), REFUSED),
    Case("Q23", unary("inverse", extra=", epsilon = ep", constants=scalar("ep", "fp16", "0.001")), FINE),
    Case("Q24", reduce_then(f"{tensor((1, 1, 1, 32))} s = sqrt(x = r);"), FOUND),
    Case("Q24", reduce_then(f"{tensor((1, 1, 1, 32))} s = sqrt(x = r);"), REFUSED, options={"strict": True}),
    Case("Q25", TILE, FOUND, chip="m3"),
    Case("Q25", TILE, FINE, chip="m4"),
    *(Case("Q26", unary(op), REFUSED) for op in ("gather", "cumsum", "one_hot", "scatter", "reduce_argmax", "logical_and", "tan")),
    Case("Q26", unary("frobnicate"), INVALID),
    Case("Q26", unary("sin"), REFUSED, chip="m1"),
    Case("Q26", unary("sin"), FINE, chip="m4"),
    Case("Q26", unary("topk"), REFUSED),
    *(Case("Q27", unary("abs").replace("fp16", kind), REFUSED) for kind in ("int32", "bf16", "uint4", "int4")),
    Case("Q27", body('string dt = const()[val = string("int32")]; tensor<int32, [1, 64, 1, 32]> y = cast(x = x, dtype = dt);'), REFUSED),
    Case("Q28", body('string dt = const()[val = string("int8")]; tensor<int8, [1, 64, 1, 32]> y = cast(x = x, dtype = dt);'), REFUSED),
    Case("Q29", unary("abs").replace("[1, 1, 1, 32]", "[1, 1, 1, 1, 1, 32]"), REFUSED),
    Case("Q29", unary("abs").replace("[1, 1, 1, 32]", "[1, 0, 1, 32]"), REFUSED),
    Case("Q30", unary("abs", 16400), REFUSED, chip="m1"),
    Case("Q30", unary("abs", 16400), FINE, chip="m4"),
    Case("Q30", unary("abs", 65552), REFUSED, chip="m4"),
    Case("Q30", conv_body((1, 16, 1, 32), (65552, 16, 1, 1), (1, 65552, 1, 32)), REFUSED, note="channels"),
    Case("Q31", matmul(16400), FINE),
    Case("Q31", matmul(40000), REFUSED),
    Case("Q32", conv_body((1, 4, 1, 48), (4, 4, 1, 17), (1, 4, 1, 32)), REFUSED),
    Case("Q32", conv_body((1, 4, 1, 46), (4, 4, 1, 15), (1, 4, 1, 32)), REFUSED, chip="m1", options={"rows": "any"}),
    Case("Q32", conv_body((1, 4, 1, 46), (4, 4, 1, 15), (1, 4, 1, 32)), FINE, options={"rows": "any"}),
    Case("Q32", conv_body((1, 4, 64, 32), (4, 4, 33, 1), (1, 4, 32, 32)), REFUSED),
    Case("Q32", conv_body((1, 6, 1, 32), (4, 2, 1, 1), (1, 4, 1, 32), groups=4), REFUSED),
    Case("Q33", unary("abs", 20), REFUSED),
    Case("Q33", unary("abs", 20), FOUND, options={"rows": "truncate"}),
    Case("Q33", unary("abs", 20), FINE, options={"rows": "any"}),
    Case("Q36", program(f"{X} a, {tensor((1, 1, 32, 128))} b", f"{scalar('ax', 'int32', '1')}{scalar('il', 'bool', 'false')}"
         f"{tensor((1, 128, 1, 32))} c = concat(values = (a, a), axis = ax, interleave = il);{ints('sh', [1, 1, 128, 32])}"
         f"{tensor((1, 1, 128, 32))} d = reshape(x = c, shape = sh);{tensor((1, 1, 128, 128))} y = matmul(x = d, y = b);", "y"), FOUND),
    Case("Q36", program(f"{X} a", f"{scalar('ax', 'int32', '1')}{scalar('il', 'bool', 'false')}"
         f"{tensor((1, 128, 1, 32))} c = concat(values = (a, a), axis = ax, interleave = il);{ints('sh', [1, 1, 128, 32])}"
         f"{tensor((1, 1, 128, 32))} d = reshape(x = c, shape = sh);{scalar('ty', 'bool', 'true')}"
         f"{tensor((1, 1, 128, 128))} y = matmul(x = d, y = d, transpose_y = ty);", "y"), FINE, note="of one input"),
    Case("Q37", NINE, FOUND),
    Case("Q37", NINE.replace(f"{X} i0, ", "").replace("x = i0", "x = i1"), FINE, note="8 inputs"),
    Case("Q38", matmul(48, rank=3), REFUSED, chip="m1"),
    Case("Q38", matmul(48, rank=3), FINE, chip="m4"),
    Case("Q39", conv_body((1, 64, 1, 32), (64, 64, 1, 1), (1, 64, 1, 32), runtime=True), FOUND, chip="m3", options={"rows": "any"}),
    Case("Q40", conv_body((2, 64, 1, 32), (64, 64, 1, 1), (2, 64, 1, 32), runtime=True), REFUSED, chip="m1", options={"rows": "any"}),
    Case("Q40", conv_body((2, 64, 1, 32), (64, 64, 1, 1), (2, 64, 1, 32), runtime=True), FINE, options={"rows": "any"}),
    *(Case("Q41", program(f"{tensor((2, 64, 1, 32))} a, {X} b", f"{tensor((2, 64, 1, 32))} y = mul(x = a, y = b);", "y"), want, chip=chip)
      for want, chip in ((FOUND, "m3"), (FINE, "m4"))),
    Case("Q49", body(f"{ints('b1', [0, 0, 0, 8])}{ints('b2', [0, 0, 0, 16])}{ints('sz', [1, 64, 1, 8])}"
         f"{tensor((1, 64, 1, 8))} s = slice_by_size(x = x, begin = b1, size = sz);{tensor((1, 64, 1, 8))} t = slice_by_size(x = x, begin = b2, size = sz);"
         f"{scalar('ax', 'int32', '3')}{tensor((1, 64, 1, 16))} y = concat(values = (s, t), axis = ax);"), FOUND, chip="m2"),
    Case("Q52", reduce_then(f"{scalar('zero', 'fp16', '0.0')}{tensor((1, 1, 1, 32))} s = mul(x = r, y = zero);"), REFUSED),
    Case("Q52", reduce_then(f"{scalar('zero', 'fp16', '0.5')}{tensor((1, 1, 1, 32))} s = mul(x = r, y = zero);"), FINE, note="times 0.5"),
    Case("Q53", layer_norm(512, 1024), FOUND),
    Case("Q53", layer_norm(512, 512), FINE),
    Case("Q55", body(f"{ints('sh', [64, 1, 1, 32])}{tensor((64, 1, 1, 32))} y = reshape(x = x, shape = sh);"), REFUSED),
    Case("Q55", body(f"{ints('rp', [1, 2, 1, 1])}{tensor((1, 128, 1, 32))} y = tile(x = x, reps = rp);"), REFUSED, note="tile"),
    Case("Q55", body(f"{ints('bg', [0, 0, 0, 0])}{ints('en', [1, 32, 1, 32])}{tensor((1, 32, 1, 32))} y = slice_by_index(x = x, begin = bg, end = en);"),
         REFUSED, note="slice_by_index"),
    Case("Q55", body("", "x"), REFUSED),
    Case("Q58", conv1x1(64, 1), REFUSED, note="no weight file"),
    Case("Q58", conv1x1(64, 1), FINE, weights=files(blob(ONE))),
    Case("Q63", rope(), REFUSED, chip="m3ultra"),
    Case("Q63", rope(), FINE, chip="m4"),
    Case("Q65", program(f"{X} a, {X} b", f"{X} y = abs(x = a);", "y"), FOUND),
    Case("Q65", body(f"{scalar('dead', 'fp16', '1.0')}{X} y = abs(x = x);"), FOUND),
    Case("Q65", body(f"{X} y = abs(x = x);"), FINE),
    Case("Q66", conv1x1(64, 1), REFUSED, chip="m1", weights=files(blob(np.ones(63, HALF)) + bytes(64))),
    Case("Q66", conv1x1(64, 1), FOUND, chip="m4", weights=files(blob(np.ones(63, HALF)) + bytes(64))),
    Case("Q66", conv1x1(64, 1), FOUND, chip="m4", weights=files(bytes(64) + blob(ONE)[64:])),
    Case("Q66", conv1x1(64, 1), FINE, chip="m1", weights=files(blob(ONE))),
    Case("Q72", conv_body((1, 16, 1, 32), (151936, 16, 1, 1), (1, 151936, 1, 32)), REFUSED),
]  # fmt: skip


@pytest.mark.parametrize("case", CASES, ids=lambda c: f"{c.rule}-{c.chip}-{c.want}{'-' + c.note if c.note else ''}")
def test_compiling(case: Case) -> None:
    simulator = Simulator(case.chip, **case.options)
    rule = "Q30" if case.rule == "Q72" else case.rule  # one dimension above 65,536
    if case.want in (REFUSED, INVALID):
        with pytest.raises(CompileError) as caught:
            simulator.compile(case.text, case.weights)
        failure = simulator.failure()
        assert failure.domain == "com.apple.appleneuralengine.compiler"
        assert failure.code == 1
        assert failure.text == f"_ANECompiler : ANECCompile() FAILED: err=({case.want})"
        line, column, detail = failure.detail.split(":", 2)
        assert int(line) >= 1
        assert int(column) >= 1
        assert f" {rule}: " in detail[:8], detail
        assert failure.detail in str(caught.value)
        return
    found = {finding.rule for finding in simulator.compile(case.text, case.weights).findings()}
    assert (rule in found) == (case.want == FOUND), found


# ---- evaluation ----------------------------------------------------------------------------------------------------


def fails(program: Any, inputs: list[Any], outputs: list[Any], status: str, **indices: Any) -> str:
    with pytest.raises(EvalError):
        program.evaluate(inputs, outputs, **indices)
    failure = program._device.failure()
    assert failure.domain == "com.apple.appleneuralengine"
    assert failure.code == 8
    assert failure.text == f"ANEProgramProcessRequestDirect() Failed with status={status}"
    return str(failure.detail)


INFERENCE = "0x1d : statusType=0x9: Program Inference error"
TWO = program(f"{X} a, {X} b", f"{X} p = add(x = a, y = b);{X} q = sub(x = a, y = b);", "p, q")
SIZE = 49152


def test_q07_q09_q10_sizes_of_surfaces() -> None:
    simulator = Simulator("m4")
    compiled = simulator.compile(TWO)
    small, usual, large = (simulator.surface(n) for n in (4096, SIZE, SIZE + 16384))
    good = [simulator.surface(SIZE) for _ in range(2)]
    assert "Q09" in fails(compiled, [usual, small], good, INFERENCE)
    assert "Q10" in fails(compiled, [usual, large], good, INFERENCE)
    assert "Q07" in fails(compiled, good, [large, usual], INFERENCE)
    compiled.evaluate(good, [usual, simulator.surface(SIZE)])


def test_q59_states_counts_and_indices() -> None:
    simulator = Simulator("m4")
    compiled = simulator.compile(TWO, load=False)
    a, b, p, q = (simulator.surface(SIZE) for _ in range(4))
    assert "not loaded" in fails(compiled, [a, b], [p, q], INFERENCE)
    compiled.load()
    assert "Q59" in fails(compiled, [a], [p, q], INFERENCE)
    assert "Q59" in fails(compiled, [a, b], [p, q], "0x16", input_indices=[0, 7])
    assert "Q59" in fails(compiled, [a, b], [p, q], "0x16", input_indices=[0, 0])
    assert "procedure" in fails(compiled, [a, b], [p, q], "0x2", procedure=1)
    compiled.evaluate([a, b], [p, q])
    compiled.unload()
    assert "not loaded" in fails(compiled, [a, b], [p, q], INFERENCE)


def test_second_function_counts_symbols_on() -> None:
    text = f"program(1.3)\n{BUILD_INFO}\n{{\n" + "".join(
        f"func {name}<ios18>({X} x) {{ {X} y = {op}(x = x); }} -> (y);\n" for name, op in (("one", "abs"), ("two", "relu"))
    ) + "}"  # fmt: skip
    simulator = Simulator("m4")
    compiled = simulator.compile(text)
    x = np.full((1, 64, 1, 32), -2, HALF)
    assert (compiled.run({"x": x}, 0)["y"] == 2).all()
    assert (compiled.run({"x": x}, 1)["y"] == 0).all()
    assert [port.symbol for port in compiled.inputs(1)] == [1]
    a, b = simulator.surface(SIZE), simulator.surface(SIZE)
    fails(compiled, [a], [b], "0x2", input_indices=[0], output_indices=[0], procedure=1)


def test_q08_q11_q69_binding_is_alphabetical_and_by_position() -> None:
    """A caller who binds in the order of the text gets the operands swapped, without an error."""
    names = ["a_input2", "a_input10"]
    text = program(f"{X} {names[0]}, {X} {names[1]}", f"{X} y = sub(x = {names[0]}, y = {names[1]});", "y")
    simulator = Simulator("m4")
    compiled = simulator.compile(text)
    assert [port.name for port in compiled.inputs()] == ["a_input10", "a_input2"]
    assert [port.declared_position for port in compiled.inputs()] == [1, 0]
    five, three, out = (simulator.surface(SIZE) for _ in range(3))
    five.write(np.full(2048, 5, HALF))
    three.write(np.full(2048, 3, HALF))
    compiled.evaluate([five, three], [out])  # meant as input2 = 5, input10 = 3
    assert (out.read(HALF, (2048,)) == -2).all()
    named = compiled.run({"a_input2": np.full((1, 64, 1, 32), 5, HALF), "a_input10": np.full((1, 64, 1, 32), 3, HALF)})
    assert (named["y"] == 2).all()
    assert {finding.rule for finding in compiled.findings()} == {"Q11"}


def test_q08_outputs_are_bound_in_alphabetical_order() -> None:
    """A caller who takes the first surface for the first output of the text gets the other one."""
    simulator = Simulator("m4")
    compiled = simulator.compile(program(f"{X} x", f"{X} b = abs(x = x);{X} a = relu(x = x);", "b, a"))
    assert [(port.name, port.declared_position) for port in compiled.outputs()] == [("a", 1), ("b", 0)]
    x, first, second = (simulator.surface(SIZE) for _ in range(3))
    x.write(np.full(2048, -5, HALF))
    compiled.evaluate([x], [first, second])
    assert (first.read(HALF, (2048,)) == 0).all()  # relu, not abs
    assert (second.read(HALF, (2048,)) == 5).all()
    named = compiled.run({"x": np.full((1, 64, 1, 32), -5, HALF)})
    assert (named["b"] == 5).all()


def test_q12_a_wrong_offset_reads_what_stands_there() -> None:
    """Offset 128 is the data: its words are taken for metadata, and give garbage without an error."""
    w = np.zeros((1, 64, 1, 1), HALF)
    data = bytearray(blob(w) + np.full(64, 3, HALF).tobytes())
    data[128 + 16 : 128 + 24] = (len(data) - 128).to_bytes(8, "little")  # where "metadata" say that the data are
    compiled = Simulator("m4").compile(BAD_OFFSET, files(bytes(data)))
    assert (compiled.run({"x": np.ones((1, 64, 1, 32), HALF)})["y"] == 192).all()
    outside = Simulator("m4").compile(
        conv1x1(64, 1).replace("uint64(64)", "uint64(18446744073709551615)"), files(blob(ONE))
    )
    assert (outside.run({"x": np.ones((1, 64, 1, 32), HALF)})["y"] == 0).all()


def test_q15_compiles_and_q56_loads_are_counted() -> None:
    simulator = Simulator("m4")
    kept = [simulator.compile(unary("abs"), load=False) for _ in range(119)]
    with pytest.raises(CompileError, match="Q15"):
        simulator.compile(unary("abs"))
    assert simulator.failure().text == "_ANECompiler : ANECCompile() FAILED: err=()"
    for compiled in kept:
        compiled.load()
    counters = simulator.counters()
    assert (counters["compiles"], counters["loaded"], counters["cache_hits"]) == (120, 119, 118)

    import dataclasses

    chip = dataclasses.replace(simulator.chip, constants={**simulator.chip.constants, "max_compiles": 0})
    free = Simulator(chip)
    loaded = [free.compile(unary("abs")) for _ in range(128)]
    with pytest.raises(CompileError, match="Q56"):
        free.compile(unary("abs"))
    assert (free.failure().code, free.failure().domain) == (6, "com.apple.appleneuralengine")
    loaded[5].unload()
    free.compile(unary("abs"))


def test_q17_reload_keeps_the_compiled_weights() -> None:
    x = {"x": np.ones((1, 64, 1, 32), HALF)}
    for delta, want in ((False, 64), (True, 128)):
        compiled = Simulator("m4", allow_delta_reload=delta).compile(conv1x1(64, 1), files(blob(ONE)))
        compiled.reload(files(blob(2 * ONE)))
        assert (compiled.run(x)["y"] == want).all()
        assert ("Q17" in {f.rule for f in compiled.findings()}) == (not delta)


def test_q20_data_are_packed_from_byte_0() -> None:
    """Rows written 64 bytes apart, as the hardware's own layout has them: read as if packed."""
    simulator = Simulator("m4")
    kind = tensor((1, 4, 1, 16))
    compiled = simulator.compile(program(f"{kind} x", f"{kind} y = abs(x = x);", "y"))
    x, y = simulator.surface(SIZE), simulator.surface(SIZE)
    strided = np.zeros((4, 32), HALF)
    strided[:, :16] = np.arange(64).reshape(4, 16) + 1
    x.write(strided)
    compiled.evaluate([x], [y])
    got = y.read(HALF, (4, 16))
    assert (got[0] == strided[0, :16]).all()
    assert (got[1] == 0).all()
    assert (got[2] == strided[1, :16]).all()
    assert "Q20" in {f.rule for f in compiled.findings()}


def test_q21_q22_attention() -> None:
    rng = np.random.default_rng(0)
    q, k, v = (rng.standard_normal((1, 1, 64, 32)).astype(HALF) for _ in range(3))
    mask = np.where(np.tri(64) > 0, 0, -1e4).astype(HALF).reshape(1, 1, 64, 64)
    masked = Simulator("m4").compile(sdpa(64, mask=True)).run({"q": q, "k": k, "v": v, "m": mask})["y"]
    plain = Simulator("m4").compile(sdpa(64)).run({"q": q, "k": k, "v": v})["y"]
    np.testing.assert_array_equal(masked, plain)
    scores = np.exp((q[0, 0].astype(float) @ k[0, 0].astype(float).T) / 32**0.5)
    np.testing.assert_allclose(plain[0, 0], scores / scores.sum(-1, keepdims=True) @ v[0, 0].astype(float), atol=0.01)
    large = Simulator("m4").compile(sdpa(512))
    same = [large.run({n: np.full((1, 1, 512, 32), c, HALF) for n in "qkv"})["y"] for c in (0, 1)]
    np.testing.assert_array_equal(*same)  # has nothing to do with the inputs


def test_q25_tile_poisons_in_strict_mode() -> None:
    simulator = Simulator("m3", strict=True)
    first, other = simulator.compile(TILE), simulator.compile(unary("abs"))
    x = np.ones((1, 1, 1, 32), HALF)
    other.run({"x": x})
    first.run({"x": np.ones((1, 64, 1, 32), HALF)})
    with pytest.raises(EvalError, match="Q25"):
        other.run({"x": x})


def test_q33_rows_are_cut_silently() -> None:
    compiled = Simulator("m4", rows="truncate").compile(unary("abs", 20))
    y = compiled.run({"x": np.ones((1, 1, 1, 20), HALF)})["y"].reshape(-1)
    assert y.tolist() == [1.0] * 16 + [0.0] * 4


def test_q34_q35_shapes_that_fail_late() -> None:
    kind = tensor((1, 1024, 1, 16))
    text = program(f"{kind} x", f"{kind} y = abs(x = x);", "y")
    x = {"x": np.zeros((1, 1024, 1, 16), HALF)}
    with pytest.raises(EvalError, match="Q34"):
        Simulator("m3").compile(text).run(x)
    Simulator("m4").compile(text).run(x)
    kind = tensor((1, 1, 1, 14608))
    steps = [f"{kind} {'y' if i == 8 else f's{i}'} = relu(x = {'x' if i == 0 else f's{i - 1}'});" for i in range(9)]
    x = {"x": np.zeros((1, 1, 1, 14608), HALF)}
    with pytest.raises(EvalError, match="Q35"):
        Simulator("m4").compile(program(f"{kind} x", "\n".join(steps), "y")).run(x)
    Simulator("m4").compile(program(f"{kind} x", f"{kind} y = relu(x = x);", "y")).run(x)


def test_q39_runtime_weights_are_ignored() -> None:
    text = conv_body((1, 64, 1, 32), (64, 64, 1, 1), (1, 64, 1, 32), runtime=True)
    inputs = {"x": np.ones((1, 64, 1, 32), HALF), "W": np.ones((64, 64, 1, 1), HALF)}
    assert (Simulator("m3", rows="any").compile(text).run(inputs)["y"] == 0).all()
    assert (Simulator("m4", rows="any").compile(text).run(inputs)["y"] == 64).all()


def slice_program() -> str:
    return body(
        f"{ints('bg', [0, 0, 0, 16])}{ints('sz', [1, 64, 1, 16])}{tensor((1, 64, 1, 16))} y = slice_by_size(x = x, begin = bg, size = sz);"
    )


def test_q42_q43_are_found_in_evaluation() -> None:
    compiled = Simulator("m4").compile(conv1x1(64, 1), files(blob(ONE)))
    assert np.isinf(compiled.run({"x": np.full((1, 64, 1, 32), 1000, HALF)})["y"]).all()
    compiled.run({"x": np.full((1, 64, 1, 32), 2**-18, HALF)})
    found = {f.rule: f.times for f in compiled.findings()}
    assert found == {"Q42": 32, "Q43": 32}


def test_q46_nan_never_comes_out() -> None:
    x = np.full((1, 64, 1, 32), np.nan, HALF)
    for chip in ("m1", "m4"):
        y = Simulator(chip).compile(conv1x1(64, 1), files(blob(ONE))).run({"x": x})["y"]
        assert np.isinf(y).all()
        for op in ("abs", "relu", "sigmoid", "exp", "sqrt"):
            assert not np.isnan(Simulator(chip).compile(unary(op)).run({"x": x[:, :1]})["y"]).any()


@pytest.mark.parametrize(("chip", "saturates"), [("m1", True), ("m2", True), ("m3", False), ("m5", False)])
def test_q48_width_slices_saturate(chip: str, saturates: bool) -> None:
    x = np.full((1, 64, 1, 32), 4094, HALF)
    x[0, 0, 0, 20:22] = 4096, -5000
    compiled = Simulator(chip).compile(slice_program())
    y = compiled.run({"x": x})["y"][0, 0, 0]
    assert y[3] == 4094
    assert y[4:6].tolist() == ([np.inf, -np.inf] if saturates else [4096, -5000])
    assert ("Q48" in {f.rule for f in compiled.findings()}) == saturates


def test_q49_concat_of_slices_takes_wrong_elements() -> None:
    text = next(case.text for case in CASES if case.rule == "Q49")
    x = np.arange(2048).reshape(1, 64, 1, 32).astype(HALF)
    want = np.concatenate([x[..., 8:16], x[..., 16:24]], -1)
    assert (Simulator("m4").compile(text).run({"x": x})["y"] == want).all()
    assert (Simulator("m2").compile(text).run({"x": x})["y"] != want).any()


def test_q47_q64_are_found_in_evaluation() -> None:
    kind, one = tensor((1, 3000, 1, 32)), tensor((1, 1, 1, 32))
    text = program(
        f"{kind} x",
        f"{ints('ax', [1])}{scalar('kd', 'bool', 'true')}{one} y = reduce_sum_square(x = x, axes = ax, keep_dims = kd);",
        "y",
    )
    compiled = Simulator("m4").compile(text)
    compiled.run({"x": np.full((1, 3000, 1, 32), 0.1, HALF)})
    assert {f.rule for f in compiled.findings()} == {"Q47"}
    compiled.run({"x": np.full((1, 3000, 1, 32), 10, HALF)})
    assert {f.rule for f in compiled.findings()} == {"Q47", "Q64"}


def test_q54_is_found_on_m3() -> None:
    half = tensor((1, 32, 1, 32))
    text = body(
        f"{scalar('np', 'int32', '2')}{scalar('ax', 'int32', '1')}{half} p, {half} q = split(x = x, num_splits = np, axis = ax);"
        f"{ints('pm', [0, 2, 1, 3])}{tensor((1, 1, 32, 32))} a = transpose(x = p, perm = pm);{tensor((1, 1, 32, 32))} b = transpose(x = q, perm = pm);"
        f"{tensor((1, 1, 32, 32))} c = matmul(x = a, y = b);{scalar('sa', 'int32', '-1')}{tensor((1, 1, 32, 32))} d = softmax(x = c, axis = sa);"
        f"{ints('rp', [1, 2, 1, 1])}{tensor((1, 2, 32, 32))} y = tile(x = d, reps = rp);"
    )
    assert "Q54" in {f.rule for f in Simulator("m3").compile(text).findings()}
    with pytest.raises(CompileError, match="Q54"):
        Simulator("m3", strict=True).compile(text)
    assert "Q54" not in {f.rule for f in Simulator("m4").compile(text).findings()}


def test_q57_q61_q62_q70_q71_modelled_time() -> None:
    import dataclasses

    simulator = Simulator("m4")

    def passed(action: Any) -> float:
        before = simulator.counters()["modelled_ms"]
        action()
        return float(simulator.counters()["modelled_ms"] - before)

    made: list[Any] = []
    assert passed(lambda: made.append(simulator.compile(unary("abs"), load=False))) == pytest.approx(23.0)
    assert passed(lambda: made.append(simulator.compile(unary("abs"), load=False))) == pytest.approx(7.5)

    def broken() -> None:
        with pytest.raises(CompileError):
            simulator.compile(unary("gelu"))

    assert passed(broken) == pytest.approx(15000.0)
    made[0].load()
    x = {"x": np.zeros((1, 1, 1, 32), HALF)}
    assert passed(lambda: made[0].run(x)) == pytest.approx(260.095, rel=1e-3)
    assert passed(lambda: made[0].run(x)) == pytest.approx(0.095, rel=0.01)
    simulator.idle(6.0)
    assert passed(lambda: made[0].run(x)) > 260
    slow = {**simulator.chip.constants, "slow_after_evaluations": 2.0, "slow_factor": 5.0}
    simulator = Simulator(dataclasses.replace(simulator.chip, constants=slow))
    made[0] = simulator.compile(unary("abs"))
    times = [passed(lambda: made[0].run(x)) for _ in range(4)]
    assert times[3] == pytest.approx(5 * times[1])


def evaluation_ms(text: str, weights: dict[str, bytes] | None = None, **constants: float) -> float:
    """Return the modelled time of the second evaluation with zeros, less the dispatch; nothing takes time to move."""
    import dataclasses

    chip = Simulator("m4").chip
    free = {"weight_gb_s": 0.0, "activation_gb_s": 0.0, "elementwise_gb_s": 0.0, "dispatch_us": 0.0}
    simulator = Simulator(dataclasses.replace(chip, constants={**chip.constants, **free, **constants}))
    compiled = simulator.compile(text, weights)
    inputs = {port.name: np.zeros(port.shape, port.dtype) for port in compiled.inputs()}
    compiled.run(inputs)
    before = simulator.counters()["modelled_ms"]
    compiled.run(inputs)
    return float(simulator.counters()["modelled_ms"] - before)


def product(x: tuple[int, ...], y: tuple[int, ...]) -> str:
    out = tensor((*x[:-1], y[-1]))
    return program(f"{tensor(x)} a, {tensor(y)} b", f"{out} y = matmul(x = a, y = b);", "y")


def test_q18_conv_is_three_times_as_fast_as_matmul() -> None:
    conv = evaluation_ms(conv1x1(256, 256, 256), files(blob(np.zeros((256, 256), HALF))))
    matmul = evaluation_ms(product((1, 1, 256, 256), (1, 1, 256, 256)))
    assert conv > 0
    assert 2.5 < matmul / conv < 4


def test_q19_large_operands_take_longer() -> None:
    text = product((1, 1, 256, 256), (1, 1, 256, 256))
    usual, large = evaluation_ms(text), evaluation_ms(text, operand_bytes=131071.0)
    assert evaluation_ms(text, operand_bytes=131072.0) == usual  # 256 by 256 fp16 still fit
    assert large == pytest.approx(1.43 * usual)  # MX: 5.7 to 4.0 TFLOPS


def test_q68_int8_weights_move_half_and_int8_products_are_faster() -> None:
    def conv(attributes: str, x: str = "x") -> str:
        kind = tensor((256, 256, 1, 1), "int8")
        q = (
            f'{tensor((1, 256, 1, 256), "int8")} q = quantize(input = x, scale = fp16(0.5), output_dtype = string("int8"));'
            f"{tensor((1, 256, 1, 256))} d = dequantize(input = q, scale = fp16(0.5));\n"
        )
        w = f"{tensor((256, 256, 1, 1))} W = {attributes.format(kind=kind)}"
        return program(
            f"{tensor((1, 256, 1, 256))} x",
            f"{w}\n{q if x == 'd' else ''}{tensor((1, 256, 1, 256))} y = conv(x = {x}, weight = W);",
            "y",
        )

    plain = "const()[val = tensor<fp16, [256, 256, 1, 1]>(0)];"
    int8 = "constexpr_affine_dequantize()[axis = int32(0), quantized_data = {kind}(0), scale = fp16(0.5), zero_point = int8(0)];"
    slow = {"weight_gb_s": 1e-3}
    assert evaluation_ms(conv(int8), **slow) == pytest.approx(evaluation_ms(conv(plain), **slow) / 2)
    assert evaluation_ms(conv(int8)) == pytest.approx(evaluation_ms(conv(plain)))
    assert evaluation_ms(conv(int8, "d")) == pytest.approx(evaluation_ms(conv(plain)) / 1.88)


def test_q60_layers_and_weights() -> None:
    import dataclasses

    kind = tensor((1, 16, 1, 16))
    steps = [
        f"{tensor((1, 1, 16, 16))} {'y' if i == 386 else f's{i}'} = matmul(x = {'x' if i == 0 else f's{i - 1}'}, y = x);"
        for i in range(387)
    ]
    text = program(f"{tensor((1, 1, 16, 16))} x", "\n".join(steps), "y")
    with pytest.raises(CompileError, match="Q60"):
        Simulator("m6").compile(text)
    Simulator("m4").compile(text)
    chip = Simulator("m4").chip
    chip = dataclasses.replace(chip, constants={**chip.constants, "max_weight_bytes": 100})
    text = program(f"{kind} x", f"{weight('W', (1, 16, 1, 16))}{kind} y = mul(x = x, y = W);", "y")
    with pytest.raises(CompileError, match="Q60"):
        Simulator(chip).compile(text, files(blob(np.ones(256, HALF))))


# ---- faults --------------------------------------------------------------------------------------------------------


def test_faults_hit_when_asked_and_then_stop() -> None:
    simulator = Simulator("m4")
    compiled = simulator.compile(TWO)
    a, b = np.full((1, 64, 1, 32), 5, HALF), np.full((1, 64, 1, 32), 3, HALF)
    run = lambda: compiled.run({"a": a, "b": b})  # noqa: E731
    simulator.inject("eval-fails", after=1, count=1)
    run()
    with pytest.raises(EvalError, match="injected"):
        run()
    run()
    simulator.inject("eval-inf", count=1)
    assert np.isinf(run()["p"]).all()
    simulator.inject("eval-swapped", count=1)
    got = run()
    assert (got["p"] == 2).all()
    assert (got["q"] == 8).all()
    simulator.inject("eval-stale", count=1)
    assert (run()["p"] == 0).all()  # the surface as it was
    simulator.inject("eval-slow", count=1, slow_ms=3.0)
    before = simulator.counters()["modelled_ms"]
    run()
    assert simulator.counters()["modelled_ms"] - before > 3
    simulator.inject("eval-fails")
    for _ in range(3):
        with pytest.raises(EvalError):
            run()
    simulator.clear_faults()
    assert (run()["p"] == 8).all()
    simulator.inject("compile-fails", count=1)
    with pytest.raises(CompileError):
        simulator.compile(TWO)
    simulator.inject("load-fails", count=1)
    with pytest.raises(CompileError):
        simulator.compile(TWO)
    assert simulator.failure().code == 6
    simulator.compile(TWO)
    counters = simulator.counters()
    assert counters["evaluation_failures"] == 4
    assert counters["compile_failures"] == 1


def test_bad_arguments_are_named() -> None:
    simulator = Simulator("m4")
    for action in (
        lambda: simulator.inject("melts"),
        lambda: simulator.inject("eval-slow", slow_ms=-1.0),
        lambda: simulator.inject("eval-fails", after=-1),
        lambda: simulator.surface(0),
        lambda: Simulator("m9"),
        lambda: Simulator("m4", mac="fp8"),
        lambda: Simulator("m4", max_memory_bytes=-1),
        lambda: simulator.compile(TWO).run({"a": np.zeros((1, 64, 1, 32))}),
        lambda: simulator.compile(TWO).run({"a": np.zeros(3), "b": np.zeros(3)}),
    ):
        with pytest.raises(AnellmError):
            action()


def test_objects_may_be_freed_in_any_order() -> None:
    simulator = Simulator("m4")
    compiled, surface = simulator.compile(unary("abs")), simulator.surface(SIZE)
    simulator.close()
    compiled.evaluate([surface], [surface])
    compiled.close()
    assert len(surface) == SIZE
    with pytest.raises(AnellmError, match="closed"):
        compiled.load()


def test_evaluations_from_many_threads_take_turns() -> None:
    """One command is in flight (Q67): each thread gets its own results, and no two evaluations share the engine's time."""
    from concurrent.futures import ThreadPoolExecutor

    simulator = Simulator("m4")
    kind = tensor((1, 64, 1, 512))
    steps = [f"{kind} {'y' if i == 19 else f's{i}'} = abs(x = {'x' if i == 0 else f's{i - 1}'});" for i in range(20)]
    compiled = simulator.compile(program(f"{kind} x", "\n".join(steps), "y"))  # long enough to meet others

    def work(k: int) -> bool:
        x = np.full((1, 64, 1, 512), -k, HALF)
        return all((compiled.run({"x": x})["y"] == k).all() for _ in range(20))

    work(0)
    before = simulator.counters()
    work(0)
    between = simulator.counters()
    alone = between["modelled_ms"] - before["modelled_ms"]
    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(work, range(1, 9)))
    after = simulator.counters()
    assert after["evaluations"] - between["evaluations"] == 160
    assert after["modelled_ms"] - between["modelled_ms"] == pytest.approx(8 * alone)
