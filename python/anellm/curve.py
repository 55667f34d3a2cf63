"""Draw a loss curve in the terminal."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

_BLOCKS = " ▁▂▃▄▅▆▇█"
_ASCII = " .:-=+*#@"
_VAL, _VAL_ASCII = "◆", "o"


def points(records: Iterable[Mapping[str, Any]]) -> tuple[list[tuple[int, float]], list[tuple[int, float]]]:
    """Return (step, loss) of the training steps and of the evaluations among metrics records."""
    train, val = [], []
    for record in records:
        if record.get("kind") == "step" and isinstance(record.get("loss"), float):
            train.append((record["step"], record["loss"]))
        elif record.get("kind") == "eval" and isinstance(record.get("val_loss"), float):
            val.append((record["step"], record["val_loss"]))
    return train, val


def _column(step: int, first: int, last: int, width: int) -> int:
    return min(width - 1, (step - first) * width // max(1, last - first + 1))


def _means(train: Sequence[tuple[int, float]], first: int, last: int, width: int) -> list[float | None]:
    """Return the mean loss of each column; a column without a step takes its left neighbour's."""
    sums, counts = [0.0] * width, [0] * width
    for step, loss in train:
        at = _column(step, first, last, width)
        sums[at] += loss
        counts[at] += 1
    means: list[float | None] = []
    for total, count in zip(sums, counts, strict=True):
        means.append(total / count if count else (means[-1] if means else None))
    return means


def draw(
    train: Sequence[tuple[int, float]],
    val: Sequence[tuple[int, float]],
    width: int = 64,
    height: int = 10,
    *,
    ascii_only: bool = False,
) -> str:
    """Return a chart of the training loss as columns and the validation loss as marks; "" without two points.

    Args:
        train: (step, loss) in order of steps.
        val: (step, loss) in order of steps.
        width: columns of the chart, without its axis.
        height: rows.
        ascii_only: for terminals that show nothing else.
    """
    everything = [*train, *val]
    if len(everything) < 2 or width < 1 or height < 1:
        return ""
    first, last = min(step for step, _ in everything), max(step for step, _ in everything)
    low, high = min(loss for _, loss in everything), max(loss for _, loss in everything)
    span = (high - low) or 1.0
    blocks, mark = (_ASCII, _VAL_ASCII) if ascii_only else (_BLOCKS, _VAL)
    cells = [[" "] * width for _ in range(height)]
    for column, mean in enumerate(_means(train, first, last, width)):
        if mean is None:
            continue
        eighths = 1 + round((mean - low) / span * (height * 8 - 1))
        for row in range(height):
            cells[height - 1 - row][column] = blocks[max(0, min(8, eighths - 8 * row))]
    for step, loss in val:
        row = min(height - 1, int((loss - low) / span * height))
        cells[height - 1 - row][_column(step, first, last, width)] = mark
    lines = []
    for index, row_cells in enumerate(cells):
        label = f"{high - span * index / max(1, height - 1):8.3f}" if index in (0, height // 2, height - 1) else " " * 8
        lines.append(f"{label} |{''.join(row_cells)}".rstrip())
    steps = f"{first}".ljust(width - len(str(last))) + str(last)
    lines.append(f"{'step':>8} +{steps}")
    legend = f"{blocks[8]} training loss" + (f"   {mark} validation loss" if val else "")
    return "\n".join([*lines, " " * 10 + legend])
