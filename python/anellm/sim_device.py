"""Neural Engine programs from Python: compile MIL text, run it on NumPy arrays, see what was silently wrong.

>>> sim = Simulator("m4")
>>> program = sim.compile(text, {"@model_path/weights/w.bin": blob})
>>> y = program.run({"x": x})["y"]
>>> program.findings()
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from anellm._ffi import Handle, check, ffi, lib, text
from anellm.errors import InvalidError
from anellm.sim_chips import Chip, load_chip

NUMERICS: Final = {"exact": lib.ANELLM_SIM_EXACT, "fast": lib.ANELLM_SIM_FAST}
MACS: Final = {"q15.16": lib.ANELLM_SIM_Q15_16, "wide_fp32": lib.ANELLM_SIM_WIDE_FP32}
ROWS: Final = {
    "error": lib.ANELLM_SIM_ROWS_ERROR,
    "truncate": lib.ANELLM_SIM_ROWS_TRUNCATE,
    "any": lib.ANELLM_SIM_ROWS_ANY,
}
FAULTS: Final = {
    "compile-fails": lib.ANELLM_SIM_COMPILE_FAILS,
    "load-fails": lib.ANELLM_SIM_LOAD_FAILS,
    "eval-fails": lib.ANELLM_SIM_EVAL_FAILS,
    "eval-inf": lib.ANELLM_SIM_EVAL_INF,
    "eval-stale": lib.ANELLM_SIM_EVAL_STALE,
    "eval-swapped": lib.ANELLM_SIM_EVAL_SWAPPED,
    "eval-slow": lib.ANELLM_SIM_EVAL_SLOW,
}
_DTYPES: Final[dict[str, type[np.generic]]] = {
    "fp16": np.float16,
    "fp32": np.float32,
    "bool": np.bool_,
    "int8": np.int8,
    "uint8": np.uint8,
    "int16": np.int16,
}
WEIGHTS_PATH = "@model_path/weights/"


def _choice(name: str, value: str, known: Mapping[str, int]) -> int:
    if value not in known:
        raise InvalidError(f"{name}: expected one of {', '.join(known)}, found {value!r}")
    return known[value]


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

    def __init__(self, device: Simulator, size_bytes: int) -> None:
        """Make one; Simulator.surface() does the same."""
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


class Simulator:
    """A simulated Neural Engine."""

    def __init__(
        self,
        chip: str | Chip = "m4",
        *,
        numerics: str = "exact",
        mac: str = "q15.16",
        rows: str = "error",
        strict: bool = False,
        lenient_blobs: bool = False,
        allow_delta_reload: bool = False,
        max_memory_bytes: int = 0,
    ) -> None:
        """Open one.

        Args:
            chip: name of a chip, path of a ``.json`` file, or a Chip.
            numerics: ``exact``, or ``fast``: an fp32 product where a bound proves that it makes no difference.
            mac: ``q15.16``, or ``wide_fp32``: sums in fp32, nothing dropped.
            rows: what becomes of rows that are no multiple of 16: ``error``, ``truncate`` (silently), ``any``.
            strict: also refuse what only some sources report as refused.
            lenient_blobs: read damaged weight files on every chip.
            allow_delta_reload: let reload() take new weights, which is not proven to work.
            max_memory_bytes: for the tensors of one program; 0: 4 GiB.

        Raises:
            InvalidError: on an unknown chip or value.
            DataError: on a damaged chip file.
        """
        self.chip = chip if isinstance(chip, Chip) else load_chip(chip)
        options = ffi.new("anellm_sim_options *")
        options.numerics = _choice("numerics", numerics, NUMERICS)
        options.mac = _choice("mac", mac, MACS)
        options.rows = _choice("rows", rows, ROWS)
        options.strict, options.lenient_blobs, options.allow_delta_reload = strict, lenient_blobs, allow_delta_reload
        options.max_memory_bytes = max_memory_bytes
        out = ffi.new("anellm_ane **")
        check(lib.anellm_ane_open(out, b"sim", self.chip.c_profile(), options))
        self._handle = Handle(out[0], lib.anellm_ane_close, "Simulator")

    @property
    def pointer(self) -> Any:
        """Return the C pointer."""
        return self._handle.pointer

    def close(self) -> None:
        """Let go of it; programs and surfaces made with it live on."""
        self._handle.close()

    def compile(self, mil: str | bytes, weights: Mapping[str, bytes] | None = None, *, load: bool = True) -> Program:
        """Compile MIL text.

        Args:
            mil: the text.
            weights: content of weight files by the path that the text uses (``@model_path/weights/w.bin``).
            load: load it as well.

        Raises:
            CompileError: line:column, the rule, and what the real API would answer; see failure().
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
        """Return the last failure as the real API reports it."""
        error = ffi.new("anellm_ane_error *")
        check(lib.anellm_ane_get_error(self.pointer, error))
        return DeviceFailure(text(error.domain), int(error.code), text(error.text), text(error.detail))

    def inject(self, fault: str, *, after: int = 0, count: int = -1, slow_ms: float = 0.0) -> None:
        """Make something go wrong on purpose.

        Args:
            fault: one of FAULTS.
            after: how many calls still go well.
            count: how many go wrong then; -1 for all.
            slow_ms: for ``eval-slow``.

        Raises:
            InvalidError: on an unknown fault or a value out of range.
        """
        check(lib.anellm_sim_inject(self.pointer, _choice("fault", fault, FAULTS), after, count, slow_ms))

    def clear_faults(self) -> None:
        """End all injected faults."""
        check(lib.anellm_sim_clear_faults(self.pointer))

    def idle(self, seconds: float) -> None:
        """Let modelled time pass."""
        check(lib.anellm_sim_idle(self.pointer, seconds))


class Program:
    """A compiled program; made by Simulator.compile()."""

    def __init__(self, device: Simulator, pointer: Any) -> None:
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

    def evaluate(
        self,
        inputs: Sequence[Surface],
        outputs: Sequence[Surface],
        *,
        input_indices: Sequence[int] | None = None,
        output_indices: Sequence[int] | None = None,
        procedure: int = 0,
    ) -> None:
        """Evaluate over surfaces bound by position, as the private API does: names are not looked at.

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
        request = Handle(out[0], lib.anellm_ane_request_free, "Request")
        try:
            check(lib.anellm_ane_evaluate(self.pointer, request.pointer))
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
        least = int(self._device.chip.constants["min_surface_bytes"])
        sizes = [max([least, *(port.bytes for port in side)]) for side in (ports, results)]
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
