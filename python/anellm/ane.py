"""Neural Engines that models compute on: the device ``ane``, and ``ane-sim``, its simulation on any machine."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from anellm._ffi import Handle, check, ffi, lib, ptr, text
from anellm.ane_device import Engine
from anellm.device import QOS, AneOptions, device_library, no_ane_platform, resolve_device
from anellm.errors import FallbackWarning, InvalidError, UnavailableError, UnsupportedError
from anellm.sim_chips import Chip, load_chip
from anellm.sim_device import Simulator


def share(ane_flops: float, cpu_flops: float) -> float | None:
    """Return the part of operations that were the engine's, 0 to 1; None when there were none."""
    total = ane_flops + cpu_flops
    return ane_flops / total if total > 0 else None


class AneStats(NamedTuple):
    """What the engine did for a model.

    Attributes:
        programs: programs that are compiled now: at most 16, or 6 a layer with mode "static".
        compiles: compiles of the device so far, failed ones too.
        evaluations: evaluations since the model came to the engine.
        rescales: changes of a gradient's power of two, since then.
        retries: evaluations repeated with a smaller one after an overflow, since then.
        surface_bytes: memory of all surfaces.
        ane_flops: operations of matrix products on the engine in the last forward and backward; a multiply-add is 2.
        cpu_flops: the same on the CPU.
        total_ane_flops: operations on the engine in all forwards and backwards since then.
        total_cpu_flops: the same on the CPU.
        compile_ms: time spent in compiling and loading programs, since then.
        max_activation: largest magnitude in the residual stream in the last forward.
        max_activation_layer: the layer that has it.
        n_refusals: programs that the engine refused, since then.
    """

    programs: int
    compiles: int
    evaluations: int
    rescales: int
    retries: int
    surface_bytes: int
    ane_flops: float
    cpu_flops: float
    total_ane_flops: float
    total_cpu_flops: float
    compile_ms: float
    max_activation: float
    max_activation_layer: int
    n_refusals: int

    @property
    def flops_share(self) -> float | None:
        """Return the part of the last pass's operations that were the engine's, 0 to 1; None before the first."""
        return share(self.ane_flops, self.cpu_flops)


class Refusal(NamedTuple):
    """A program that an engine refused to compile or load: the CPU computes its part of the blocks, in all layers.

    Attributes:
        program: its name.
        part: "attention forward and backward", "attention backward", "mlp forward" or "mlp backward".
        batch_size: sequences (B) of the shape that it was refused for; larger ones are not tried either.
        seq_len: tokens (T) of it.
        domain, code, text: the error as the system reports it; "", 0, "" where it does not.
        message: all of it in a line.
    """

    program: str
    part: str
    batch_size: int
    seq_len: int
    domain: str
    code: int
    text: str
    message: str

    def __str__(self) -> str:
        return f"the Neural Engine refused {self.message}; the CPU computes {self.part} in all layers"


class AneQos(NamedTuple):
    """The quality of service that calls of programs to come ask macOS for.

    Attributes:
        value: a number of macOS' qos_class_t.
        measured: it was chosen by measurement, in this process.
        us: class -> median time of a small evaluation, of those that were measured, in microseconds.
    """

    value: int
    measured: bool
    us: dict[str, float]

    @property
    def name(self) -> str:
        """Return the name of the class, or the number in words where it has none."""
        return next((name for name in QOS[1:] if qos_value(name) == self.value), str(self.value))

    def __str__(self) -> str:
        """Return it in words."""
        times = ", ".join(f"{name} {us:.0f} us" for name, us in self.us.items())
        how = f", measured: {times or 'nothing, all failed'}" if self.measured else ""
        return f"{self.name} ({self.value}){how}"


def qos_value(name: str) -> int:
    """Return the number of a class of QOS."""
    return int(getattr(lib, f"ANELLM_ANE_QOS_{name.upper().replace('-', '_')}"))


class AneDevice(Engine):
    """An open Neural Engine.

    Attributes:
        name: "ane" or "ane-sim".
        options: what it was opened with.
        chip: the chip that is simulated; None for a real one.
        simulator: the simulation, for its faults and its clock; None for a real one.
    """

    def __init__(self, name: str, options: AneOptions) -> None:
        """Open one.

        Args:
            name: "ane-sim"; or "ane": the engine of this machine, or what the library is that ANELLM_ANE_DEVICE names.
            options: the chip and the numerics to simulate.

        Raises:
            ConfigError: on an unknown chip.
            DataError: on a damaged chip file.
            UnavailableError: when there is no such device; says why.
        """
        self.name, self.options = name, options
        self.chip: Chip | None = None
        self.simulator: Simulator | None = None
        if name == "ane-sim":
            self.chip = load_chip(options.chip)
            self.simulator = Simulator(self.chip, numerics=options.numerics)
            self.min_surface_bytes = self.simulator.min_surface_bytes
            return
        library = device_library()
        if library is None and (why := no_ane_platform()) is not None:
            raise UnavailableError(f"device {name}: {why}")
        out = ffi.new("anellm_ane **")
        limits = load_chip(options.chip)
        check(lib.anellm_ane_open(out, (library or "ane").encode(), limits.c_profile(), ffi.NULL))
        self.min_surface_bytes = int(limits.constants["min_surface_bytes"])
        self._handle = Handle(out[0], lib.anellm_ane_close, "device")
        if options.qos != "auto":
            check(lib.anellm_ane_set_qos(self.pointer, qos_value(options.qos)))

    @property
    def pointer(self) -> Any:
        """Return the C pointer."""
        return self._handle.pointer if self.simulator is None else self.simulator.pointer

    def information(self) -> dict[str, str | int]:
        """Return what the device tells of itself and its machine: "" or 0 where it does not know."""
        info = ffi.new("anellm_ane_info *")
        check(lib.anellm_ane_get_info(self.pointer, info))
        texts = ("device", "architecture", "chip", "system")
        return {name: text(getattr(info, name)) for name in texts} | {
            name: int(getattr(info, name)) for name in ("n_engines", "n_cores")
        }

    def qos(self) -> AneQos | None:
        """Return the quality of service in force, which is measured now if it is to be; None without such a thing."""
        found = ffi.new("anellm_ane_qos *")
        try:
            check(lib.anellm_ane_get_qos(self.pointer, found))
        except UnsupportedError:
            return None
        names = {qos_value(name): name for name in QOS[1:]}
        times = zip(found.values, found.us, strict=True)
        return AneQos(int(found.value), bool(found.measured), {names[q]: float(us) for q, us in times if us > 0})

    def describe(self) -> dict[str, Any]:
        """Return its name and settings, for metrics.jsonl and the manifest."""
        simulated = self.chip is not None
        qos = self.qos()
        return {
            "device": self.name,
            "chip": self.chip.name if self.chip is not None else None,
            "numerics": self.options.numerics if simulated else None,
            "ane_scaling": "on" if self.options.scaling else "off",
            "ane_softmax": self.options.softmax,
            "ane_fallback": self.options.fallback,
            "ane_mode": self.options.mode,
            **({} if qos is None else {"ane_qos": qos.name, "ane_qos_measured": qos.measured}),
        }

    def __str__(self) -> str:
        """Return its name with the chip and numerics of a simulation."""
        return (
            self.name if self.chip is None else f"{self.name}, chip {self.chip.name}, {self.options.numerics} numerics"
        )


def c_options(options: AneOptions) -> Any:
    """Return the options as a C struct."""
    c = ffi.new("anellm_ane_options *")
    c.scaling = int(options.scaling)
    c.softmax_cpu = int(options.softmax == "cpu")
    c.async_dw = 1
    c.fallback = int(options.fallback == "cpu")
    c.mode = lib.ANELLM_ANE_STATIC if options.mode == "static" else lib.ANELLM_ANE_DYNAMIC
    c.compile_budget = options.compile_budget
    return c


class ModelEngine:
    """The Neural Engine of a model: Model.ane.

    Attributes:
        device: the device.
        refusals: programs that it refused so far, whose part the CPU computes.
    """

    def __init__(self, model: Handle, n_layers: int, device: AneDevice) -> None:
        """Let a model compute on a device from now on.

        Args:
            model: the C model.
            n_layers: its number of layers.
            device: the device.

        Raises:
            UnsupportedError: when a dimension of the model is beyond what any engine takes.
            BusyError: when another thread uses the model.
        """
        self.device, self._model, self._n_layers = device, model, n_layers
        check(lib.anellm_model_attach_ane(model.pointer, device.pointer, c_options(device.options)))
        model.kept = device
        self.refusals: list[Refusal] = []

    def detach(self) -> None:
        """Let the model compute on the CPU again."""
        check(lib.anellm_model_attach_ane(self._model.pointer, ffi.NULL, ffi.NULL))
        self._model.kept = None

    def stats(self) -> AneStats:
        """Return what the engine did for the model."""
        stats = ffi.new("anellm_ane_stats *")
        check(lib.anellm_model_ane_stats(self._model.pointer, stats))
        return AneStats(*(getattr(stats, name) for name in AneStats._fields))

    def hold(self, first: int, last: int) -> None:
        """Let only programs of layers first <= layer < last be compiled from now on; those of others are freed at once.

        For mode "static": with "dynamic" programs belong to no layer, and nothing happens.

        Raises:
            TokenRangeError: unless 0 <= first <= last <= the number of layers.
        """
        check(lib.anellm_model_ane_hold(self._model.pointer, first, last))

    def note_refusals(self) -> None:
        """Take note of what was refused in the last forward, and warn of each program once."""
        n = self.stats().n_refusals
        found = ffi.new("anellm_ane_refusal *")
        for index in range(len(self.refusals), n):
            check(lib.anellm_model_ane_refusal(self._model.pointer, index, found))
            error, message = found.error, " ".join(text(found.message).split())
            refusal = Refusal(
                text(found.program), text(found.part), int(found.B), int(found.T),
                text(error.domain), int(error.code), text(error.text), message,
            )  # fmt: skip
            first = all(refusal.program != known.program for known in self.refusals)
            self.refusals.append(refusal)
            if first:
                warnings.warn(str(refusal), FallbackWarning, stacklevel=4)

    def activations(self) -> list[float]:
        """Return the largest magnitude in the residual stream behind each layer, in the last forward."""
        found = np.zeros(self._n_layers, np.float32)
        pointer = ptr(found, np.float32, write=True)
        check(lib.anellm_model_ane_activations(self._model.pointer, pointer, self._n_layers))
        return [float(value) for value in found]

    def exponents(self) -> list[int]:
        """Return the state of the gradients' powers of two: with it a run goes on exactly where it stopped."""
        found = np.zeros(self._n_exponents(), np.int32)
        pointer = ptr(found, np.int32, write=True)
        check(lib.anellm_model_ane_exponents(self._model.pointer, pointer, found.size, 0))
        return [int(value) for value in found]

    def set_exponents(self, values: Sequence[int]) -> None:
        """Take the state that exponents() gave.

        Raises:
            InvalidError: when it is none of this model's.
        """
        n = self._n_exponents()
        if len(values) != n:
            raise InvalidError(f"exponents: expected {n} numbers, found {len(values)}")
        array = np.array(values, np.int32)
        check(lib.anellm_model_ane_exponents(self._model.pointer, ptr(array, np.int32), n, 1))

    def _n_exponents(self) -> int:
        n = ffi.new("int64_t *")
        check(lib.anellm_model_ane_n_exponents(self._model.pointer, n))
        return int(n[0])


def check_usable(device: str, options: AneOptions | None) -> None:
    """Refuse a device that cannot be used here, or a chip that there is not, before anything is made for it.

    Raises:
        ConfigError, DataError, UnavailableError: see AneDevice.
    """
    name = resolve_device(device)
    if name == "ane-sim":
        load_chip((options or AneOptions()).chip)
    elif name == "ane":
        AneDevice(name, options or AneOptions())


def memory_bytes(c_config: Any, batch_size: int, seq_len: int, *, training: bool, options: AneOptions) -> int:
    """Return the memory of surfaces and buffers that a model takes on an ANE device besides its own.

    Args:
        c_config: the model's dimensions as a C struct.
        batch_size: sequences (B) in a forward pass.
        seq_len: tokens (T) in each.
        training: count what backward needs.
        options: how it computes.

    Raises:
        UnsupportedError: when a dimension of the model is beyond what any engine takes.
    """
    found = ffi.new("int64_t *")
    check(lib.anellm_ane_memory(found, c_config, batch_size, seq_len, int(training), c_options(options)))
    return int(found[0])
