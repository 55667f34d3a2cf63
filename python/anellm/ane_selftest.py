"""Put a Neural Engine to the test: compile, evaluate, compare and time each program of a model.

Made for a machine that nobody has tried yet: a program that is refused or wrong is one row of the table, and the
others go on. What comes out is held against float64, and, on a real engine, against the simulator's answer to the same
bytes. The times make a chip profile for the simulator.
"""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np

from anellm.ane import AneDevice
from anellm.ane_device import Engine, Program
from anellm.ane_rates import measure, measured_chip
from anellm.ane_reference import Arrays, Batch, matrices, pack, program_inputs, program_outputs, unpack
from anellm.config import ModelConfig
from anellm.errors import AnellmError, CompileError, EvalError
from anellm.mil import AneProgram, ane_programs, bake
from anellm.sim_chips import Chip, chip_values, load_chip, nearest_chip
from anellm.sim_device import Simulator

MAX_ERROR: Final = 0.01  # relative Frobenius error, which leaves a cosine of 0.99995; simulated chips have 0.0015
_REPEATS: Final = 20
_SECONDS: Final = 0.5  # of repeated evaluations per program


@dataclass(frozen=True)
class Size:
    """A shape to test.

    Attributes:
        name: what the table calls it.
        batch: a model's shape with a batch.
        only: names of programs; empty: all.
        mode: ``static``: programs with weights in them; those that are ``dynamic`` ones as well are left out.
    """

    name: str
    batch: Batch
    only: tuple[str, ...] = ()
    mode: str = "dynamic"

    def programs(self) -> list[AneProgram]:
        """Return the programs of this size that are tested."""
        found = ane_programs(self.batch.config, self.batch.B, self.batch.T, mode=self.mode)
        left = ("static",) if self.mode == "static" else ("dynamic", "any")
        return [p for p in found if p.mode in left and (not self.only or p.name in self.only)]


_LEAST: Final = ModelConfig(
    dim=32, hidden_dim=32, n_layers=1, n_heads=1, n_kv_heads=1, head_dim=32, vocab_size=32, max_seq_len=32
)
_STORIES110M: Final = ModelConfig.from_preset("stories110m")
_GPT2: Final = ModelConfig.from_preset("gpt2")
_WIDE: Final = ModelConfig(
    dim=2048, hidden_dim=32, n_layers=1, n_heads=32, n_kv_heads=32, head_dim=64, vocab_size=32, max_seq_len=32
)
# A small model with padding, grouped queries and q/k-norm.
SMALL: Final = Batch(ModelConfig.from_preset("tiny", n_kv_heads=2, qk_norm=True), 2, 40)
SIZES: Final = (
    Size("least", Batch(_LEAST, 1, 32), ("wo_fwd",)),  # for the dispatch
    Size("small", SMALL),
    Size("few rows", Batch(_STORIES110M, 1, 32), ("wo_bwd", "ffn_bwd_w2")),  # moving takes longer than computing
    Size("stories110m", Batch(_STORIES110M, 1, 256)),
    Size("many rows", Batch(_STORIES110M, 4, 256), ("wo_bwd",)),  # the other way round
    Size("small", SMALL, mode="static"),
    Size("stories110m", Batch(_STORIES110M, 1, 256), mode="static"),
    Size("many rows", Batch(_STORIES110M, 4, 256), ("qkv_bwd_static",), "static"),
    Size("many weights", Batch(_WIDE, 1, 32), ("qkv_bwd_static",), "static"),
    Size("gpt2", Batch(_GPT2, 4, 64), ("attn_fwd", "ffn_fwd")),  # biases, GELU
    Size("gpt2", Batch(_GPT2, 4, 64), ("attn_fwd_static", "ffn_fwd_static", "ffn_bwd_static"), "static"),
)


@dataclass(frozen=True)
class Output:
    """An output field of a program.

    Attributes:
        name: the field.
        error: relative Frobenius error against float64; None where a value is not finite.
        cosine: with float64; None likewise.
        bad: values that are infinite or were not written.
        from_simulator: relative Frobenius distance from the simulator's result; None without one.
    """

    name: str
    error: float | None
    cosine: float | None
    bad: int
    from_simulator: float | None

    @property
    def ok(self) -> bool:
        """Return whether it is as near as it should be."""
        return self.error is not None and self.error <= MAX_ERROR


@dataclass(kw_only=True)
class Tested:
    """What became of a program.

    Attributes:
        program: its name.
        size: name of its size.
        state: "ok", "wrong" or "refused".
        stage: where it was refused: "compile", "load", "evaluate", "unload"; "" otherwise.
        message: the error's message.
        domain, code, text: the error as the system reports it.
        compile_ms, load_ms, first_ms, evaluate_ms, unload_ms: times; first_ms is that of the first evaluation,
            evaluate_ms the median of more.
        cached: it was not compiled, because macOS had it.
        flops: of an evaluation.
        operand_bytes: of the input's fields.
        weight_bytes: of constants that are weights.
        outputs: what came out.
    """

    program: str
    size: str
    state: str = "refused"
    stage: str = ""
    message: str = ""
    domain: str = ""
    code: int = 0
    text: str = ""
    compile_ms: float | None = None
    load_ms: float | None = None
    first_ms: float | None = None
    evaluate_ms: float | None = None
    unload_ms: float | None = None
    cached: bool = False
    flops: float = 0.0
    operand_bytes: int = 0
    weight_bytes: int = 0
    outputs: list[Output] = field(default_factory=list)

    @property
    def refusal(self) -> str:
        """Return the error in a line: what the system reports if it does, else the message."""
        if not self.text and not self.domain:
            return self.message
        return " ".join(f"{self.domain or 'no NSError'}, code {self.code}: {self.text}".split())

    @property
    def worst(self) -> Output:
        """Return the output that is furthest off."""
        return max(self.outputs, key=lambda o: float("inf") if o.error is None else o.error)


# ---- one program -----------------------------------------------------------------------------------------------------


class _Clock:
    """Time in ms: modelled on the simulator, real on anything else."""

    def __init__(self, device: AneDevice) -> None:
        self._device = device

    def now(self) -> float:
        if self._device.simulator is not None:
            return self._device.counters()["modelled_ms"]
        return time.perf_counter() * 1e3


def _off(found: np.ndarray, expected: np.ndarray) -> float:
    size = float(np.linalg.norm(expected))
    distance = float(np.linalg.norm(found - expected))
    return distance / size if size > 0 else distance


def _compare(found: Arrays, expected: Arrays, simulated: Arrays | None) -> list[Output]:
    outputs = []
    for name, value in found.items():
        bad = int((~np.isfinite(value)).sum())
        near = None
        if simulated is not None and not bad and np.isfinite(simulated[name]).all():
            near = _off(value, simulated[name])
        error = cosine = None
        if not bad:
            error = _off(value, expected[name])
            sizes = float(np.linalg.norm(value) * np.linalg.norm(expected[name]))
            cosine = float(np.vdot(value, expected[name])) / sizes if sizes > 0 else 0.0
        outputs.append(Output(name, error, cosine, bad, near))
    return outputs


def _simulated(chip: Chip, program: AneProgram, plane: np.ndarray, batch: Batch) -> Arrays | None:
    """Return what the simulator makes of the same input; None where it refuses."""
    engine = Simulator(chip, numerics="fast")
    try:
        compiled = engine.compile(program.mil, program.files)
        return unpack(program, compiled.run({"a_input0": plane})["z_output0"], batch)
    except AnellmError:
        return None
    finally:
        engine.close()


def _evaluate(device: Engine, clock: _Clock, compiled: Program, program: AneProgram, plane: np.ndarray, row: Tested,
              repeats: int) -> np.ndarray:  # fmt: skip
    """Evaluate over surfaces of our own, first on NaN, which no engine writes (Q46); return the first output."""
    given, taken = device.surface(program.input.bytes), device.surface(program.output.bytes)
    given.write(plane)
    taken.write(np.full(len(taken) // 2, np.nan, np.float16))
    request = compiled.request([given], [taken])
    try:
        start = clock.now()
        request.evaluate()
        row.first_ms = clock.now() - start
        found = taken.read(np.float16, program.output.shape)
        times: list[float] = []
        end = time.perf_counter() + _SECONDS
        while not times or (len(times) < repeats and time.perf_counter() < end):
            start = clock.now()
            request.evaluate()
            times.append(clock.now() - start)
        row.evaluate_ms = statistics.median(times)
    finally:
        request.close()
    return found


def _try(device: AneDevice, program: AneProgram, plane: np.ndarray, row: Tested, repeats: int) -> np.ndarray | None:
    """Compile, load, evaluate, unload; fill in the row. Return the output, or None when it is refused."""
    clock, compiled = _Clock(device), None
    try:
        row.stage = "compile"
        hits = device.counters()["cache_hits"]
        start = clock.now()
        compiled = device.compile(program.mil, program.files, load=False)
        row.compile_ms = clock.now() - start
        row.cached = device.counters()["cache_hits"] > hits
        row.stage = "load"
        start = clock.now()
        compiled.load()
        row.load_ms = clock.now() - start
        row.stage = "evaluate"
        found = _evaluate(device, clock, compiled, program, plane, row, repeats)
        row.stage = "unload"
        start = clock.now()
        compiled.unload()
        row.unload_ms = clock.now() - start
    except AnellmError as error:
        row.message = " ".join(str(error).split())
        if isinstance(error, (CompileError, EvalError)):
            failure = device.failure()
            row.domain, row.code, row.text = failure.domain, failure.code, failure.text
        return None
    finally:
        if compiled is not None:
            compiled.close()
    row.stage = ""
    return found


def check_program(
    device: AneDevice, chip: Chip | None, program: AneProgram, size: Size, values: Arrays, repeats: int
) -> Tested:
    """Return what becomes of a program.

    Args:
        device: what is tested.
        chip: what is simulated beside it, unless the device is a simulator itself; None: nothing.
        program: the program.
        size: its shape.
        values: the input fields.
        repeats: most evaluations to time.
    """
    if program.weights:
        program = dataclasses.replace(program, files=bake(program.files, matrices(values, size.batch)))
    operands = 2 * sum(where.channels * where.columns for where in program.input.fields)
    row = Tested(program=program.name, size=size.name, flops=program.flops, operand_bytes=operands)
    row.weight_bytes = sum(len(program.files[path]) for path in program.weights)
    plane = pack(program, values, size.batch, unused=0.0)
    output = _try(device, program, plane, row, repeats)
    if output is None:
        return row
    real = device.simulator is None
    simulated = _simulated(chip, program, plane, size.batch) if real and chip is not None else None
    expected = program_outputs(program, values, size.batch)
    row.outputs = _compare(unpack(program, output, size.batch), expected, simulated)
    row.state = "ok" if all(output.ok for output in row.outputs) else "wrong"
    return row


# ---- all of them -----------------------------------------------------------------------------------------------------


def _show(row: Tested) -> None:
    """Print what follows the names in a row of the table."""
    if row.state == "refused":
        print(f"refused at {row.stage}: {row.refusal}")
        return
    worst = row.worst
    if worst.error is None or worst.cosine is None:
        amount = f"{worst.name}: {worst.bad} values infinite or not written"
    else:
        distances = [output.from_simulator for output in row.outputs]
        known = [distance for distance in distances if distance is not None]
        near = f"{max(known):9.6f}" if known else "        -"
        amount = f"{worst.error:9.6f} {worst.cosine:10.7f} {near}"
        if not worst.ok:
            amount += f" in {worst.name}"
    print(f"{row.state:5} {row.compile_ms:10.3f} {row.evaluate_ms:11.3f}  {amount}")


def _compile_again(device: AneDevice, sizes: Sequence[Size], rows: Sequence[Tested]) -> dict[str, float]:
    """Return the time to compile a program that was compiled before (Q62), of the first that compiles."""
    done = {(row.program, row.size) for row in rows if row.compile_ms is not None}
    program = next((p for size in sizes for p in size.programs() if (p.name, size.name) in done), None)
    if program is None:
        return {}
    clock = _Clock(device)
    start = clock.now()
    try:
        device.compile(program.mil, program.files, load=False).close()
    except AnellmError:
        return {}
    return {"cached_compile_ms": clock.now() - start}


def base_chip(device: AneDevice) -> Chip:
    """Return the known chip that is nearest to a device."""
    if device.chip is not None:
        return device.chip
    return load_chip(nearest_chip(str(device.information()["architecture"]), device.options.chip))


def selftest(device: AneDevice, sizes: Sequence[Size], repeats: int = _REPEATS) -> tuple[list[Tested], dict[str, Any]]:
    """Test a device, and print a table, a row as soon as it is known.

    Args:
        device: what to test.
        sizes: the shapes, SIZES but for tests.
        repeats: most evaluations of a program to time.

    Returns:
        What became of the programs; and what to write: a chip's JSON file, with the report under "selftest".
    """
    base, information = base_chip(device), device.information()
    modelled = device.simulator is not None
    repeats = 1 if modelled else repeats
    names = [str(information[key]) for key in ("chip", "architecture", "system") if information[key]]
    where = ", ".join(["ane-sim" if modelled else "ane", *names])
    print(f"{where}; nearest chip: {base.name}; times are {'modelled' if modelled else 'real'}, in ms")
    head = ("result", "compile", "evaluate", "rel. error", "cosine", "from sim.")
    print("{:16} {:12} {:6} {:>9} {:>11} {:>11} {:>10} {:>9}".format("program", "size", *head))
    rows = []
    for size in sizes:
        values = program_inputs(size.batch)
        for program in size.programs():
            # Named first: should the framework end the process, the last line says where.
            print(f"{program.name:16} {size.name:12} ", end="", flush=True)
            rows.append(check_program(device, base, program, size, values, repeats))
            _show(rows[-1])
    values_found = measure(rows) | _compile_again(device, sizes, rows)
    chip = measured_chip(base, str(information["architecture"]), where, values_found)
    if (qos := device.qos()) is not None:
        print(f"quality of service: {qos}")
    print("measured: " + (", ".join(f"{k} {v:.4g}" for k, v in sorted(values_found.items())) or "nothing"))
    states = [row.state for row in rows]
    if cached := sum(row.cached for row in rows):
        print(f"{cached} were not compiled: macOS had them from before; ANELLM_ANE_CACHE=off compiles them")
    print(f"{len(rows)} programs: " + ", ".join(f"{states.count(s)} {s}" for s in ("ok", "wrong", "refused")))
    report = {
        "device": device.name,
        "information": information,
        "qos": None if qos is None else qos._asdict(),
        "nearest_chip": base.name,
        "modelled_times": modelled,
        "max_error": MAX_ERROR,
        "measured": values_found,
        "programs": [dataclasses.asdict(row) for row in rows],
    }
    return rows, {**chip_values(chip), "selftest": report}
