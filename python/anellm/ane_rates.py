"""Constants of a chip from the times that a self-test took (anellm.ane_selftest)."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Sequence
from typing import TYPE_CHECKING, Final

from anellm.sim_chips import Chip

if TYPE_CHECKING:
    from anellm.ane_selftest import Tested

_RATES: Final = ("activation_gb_s", "matmul_tflops", "weight_gb_s", "conv_tflops")
_BUSY: Final = 1.25  # an evaluation shorter than this times the dispatch says nothing about rates
_PRODUCTS: Final = ("wo_fwd", "ffn_bwd_w2", "ffn_bwd_w13", "wo_bwd", "qkv_bwd")  # nothing but one product
_CONVS: Final = ("qkv_bwd_static",)  # nothing but one product with constants


def _median(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.median(known) if known else None


def measure(rows: Sequence[Tested]) -> dict[str, float]:
    """Return constants of a chip profile, as far as the rows of programs that are right tell.

    The dispatch is the shortest evaluation of all. Rates are the best that any single product reached beside the
    dispatch, so the engine may be faster.
    """
    rows = [row for row in rows if row.state == "ok"]
    found = {name: _median([getattr(row, name) for row in rows]) for name in ("load_ms", "unload_ms")}
    found["compile_ms"] = _median([row.compile_ms for row in rows if not row.cached])
    times = [(row, row.evaluate_ms) for row in rows if row.evaluate_ms is not None]
    if times:
        dispatch = min(ms for _, ms in times)
        found["dispatch_us"] = dispatch * 1e3
        for names, size, rate, tflops in (
            (_PRODUCTS, "operand_bytes", "activation_gb_s", "matmul_tflops"),
            (_CONVS, "weight_bytes", "weight_gb_s", "conv_tflops"),
        ):
            busy = [(row, ms - dispatch) for row, ms in times if row.program in names and ms >= _BUSY * dispatch]
            found[rate] = max((getattr(row, size) / ms / 1e6 for row, ms in busy), default=None)
            found[tflops] = max((row.flops / ms / 1e9 for row, ms in busy), default=None)
    return {name: value for name, value in found.items() if value is not None and value > 0}


def measured_chip(base: Chip, architecture: str, where: str, values: dict[str, float]) -> Chip:
    """Return a chip with measured constants in the place of a known one's.

    Args:
        base: the nearest known chip.
        architecture: what the device says it is; "" keeps the base's.
        where: what was measured, in words.
        values: constant -> measured.
    """
    source = f"measured by --ane-selftest on {where}"
    best = dict.fromkeys(_RATES, f"{source}: the most that a product reached")
    fits = architecture.isascii() and 0 < len(architecture) <= 15
    return dataclasses.replace(
        base,
        name=f"{base.name.encode()[:8].decode(errors='ignore')}-tested",
        architecture=architecture if fits else base.architecture,
        description=f"{base.description}; times {source}",
        constants={**base.constants, **values},
        sources={**base.sources, **{name: best.get(name, source) for name in values}},
    )
