"""``bench step``: a whole training step, in turns with other frameworks that do the same one."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from anellm.bench_llmc import Llmc
from anellm.bench_peers import (
    Child,
    ChildError,
    Contender,
    MissingError,
    Runner,
    alternate,
    missing_line,
    tuned_torch,
)
from anellm.bench_timing import BenchJob, Peak, Times, peak_tier, table, variant
from anellm.errors import ConfigError, InternalError

HEAD = ("ms", "least", "it/s", "tokens/s", "GFLOP/s", "MiB")  # of what cells() gives
COUNTED = (
    "GFLOP/s: 6 operations for each weight that multiplies and token, and causal attention; norms, softmax and AdamW "
    "are not counted, their time is"
)
_TRIAL_STEPS = 3  # timed steps by which the better of PyTorch's two ways is chosen
_TOLERANCE = {"fp32": 1e-3, "bf16": 1e-2}  # relative


def step_job(job: BenchJob, folder: Path) -> dict[str, Any]:
    """Return what every contender is told.

    The tokens are a circle, each the target of the one before, so that llm.c's program finds the same batch at every
    place of a file that repeats it.
    """
    circle = np.random.default_rng(0).integers(0, job.shape.vocab_size, job.batch_size * job.seq_len)
    tokens, targets = (x.reshape(job.batch_size, job.seq_len).tolist() for x in (circle, np.roll(circle, -1)))
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


def figures(ms: Sequence[float], rss_mib: float | None, n_tokens: int, flops: float) -> dict[str, Any]:
    """Return what is told of a contender's steps.

    Args:
        ms: their times.
        rss_mib: most memory that its process held; None: not known.
        n_tokens: tokens of a step.
        flops: floating-point operations of a step.
    """
    t = Times.of(ms)
    return {
        "ms": t.median,
        "min_ms": t.least,
        "timed_steps": t.count,
        "iterations_per_s": 1e3 / t.median,
        "tokens_per_s": 1e3 * n_tokens / t.median,
        "gflops": flops / t.median / 1e6,
        "rss_mib": rss_mib,
    }


def cells(entry: Mapping[str, Any]) -> list[str]:
    """Return figures() as the columns of HEAD."""
    memory = "-" if entry["rss_mib"] is None else f"{entry['rss_mib']:.0f}"
    numbers = [f"{entry['ms']:.1f}", f"{entry['min_ms']:.1f}", f"{entry['iterations_per_s']:.4g}"]
    return [*numbers, f"{entry['tokens_per_s']:.0f}", f"{entry['gflops']:.1f}", memory]


class Race:
    """The contenders that take part, and why others do not."""

    def __init__(self, job: BenchJob, folder: Path) -> None:
        """Begin with none.

        Args:
            job: what to measure.
            folder: where files may be put, for as long as they run.
        """
        self.job, self.folder = job, folder
        self.common = step_job(job, folder)
        self.running: list[Runner] = []
        self.losses: dict[str, list[float]] = {}
        self.about: dict[str, dict[str, Any]] = {}
        self.missing: dict[str, str] = {}

    def enter(self, contender: Contender) -> Child:
        """Start a contender, and hold its first losses against ours."""
        child = Child(contender, self.job.threads)
        try:
            about = child.start(self.common)
            self._admit(child, about)
        except BaseException:
            child.close()
            raise
        return child

    def _admit(self, child: Runner, about: dict[str, Any]) -> None:
        contender = child.contender
        losses = child.run(0, warmup=contender.checked_steps)["values"]
        ours = self.losses.get("anellm", losses)[: len(losses)]
        if not agree(ours, losses, self.common["dtype"]):
            raise InternalError(
                f"{contender.name} computes something else: its first losses are {losses}, anellm's are {ours}"
            )
        self.running.append(child)
        self.losses[contender.name] = losses
        about.pop("rss_mib", None)
        self.about[contender.name] = {**about, **contender.options, "notes": list(contender.notes)}

    def enter_ours(self, environment: Mapping[str, str] | None = None) -> None:
        """Start anellm, which writes the weights that the others start from."""
        self.enter(Contender("anellm", "anellm", environment=environment or {}))
        self.common["tensors"] = self.about["anellm"].pop("tensors")

    def enter_llmc(self, program: str) -> None:
        """Start llm.c's program.

        Raises:
            ConfigError: when it fails, or its losses are others.
        """
        child = Llmc(program, self.job.shape, self.common, self.folder, self.job.rounds)
        try:
            self._admit(child, {})
        except BaseException as error:
            child.close()
            if isinstance(error, InternalError):
                raise ConfigError(f"--llmc: {error}") from None
            raise

    def leave(self, child: Runner) -> None:
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

    def enter_all(self) -> None:
        """Start every other contender of the job."""
        if self.job.llmc is not None:
            self.enter_llmc(self.job.llmc)
        for peer in self.job.compare:
            self.enter_peer(peer)

    def close(self) -> None:
        """End every child."""
        for child in self.running:
            child.close()


def summarise(times: Mapping[str, Mapping[str, Any]], n_tokens: int, flops: float, peak: float) -> dict[str, Any]:
    """Return the figures of a race.

    Args:
        times: for each contender "ms", all its times, and "rss_mib".
        n_tokens: tokens of a step.
        flops: floating-point operations of a step.
        peak: GFLOP/s that the machine can do.

    Returns:
        "anellm" and "peers" with figures(); "ratio" (the peer's ms over anellm's) and
        "ratio_of_minima"; "peak_gflops", "gflops" and "fraction_of_peak", all of anellm's median step.
    """
    found = {name: figures(entry["ms"], entry["rss_mib"], n_tokens, flops) for name, entry in times.items()}
    ours = found.pop("anellm")
    gflops = ours["gflops"]
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


def show_about(about: Mapping[str, Mapping[str, Any]]) -> None:
    """Print a line for each contender of which there is anything to tell."""
    for name, entry in about.items():
        how = [f"version {entry['version']}"] if "version" in entry else []
        how += ["torch.compile" if entry["compile"] else "eager"] if "compile" in entry else []
        if how or entry["notes"]:
            print(f"{name}: {', '.join([*how, *entry['notes']])}")


def show(values: Mapping[str, Any]) -> None:
    """Print a race's table."""
    rows = []
    for name, entry in {"anellm": values["anellm"], **values["peers"]}.items():
        ratio = values["ratio"].get(name, 1.0)
        least = values["ratio_of_minima"].get(name, 1.0)
        rows.append([name, *cells(entry), f"{ratio:.2f}", f"{least:.2f}"])
    print(table(["", *HEAD, "ms / ours", "least / ours"], rows))
    show_about(values["about"])
    for line in values["missing"].values():
        print(line)
    print(
        f"peak of {values['peak_tier']} multiply-adds {values['peak_gflops']:.0f} GFLOP/s; a step of "
        f"{values['flops'] / 1e9:.1f} GFLOP reaches {values['gflops']:.0f}, {values['fraction_of_peak']:.2f} of it"
    )
    print(COUNTED)


def run(job: BenchJob) -> dict[str, Any]:
    """Measure, print, and return the figures."""
    with tempfile.TemporaryDirectory(prefix="anellm-bench-") as name:
        race = Race(job, Path(name))
        try:
            race.enter_ours()
            race.enter_all()
            peak = Peak(peak_tier(variant(), job.dtype), job.threads)
            times = alternate(race.running, job.rounds, job.steps, 1, peak.sample)
        finally:
            race.close()
    n_tokens = job.batch_size * job.seq_len
    values = {
        **job.describe(),
        **summarise(times, n_tokens, job.shape.flops_per_token(job.seq_len) * n_tokens, peak.gflops),
        "peak_tier": peak.tier,
        "about": race.about,
        "first_losses": race.losses,
        "missing": race.missing,
        "method": f"{job.rounds} rounds, contenders in turns, each 1 untimed and {job.steps} timed steps a turn; ms is "
        "the median of all timed steps, min_ms the least; ratio is a peer's over ours; the peak is the best of those "
        "before the first round and after each. llm.c's program is stopped while others work, and gives as many "
        "timed steps as fit before it generates text.",
    }
    show(values)
    return values
