"""MIL text for tests: a header, a function around some statements, weight files in the MILBlob v2 format."""

from __future__ import annotations

import struct

import numpy as np

BUILD_INFO = (
    '[buildInfo = dict<string, string>({{"coremlc-component-MIL", "3510.2.1"}, {"coremlc-version", "3505.4.1"}, '
    '{"coremltools-component-milinternal", ""}, {"coremltools-version", "9.0"}})]'
)
CODES = {"fp16": 1, "fp32": 2, "uint8": 3, "int8": 4, "bf16": 5, "int16": 6, "int4": 8, "uint1": 9, "uint4": 11}
NUMPY = {"float16": "fp16", "float32": "fp32", "uint8": "uint8", "int8": "int8", "int16": "int16"}


def program(parameters: str, body: str, results: str) -> str:
    """Return a program of one function."""
    return (
        f"program(1.3)\n{BUILD_INFO}\n{{\n    func main<ios18>({parameters}) {{\n{body}\n    }} -> ({results});\n}}\n"
    )


def tensor(shape: tuple[int, ...], dtype: str = "fp16") -> str:
    return f"tensor<{dtype}, [{', '.join(map(str, shape))}]>"


def ints(name: str, values: list[int]) -> str:
    kind = tensor((len(values),), "int32")
    return f'{kind} {name} = const()[name = string("{name}"), val = {kind}([{", ".join(map(str, values))}])];'


def scalar(name: str, kind: str, value: str) -> str:
    return f'{kind} {name} = const()[name = string("{name}"), val = {kind}({value})];'


def weight(name: str, shape: tuple[int, ...], dtype: str = "fp16", offset: int = 64, file: str = "w.bin") -> str:
    kind = tensor(shape, dtype)
    blob = f'BLOBFILE(path = string("@model_path/weights/{file}"), offset = uint64({offset}))'
    return f'{kind} {name} = const()[name = string("{name}"), val = {kind}({blob})];'


def blob(*arrays: np.ndarray | tuple[str, bytes]) -> bytes:
    """Return a weight file; the first array's metadata stands at byte 64."""
    out = bytearray(struct.pack("<II56x", len(arrays), 2))
    for array in arrays:
        code, data = array if isinstance(array, tuple) else (NUMPY[array.dtype.name], array.tobytes())
        out += bytes(-len(out) % 64)
        start = len(out) + 64
        out += struct.pack("<IIQQQ32x", 0xDEADBEEF, CODES[code], len(data), start, 0) + data
    return bytes(out)


def files(data: bytes, file: str = "w.bin") -> dict[str, bytes]:
    return {f"@model_path/weights/{file}": data}


def unary(op: str, n: int = 32, extra: str = "", constants: str = "") -> str:
    """Return a program y = op(x) over (1, 1, 1, n)."""
    kind = tensor((1, 1, 1, n))
    return program(f"{kind} x", f'{constants}\n{kind} y = {op}(x = x{extra})[name = string("y")];', "y")


def conv1x1(inputs: int, outputs: int, width: int = 32, extra: str = "", constants: str = "") -> str:
    """Return y = conv(x, W) with a constant weight in w.bin."""
    constants += weight("W", (outputs, inputs, 1, 1)) + scalar("pt", "string", '"valid"') + scalar("gr", "int32", "1")
    constants += ints("st", [1, 1]) + ints("pd", [0, 0, 0, 0]) + ints("dl", [1, 1])
    call = "conv(dilations = dl, groups = gr, pad = pd, pad_type = pt, strides = st, weight = W, x = x"
    line = f'{tensor((1, outputs, 1, width))} y = {call}{extra})[name = string("y")];'
    return program(f"{tensor((1, inputs, 1, width))} x", f"{constants}\n{line}", "y")
