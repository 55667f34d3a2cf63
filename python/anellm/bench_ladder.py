"""``bench matmul-ladder``: one matrix product, from three plain loops to the library's own, one idea at a time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from anellm import safeio
from anellm._ffi import check, ffi, lib, ptr, text
from anellm.bench_kernels import Peers, matmul_case
from anellm.bench_svg import bar_chart
from anellm.bench_timing import BenchJob, Peak, Times, measure, peak_tier, table, variant
from anellm.errors import InternalError

_MEANING = {
    "naive": "three loops, as in the definition",
    "reordered": "inner loops swapped: memory in order",
    "tiled": "blocks that stay in the cache",
    "simd": "blocks in registers, vector instructions",
    "threads": "the same on every core",
}


def rungs() -> list[str]:
    """Return the names of the C core's steps."""
    names: list[str] = []
    while (name := lib.anellm_matmul_rung(len(names))) != ffi.NULL:
        names.append(text(name))
    return names


def measure_rung(rung: int, M: int, N: int, K: int, count: int) -> Times:
    """Time a step of the ladder, and check its result.

    Raises:
        InternalError: when the product is wrong.
    """
    rng = np.random.default_rng(0)
    a, b = rng.standard_normal((M, K), np.float32), rng.standard_normal((K, N), np.float32)
    c = np.full((M, N), np.nan, np.float32)
    pointers = [ptr(x, np.float32) for x in (c, a, b)]
    times = measure(lambda: check(lib.anellm_matmul_ladder(*pointers, M, N, K, rung)), 0.0, count)
    if not np.allclose(c, a @ b, rtol=0, atol=1e-4 * K**0.5):
        raise InternalError(f"the product of step {rung} is wrong")
    return times


def race(job: BenchJob, M: int, N: int, K: int, peak: Peak) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """Time every step of the ladder, the library's own product and the peers'.

    Returns:
        Name, what it is, and the least time in milliseconds; and for each peer that does not take part why.
    """
    found: list[dict[str, Any]] = []
    for i, name in enumerate(rungs()):
        # The first step takes a hundred times as long as the last: it is timed less often.
        times = measure_rung(i, M, N, K, 1 if i == 0 else job.rounds)
        found.append({"name": name, "what": _MEANING[name], "ms": times.least})
        peak.sample()
    case = matmul_case("NN", M, N, K, job.dtype)
    times = measure(case.run, 0.0, max(job.rounds, case.job["copies"]))
    found.append({"name": "anellm", "what": f"the library: packed, {variant()}, {job.dtype}", "ms": times.least})
    with Peers(job) as peers:
        found += [{"name": name, "what": "its own product", "ms": ms} for name, ms in peers.measure(case).items()]
    peak.sample()
    return found, peers.missing


def run(job: BenchJob) -> dict[str, Any]:
    """Measure, print, draw, and return the figures."""
    M, N, K = job.batch_size * job.seq_len, job.shape.hidden_dim, job.shape.dim
    peak = Peak(peak_tier(variant(), job.dtype), job.threads)
    found, missing = race(job, M, N, K, peak)
    rows, bars = [], []
    for entry in found:
        entry["gflops"] = 2 * M * N * K / entry["ms"] / 1e6
        entry["fraction_of_peak"] = entry["gflops"] / peak.gflops
        part = f"{100 * entry['fraction_of_peak']:.1f} %"
        rows.append([entry["name"], f"{entry['ms']:.3f}", f"{entry['gflops']:.1f}", part, entry["what"]])
        bars.append((entry["name"], entry["gflops"], f"({part})"))
    print(table(["", "ms", "GFLOP/s", "of peak", "what"], rows))
    for line in missing.values():
        print(line)
    title = f"Matrix product {M} x {N} x {K}, {job.threads} threads"
    drawing = bar_chart(title, "GFLOP/s", bars, peak.gflops, f"peak of {peak.tier}")
    safeio.write_bytes(Path(job.figure), drawing.encode())
    print(f"peak of {peak.tier} multiply-adds: {peak.gflops:.0f} GFLOP/s; drawing: {job.figure}")
    return {
        **job.describe(),
        "sizes": {"M": M, "N": N, "K": K},
        "ladder": found,
        "peak_gflops": peak.gflops,
        "peak_tier": peak.tier,
        "figure": job.figure,
        "missing": missing,
        "method": "the least time of each; one thread up to simd; anellm's and the peers' B comes from memory",
    }
