"""Plots of a dataset as inline SVG."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from markupsafe import Markup

from loraport.buckets import Size
from loraport.pages.svg import ACCENT, LINE, WARN, WIDTH, line, svg, text

#: Light to dark, for counts.
SHADES = ("#e3edfb", "#cbdef7", "#afcbf1", "#90b5ea", "#6f9ce0", "#4f82d4", "#3569c4", "#2253ae", "#173f90", "#0e2c6e")
_LEFT, _RIGHT, _TOP, _BOTTOM = 54, 10, 10, 40
_BINS = 24
_SPOTS = 32  #: places for bubbles along an axis, so that their number is bounded


def sizes_plot(sizes: Mapping[Size, int], resolution: int) -> Markup:
    """Width against height of all images, both on log scales: a bubble's area is the number of images about there. The
    line is the pixel budget; images below it are smaller than they could be trained."""
    height = 300
    sides = [side for size in sizes for side in size]
    low, high = min([*sides, resolution // 2]) / 1.25, max([*sides, resolution * 2]) * 1.25
    inner_w, inner_h = WIDTH - _LEFT - _RIGHT, height - _TOP - _BOTTOM
    span = math.log(high / low)

    def x(value: float) -> float:
        return _LEFT + inner_w * math.log(value / low) / span

    def y(value: float) -> float:
        return _TOP + inner_h * (1 - math.log(value / low) / span)

    parts = []
    for tick in _octaves(low, high):
        parts.append(line(x(tick), _TOP, x(tick), _TOP + inner_h))
        parts.append(line(_LEFT, y(tick), _LEFT + inner_w, y(tick)))
        parts.append(text(x(tick), height - 24, f"{tick}", "middle"))
        parts.append(text(_LEFT - 6, y(tick) + 4, f"{tick}", "end"))
    start, end = max(low, resolution**2 / high), min(high, resolution**2 / low)
    parts.append(line(x(start), y(resolution**2 / start), x(end), y(resolution**2 / end), dashed=True))
    bubbles: dict[tuple[int, int], tuple[int, Size]] = {}
    for size, count in sizes.items():
        spot = (round(_SPOTS * math.log(size[0] / low) / span), round(_SPOTS * math.log(size[1] / low) / span))
        known, largest = bubbles.get(spot, (0, size))
        bubbles[spot] = (known + count, size if count > sizes[largest] else largest)
    most = max((count for count, _ in bubbles.values()), default=1)
    for count, size in sorted(bubbles.values(), reverse=True):
        radius = 3 + 11 * math.sqrt(count / most) if most > 1 else 4
        told = f"about {size[0]} × {size[1]} px: {count:,} image{'s' if count != 1 else ''}"
        circle = (
            '<circle cx="{x:.1f}" cy="{y:.1f}" r="{r:.1f}" fill="{c}" fill-opacity=".5" stroke="{c}">'
            "<title>{t}</title></circle>"
        )
        parts.append(Markup(circle).format(x=x(size[0]), y=y(size[1]), r=radius, c=ACCENT, t=told))
    parts.append(text(_LEFT + inner_w / 2, height - 6, "width, px", "middle"))
    upwards = '<text transform="translate(11 {y}) rotate(-90)" text-anchor="middle" class="t">height, px</text>'
    parts.append(Markup(upwards).format(y=_TOP + inner_h / 2))
    return svg(height, f"Widths and heights of {sum(sizes.values()):,} images", parts)


def histogram(values: Sequence[int], unit: str, limit: int | None = None) -> Markup:
    """How many values lie in each of up to 24 equal ranges, with a line at the limit where it is in sight."""
    height = 230
    low, high = min(values), max(values)
    step = _nice_step((high - low + 1) / _BINS)
    start = low // step * step
    bins = [0] * ((high - start) // step + 1)
    for value in values:
        bins[(value - start) // step] += 1
    inner_w, inner_h = WIDTH - _LEFT - _RIGHT, height - _TOP - _BOTTOM
    most, each = max(bins), inner_w / len(bins)
    parts = []
    for tick in _count_ticks(most):
        y = _TOP + inner_h * (1 - tick / most)
        parts += [line(_LEFT, y, _LEFT + inner_w, y), text(_LEFT - 6, y + 4, f"{tick:,}", "end")]
    for index, count in enumerate(bins):
        if count:
            first = start + index * step
            told = f"{_range(first, step)} {unit}: {count:,} caption{'s' if count != 1 else ''}"
            bar = inner_h * count / most
            rect = '<rect x="{x:.1f}" y="{y:.1f}" width="{w:.1f}" height="{h:.1f}" fill="{c}"><title>{t}</title></rect>'
            over = limit is not None and first + step - 1 > limit
            parts.append(
                Markup(rect).format(
                    x=_LEFT + index * each + 0.75,
                    y=_TOP + inner_h - bar,
                    w=max(each - 1.5, 0.5),
                    h=bar,
                    c=WARN if over else ACCENT,
                    t=told,
                )
            )
    every = max(1, math.ceil(len(bins) / 6))
    for index in range(0, len(bins) + 1, every):
        parts.append(text(_LEFT + index * each, height - 24, f"{start + index * step:,}", "middle"))
    if limit is not None and start <= limit <= start + len(bins) * step:
        x = _LEFT + inner_w * (limit - start) / (len(bins) * step)
        parts.append(line(x, _TOP, x, _TOP + inner_h, dashed=True))
    parts.append(text(_LEFT + inner_w / 2, height - 6, unit, "middle"))
    return svg(height, f"{len(values):,} captions by length, {low:,} to {high:,} {unit}", parts)


def heat_map(rows: Sequence[Sequence[int]], what: str) -> Markup:
    """Counts over a grid as shades, drawn as the square that every picture is when measured in thousandths."""
    side = 280
    left, top = (WIDTH - side) / 2, 18
    cell = side / len(rows)
    most = max(max(row) for row in rows)
    parts = [_frame(left, top, side, "#fff")]
    for number, row in enumerate(rows):
        column = 0
        while column < len(row):
            shade = _shade(row[column], most)
            end = column
            while end < len(row) and _shade(row[end], most) == shade:
                end += 1
            if shade is not None:
                # A hair wider and higher than the cells, so that no seams show between them.
                rect = (
                    '<rect x="{x:.2f}" y="{y:.2f}" width="{w:.2f}" height="{h:.2f}" fill="{c}" '
                    'shape-rendering="crispEdges"/>'
                )
                parts.append(
                    Markup(rect).format(
                        x=left + column * cell,
                        y=top + number * cell,
                        w=(end - column) * cell + (0.3 if end < len(row) else 0),
                        h=cell + (0.3 if number + 1 < len(rows) else 0),
                        c=SHADES[shade],
                    )
                )
            column = end
    for part in (1 / 3, 2 / 3):
        guide = (
            '<path d="M{x:.1f} {t}v{s}M{l} {y:.1f}h{s}" stroke="#7a8594" stroke-opacity=".7" stroke-dasharray="2 4"/>'
        )
        parts.append(Markup(guide).format(x=left + part * side, y=top + part * side, t=top, l=left, s=side))
    parts.append(_frame(left, top, side, "none"))
    parts += [text(WIDTH / 2, 12, "top of the picture", "middle"), *_legend(left, top + side + 12, side, most)]
    busiest = max((count, -number, -column) for number, row in enumerate(rows) for column, count in enumerate(row))
    place = _place(-busiest[1] / len(rows), -busiest[2] / len(rows))
    return svg(int(top + side + 46), f"Where {what} are; most of them cover the {place}", parts)


def _legend(left: float, top: float, side: float, most: int) -> list[Markup]:
    if most == 1:
        return [text(left + side / 2, top + 8, "no place is in two boxes", "middle")]
    width = side / len(SHADES)
    parts = []
    for index, shade in enumerate(SHADES):
        rect = '<rect x="{x:.1f}" y="{y}" width="{w:.1f}" height="9" fill="{c}"/>'
        parts.append(Markup(rect).format(x=left + index * width, y=top, w=width + 0.3, c=shade))
    return [*parts, text(left, top + 23, "few", "start"), text(left + side, top + 23, f"{most:,} boxes", "end")]


def _shade(count: int, most: int) -> int | None:
    """The index of a count's shade; None for none at all."""
    return None if not count else math.ceil(len(SHADES) * count / most) - 1


def _place(down: float, across: float) -> str:
    row = ("top", "middle", "bottom")[min(2, int(3 * down))]
    column = ("left", "centre", "right")[min(2, int(3 * across))]
    return "centre" if (row, column) == ("middle", "centre") else f"{row} {column}"


def _octaves(low: float, high: float) -> list[int]:
    return [2**power for power in range(math.ceil(math.log2(low)), math.floor(math.log2(high)) + 1)]


def _nice_step(least: float) -> int:
    """The smallest of 1, 2, 5, 10, 20, 50 … that is not below."""
    step = 1
    while True:
        for factor in (1, 2, 5):
            if factor * step >= least:
                return factor * step
        step *= 10


def _count_ticks(most: int) -> list[int]:
    step = _nice_step(most / 4)
    return list(range(0, most + 1, step))


def _range(first: int, step: int) -> str:
    return f"{first:,}" if step == 1 else f"{first:,} to {first + step - 1:,}"


def _frame(left: float, top: float, side: float, fill: str) -> Markup:
    frame = '<rect x="{x}" y="{y}" width="{s}" height="{s}" fill="{f}" stroke="{c}"/>'
    return Markup(frame).format(x=left, y=top, s=side, f=fill, c=LINE)
