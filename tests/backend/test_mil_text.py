"""MIL text: the dialects that compile, errors with their place, and text that means harm."""

# ruff: noqa: E501 (programs stand in long lines)
from __future__ import annotations

import time

import numpy as np
import pytest
from milprograms import BUILD_INFO, files, program, scalar, tensor, unary

from anellm.errors import AnellmError, CompileError, InvalidError, OutOfMemoryError
from anellm.sim import Simulator

KIND = tensor((1, 1, 1, 32))
BODY = f"{KIND} y = abs(x = x);"

DIALECTS = {
    "1.3, ios18": ("1.3", BUILD_INFO, "ios18"),
    "1.3, two versions": ("1.3", '[buildInfo = dict<string, string>({{"coremlc-component-MIL", "3520.4.1"}, {"coremlc-version", "3520.5.1"}})]', "ios18"),
    "1.3, newer versions": ("1.3", '[buildInfo = dict<string, string>({{"coremlc-component-MIL", "3600.16.1"}, {"coremlc-version", "3600.25.1"}})]', "ios18"),
    "1.0, ios16": ("1.0", '[buildInfo = dict<tensor<string, []>, tensor<string, []>>({{"coremlc-version","3505.4.1"}})]', "ios16"),
    "1.5, ios17": ("1.5", BUILD_INFO, "ios17"),
}  # fmt: skip


@pytest.mark.parametrize("dialect", DIALECTS)
@pytest.mark.parametrize("spaces", ["usual", "none", "many"])
def test_dialects(dialect: str, spaces: str) -> None:
    version, info, opset = DIALECTS[dialect]
    text = f"program({version})\n{info}\n{{\nfunc main<{opset}>({KIND} x) {{\n{BODY}\n}} -> (y);\n}}\n"
    if spaces == "none":
        text = text.replace(" = ", "=").replace(", ", ",").replace("\n", "")
    elif spaces == "many":
        text = text.replace(" ", "\r\n\t ")
    y = Simulator("m4").compile(text).run({"x": np.full((1, 1, 1, 32), -3.0)})["y"]
    assert (y == 3).all()


@pytest.mark.parametrize(
    ("literal", "value"),
    [("fp16(0.5)", 0.5), ("fp16(0x1p-3)", 0.125), ("fp16(-0x1.8p+1)", -3.0), ("fp16(1e-05)", 1e-5), ("fp16(-2.5E2)", -250.0), ("fp16(3)", 3.0),
     ("tensor<fp16, []>(0.25)", 0.25), ("tensor<fp16, [1]>([7])", 7.0), ("fp16(.5)", 0.5), ("fp16(1.)", 1.0), ("fp16(123456789012345678901234567890e-28)", 12.3456),
     ("fp16(0x7)", 7.0), ("fp16(-0)", 0.0), ("fp16(" + "9" * 100_000 + ")", np.inf), ("fp16(inf)", np.inf), ("fp16(-inf)", -np.inf)],
)  # fmt: skip
def test_numbers(literal: str, value: float) -> None:
    """Inline, as an argument."""
    text = program(f"{KIND} x", f"{KIND} y = add(x = x, y = {literal});", "y")
    y = Simulator("m4").compile(text).run({"x": np.zeros((1, 1, 1, 32))})["y"]
    assert (y == np.float16(value)).all()


def test_nested_lists_attributes_and_opsets() -> None:
    kind = tensor((2, 16))
    rows = ", ".join(f"[{', '.join(str(16 * r + c) for c in range(16))}]" for r in range(2))
    body = (f'{kind} k = const()[name = string("another name"), val = {kind}([{rows}])];'
            f'{kind} y = add<ios17>(y = k, x = x)[name = string("y, said \\"so\\"")];')  # fmt: skip
    y = Simulator("m4").compile(program(f"{kind} x", body, "y")).run({"x": np.zeros((2, 16))})["y"]
    np.testing.assert_array_equal(y, np.arange(32).reshape(2, 16))


GOOD = program(f"{KIND} x", BODY, "y")
# What is replaced -> by what -> line:column and words of the error
PLACES = [
    ("program(1.3)", "programme(1.3)", '1:1: expected "program", found "programme"'),
    ("program(1.3)", "program(2.0)", "1:9: expected program version 1.0, 1.3 or 1.5, found 2"),
    ("buildInfo", "builtInfo", "2:1: the program has no buildInfo"),
    ("ios18", "ios15", '4:15: expected opset ios16, ios17 or ios18, found "ios15"'),
    ("fp16, [1, 1, 1, 32]> x", "fp17, [1, 1, 1, 32]> x", '4:29: unknown element type "fp17"'),
    ("[1, 1, 1, 32]> x", "[1, -1, 1, 32]> x", "4:39: expected a dimension, found the number -1"),
    ("[1, 1, 1, 32]> x", "[1, 4294967296, 1, 32]> x", "4:39: a dimension above 2^31 - 1"),
    ("abs(x = x)", "abs(x = )", '5:41: expected a name or a value, found ")"'),
    ("abs(x = x)", "abs(x = x, x = x)", '5:44: argument "x" is given twice'),
    ("abs(x = x)", "abs(z = x)", "argument x is missing"),
    ("abs(x = x)", "abs(x = x, z = x)", '5:44: abs has no argument "z"'),
    ("abs(x = x);", "abs(x = x)", '6:5: expected ";"'),
    ("abs(x = x)", "abs(x = $)", "5:41: expected a name or a value, found this character"),
    ("abs(x = x)", "add(x = x, y = fp16(1.2.3))", "found this is not a number"),
    ("abs(x = x)", 'add(x = x, y = fp16("1"))', 'expected a number, found the string "1"'),
    ("abs(x = x)", "add(x = x, y = bool(1))", "expected true or false"),
    ("abs(x = x)", "add(x = x, y = int32(1.5))", "expected a whole number, found the number 1.5"),
    ("abs(x = x)", "add(x = x, y = tensor<fp16, [3]>([1, 2]))", "expected 3 values, found 2"),
    ("abs(x = x)", 'add(x = x, y = string("open', "this string has no closing quote"),
    ("abs(x = x)", 'add(x = x, y = fp16(BLOBFILE(path = string("w"))))', "BLOBFILE needs path"),
    (f"{KIND} y", f"{tensor((1, 1, 1, 16))} y", '5:29: "y" is declared as tensor<fp16, [1, 1, 1, 16]>, but abs gives tensor<fp16, [1, 1, 1, 32]>'),
    (f"{KIND} y", f"{tensor((1, 1, 1, 32), 'fp32')} y", "is declared as tensor<fp32"),
    ("-> (y)", "-> (q)", '6:11: Q06: "q" is returned, but not defined'),
    ("-> (y);", "-> (y)", '7:1: expected ";", found "}"'),
    ("func main", "func", "4:9: expected the function's name, found \"<\""),
    ("[1, 1, 1, 32]> x", "[1, ?, 1, 32]> x", "open dimension"),
    (f"main<ios18>({KIND} x", f"main<ios18>(state<{KIND}> x", "do not lower"),
]  # fmt: skip


@pytest.mark.parametrize(("old", "new", "want"), PLACES)
def test_errors_name_their_place(old: str, new: str, want: str) -> None:
    assert GOOD.count(old) >= 1
    simulator = Simulator("m4")
    with pytest.raises(CompileError):
        simulator.compile(GOOD.replace(old, new, 1))
    detail = simulator.failure().detail
    assert want in detail
    assert detail.split(":")[0].isdigit()


def test_every_prefix_is_refused_with_a_place() -> None:
    simulator = Simulator("m4")
    text = GOOD.rstrip()
    chip = simulator.chip
    import dataclasses

    simulator = Simulator(dataclasses.replace(chip, constants={**chip.constants, "max_compiles": 0}))
    for n in range(len(text)):
        with pytest.raises(CompileError):
            simulator.compile(text[:n])
        line, column, _ = simulator.failure().detail.split(":", 2)
        assert (int(line), int(column)) >= (1, 1)
    simulator.compile(text)


HOSTILE = {
    "types in types": GOOD.replace(f"{KIND} y", "list<" * 100_000),
    "lists in lists": GOOD.replace("abs(x = x)", f"add(x = x, y = fp16({'[' * 100_000}"),
    "braces in braces": GOOD.replace("({{", "({" * 100_000 + "{{", 1),
    "tuples": GOOD.replace("abs(x = x)", f"add(x = ({'(' * 100_000}"),
    "a product of sizes over 2^63": GOOD.replace("[1, 1, 1, 32]", "[2147483647, 2147483647, 2147483647, 2147483647]"),
    "2^40 elements": GOOD.replace("[1, 1, 1, 32]", "[65536, 65536, 65536, 65536]"),
    "a constant of 2^36 elements": GOOD.replace("abs(x = x)", "add(x = x, y = tensor<fp16, [262144, 262144]>(0))"),
    "an exponent": GOOD.replace("abs(x = x)", "add(x = x, y = fp16(1e999999999999999999999))").replace("y = fp16", "y = int32"),
    "NUL bytes": GOOD.replace("abs", "a\0s"),
    "bytes that are no text": GOOD.replace("abs", "\x80\xff"),
    "17 dimensions": GOOD.replace("[1, 1, 1, 32]", "[" + ", ".join("1" * 17) + "]"),
    "many names of nothing": GOOD.replace("-> (y)", f"-> ({'y, ' * 2000}y)"),
    "a reshape to the impossible": program(f"{KIND} x", f"{KIND} y = reshape(x = x, shape = tensor<int32, [4]>([-1, -1, 1, 32]));", "y"),
    "a split in 0": program(f"{KIND} x", f"{KIND} y = split(x = x, num_splits = int32(0), axis = int32(3));", "y"),
    "a slice behind the end": program(f"{KIND} x", f"{KIND} y = slice_by_size(x = x, begin = tensor<int32, [4]>([0, 0, 0, 2147483647]), size = tensor<int32, [4]>([1, 1, 1, 32]));", "y"),
    "a stride of -2^31": program(f"{KIND} x", f"{KIND} y = slice_by_index(x = x, begin = tensor<int32, [4]>([0, 0, 0, 0]), end = tensor<int32, [4]>([1, 1, 1, 32]), strides = tensor<int32, [4]>([1, 1, 1, -2147483648]));", "y"),
    "a huge pad": program(f"{KIND} x", f'{KIND} y = pad(x = x, pad = tensor<int32, [2]>([2147483647, 2147483647]), mode = string("constant"));', "y"),
    "a huge conv": program(f"{KIND} x", f'{KIND} y = conv(x = x, weight = tensor<fp16, [1, 1, 1, 1]>(1), pad_type = string("custom"), pad = tensor<int32, [4]>([2147483647, 2147483647, 2147483647, 2147483647]));', "y"),
    "an axis far out": program(f"{KIND} x", f"{KIND} y = softmax(x = x, axis = int32(-2147483648));", "y"),
    "a string for a number": program(f"{KIND} x", f'{KIND} y = softmax(x = x, axis = string("1"));', "y"),
    "a string for a tensor": program(f"{KIND} x", f'{KIND} y = add(x = x, y = string("1"));', "y"),
    "lists of nothing": program(f"{KIND} x", f"{KIND} y = concat(values = (), axis = int32(0), interleave = bool(false));", "y"),
    "an empty text": "",
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_text_is_an_error(name: str) -> None:
    start = time.process_time()
    with pytest.raises((CompileError, OutOfMemoryError)):
        Simulator("m4", rows="any", max_memory_bytes=1 << 28).compile(HOSTILE[name].encode("latin-1"))
    assert time.process_time() - start < 5


def test_a_hundred_megabytes() -> None:
    """Memory of a long list is a small multiple of the text."""
    import resource

    n = 12_500_000
    numbers = b"0.25,0x1," * (n // 2)
    text = program(f"{KIND} x", f"{tensor((n,))} k = const()[val = {tensor((n,))}([@])];{BODY}", "y").encode()
    text = text.replace(b"@", numbers[:-1])
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    compiled = Simulator("m4").compile(text)
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
    assert grown < 5 * len(text)
    assert {f.rule for f in compiled.findings()} == {"Q65"}


def test_many_statements_take_linear_time() -> None:
    n = 20_000
    steps = "\n".join(f"{KIND} s{i} = relu(x = {'x' if i == 0 else f's{i - 1}'});" for i in range(n))
    start = time.process_time()
    Simulator("m4").compile(program(f"{KIND} x", f"{steps}{KIND} y = abs(x = s{n - 1});", "y"))
    assert time.process_time() - start < 5


def test_weight_files_that_point_anywhere() -> None:
    rng = np.random.default_rng(0)
    text = program(f"{KIND} x", f'{KIND} w = const()[val = {KIND}(BLOBFILE(path = string("@model_path/weights/w.bin"), offset = uint64(64)))];'
                   f"{KIND} y = add(x = x, y = w);", "y")  # fmt: skip
    for seed in range(200):
        data = bytearray(rng.integers(0, 256, int(rng.integers(0, 300)), dtype=np.uint8).tobytes())
        if seed % 2 and len(data) >= 128:
            data[64:68] = b"\xef\xbe\xad\xde"
            data[80:88] = int(rng.integers(0, 2**63)).to_bytes(8, "little")
        compiled = Simulator("m4").compile(text, files(bytes(data)))
        compiled.run({"x": np.zeros((1, 1, 1, 32))})
        assert {f.rule for f in compiled.findings()} & {"Q12", "Q66"}


def test_arguments() -> None:
    with pytest.raises(InvalidError, match="NUL"):
        Simulator("m4").compile(GOOD, {"a\0b": b""})
    with pytest.raises(AnellmError):
        Simulator("m4").compile(unary("abs", constants=scalar("big", "uint64", "99999999999999999999999")))
