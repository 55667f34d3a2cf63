"""Bar charts as SVG, with nothing but the standard library."""

from __future__ import annotations

from collections.abc import Sequence
from xml.sax.saxutils import escape, quoteattr

_WIDTH, _BAR, _GAP, _LEFT, _RIGHT, _TOP = 720, 26, 10, 190, 200, 52


def bar_chart(title: str, unit: str, bars: Sequence[tuple[str, float, str]], limit: float, limit_name: str) -> str:
    """Return horizontal bars on a linear scale, with a line for the limit.

    Args:
        title: what the chart shows.
        unit: of the values.
        bars: name, value, and what stands behind the bar.
        limit: the value of the line.
        limit_name: what it is.
    """
    longest = max([limit, *(value for _, value, _ in bars)]) or 1.0
    left = max([_LEFT, *(20 + 7 * len(name) for name, _, _ in bars)])  # a letter is 7 wide, about
    span = _WIDTH - left - _RIGHT
    height = _TOP + len(bars) * (_BAR + _GAP) + 40
    bottom = height - 40
    size = f'viewBox="0 0 {_WIDTH} {height}" width="{_WIDTH}" height="{height}"'
    font = 'font-family="sans-serif" font-size="13"'
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" {size} {font} role="img" aria-label={quoteattr(title)}>',
        f'<rect width="{_WIDTH}" height="{height}" fill="#ffffff"/>',
        f'<text x="16" y="28" font-size="16" fill="#1c1c1c">{escape(title)}</text>',
    ]
    for i, (name, value, note) in enumerate(bars):
        y = _TOP + i * (_BAR + _GAP)
        width = max(1.0, span * value / longest)
        base = y + _BAR - 8
        text = escape(f"{value:.1f} {unit} {note}")
        parts += [
            f'<text x="{left - 10}" y="{base}" text-anchor="end" fill="#1c1c1c">{escape(name)}</text>',
            f'<rect x="{left}" y="{y}" width="{width:.1f}" height="{_BAR}" rx="3" fill="#2f6f8f"/>',
            f'<text x="{left + width + 8:.1f}" y="{base}" fill="#4a4a4a">{text}</text>',
        ]
    x = left + span * limit / longest
    text = escape(f"{limit_name}: {limit:.0f} {unit}")
    parts += [
        f'<line x1="{x:.1f}" y1="{_TOP - 6}" x2="{x:.1f}" y2="{bottom}" stroke="#b5482f" stroke-dasharray="5 4"/>',
        f'<text x="{x:.1f}" y="{bottom + 20}" text-anchor="middle" fill="#b5482f">{text}</text>',
        "</svg>",
    ]
    return "\n".join(parts) + "\n"
