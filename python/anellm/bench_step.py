"""``bench step``: a whole training step, in turns with other frameworks that do the same one."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from anellm.bench_peers import Child, ChildError, Contender, MissingError, alternate, missing_line, tuned_torch
from anellm.bench_timing import BenchJob, Peak, Times, peak_tier, table, variant
from anellm.errors import InternalError

_TRIAL_STEPS = 3  # timed steps by which the better of PyTorch's two ways is chosen
_CHECKED_STEPS = 3  # first losses that must agree: the later ones say that gradients and updates do, too
_TOLERANCE = {"fp32": 1e-3, "bf16": 1e-2}  # relative


def step_job(job: BenchJob, folder: Path) -> dict[str, Any]:
    """Return what every contender is told."""
    rng = np.random.default_rng(0)
    tokens, targets = rng.integers(0, job.shape.vocab_size, (2, job.batch_size, job.seq_len)).tolist()
    return {
        "task": "step",
        "config": job.shape.to_dict(),
        "weights": str(folder / "weights"),
        "tokens": tokens,
        "targets": targets,
        "threads": job.threads,
        "dtype": job.dtype,
        "seed": 1,
        "lr": 1e-4,
        "betas": [0.9, 0.95],
        "eps": 1e-8,
        "weight_decay": 0.1,
    }


def agree(ours: Sequence[float], theirs: Sequence[float], dtype: str) -> bool:
    """Return whether two contenders' first losses are those of the same computation."""
    limit = _TOLERANCE[dtype]
    return all(abs(a - b) <= limit * abs(a) for a, b in zip(ours, theirs, strict=True))


class _Race:
    """The contenders that take part, and why others do not."""

    def __init__(self, job: BenchJob, folder: Path) -> None:
        self.job, self.folder = job, folder
        self.common = step_job(job, folder)
        self.running: list[Child] = []
        self.losses: dict[str, list[float]] = {}
        self.about: dict[str, dict[str, Any]] = {}
        self.missing: dict[str, str] = {}

    def enter(self, contender: Contender) -> Child:
        """Start a contender, and hold its first losses against ours."""
        child = Child(contender, self.job.threads)
        try:
            about = child.start(self.common)
            losses = child.run(0, warmup=_CHECKED_STEPS)["values"]
        except BaseException:
            child.close()
            raise
        ours = self.losses.get("anellm", losses)
        if not agree(ours, losses, self.common["dtype"]):
            child.close()
            raise InternalError(
                f"{contender.name} computes something else: its first losses are {losses}, anellm's are {ours}"
            )
        self.running.append(child)
        self.losses[contender.name] = losses
        about.pop("rss_mib")
        self.about[contender.name] = {**about, **contender.options, "notes": list(contender.notes)}
        return child

    def leave(self, child: Child) -> None:
        """End a contender's part."""
        self.running.remove(child)
        child.close()

    def try_to_enter(self, peer: str, contender: Contender) -> Child | None:
        """Start a contender; where its package is missing or it fails, say so and go on without it."""
        try:
            return self.enter(contender)
        except MissingError as error:
            self.missing[contender.name] = missing_line(peer, str(error), contender.python)
        except ChildError as error:
            self.missing[contender.name] = str(error)
        return None

    def enter_torch(self, python: str) -> None:
        """Start PyTorch as installed, eager or compiled, whichever is faster here; and tuned."""
        best: tuple[float, Contender] | None = None
        for compiled in (False, True):
            contender = Contender("torch", "torch", python, options={"compile": compiled})
            child = self.try_to_enter("torch", contender)
            if child is None:
                break  # eager says that torch is missing; without the compiler eager is what there is
            least = min(child.run(_TRIAL_STEPS)["ms"])
            self.leave(child)
            if best is None or least < best[0]:
                best = (least, contender)
        if best is None:
            return
        self.missing.pop("torch", None)
        self.try_to_enter("torch", best[1])
        self.try_to_enter("torch", tuned_torch(python, self.common["dtype"], self.folder, {"compile": True}))

    def enter_peer(self, peer: str) -> None:
        """Start a peer in every way that it takes part."""
        if peer == "torch":
            self.enter_torch(self.job.pythons["torch"])
        elif peer == "numpy":
            self.missing["numpy"] = "numpy: has no training step; bench kernels and bench matmul-ladder compare with it"
        else:
            self.try_to_enter(peer, Contender(peer, peer, self.job.pythons[peer]))

    def close(self) -> None:
        """End every child."""
        for child in self.running:
            child.close()


def summarise(times: Mapping[str, Mapping[str, Any]], flops: float, peak: float) -> dict[str, Any]:
    """Return the figures of a race.

    Args:
        times: for each contender "ms", all its times, and "rss_mib".
        flops: floating-point operations of a step.
        peak: GFLOP/s that the machine can do.

    Returns:
        "anellm" and "peers" with ms (the median), min_ms and rss_mib; "ratio" (the peer's ms over anellm's) and
        "ratio_of_minima"; "peak_gflops", "gflops" and "fraction_of_peak", all of anellm's median step.
    """
    found = {}
    for name, entry in times.items():
        t = Times.of(entry["ms"])
        found[name] = {"ms": t.median, "min_ms": t.least, "rss_mib": entry["rss_mib"], "timed_steps": t.count}
    ours = found.pop("anellm")
    gflops = flops / ours["ms"] / 1e6
    return {
        "anellm": ours,
        "peers": found,
        "ratio": {name: peer["ms"] / ours["ms"] for name, peer in found.items()},
        "ratio_of_minima": {name: peer["min_ms"] / ours["min_ms"] for name, peer in found.items()},
        "flops": flops,
        "gflops": gflops,
        "peak_gflops": peak,
        "fraction_of_peak": gflops / peak,
        "fraction_of_peak_of_minimum": flops / ours["min_ms"] / 1e6 / peak,
    }


def show(values: Mapping[str, Any]) -> None:
    """Print a race's table."""
    tokens = values["batch_size"] * values["seq_len"]
    rows = []
    for name, entry in {"anellm": values["anellm"], **values["peers"]}.items():
        ratio = values["ratio"].get(name, 1.0)
        least = values["ratio_of_minima"].get(name, 1.0)
        cells = [f"{entry['ms']:.1f}", f"{entry['min_ms']:.1f}", f"{1e3 * tokens / entry['ms']:.0f}"]
        rows.append([name, *cells, f"{entry['rss_mib']:.0f}", f"{ratio:.2f}", f"{least:.2f}"])
    print(table(["", "ms", "least", "tokens/s", "MiB", "ms / ours", "least / ours"], rows))
    for name, about in values["about"].items():
        how = [f"version {about['version']}"] if "version" in about else []
        how += ["torch.compile" if about["compile"] else "eager"] if "compile" in about else []
        if how or about["notes"]:
            print(f"{name}: {', '.join([*how, *about['notes']])}")
    for line in values["missing"].values():
        print(line)
    print(
        f"peak of {values['peak_tier']} multiply-adds {values['peak_gflops']:.0f} GFLOP/s; a step of "
        f"{values['flops'] / 1e9:.1f} GFLOP reaches {values['gflops']:.0f}, {values['fraction_of_peak']:.2f} of it"
    )


def run(job: BenchJob) -> dict[str, Any]:
    """Measure, print, and return the figures."""
    with tempfile.TemporaryDirectory(prefix="anellm-bench-") as name:
        race = _Race(job, Path(name))
        try:
            race.enter(Contender("anellm", "anellm"))
            race.common["tensors"] = race.about["anellm"].pop("tensors")
            for peer in job.compare:
                race.enter_peer(peer)
            peak = Peak(peak_tier(variant(), job.dtype), job.threads)
            times = alternate(race.running, job.rounds, job.steps, 1, peak.sample)
        finally:
            race.close()
    flops = job.shape.flops_per_token(job.seq_len) * job.batch_size * job.seq_len
    values = {
        **job.describe(),
        **summarise(times, flops, peak.gflops),
        "peak_tier": peak.tier,
        "about": race.about,
        "first_losses": race.losses,
        "missing": race.missing,
        "method": f"{job.rounds} rounds, contenders in turns, each 1 untimed and {job.steps} timed steps a turn; ms is "
        "the median of all timed steps, min_ms the least; ratio is a peer's over ours; the peak is the best of those "
        "before the first round and after each. anellm's step has the gradient's norm in it, the peers' have not.",
    }
    show(values)
    return values
