"""Where the time of training steps on a Neural Engine goes: compiling, evaluating, moving, and what the CPU does."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Final

from anellm._ffi import check, ffi, lib, text

_MOST_SUMS: Final = 64  # of the C core
# Rows of the report: key, what it is called, the C core's spans on the calling thread. The names in the first column of
# the original trainer's report (ANE eval, IO, classifier, cross-entropy + residuals, RMSNorm) are kept where ours is
# the same part; here cross-entropy is in the classifier, residuals are added as outputs are read.
_CPU_ROWS: Final = (
    ("io_ms", "IO", ("write", "read", "copy", "scan", "stage")),
    ("classifier_ms", "classifier and cross-entropy", ("classifier",)),
    ("rmsnorm_ms", "RMSNorm", ("norm",)),
    ("elementwise_ms", "SwiGLU and RoPE", ("swiglu", "rope")),
    (
        "blocks_ms",
        "blocks on the CPU",
        ("attention", "attention_forward", "attention_backward", "mlp_forward", "mlp_backward"),
    ),
    ("wait_ms", "waiting for weight gradients", ("wait",)),
)
_DEVICE_ROWS: Final = (("compile_ms", "compiling"), ("ane_eval_ms", "ANE eval"))

Sums = dict[tuple[str, int], int]


def read_sums() -> Sums:
    """Return the C core's sums: (name of a span, row) -> nanoseconds."""
    sums, n = ffi.new(f"anellm_trace_sum[{_MOST_SUMS}]"), ffi.new("int64_t *")
    check(lib.anellm_trace_sums(sums, _MOST_SUMS, n))
    return {(text(s.name), int(s.row)): int(s.ns) for s in sums[0 : n[0]]}


class Efficiency:
    """Add up where the time of steps goes. Between begin() and end() the C core times its parts."""

    def __init__(self) -> None:
        """Begin with nothing."""
        self._totals: Sums = {}
        self._before: Sums | None = None
        self._start = self._ns = self._optimizer_ns = 0
        self._flops = [0.0, 0.0]
        self._flops_before = (0.0, 0.0)
        self.steps = 0

    def begin(self, flops: tuple[float, float]) -> None:
        """Begin a step.

        Args:
            flops: operations of matrix products so far, on the engine and on the CPU.
        """
        if self._before is None:
            check(lib.anellm_trace_count(1))
        self._before, self._flops_before, self._start = read_sums(), flops, time.perf_counter_ns()

    @contextmanager
    def optimizer(self) -> Iterator[None]:
        """Time the update of the weights."""
        start = time.perf_counter_ns()
        yield
        self._optimizer_ns += time.perf_counter_ns() - start

    def end(self, flops: tuple[float, float]) -> None:
        """End a step; nothing without begin()."""
        if self._before is None:
            return
        self._ns += time.perf_counter_ns() - self._start
        for key, ns in read_sums().items():
            self._totals[key] = self._totals.get(key, 0) + ns - self._before.get(key, 0)
        self._flops = [a + now - was for a, now, was in zip(self._flops, flops, self._flops_before, strict=True)]
        self._before = None
        check(lib.anellm_trace_count(0))
        self.steps += 1

    def close(self) -> None:
        """Stop counting, also within a step."""
        if self._before is not None:
            self._before = None
            check(lib.anellm_trace_count(0))

    def summary(self) -> dict[str, float]:
        """Return milliseconds a step, on average, and rates; {} without a step.

        ``total_ms`` is all of a step; ``other_ms`` what no row has: embedding, the gradient's norm, batches.
        ``weight_gradients_ms`` is spent beside them, on the thread of jobs. ``tflops``: operations of all matrix
        products (2 for a multiply-add; forward, backward, what is computed again) over the time of the steps, in 10¹²
        a second; ``ane_tflops``: those of the engine over the time of its evaluations.
        """
        if self.steps == 0:
            return {}

        def ms(ns: float) -> float:
            return ns / 1e6 / self.steps

        def row(which: int) -> dict[str, int]:
            return {name: ns for (name, where), ns in self._totals.items() if where == which}

        device, caller = row(lib.ANELLM_TRACE_DEVICE), row(lib.ANELLM_TRACE_CALLER)
        compiling = device.pop("compile", 0)
        evaluating = sum(device.values())
        found = {"total_ms": ms(self._ns), "compile_ms": ms(compiling), "ane_eval_ms": ms(evaluating)}
        for key, _, names in _CPU_ROWS:
            found[key] = ms(sum(caller.get(name, 0) for name in names))
        found["optimizer_ms"] = ms(self._optimizer_ns)
        found["other_ms"] = found["total_ms"] - sum(ms for key, ms in found.items() if key != "total_ms")
        found["weight_gradients_ms"] = ms(sum(row(lib.ANELLM_TRACE_JOBS).values()))
        found["tflops"] = sum(self._flops) / max(1, self._ns) / 1e3
        if evaluating > 0:
            found["ane_tflops"] = self._flops[0] / evaluating / 1e3
        return found


def describe(values: Mapping[str, Any]) -> list[str]:
    """Return a summary as lines of a table; none without one."""
    if not values:
        return []
    total = values["total_ms"]
    rows = [*_DEVICE_ROWS, *((key, what) for key, what, _ in _CPU_ROWS)]
    rows += [("optimizer_ms", "AdamW"), ("other_ms", "other")]
    lines = [f"a step   {total:10.2f} ms, on average; {values['tflops']:.3f} TFLOPS"]
    for key, what in rows:
        if values[key] != 0:
            lines.append(f"  {what:29} {values[key]:9.2f} ms {values[key] / max(total, 1e-9):6.1%}")
    if values["weight_gradients_ms"] > 0:
        lines.append(f"  beside: weight gradients      {values['weight_gradients_ms']:9.2f} ms")
    return lines
