"""What the benchmarks share: timing in this process, the machine's limits, tables."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from anellm import info
from anellm._ffi import check, ffi, lib, text

if TYPE_CHECKING:
    from anellm.config import ModelConfig

# The tiers whose multiply-adds a product in fp32 can use, slowest first. Those of bf16 alone are not among them.
_FP32_TIERS = ("portable", "neon", "avx2", "avx512")


@dataclass(frozen=True)
class BenchJob:
    """What to measure, with every choice made.

    Attributes:
        what: the kind of benchmark.
        preset: name of the shape, for the output.
        shape: the model's dimensions.
        batch_size: sequences (B).
        seq_len: tokens in each (T).
        dtype: "fp32" or "bf16".
        weights: format of the weights for decoding, "fp32", "bf16" or "int8".
        threads: size of every thread pool.
        steps: timed calls in a round; rounds: turns of each contender.
        tokens: tokens to decode.
        compare: peers to run.
        pythons: peer -> the Python that runs it.
        runc: path of llama2.c's program, or None.
        llmc: path of llm.c's program, or None.
        figure: where to write the drawing.
    """

    what: str
    preset: str
    shape: ModelConfig
    batch_size: int
    seq_len: int
    dtype: str
    weights: str
    threads: int
    steps: int
    rounds: int
    tokens: int
    compare: Sequence[str]
    pythons: Mapping[str, str]
    runc: str | None
    llmc: str | None
    figure: str

    def describe(self) -> dict[str, Any]:
        """Return what was measured where, for the JSON output."""
        return {
            "what": self.what,
            "preset": self.preset,
            "model": self.shape.to_dict(),
            "n_params": self.shape.n_params(),
            "batch_size": self.batch_size,
            "seq_len": self.seq_len,
            "dtype": self.dtype,
            "threads": self.threads,
            "steps": self.steps,
            "rounds": self.rounds,
            "machine": info.collect(self.threads),
        }


@dataclass(frozen=True)
class Times:
    """Times of the same work, in milliseconds."""

    median: float
    least: float
    count: int

    @classmethod
    def of(cls, ms: Sequence[float]) -> Times:
        """Return what is worth knowing of a list of times."""
        return cls(statistics.median(ms), min(ms), len(ms))


def measure(run: Callable[[], object], seconds: float = 0.1, least_count: int = 3) -> Times:
    """Time a function after one call that is not timed.

    Args:
        run: the function.
        seconds: go on for this long,
        least_count: and for this many calls.
    """
    run()
    ms: list[float] = []
    end = time.perf_counter() + seconds
    while len(ms) < least_count or time.perf_counter() < end:
        start = time.perf_counter()
        run()
        ms.append(1e3 * (time.perf_counter() - start))
    return Times.of(ms)


def variant() -> str:
    """Return the tier of kernels in force."""
    return text(lib.anellm_cpu_variant())


def peak_tier(tier: str, dtype: str) -> str:
    """Return the tier whose multiply-adds a tier's products use: those above avx512 only add instructions for bf16.

    The matrix unit behind vdsp has no public instructions, so its products are compared with NEON's.
    """
    if tier == "naive":
        return "portable"
    if tier == "vdsp":
        return "neon"
    return tier if dtype == "bf16" or tier in _FP32_TIERS else "avx512"


def peak_gflops(tier: str, threads: int, seconds: float = 0.25) -> float:
    """Measure the most multiply-adds that a tier's instructions can do, in GFLOP/s.

    Raises:
        UnavailableError: when this machine has no such instructions.
    """
    found = ffi.new("double *")
    check(lib.anellm_peak_gflops(found, tier.encode(), threads, seconds))
    return float(found[0])


class Peak:
    """The most that was ever measured of a tier's multiply-adds: a busy neighbour can only make it less."""

    def __init__(self, tier: str, threads: int) -> None:
        """Measure once."""
        self.tier, self._threads = tier, threads
        self.gflops = peak_gflops(tier, threads)

    def sample(self) -> None:
        """Measure again, more briefly."""
        self.gflops = max(self.gflops, peak_gflops(self.tier, self._threads, 0.03))


def bandwidth_gbs(n_bytes: int, threads: int, seconds: float = 0.25) -> float:
    """Measure how fast so many bytes can be read again and again, in GB/s (10^9 bytes a second)."""
    found = ffi.new("double *")
    check(lib.anellm_bandwidth_gbs(found, max(n_bytes, 1 << 20), threads, seconds))
    return float(found[0])


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return rows of text in columns: the first aligned left, the others right."""
    lines = [head, *rows]
    widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
    aligned = "<" + ">" * (len(head) - 1)
    return "\n".join(
        "  ".join(f"{cell:{side}{width}}" for cell, side, width in zip(line, aligned, widths, strict=True))
        for line in lines
    )
