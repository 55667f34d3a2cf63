"""Where the time of training steps on a Neural Engine goes: compiling, evaluating, moving, and what the CPU does."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Final

from anellm._ffi import check, ffi, lib, text
from anellm.errors import InvalidError

_MOST_SUMS: Final = 64  # of the C core
# Rows of the report: key, what it is called, the C core's spans on the calling thread. The names in the first column of
# the original trainer's report (ANE eval, IO, classifier, cross-entropy + residuals, RMSNorm) are kept where ours is
# the same part; here cross-entropy is in the classifier, residuals are added as outputs are read.
_CPU_ROWS: Final = (
    ("io_ms", "IO", ("write", "read", "copy", "scan", "stage")),
    ("classifier_ms", "classifier and cross-entropy", ("classifier",)),
    ("rmsnorm_ms", "norms", ("norm",)),
    ("elementwise_ms", "SwiGLU or GELU, RoPE", ("activation", "rope")),
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

    def __init__(self, read: Callable[[], Sums] = read_sums) -> None:
        """Begin with nothing; ``read`` returns the sums of whatever computes."""
        self._read = read
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
        self._before, self._flops_before, self._start = self._read(), flops, time.perf_counter_ns()

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
        self._totals, self._ns, self._flops = self._up_to_now(self._before, flops)
        self._before = None
        check(lib.anellm_trace_count(0))
        self.steps += 1

    def _up_to_now(self, before: Sums, flops: tuple[float, float]) -> tuple[Sums, int, list[float]]:
        totals = dict(self._totals)
        for key, ns in self._read().items():
            totals[key] = totals.get(key, 0) + ns - before.get(key, 0)
        added = [a + now - was for a, now, was in zip(self._flops, flops, self._flops_before, strict=True)]
        return totals, self._ns + time.perf_counter_ns() - self._start, added

    def state(self, flops: tuple[float, float]) -> dict[str, Any]:
        """Return what there is so far, the step that is open included, for the process that goes on with it."""
        totals, ns, added = self._totals, self._ns, self._flops
        if self._before is not None:
            totals, ns, added = self._up_to_now(self._before, flops)
        return {
            "sums": [[name, row, total] for (name, row), total in totals.items()],
            "ns": ns,
            "optimizer_ns": self._optimizer_ns,
            "flops": [float(x) for x in added],
            "steps": self.steps,
        }

    def go_on(self, state: object) -> None:
        """Count on from what state() gave in another process.

        Raises:
            InvalidError: when it is none.
        """
        if not isinstance(state, dict) or state.keys() != {"sums", "ns", "optimizer_ns", "flops", "steps"}:
            raise InvalidError(f"efficiency: expected sums, ns, optimizer_ns, flops and steps, found {state!r:.80}")
        sums, flops = state["sums"], state["flops"]
        if not isinstance(sums, list) or not all(
            isinstance(s, list) and [type(x) for x in s] == [str, int, int] for s in sums
        ):
            raise InvalidError(f"efficiency: sums: expected names, rows and times, found {sums!r:.80}")
        if not isinstance(flops, list) or [type(x) for x in flops] != [float, float]:
            raise InvalidError(f"efficiency: flops: expected two numbers, found {flops!r:.80}")
        for name in ("ns", "optimizer_ns", "steps"):
            if type(state[name]) is not int or state[name] < 0:
                raise InvalidError(f"efficiency: {name}: expected a whole number from 0, found {state[name]!r:.80}")
        self._totals = {(name, row): ns for name, row, ns in sums}
        self._ns, self._optimizer_ns, self.steps = state["ns"], state["optimizer_ns"], state["steps"]
        self._flops = list(flops)

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
