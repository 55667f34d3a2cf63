"""Curves in one picture: SVG with nothing but the standard library, PNG through matplotlib."""

from __future__ import annotations

import importlib.util
import io
import math
from collections.abc import Sequence
from typing import Any, NamedTuple
from xml.sax.saxutils import escape, quoteattr

from anellm.errors import InvalidError, UnavailableError

_WIDTH, _HEIGHT, _LEFT, _RIGHT, _TOP, _BOTTOM = 720, 420, 70, 190, 52, 52
# Okabe and Ito's colours, which the colour-blind tell apart (jfly.uni-koeln.de/color), without yellow.
_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#1c1c1c")
_TICKS = 6


class Curve(NamedTuple):
    """A name and its points (x, y), x rising, all finite."""

    name: str
    points: Sequence[tuple[float, float]]


def colour(index: int) -> str:
    """Return the colour of a curve by its place."""
    return _COLOURS[index % len(_COLOURS)]


def ticks(low: float, high: float) -> list[float]:
    """Return round numbers from low to high, at most seven: steps of 1, 2 or 5 times a power of ten."""
    span = high - low
    if not span > 0:
        return [low]
    base = 10.0 ** math.floor(math.log10(span / _TICKS))
    step = next(m * base for m in (1, 2, 5, 10, 20) if span / (m * base) <= _TICKS)
    first = math.ceil(low / step - 1e-9)
    return [round(i * step, 12) for i in range(first, math.floor(high / step + 1e-9) + 1)]


def _range(values: Sequence[float]) -> tuple[float, float]:
    low, high = min(values), max(values)
    return (low, high) if high > low else (low - 0.5, high + 0.5)


def _check(curves: Sequence[Curve]) -> None:
    """Refuse what cannot be drawn.

    Raises:
        InvalidError: without a point, or with one that is not finite.
    """
    for curve in curves:
        for x, y in curve.points:
            if not (math.isfinite(x) and math.isfinite(y)):
                raise InvalidError(f"curve {curve.name}: expected finite points, found {(x, y)}")
    if not any(curve.points for curve in curves):
        raise InvalidError("chart: expected at least one point, found none")


def svg(title: str, x_label: str, y_label: str, curves: Sequence[Curve]) -> str:
    """Return the curves as an SVG picture on linear axes, each with its name and last value in a legend.

    Args:
        title: what the picture shows.
        x_label: what x is.
        y_label: what y is.
        curves: at least one point among them; one without points stands in the legend only.

    Raises:
        InvalidError: without a point, or with one that is not finite.
    """
    _check(curves)
    x0, x1 = _range([x for curve in curves for x, _ in curve.points])
    y0, y1 = _range([y for curve in curves for _, y in curve.points])
    right, bottom = _WIDTH - _RIGHT, _HEIGHT - _BOTTOM

    def at(x: float, y: float) -> tuple[float, float]:
        return _LEFT + (x - x0) / (x1 - x0) * (right - _LEFT), bottom - (y - y0) / (y1 - y0) * (bottom - _TOP)

    size = f'viewBox="0 0 {_WIDTH} {_HEIGHT}" width="{_WIDTH}" height="{_HEIGHT}"'
    font = 'font-family="sans-serif" font-size="13"'
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" {size} {font} role="img" aria-label={quoteattr(title)}>',
        f'<rect width="{_WIDTH}" height="{_HEIGHT}" fill="#ffffff"/>',
        f'<text x="16" y="28" font-size="16" fill="#1c1c1c">{escape(title)}</text>',
    ]
    for value in ticks(y0, y1):
        y = at(x0, value)[1]
        parts += [
            f'<line x1="{_LEFT}" y1="{y:.1f}" x2="{right}" y2="{y:.1f}" stroke="#e2e2e2"/>',
            f'<text x="{_LEFT - 8}" y="{y + 4:.1f}" text-anchor="end" fill="#4a4a4a">{value:g}</text>',
        ]
    for value in ticks(x0, x1):
        x = at(value, y0)[0]
        parts += [
            f'<line x1="{x:.1f}" y1="{bottom}" x2="{x:.1f}" y2="{bottom + 5}" stroke="#4a4a4a"/>',
            f'<text x="{x:.1f}" y="{bottom + 20}" text-anchor="middle" fill="#4a4a4a">{value:g}</text>',
        ]
    middle = (_LEFT + right) / 2
    parts += [
        f'<line x1="{_LEFT}" y1="{bottom}" x2="{right}" y2="{bottom}" stroke="#4a4a4a"/>',
        f'<text x="{middle}" y="{_HEIGHT - 12}" text-anchor="middle" fill="#1c1c1c">{escape(x_label)}</text>',
        f'<text x="{_LEFT - 8}" y="{_TOP - 8}" text-anchor="end" fill="#1c1c1c">{escape(y_label)}</text>',
    ]
    for i, curve in enumerate(curves):
        places = [at(x, y) for x, y in curve.points]
        line = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
        if places:
            parts.append(f'<polyline points="{line}" fill="none" stroke="{colour(i)}" stroke-width="2"/>')
        parts += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{colour(i)}"/>' for x, y in places]
        last = f": {curve.points[-1][1]:.4f}" if curve.points else ": -"
        top = _TOP + 20 * i
        parts += [
            f'<rect x="{right + 16}" y="{top}" width="14" height="4" fill="{colour(i)}"/>',
            f'<text x="{right + 36}" y="{top + 8}" fill="#1c1c1c">{escape(curve.name + last)}</text>',
        ]
    return "\n".join([*parts, "</svg>"]) + "\n"


def png(title: str, x_label: str, y_label: str, curves: Sequence[Curve]) -> bytes:
    """Return the same picture as PNG; see svg().

    Raises:
        InvalidError: without a point, or with one that is not finite.
        UnavailableError: when matplotlib is not installed.
    """
    _check(curves)
    if importlib.util.find_spec("matplotlib") is None:
        raise UnavailableError("a PNG needs matplotlib: pip install 'anellm[plot]'")
    figure_of: Any = importlib.import_module("matplotlib.figure").Figure
    figure = figure_of(figsize=(_WIDTH / 100, _HEIGHT / 100), dpi=200, layout="constrained")  # no window, no state
    axes = figure.subplots()
    for i, curve in enumerate(curves):
        label = curve.name + (f": {curve.points[-1][1]:.4f}" if curve.points else ": -")
        x, y = [point[0] for point in curve.points], [point[1] for point in curve.points]
        axes.plot(x, y, color=colour(i), marker="o", markersize=3, label=label)
    axes.set(title=title, xlabel=x_label, ylabel=y_label)
    axes.grid(visible=True, color="#e2e2e2")
    axes.legend()
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()
