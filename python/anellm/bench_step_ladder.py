"""``bench step-ladder``: a training step from three plain loops to all this machine has, one rung after the other."""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from anellm import safeio
from anellm._ffi import check, lib, text
from anellm.bench_peers import Child, Contender, alternate
from anellm.bench_step import COUNTED, HEAD, Race, agree, cells, figures, show_about
from anellm.bench_svg import bar_chart
from anellm.bench_timing import BenchJob, Peak, peak_tier, table
from anellm.errors import InternalError, UnavailableError

# Tiers by what they change, each from the slowest: those of bf16 have the fp32 kernels of avx512. The others round to
# bf16 in software, which is slower than fp32.
FP32_TIERS = ("naive", "portable", "neon", "vdsp", "avx2", "avx512")
BF16_TIERS = ("avx512bf16", "amx")

_COLD_MS = 10_000.0  # a first step that takes longer is the result: a second one would tell little more
_RUNG_MS = 15_000.0  # what the timed steps of a rung may take together


@dataclass(frozen=True)
class Rung:
    """One way to run the step.

    Attributes:
        variant: the tier of kernels, as ANELLM_CPU names it.
        dtype: "fp32" or "bf16".
        threads: how many.
    """

    variant: str
    dtype: str
    threads: int

    @property
    def name(self) -> str:
        """Return what tables call it."""
        if self.variant == "naive":
            return "naive loops"
        tier = self.variant if self.dtype == "fp32" else f"{self.variant} (bf16)"
        return f"{tier}, {self.threads} thread{'s' if self.threads > 1 else ''}"


def unavailable(tier: str) -> str | None:
    """Return why a tier cannot run here; None if it can."""
    if tier in ("naive", *variants()):
        return None
    try:
        check(lib.anellm_cpu_set_variant(tier.encode()))
    except UnavailableError as error:
        return str(error).partition(": ")[2]
    raise InternalError(f"tier {tier} can be chosen, but is not listed")


def variants() -> list[str]:
    """Return the tiers of this machine, the best first."""
    return text(lib.anellm_cpu_variants()).split(",")


def rungs(threads: int) -> tuple[list[Rung], dict[str, str]]:
    """Return the rungs that this machine has, from the slowest, and why it has not the others, by tier."""
    found, missing = [Rung("naive", "fp32", 1)], {}
    for tier in (*FP32_TIERS[1:], *BF16_TIERS):
        reason = unavailable(tier)
        if reason is not None:
            missing[tier] = f"{tier}: not available: {reason}"
            continue
        dtype = "bf16" if tier in BF16_TIERS else "fp32"
        found += [Rung(tier, dtype, n) for n in dict.fromkeys((1, threads))]
    return found, missing


def tops(threads: int) -> list[Rung]:
    """Return the best rung of each dtype, which run in turns with the peers."""
    best = {}
    for tier in reversed(variants()):
        dtype = "bf16" if tier in BF16_TIERS else "fp32"
        best[dtype] = Rung(tier, dtype, threads)
    return sorted(best.values(), key=lambda rung: rung.dtype, reverse=True)


def climb(rung: Rung, common: Mapping[str, Any], losses: Sequence[float], most: int) -> dict[str, Any]:
    """Time a rung in a process of its own.

    Args:
        rung: which.
        common: what every contender is told.
        losses: the first losses that it must have.
        most: timed steps.

    Returns:
        "ms", "rss_mib", "losses", and "warm": whether there was an untimed step before.

    Raises:
        InternalError: when it computes something else, or with other kernels.
    """
    options = {"dtype": rung.dtype, "threads": rung.threads, "weights": None}
    child = Child(
        Contender(rung.name, "anellm", environment={"ANELLM_CPU": rung.variant}, options=options), rung.threads
    )
    try:
        about = child.start(common)
        if about["variant"] != rung.variant:
            raise InternalError(f"{rung.name} ran with the kernels of {about['variant']}")
        found = child.run(1)
        first, values = found["ms"][0], found["values"]
        warm = first <= _COLD_MS
        if warm:
            found = child.run(min(most, max(2, int(_RUNG_MS / first))))
            values = values + found["values"]
    finally:
        child.close()
    # A cold rung has one loss, that of the forward pass.
    n = min(len(values), len(losses))
    if not agree(losses[:n], values[:n], rung.dtype):
        raise InternalError(f"{rung.name} computes something else: its first losses are {values[:n]}, not {losses[:n]}")
    return {"ms": found["ms"], "rss_mib": found["rss_mib"], "losses": values[:n], "warm": warm}


class _Ladder:
    """What was found so far."""

    def __init__(self, job: BenchJob) -> None:
        self.job = job
        self.n_tokens = job.batch_size * job.seq_len
        self.flops = job.shape.flops_per_token(job.seq_len) * self.n_tokens
        self.entries: dict[str, dict[str, Any]] = {}
        self.missing: dict[str, str] = {}
        self.about: dict[str, dict[str, Any]] = {}
        self.losses: dict[str, dict[str, list[float]]] = {}
        self.peaks: dict[str, Peak] = {}
        self.references: dict[str, str] = {}

    def add(self, name: str, ms: Sequence[float], rss_mib: float | None, about: Mapping[str, Any]) -> None:
        self.entries[name] = {"name": name, **about, **figures(ms, rss_mib, self.n_tokens, self.flops)}

    def race(self, top: Rung, folder: Path) -> dict[str, Any]:
        """Let the best rung of a dtype and the peers take turns; return what every contender was told."""
        llmc = self.job.llmc if top.dtype == "fp32" else None  # it has one dtype
        race = Race(dataclasses.replace(self.job, dtype=top.dtype, llmc=llmc), folder)
        try:
            race.enter_ours({"ANELLM_CPU": top.variant})
            race.enter_all()
            peak = Peak(peak_tier(top.variant, top.dtype), top.threads)
            times = alternate(race.running, self.job.rounds, self.job.steps, 1, peak.sample)
        finally:
            race.close()
        for who, entry in times.items():
            ours = who == "anellm"
            name = top.name if ours else who if who == "llm.c" else f"{who} ({top.dtype})"
            variant = top.variant if ours else None
            about = {"variant": variant, "dtype": top.dtype, "threads": top.threads, "in_turns": True, "warm": True}
            self.add(name, entry["ms"], entry["rss_mib"], about)
            if not ours:
                self.about[name] = race.about[who]
        self.missing |= {who: line for who, line in race.missing.items() if who not in self.missing}
        self.losses[top.dtype] = race.losses
        self.peaks[top.dtype] = peak
        self.references[top.dtype] = top.name
        return race.common

    def climb(self, rung: Rung, common: Mapping[str, Any]) -> None:
        """Time a rung beside none."""
        found = climb(rung, common, self.losses[rung.dtype]["anellm"], self.job.steps * self.job.rounds)
        about = {**dataclasses.asdict(rung), "in_turns": False, "warm": found["warm"]}
        self.add(rung.name, found["ms"], found["rss_mib"], about)
        self.losses[rung.dtype][rung.name] = found["losses"]

    def sorted(self, order: Sequence[Rung]) -> list[dict[str, Any]]:
        """Return our rungs from the slowest kind, then the others, each with its ratios."""
        names = [rung.name for rung in order]
        found = [self.entries[name] for name in dict.fromkeys([*names, *self.entries])]
        for entry in found:
            entry["ratio"] = {dtype: entry["ms"] / self.entries[name]["ms"] for dtype, name in self.references.items()}
        return found


def show(values: Mapping[str, Any]) -> None:
    """Print the ladder's table."""
    dtypes = list(values["reference"])
    rows = [
        [entry["name"], *cells(entry), *(f"{entry['ratio'][dtype]:.2f}" for dtype in dtypes)]
        for entry in values["ladder"]
    ]
    print(table(["", *HEAD, *(f"ms / {dtype}" for dtype in dtypes)], rows))
    for dtype, name in values["reference"].items():
        peak = f"the peak of {values['peak_tier'][dtype]} is {values['peak_gflops'][dtype]:.0f} GFLOP/s"
        print(f"ms / {dtype}: over {name}; {peak}")
    cold = [entry["name"] for entry in values["ladder"] if not entry["warm"]]
    if cold:
        print(f"one step without warm-up: {', '.join(cold)}")
    show_about(values["about"])
    for line in values["missing"].values():
        print(line)
    print(COUNTED)
    print(f"drawing: {values['figure']}")


def run(job: BenchJob) -> dict[str, Any]:
    """Measure, print, draw, and return the figures."""
    order, missing = rungs(job.threads)
    ladder = _Ladder(job)
    ladder.missing = missing
    common: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(prefix="anellm-bench-") as name:
        for top in tops(job.threads):
            common = ladder.race(top, Path(name))
        for rung in order:
            if rung.name not in ladder.entries:
                ladder.climb(rung, common)
    found = ladder.sorted(order)
    last = list(ladder.peaks)[-1]
    peak = ladder.peaks[last]
    bars = [(entry["name"], entry["gflops"], f"({entry['ms']:,.0f} ms)") for entry in found]
    title = f"A training step of {job.preset}, {job.batch_size} x {job.seq_len} tokens"
    drawing = bar_chart(title, "GFLOP/s", bars, peak.gflops, f"peak of {peak.tier}")
    safeio.write_bytes(Path(job.figure), drawing.encode())
    values = {
        **{key: value for key, value in job.describe().items() if key != "dtype"},
        "ladder": found,
        "reference": ladder.references,
        "flops": ladder.flops,
        "peak_gflops": {dtype: peak.gflops for dtype, peak in ladder.peaks.items()},
        "peak_tier": {dtype: peak.tier for dtype, peak in ladder.peaks.items()},
        "about": ladder.about,
        "first_losses": ladder.losses,
        "missing": ladder.missing,
        "figure": job.figure,
        "method": f"in_turns: {job.rounds} rounds as in bench step, the best rung of each dtype with the peers of that "
        "dtype. The other rungs run one after the other, each in a process of its own: a first step that is not timed, "
        f"then up to {job.rounds * job.steps} in {_RUNG_MS / 1e3:.0f} s; where the first takes more than "
        f"{_COLD_MS / 1e3:.0f} s, it is the result (warm: false). ratio is an entry's ms over those of our best rung "
        "in each dtype.",
    }
    show(values)
    return values
