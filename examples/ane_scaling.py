"""Draw what scaling does for training on the Neural Engine: the losses of three runs, as an SVG.

    RUN="--preset stories15m --steps 300 --batch-size 4 --seq-len 256 --seed 1 --data TEXT --tokenizer TOKENIZER"
    anellm train $RUN --device cpu --out runs/cpu
    anellm train $RUN --device ane-sim --chip m4 --out runs/sim
    anellm train $RUN --device ane-sim --chip m4 --ane-scaling off --out runs/off
    python examples/ane_scaling.py runs/cpu runs/sim runs/off docs/ane-scaling.svg

It prints how far apart the runs are, and exits with 1 unless the simulated engine follows the CPU: validation losses at
the last step within 1 %, training losses within 2 % at every step from the 50th on.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from xml.sax.saxutils import escape

from anellm import curve, metrics

NAMES = ("CPU, fp32", "Neural Engine (simulated)", "the same without scaling")
COLOURS = ("#1c1c1c", "#2f6f8f", "#b5482f")
FIRST_STEP = 50  # training losses are compared from here on
TRAIN_LIMIT, VAL_LIMIT = 0.02, 0.01
WINDOW = 9  # steps that a point of a curve is the mean of

Points = list[tuple[int, float]]


@dataclass(frozen=True)
class Run:
    """One run: its name, its training losses, its validation losses, and the steps it skipped."""

    name: str
    train: Points
    val: Points
    skipped: int


def read(path: Path, name: str) -> Run:
    """Return a run's losses.

    Raises:
        SystemExit: when there are none.
    """
    records = list(metrics.read(path if path.is_dir() else path.parent))
    train, val = curve.points(records)
    if not train or not val:
        raise SystemExit(f"{path}: expected a run with training and validation losses, found none")
    return Run(name, train, val, sum(record["kind"] == "skip" for record in records))


def smooth(points: Points) -> Points:
    """Return each step's loss as the mean of those around it; fewer at the ends."""
    half = WINDOW // 2
    losses = [loss for _, loss in points]
    windows = (losses[max(0, i - half) : i + half + 1] for i in range(len(losses)))
    return [(step, sum(window) / len(window)) for (step, _), window in zip(points, windows, strict=True)]


def difference(one: Points, other: Points, first_step: int) -> tuple[float, int]:
    """Return the largest relative difference from a step on, and the step it is at; inf where one run is longer."""
    a, b = ({step: loss for step, loss in points if step >= first_step} for points in (one, other))
    both = a.keys() & b.keys()  # a skipped step has no loss
    if not both or max(a) != max(b):
        return math.inf, max(both, default=first_step)
    return max((abs(b[step] - a[step]) / a[step], step) for step in both)


# ---- drawing -----------------------------------------------------------------------------------------------------

_WIDTH, _HEIGHT, _LEFT, _RIGHT, _TOP, _BOTTOM = 760, 420, 60, 20, 60, 46


def ticks(low: float, high: float, about: int) -> list[float]:
    """Return round numbers from low to high, about so many."""
    raw = (high - low) / about or 1.0
    size = 10.0 ** math.floor(math.log10(raw))
    size *= next(factor for factor in (1, 2, 5, 10) if size * factor >= raw)
    first = math.ceil(low / size - 1e-9)
    return [i * size for i in range(first, math.floor(high / size + 1e-9) + 1)]


def draw(runs: Sequence[Run], title: str) -> str:
    """Return the runs as an SVG: lines for training losses, rings for validation losses."""
    everything = [point for run in runs for point in [*smooth(run.train), *run.val]]
    last = max(step for step, _ in everything)
    low, high = min(loss for _, loss in everything), max(loss for _, loss in everything)
    margin = 0.03 * (high - low) or 0.5
    low, high = low - margin, high + margin
    right, bottom = _WIDTH - _RIGHT, _HEIGHT - _BOTTOM

    def x(step: float) -> str:
        return f"{_LEFT + (right - _LEFT) * step / max(1, last):.1f}"

    def y(loss: float) -> str:
        return f"{bottom - (bottom - _TOP) * (loss - low) / (high - low):.1f}"

    size = f'viewBox="0 0 {_WIDTH} {_HEIGHT}" width="{_WIDTH}" height="{_HEIGHT}"'
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" {size} font-family="sans-serif" font-size="13" role="img">',
        f"<title>{escape(title)}</title>",
        f'<rect width="{_WIDTH}" height="{_HEIGHT}" fill="#ffffff"/>',
        f'<text x="16" y="26" font-size="16" fill="#1c1c1c">{escape(title)}</text>',
    ]
    for loss in ticks(low, high, 6):
        parts.append(f'<line x1="{_LEFT}" x2="{right}" y1="{y(loss)}" y2="{y(loss)}" stroke="#e3e3e3"/>')
        parts.append(f'<text x="{_LEFT - 8}" y="{y(loss)}" dy="4" text-anchor="end" fill="#4a4a4a">{loss:g}</text>')
    for step in ticks(0, last, 6):
        parts.append(f'<text x="{x(step)}" y="{bottom + 18}" text-anchor="middle" fill="#4a4a4a">{step:g}</text>')
    parts.append(f'<text x="{right}" y="{bottom + 36}" text-anchor="end" fill="#4a4a4a">step</text>')
    parts.append(f'<text x="{_LEFT - 8}" y="{_TOP - 8}" text-anchor="end" fill="#4a4a4a">loss</text>')
    for i, (run, colour) in enumerate(zip(runs, COLOURS, strict=True)):
        line = " ".join(f"{x(step)},{y(loss)}" for step, loss in smooth(run.train))
        dashes = ' stroke-dasharray="6 4"' if i == 1 else ""  # it lies on the first
        parts.append(f'<polyline points="{line}" fill="none" stroke="{colour}" stroke-width="1.8"{dashes}/>')
        for step, loss in run.val:
            parts.append(f'<circle cx="{x(step)}" cy="{y(loss)}" r="{4 + i}" fill="none" stroke="{colour}"/>')
        top = _TOP + 14 + 20 * i
        note = f"{run.name}: validation loss {run.val[-1][1]:.4f}" + (f", {run.skipped} skipped" if run.skipped else "")
        parts.append(f'<line x1="{right - 330}" x2="{right - 300}" y1="{top - 4}" y2="{top - 4}" stroke="{colour}" '
                     f'stroke-width="2"{dashes}/>')  # fmt: skip
        parts.append(f'<text x="{right - 292}" y="{top}" fill="{colour}">{escape(note)}</text>')
    return "\n".join([*parts, "</svg>"]) + "\n"


def main(argv: Sequence[str]) -> int:
    """Draw, print the differences, and return 0 when the engine follows the CPU."""
    if len(argv) != 4:
        raise SystemExit("usage: ane_scaling.py CPU_RUN SIM_RUN OFF_RUN FIGURE.svg")
    runs = [read(Path(path), name) for path, name in zip(argv, NAMES, strict=False)]
    Path(argv[3]).write_text(draw(runs, "Training loss on the Neural Engine, with and without scaling"), "utf-8")
    cpu = runs[0]
    good = True
    for run in runs:
        train, at = difference(cpu.train, run.train, FIRST_STEP)
        val = abs(run.val[-1][1] - cpu.val[-1][1]) / cpu.val[-1][1]
        print(f"{run.name:28} validation loss {run.val[-1][1]:.4f} ({val:.3%} off), "
              f"training loss at most {train:.3%} off (step {at}), {run.skipped} steps skipped")  # fmt: skip
        good &= run is runs[2] or (train <= TRAIN_LIMIT and val <= VAL_LIMIT)
    print(f"the engine follows the CPU: {'yes' if good else 'no'}")
    return 0 if good else 1


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
