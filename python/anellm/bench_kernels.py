"""``bench kernels``: every operation of a step in every tier that this machine can run."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Self

import numpy as np

from anellm._ffi import check, ffi, lib, ptr, text
from anellm.bench_peers import Child, ChildError, MissingError, matmul_contenders, missing_line
from anellm.bench_timing import BenchJob, Peak, Times, bandwidth_gbs, measure, peak_tier, table, variant
from anellm.config import ModelConfig

Array = np.ndarray[Any, np.dtype[np.float32]]

_COLD_BYTES = 160 << 20  # weights take turns over this much, so that they come from memory as in a real step
_MOST_COPIES = 128
_PEER_CALLS = 5
_SECONDS = 0.02  # of measuring a case in a tier, for each of --steps


@dataclass(frozen=True)
class Case:
    """One operation at one shape.

    Attributes:
        kernel: name of the operation.
        shape: the sizes, as text.
        run: does it once.
        rows: tokens (or weights, where there are no tokens) that it handles.
        flops: floating-point operations, where they are what bounds it; else 0.
        n_bytes: bytes that it must read and write.
        job: for a matrix product, what a peer's process is told.
    """

    kernel: str
    shape: str
    run: Callable[[], object]
    rows: int
    flops: int = 0
    n_bytes: int = 0
    job: dict[str, Any] = field(default_factory=dict)


def _random(*shape: int) -> Array:
    return np.random.default_rng(0).standard_normal(shape, np.float32)


def _f(array: np.ndarray[Any, Any]) -> Any:
    """Return an array's pointer, which does not keep the array: take it in the call, not before."""
    return ptr(array, array.dtype)


def copies(n_bytes: int) -> int:
    """Return how many buffers of a size take turns, so that none is still in a cache when its turn comes."""
    return min(_MOST_COPIES, max(1, -(-_COLD_BYTES // max(1, n_bytes))))


def matmul_shapes(shape: ModelConfig) -> list[tuple[int, int]]:
    """Return the outputs and inputs of each weight; query, key and value are one product, gate and up another."""
    return [
        (shape.q_dim + 2 * shape.kv_dim, shape.dim),
        (shape.dim, shape.q_dim),
        (shape.gate_up_dim, shape.dim),
        (shape.dim, shape.hidden_dim),
        (shape.vocab_size, shape.dim),
    ]


def matmul_case(form: str, M: int, N: int, K: int, dtype: str = "fp32") -> Case:
    """Return the product op(A) op(B) of a form: NT (forward), NN (gradient of the input), TN (of the weight).

    The weight, B or in TN the result, is another buffer each time. With "bf16" all are fp32 in memory just the same:
    rounding the inputs is part of the work.
    """
    product = lib.anellm_matmul_bf16 if dtype == "bf16" else lib.anellm_matmul
    trans_a, trans_b = int(form[0] == "T"), int(form[1] == "T")
    n_b = 1 if trans_a else copies(4 * N * K)
    n_c = copies(4 * M * N) if trans_a else 1
    a = _random(K, M) if trans_a else _random(M, K)
    b = np.empty((n_b, N, K) if trans_b else (n_b, K, N), np.float32)
    b[...] = _random(*b.shape[1:])
    c = np.zeros((n_c, M, N), np.float32)
    ld_a, ld_b = a.shape[1], b.shape[2]
    turn = 0

    def run() -> None:
        nonlocal turn
        turn += 1
        left, right, out = a, b[turn % n_b], c[turn % n_c]
        check(product(_f(out), N, _f(left), ld_a, trans_a, _f(right), ld_b, trans_b, M, N, K, 0))

    job = {"task": "matmul", "M": M, "N": N, "K": K, "trans_a": trans_a, "trans_b": trans_b, "copies": n_b}
    job |= {"out_copies": n_c, "dtype": dtype}
    name = "matmul" if dtype == "fp32" else "matmul_bf16"
    return Case(f"{name} {form}", f"{M}x{N}x{K}", run, M if not trans_a else K, 2 * M * N * K, 0, job)


def matmul_cases(shape: ModelConfig, n_tokens: int) -> Iterator[Case]:
    """Yield every product of a step."""
    for dtype in ("fp32", "bf16"):
        for form in ("NT", "NN", "TN"):
            for outputs, inputs in matmul_shapes(shape):
                sizes = {
                    "NT": (n_tokens, outputs, inputs),
                    "NN": (n_tokens, inputs, outputs),
                    "TN": (outputs, inputs, n_tokens),
                }[form]
                yield matmul_case(form, *sizes, dtype)


def decode_cases(shape: ModelConfig) -> Iterator[Case]:
    """Yield the classifier for one token, whose weights come from memory, in each format."""
    N, K = shape.vocab_size, shape.dim
    n_copies = copies(2 * N * K)
    groups = -(-K // lib.ANELLM_QUANTIZE_GROUP)
    x, y = _random(1, K), np.zeros((1, N), np.float32)
    full = np.zeros((n_copies, N, K), np.float32)
    half = np.zeros((n_copies, N, K), np.uint16)
    eighth, scales = np.zeros((n_copies, N, K), np.int8), np.ones((n_copies, N, groups), np.float32)
    turn = 0

    def f32(i: int) -> int:
        return int(lib.anellm_matvec_f32(_f(y), N, _f(x), K, _f(full[i]), K, 1, N, K, 0))

    def bf16(i: int) -> int:
        return int(lib.anellm_matvec_bf16(_f(y), N, _f(x), K, _f(half[i]), K, 1, N, K, 0))

    def int8(i: int) -> int:
        q = ffi.cast("int8_t *", eighth[i].ctypes.data)
        return int(lib.anellm_matvec_int8(_f(y), N, _f(x), K, q, K, _f(scales[i]), 1, N, K, 0))

    def run(call: Callable[[int], int]) -> None:
        nonlocal turn
        turn += 1
        check(call(turn % n_copies))

    for name, call, n_bytes in (
        ("matvec_f32", f32, 4 * N * K),
        ("matvec_bf16", bf16, 2 * N * K),
        ("matvec_int8", int8, N * K + 4 * N * groups),
    ):
        yield Case(name, f"1x{N}x{K}", partial(run, call), 1, 0, n_bytes)


def attention_cases(shape: ModelConfig, B: int, T: int) -> Iterator[Case]:
    """Yield attention forward and backward, with the operations of the causal half."""
    N, kv = B * T, shape.kv_dim
    q, k, v, out, dout = (_random(N, n) for n in (shape.q_dim, kv, kv, shape.q_dim, shape.q_dim))
    dq, dk, dv, lse = np.empty_like(q), np.empty_like(k), np.empty_like(v), _random(B * shape.n_heads * T)
    s = ffi.new("anellm_attention_shape *")
    s.B, s.Tq, s.Tk = B, T, T
    s.n_heads, s.n_kv_heads, s.head_dim = shape.n_heads, shape.n_kv_heads, shape.head_dim
    s.ld_q, s.ld_k, s.ld_v, s.ld_out = shape.q_dim, kv, kv, shape.q_dim
    s.scale = shape.head_dim**-0.5
    size = f"{B}x{T}x{shape.n_heads}x{shape.head_dim}"
    flops = 2 * B * T * T * shape.q_dim  # q·k and p·v, 2 T q_dim each for a query, over half of the keys

    def forward() -> None:
        check(lib.anellm_attention_forward(_f(out), _f(lse), _f(q), _f(k), _f(v), s))

    def backward() -> None:
        check(lib.anellm_attention_backward(_f(dq), _f(dk), _f(dv), _f(dout), _f(out), _f(lse), _f(q), _f(k), _f(v), s))

    yield Case("attention_forward", size, forward, N, flops)
    yield Case("attention_backward", size, backward, N, 2 * flops)


def weight_cases(shape: ModelConfig) -> Iterator[Case]:
    """Yield the operations on weights and gradients, on as many as a layer has."""
    n = (shape.n_params_without_embeddings() - shape.dim) // shape.n_layers
    p, m, v, g = _random(n), np.zeros(n, np.float32), np.zeros(n, np.float32), _random(n)
    half = np.zeros(n, np.uint16)
    params = ffi.new("anellm_adamw_params *")
    params.lr, params.beta1, params.beta2, params.eps = 1e-6, 0.9, 0.95, 1e-8
    params.grad_scale, params.step = 1.0, 1
    total, bad = ffi.new("double *"), ffi.new("int64_t *")

    def convert(call: Callable[..., int], out: np.ndarray[Any, Any], source: np.ndarray[Any, Any]) -> int:
        return int(call(_f(out), _f(source), n))

    def case(kernel: str, n_bytes: int, call: Callable[[], int]) -> Case:
        return Case(kernel, str(n), lambda: check(call()), n, 0, n_bytes)

    yield case("adamw", 28 * n, lambda: lib.anellm_adamw(_f(p), _f(m), _f(v), _f(g), n, params))
    yield case("grad_norm", 4 * n, lambda: lib.anellm_grad_norm(total, bad, _f(g), n))
    for kind in ("f16", "bf16"):
        narrow, widen = getattr(lib, f"anellm_convert_f32_to_{kind}"), getattr(lib, f"anellm_convert_{kind}_to_f32")
        yield case(f"convert_f32_to_{kind}", 6 * n, partial(convert, narrow, half, g))
        yield case(f"convert_{kind}_to_f32", 6 * n, partial(convert, widen, p, half))


def cases(shape: ModelConfig, batch_size: int, seq_len: int) -> Iterator[Case]:
    """Yield every case; each one's memory can go before the next one comes."""
    from anellm.bench_rows import row_cases

    yield from matmul_cases(shape, batch_size * seq_len)
    yield from attention_cases(shape, batch_size, seq_len)
    yield from row_cases(shape, batch_size, seq_len)
    yield from decode_cases(shape)
    yield from weight_cases(shape)


def tiers() -> list[str]:
    """Return the tiers that this machine can run, portable first."""
    return text(lib.anellm_cpu_variants()).split(",")[::-1]


def _row(case: Case, tier: str, times: Times, portable_ms: float) -> dict[str, Any]:
    """Return a case's figures in a tier; rates are those of the fastest call."""
    rate = case.flops / times.least / 1e6
    return {
        "kernel": case.kernel,
        "shape": case.shape,
        "variant": tier,
        "ms": times.median,
        "min_ms": times.least,
        "rows_per_s": 1e3 * case.rows / times.least,
        "gflops": rate if case.flops else None,
        "fraction_of_peak": None,  # once the peak was measured for the last time
        "gbs": case.n_bytes / times.least / 1e6 if case.n_bytes else None,
        "ratio_to_portable": portable_ms / times.least,
        "ratio": {},
    }


def measure_case(case: Case, peaks: Mapping[str, Peak], seconds: float) -> list[dict[str, Any]]:
    """Time a case in every tier, and put back the tier that was in force.

    Args:
        case: what to time.
        peaks: tiers, portable first, and the most that the multiply-adds of each can do for this case.
        seconds: how long in each.
    """
    before, rows = variant(), []
    try:
        portable = 0.0
        for tier, peak in peaks.items():
            check(lib.anellm_cpu_set_variant(tier.encode()))
            times = measure(case.run, seconds)
            portable = portable or times.least
            if case.flops:
                peak.sample()
            rows.append(_row(case, tier, times, portable))
    finally:
        check(lib.anellm_cpu_set_variant(before.encode()))
    return rows


class Peers:
    """Peers that do matrix products, each in a process that lives until the end."""

    def __init__(self, job: BenchJob) -> None:
        """Prepare those that the job names."""
        self._job = job
        self._folder = tempfile.TemporaryDirectory(prefix="anellm-bench-")
        self._running: list[Child] = []
        self._dtype = ""
        self.missing: dict[str, str] = {}

    def _start(self, dtype: str) -> None:
        """Start the processes for a number format: what is best for a peer depends on it."""
        self._stop()
        job, self._dtype = self._job, dtype
        for contender in matmul_contenders(job.compare, job.pythons, dtype, Path(self._folder.name)):
            if contender.name not in self.missing and not (dtype == "bf16" and contender.module == "numpy"):
                self._running.append(Child(contender, job.threads))

    def _stop(self) -> None:
        for child in self._running:
            child.close()
        self._running = []

    def measure(self, case: Case) -> dict[str, float]:
        """Return the least time of each peer for a product, in milliseconds; who cannot is noted and left out."""
        if case.job["dtype"] != self._dtype:
            self._start(case.job["dtype"])
        found = {}
        for child in list(self._running):
            name = child.contender.name
            try:
                child.start({**case.job, "threads": self._job.threads})
                found[name] = min(child.run(_PEER_CALLS, warmup=2)["ms"])
            except (MissingError, ChildError) as error:
                missing = isinstance(error, MissingError)
                self.missing[name] = missing_line(name, str(error), child.contender.python) if missing else str(error)
                self._running.remove(child)
                child.close()
        return found

    def __enter__(self) -> Self:
        """Return self."""
        return self

    def __exit__(self, *_: object) -> None:
        """End every process."""
        self._stop()
        self._folder.cleanup()


def show(rows: Sequence[Mapping[str, Any]]) -> None:
    """Print the table."""
    peers = list(dict.fromkeys(name for row in rows for name in row["ratio"]))
    lines = []
    for row in rows:
        rate = f"{row['gflops']:.1f} GFLOP/s" if row["gflops"] is not None else f"{row['gbs']:.1f} GB/s"
        part = "" if row["fraction_of_peak"] is None else f"{row['fraction_of_peak']:.2f}"
        ratios = [f"{row['ratio'][name]:.2f}" if name in row["ratio"] else "" for name in peers]
        cells = [row["shape"], row["variant"], f"{row['min_ms']:.3f}", rate, part, f"{row['ratio_to_portable']:.1f}"]
        lines.append([row["kernel"], *cells, *ratios])
    head = ["kernel", "shape", "variant", "ms", "rate", "of peak", "x portable"]
    print(table([*head, *(f"{name} ms / ours" for name in peers)], lines))


def run(job: BenchJob) -> dict[str, Any]:
    """Measure, print, and return the figures."""
    by_name: dict[str, Peak] = {}
    peaks: dict[str, dict[str, Peak]] = {"fp32": {}, "bf16": {}}
    for dtype, of_tier in peaks.items():
        for tier in tiers():
            name = peak_tier(tier, dtype)
            of_tier[tier] = by_name.get(name) or by_name.setdefault(name, Peak(name, job.threads))
    read = bandwidth_gbs(1 << 28, job.threads)
    rows: list[dict[str, Any]] = []
    counted: list[tuple[dict[str, Any], Peak]] = []
    with Peers(job) as peers:
        for case in cases(job.shape, job.batch_size, job.seq_len):
            of_tier = peaks[case.job.get("dtype", "fp32")]
            found = measure_case(case, of_tier, _SECONDS * job.steps)
            for name, ms in (peers.measure(case) if case.job else {}).items():
                for row in found:
                    row["ratio"][name] = ms / row["min_ms"]
            rows += found
            counted += [(row, of_tier[row["variant"]]) for row in found if case.flops]
    for row, peak in counted:
        row["fraction_of_peak"] = row["gflops"] / peak.gflops
    show(rows)
    for line in peers.missing.values():
        print(line)
    limits = {name: peak.gflops for name, peak in by_name.items()}
    shown = ", ".join(f"{name} {gflops:.0f}" for name, gflops in limits.items())
    print(f"peak, GFLOP/s: {shown}; reading memory: {read:.1f} GB/s")
    return {
        **job.describe(),
        "kernels": rows,
        "peak_gflops": limits,
        "read_gbs": read,
        "missing": peers.missing,
        "method": "rates and ratios are of the least time of at least 3 calls; the weight of a matrix product (in TN "
        "its result) comes from memory, the rest may be in a cache; a peer's ratio is its least time over ours; peers "
        "get bf16 products in bf16, which leaves them out the rounding that ours does",
    }
