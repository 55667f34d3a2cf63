"""Neural Engine programs from Python: compile MIL text, run it on NumPy arrays, see what was silently wrong.

>>> sim = Simulator("m4")
>>> program = sim.compile(text, {"@model_path/weights/w.bin": blob})
>>> y = program.run({"x": x})["y"]
>>> program.findings()
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from anellm._ffi import Handle, check, ffi, lib
from anellm.ane_device import Engine
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


def _choice(name: str, value: str, known: Mapping[str, int]) -> int:
    if value not in known:
        raise InvalidError(f"{name}: expected one of {', '.join(known)}, found {value!r}")
    return known[value]


class Simulator(Engine):
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
        self.min_surface_bytes = int(self.chip.constants["min_surface_bytes"])
        self._handle = Handle(out[0], lib.anellm_ane_close, "Simulator")

    @property
    def pointer(self) -> Any:
        """Return the C pointer."""
        return self._handle.pointer

    def close(self) -> None:
        """Let go of it; programs and surfaces made with it live on."""
        self._handle.close()

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
