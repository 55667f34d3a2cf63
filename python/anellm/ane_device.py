"""An open Neural Engine, real or simulated: compile programs, run them over surfaces or on arrays."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from anellm._ffi import Handle, check, ffi, lib, text
from anellm.errors import InvalidError

_DTYPES: Final[dict[str, type[np.generic]]] = {
    "fp16": np.float16,
    "fp32": np.float32,
    "bool": np.bool_,
    "int8": np.int8,
    "uint8": np.uint8,
    "int16": np.int16,
}
WEIGHTS_PATH = "@model_path/weights/"


@dataclass(frozen=True)
class Port:
    """An input or output of a function: a port's place in the list is its binding position (alphabetical by name)."""

    name: str
    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    declared_position: int
    symbol: int
    bytes: int


@dataclass(frozen=True)
class Finding:
    """Something that the hardware does wrong without an error.

    Attributes:
        rule: its id in the table of docs/simulator.md, such as ``Q21``.
        line: line of the program, from 1; 0 for none.
        column: column, from 1; 0 for none.
        times: how often, or how many elements.
        text: what.
    """

    rule: str
    line: int
    column: int
    times: int
    text: str

    def __str__(self) -> str:
        place = f"{self.line}:{self.column}: " if self.line else ""
        count = f" ({self.times} times)" if self.times > 1 else ""
        return f"{place}{self.rule}: {self.text}{count}"


@dataclass(frozen=True)
class DeviceFailure:
    """What the real API would have answered, and the reason that the simulator knows."""

    domain: str
    code: int
    text: str
    detail: str


def _files(weights: Mapping[str, bytes]) -> tuple[Any, list[Any]]:
    """Return weight files as a C array, and what must stay alive with it."""
    files = ffi.new("anellm_ane_file[]", max(1, len(weights)))
    kept: list[Any] = []
    for file, (path, data) in zip(files, weights.items(), strict=False):
        if "\0" in path:
            raise InvalidError(f"weights: expected a path without NUL characters, found {path!r}")
        name, content = ffi.new("char[]", path.encode()), ffi.from_buffer(data)
        kept += [name, content]
        file.path, file.data, file.bytes = name, content, len(data)
    return files, kept


class Surface:
    """Memory that a device reads or writes, packed from byte 0 on."""

    def __init__(self, device: Engine, size_bytes: int) -> None:
        """Make one; Engine.surface() does the same."""
        out = ffi.new("anellm_ane_surface **")
        check(lib.anellm_ane_surface_create(device.pointer, out, size_bytes))
        self._handle = Handle(out[0], lib.anellm_ane_surface_free, "Surface")

    @property
    def pointer(self) -> Any:
        """Return the C pointer."""
        return self._handle.pointer

    def __len__(self) -> int:
        return int(lib.anellm_ane_surface_bytes(self.pointer))

    @contextmanager
    def lock(self) -> Iterator[np.ndarray]:
        """Give its bytes, (size,) uint8; they must not be used after the block."""
        check(lib.anellm_ane_surface_lock(self.pointer, 0))
        try:
            yield np.frombuffer(ffi.buffer(lib.anellm_ane_surface_base(self.pointer), len(self)), np.uint8)
        finally:
            check(lib.anellm_ane_surface_unlock(self.pointer))

    def write(self, array: np.ndarray) -> None:
        """Write an array's bytes from byte 0 on.

        Raises:
            InvalidError: when it does not fit.
        """
        data = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
        if data.size > len(self):
            raise InvalidError(f"surface: expected at most {len(self)} bytes, found {data.size}")
        with self.lock() as memory:
            memory[: data.size] = data

    def read(self, dtype: Any, shape: tuple[int, ...]) -> np.ndarray:
        """Return a copy of the packed elements.

        Raises:
            InvalidError: when the surface is smaller.
        """
        size = int(np.prod(shape)) * np.dtype(dtype).itemsize
        if size > len(self):
            raise InvalidError(f"surface: expected at most {len(self)} bytes, found {size}")
        with self.lock() as memory:
            found: np.ndarray = memory[:size].view(dtype).reshape(shape).copy()
        return found


class Engine:
    """An open device, real or simulated: AneDevice, Simulator.

    Attributes:
        min_surface_bytes: Program.run() makes no smaller surfaces (Q09).
    """

    min_surface_bytes: int

    @property
    def pointer(self) -> Any:
        """Return the C pointer."""
        raise NotImplementedError

    def compile(self, mil: str | bytes, weights: Mapping[str, bytes] | None = None, *, load: bool = True) -> Program:
        """Compile MIL text.

        Args:
            mil: the text.
            weights: content of weight files by the path that the text uses (``@model_path/weights/w.bin``).
            load: load it as well.

        Raises:
            CompileError: with what the API answers; see failure(). The simulator names line:column and rule first.
        """
        data = mil.encode() if isinstance(mil, str) else mil
        files, kept = _files(weights or {})
        out = ffi.new("anellm_ane_program **")
        check(lib.anellm_ane_compile(self.pointer, out, data, len(data), files, len(weights or {})))
        del kept
        program = Program(self, out[0])
        if load:
            program.load()
        return program

    def surface(self, size_bytes: int) -> Surface:
        """Return a new surface of zeros."""
        return Surface(self, size_bytes)

    def counters(self) -> dict[str, float]:
        """Return the counts since it was opened: compiles, loads, evaluations, modelled time in ms."""
        counters = ffi.new("anellm_ane_counters *")
        check(lib.anellm_ane_get_counters(self.pointer, counters))
        return {name: getattr(counters, name) for name, _ in ffi.typeof("anellm_ane_counters").fields}

    def failure(self) -> DeviceFailure:
        """Return the last failure to compile or evaluate, as the system reports it."""
        error = ffi.new("anellm_ane_error *")
        check(lib.anellm_ane_get_error(self.pointer, error))
        return DeviceFailure(text(error.domain), int(error.code), text(error.text), text(error.detail))


class Program:
    """A compiled program; made by Engine.compile()."""

    def __init__(self, device: Engine, pointer: Any) -> None:
        """Own a compiled program.

        Args:
            device: where it was compiled.
            pointer: the C object.
        """
        self._device = device
        self._handle = Handle(pointer, lib.anellm_ane_program_free, "Program")

    @property
    def pointer(self) -> Any:
        """Return the C pointer."""
        return self._handle.pointer

    def close(self) -> None:
        """Unload and free it."""
        self._handle.close()

    def load(self) -> None:
        """Load it.

        Raises:
            CompileError: when too many programs are loaded.
        """
        check(lib.anellm_ane_load(self.pointer))

    def unload(self) -> None:
        """Unload it."""
        check(lib.anellm_ane_unload(self.pointer))

    def reload(self, weights: Mapping[str, bytes]) -> None:
        """Put other weight files in place, unload, load: the compiled weights stay, as on the hardware."""
        files, kept = _files(weights)
        check(lib.anellm_ane_reload(self.pointer, files, len(weights)))
        del kept

    def _ports(self, procedure: int, output: bool) -> list[Port]:
        n, port = ffi.new("int64_t *"), ffi.new("anellm_ane_port *")
        check(lib.anellm_ane_count_ports(self.pointer, procedure, output, n))
        ports = []
        for i in range(n[0]):
            check(lib.anellm_ane_get_port(self.pointer, procedure, output, i, port))
            shape = tuple(port.shape[d] for d in range(port.rank))
            dtype = np.dtype(_DTYPES[text(port.dtype)])
            ports.append(Port(text(port.name), dtype, shape, port.declared_position, port.symbol, port.bytes))
        return ports

    def inputs(self, procedure: int = 0) -> list[Port]:
        """Return the inputs of a function, in binding order."""
        return self._ports(procedure, output=False)

    def outputs(self, procedure: int = 0) -> list[Port]:
        """Return the outputs of a function, in binding order."""
        return self._ports(procedure, output=True)

    def request(
        self,
        inputs: Sequence[Surface],
        outputs: Sequence[Surface],
        *,
        input_indices: Sequence[int] | None = None,
        output_indices: Sequence[int] | None = None,
        procedure: int = 0,
    ) -> Request:
        """Return an evaluation over surfaces bound by position, as the private API does: names are not looked at.

        Raises:
            EvalError: with what the real API would answer.
        """
        a, b = list(inputs), list(outputs)
        ai = list(range(len(a))) if input_indices is None else list(input_indices)
        bi = list(range(len(b))) if output_indices is None else list(output_indices)
        if len(ai) != len(a) or len(bi) != len(b):
            raise InvalidError("evaluate: expected one index for each surface")
        out = ffi.new("anellm_ane_request **")
        check(
            lib.anellm_ane_request_create(
                self.pointer,
                out,
                procedure,
                ffi.new("anellm_ane_surface *[]", [s.pointer for s in a]),
                ffi.new("int32_t[]", ai),
                len(a),
                ffi.new("anellm_ane_surface *[]", [s.pointer for s in b]),
                ffi.new("int32_t[]", bi),
                len(b),
            )
        )
        return Request(self, out[0])

    def evaluate(self, inputs: Sequence[Surface], outputs: Sequence[Surface], **binding: Any) -> None:
        """Evaluate once; the arguments are those of request().

        Raises:
            EvalError: with what the real API would answer.
        """
        request = self.request(inputs, outputs, **binding)
        try:
            request.evaluate()
        finally:
            request.close()

    def run(self, inputs: Mapping[str, np.ndarray], procedure: int = 0) -> dict[str, np.ndarray]:
        """Evaluate on arrays by name.

        Args:
            inputs: an array for each input, of its shape; numbers are converted to its dtype.
            procedure: which function.

        Returns:
            An array for each output.

        Raises:
            InvalidError: on a missing or unknown name, or a wrong shape.
            EvalError: with what the real API would answer.
        """
        ports, results = self.inputs(procedure), self.outputs(procedure)
        names = [port.name for port in ports]
        if sorted(inputs) != sorted(names):
            raise InvalidError(f"inputs: expected {', '.join(names)}, found {', '.join(inputs) or 'none'}")
        sizes = [max([self._device.min_surface_bytes, *(port.bytes for port in side)]) for side in (ports, results)]
        surfaces = []
        for port in ports:
            array = np.asarray(inputs[port.name])
            if array.shape != port.shape:
                raise InvalidError(f"input {port.name}: expected shape {port.shape}, found {array.shape}")
            if array.dtype.kind not in "fiub":
                raise InvalidError(f"input {port.name}: expected numbers, found {array.dtype}")
            surfaces.append(self._device.surface(sizes[0]))
            with np.errstate(over="ignore"):
                surfaces[-1].write(array.astype(port.dtype))
        written = [self._device.surface(sizes[1]) for _ in results]
        symbols = [[port.symbol for port in side] for side in (ports, results)]
        self.evaluate(surfaces, written, input_indices=symbols[0], output_indices=symbols[1], procedure=procedure)
        return {p.name: s.read(p.dtype, p.shape) for p, s in zip(results, written, strict=True)}

    def findings(self) -> list[Finding]:
        """Return what was silently wrong, in compiling and in the evaluations so far."""
        n, finding = ffi.new("int64_t *"), ffi.new("anellm_sim_finding *")
        check(lib.anellm_sim_count_findings(self.pointer, n))
        found = []
        for i in range(n[0]):
            check(lib.anellm_sim_get_finding(self.pointer, i, finding))
            found.append(
                Finding(text(finding.rule), finding.line, finding.column, int(finding.times), text(finding.text))
            )
        return found


class Request:
    """An evaluation over surfaces, to be done any number of times; made by Program.request()."""

    def __init__(self, program: Program, pointer: Any) -> None:
        """Own a request.

        Args:
            program: what is evaluated.
            pointer: the C object.
        """
        self._program = program
        self._handle = Handle(pointer, lib.anellm_ane_request_free, "Request")

    def evaluate(self) -> None:
        """Evaluate.

        Raises:
            EvalError: with what the real API would answer.
        """
        check(lib.anellm_ane_evaluate(self._program.pointer, self._handle.pointer))

    def close(self) -> None:
        """Free it."""
        self._handle.close()
