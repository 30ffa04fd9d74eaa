"""Pieces of inline SVG, made of strings that are safe by construction: `Markup.format` escapes whatever is put in.

Every plot is 360 units wide, so that its text stays readable on a phone, and names itself for screen readers.
"""

from __future__ import annotations

from collections.abc import Sequence

from markupsafe import Markup

WIDTH = 360
LINE, ACCENT, WARN = "#d9dee5", "#2563c9", "#b3261e"


def svg(height: int, title: str, parts: Sequence[Markup]) -> Markup:
    """A picture with its title, `WIDTH` units wide."""
    head = Markup('<svg viewBox="0 0 {w} {h}" role="img" aria-label="{t}" class="plot">').format(
        w=WIDTH, h=height, t=title
    )
    return head + Markup("").join(parts) + Markup("</svg>")


def line(x1: float, y1: float, x2: float, y2: float, dashed: bool = False) -> Markup:
    """A line of the grid; dashed, it marks a limit."""
    style = Markup(' stroke-width="1.5" stroke-dasharray="5 4"' if dashed else "")
    path = '<path d="M{x1:.1f} {y1:.1f}L{x2:.1f} {y2:.1f}" stroke="{c}"{style}/>'
    return Markup(path).format(x1=x1, y1=y1, x2=x2, y2=y2, c=WARN if dashed else LINE, style=style)


def text(x: float, y: float, content: str, anchor: str) -> Markup:
    """A word at a place; anchor: start, middle or end."""
    return Markup('<text x="{x:.1f}" y="{y:.1f}" text-anchor="{a}" class="t">{t}</text>').format(
        x=x, y=y, a=anchor, t=content
    )
