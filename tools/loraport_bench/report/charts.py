"""The report's plots as inline SVG."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from markupsafe import Markup

from loraport.pages.svg import WARN, WIDTH, line, svg, text
from loraport_bench.records import PhaseName, Run
from loraport_bench.report.numbers import PHASES, Entry, Group, Numbers, seconds
from loraport_bench.report.tables import phase_title

#: Of backends, by their place in the bench; told apart without colours by dashes and by markers.
COLOURS = ("#2563c9", "#b34700", "#2e7d32", "#8e24aa", "#00707a", "#c2185b", "#6b5b00", "#455a64")
_DASHES = ("", "7 3", "2 2.5", "9 3 2 3", "4 2", "12 3", "1 2", "6 2 1 2 1 2")
PHASE_COLOURS: dict[PhaseName, str] = dict(
    zip(
        PHASES,
        ("#8b97a6", "#f0a840", "#5bb5a2", "#c789c9", "#2563c9", "#9bc1f2", "#d9d36a", "#b3261e", "#3b3f46"),
        strict=True,
    )
)
_LEFT, _RIGHT = 56, 14
_MOST_POINTS = 220  #: of one curve

Point = tuple[float, float]


@dataclass(frozen=True)
class Curve:
    """A line of a plot. `of` is the place of its backend, which gives it its colour and dashes."""

    name: str
    of: int
    points: Sequence[Point]


@dataclass(frozen=True)
class Axis:
    """What is along an axis, and how its ticks are told."""

    title: str
    tell: Callable[[float], str]
    zero: bool = True  #: whether it begins at zero


def place_of(backends: Sequence[str], name: str) -> int:
    return list(backends).index(name) if name in backends else len(backends)


def colour(place: int) -> str:
    """Of a backend, by its place."""
    return COLOURS[place % len(COLOURS)]


def dashes(place: int) -> str:
    return _DASHES[place % len(_DASHES)]


def ranges(
    entries: Sequence[Entry],
    backends: Sequence[str],
    of: Callable[[Entry], Numbers | None],
    each: Callable[[Run], Point | float | None],
    axis: Axis,
    title: str,
    mark: tuple[float, str] | None = None,
) -> Markup:
    """A row for each backend: a bar from 10th to 90th percentile, the median, and each repeat as a dot. A backend
    without a number says why. `mark` is a dashed line with its name."""
    step, top = 46, 22 if mark else 6
    height = top + step * len(entries) + 36
    found = {one.backend: of(one) for one in entries}
    known = [got for got in found.values() if got]
    values = [value for got in known for value in (0.0 if axis.zero else got.low, got.p90, got.high)]
    values += [mark[0]] if mark else []
    if axis.zero:  # one wild step must not press all others together
        most = max((got.p90 for got in known), default=1.0) * 1.12
        values = [min(value, most) for value in values]
    low, high, ticks = _scale(values, axis.zero, 5)
    inner = WIDTH - 16 - _RIGHT

    def x(value: float) -> float:
        return 16 + inner * (value - low) / (high - low)

    bottom = top + step * len(entries)
    parts = [line(x(tick), top, x(tick), bottom) for tick in ticks]
    parts += [text(x(tick), bottom + 15, _short(tick), "middle") for tick in ticks]
    if mark:
        parts += [line(x(mark[0]), top, x(mark[0]), bottom, dashed=True)]
        parts += [text(min(x(mark[0]), WIDTH - 4), top - 8, mark[1], "end" if x(mark[0]) > WIDTH / 2 else "start")]
    for number, one in enumerate(entries):
        y, ink, got = top + step * number + 30, colour(place_of(backends, one.backend)), found[one.backend]
        parts.append(_label(16, y - 13, one.backend, axis.tell(got.median) if got else ""))
        if got is None:
            parts.append(_warning(16, y + 4, one.why_not or "not measured"))
            continue
        if axis.zero:
            length = '<rect x="16" y="{y:.1f}" width="{w:.1f}" height="10" fill="{c}" fill-opacity=".2"/>'
            parts.append(Markup(length).format(y=y - 5, w=x(got.median) - 16, c=ink))
        told = f"{one.backend}: median {axis.tell(got.median)}, {axis.tell(got.p10)} to {axis.tell(got.p90)}"
        bar = (
            '<rect x="{x:.1f}" y="{y:.1f}" width="{w:.1f}" height="10" rx="2" fill="{c}" fill-opacity=".45">'
            "<title>{t}</title></rect>"
        )
        wide = max(x(got.p90) - x(got.p10), 2)
        parts.append(Markup(bar).format(x=x(got.p10), y=y - 5, w=wide, c=ink, t=told))
        middle = '<path d="M{x:.1f} {y:.1f}v14" stroke="{c}" stroke-width="2.5"/>'
        parts.append(Markup(middle).format(x=x(got.median), y=y - 7, c=ink))
        for run in one.good:
            value = each(run)
            if isinstance(value, float) and low <= value <= high:
                dot = '<circle cx="{x:.1f}" cy="{y:.1f}" r="2.6" fill="{c}" stroke="#fff" stroke-width=".8"/>'
                parts.append(Markup(dot).format(x=x(value), y=y, c=ink))
    parts.append(text(16 + inner / 2, height - 4, axis.title, "middle"))
    return svg(height, title, parts)


def stacked(group: Group) -> Markup:
    """Each backend's phases one after the other, in median seconds."""
    step, top = 44, 4
    rows = [one for one in group.entries if one.good]
    height = top + step * len(group.entries) + 36
    totals = {one.backend: sum(got.median for name in group.phases if (got := one.phase(name))) for one in rows}
    low, high, ticks = _scale([0.0, *totals.values()], True, 5)
    inner, bottom = WIDTH - 16 - _RIGHT, top + step * len(group.entries)

    def x(value: float) -> float:
        return 16 + inner * (value - low) / (high - low)

    parts = [line(x(tick), top, x(tick), bottom) for tick in ticks]
    parts += [text(x(tick), bottom + 15, f"{tick:,.4g}", "middle") for tick in ticks]
    for number, one in enumerate(group.entries):
        y, since = top + step * number + 20, 0.0
        parts.append(_label(16, y - 4, one.backend, seconds(totals[one.backend]) if one.good else ""))
        if not one.good:
            parts.append(_warning(16, y + 13, one.why_not))
            continue
        for name in group.phases:
            got = one.phase(name)
            if got:
                told = f"{one.backend}, {phase_title(name)}: {seconds(got.median)}"
                box = '<rect x="{x:.2f}" y="{y}" width="{w:.2f}" height="16" fill="{c}"><title>{t}</title></rect>'
                wide = max(x(since + got.median) - x(since), 0.3)
                parts.append(Markup(box).format(x=x(since), y=y, w=wide, c=PHASE_COLOURS[name], t=told))
                since += got.median
    parts.append(text(16 + inner / 2, height - 4, "seconds, phases one after the other", "middle"))
    return svg(height, f"Phases of the runs, {group.title}", parts)


def curves(lines: Sequence[Curve], across: Axis, up: Axis, title: str, mark: tuple[float, str] | None = None) -> Markup:
    """Curves over one another on common axes. `mark` is a dashed level with its name."""
    return svg(250, title, _panel(lines, across, up, 10, 204, mark, title_up=True))


def panels(parts: Sequence[tuple[str, Sequence[Curve]]], across: Axis, up: Axis, title: str) -> Markup:
    """A panel for each part, one below the other: common across, each with an axis of its own upwards."""
    each, drawn = 104, []
    most = max((x for _, lines in parts for curve in lines for x, _ in curve.points), default=1.0)
    for number, (name, lines) in enumerate(parts):
        top = 20 + each * number
        drawn.append(_label(_LEFT, top - 6, name))
        last = number == len(parts) - 1
        drawn += _panel(lines, across, up, top, top + each - 30, None, most=most, ticks_across=last)
    return svg(20 + each * len(parts) + 14, title, drawn)


def trace(run: Run, title: str) -> Markup:
    """A run's memory over time, over its phases as shades."""
    lines = []
    if run.device_memory:
        lines.append(Curve("device", 0, [(at, size / 2**30) for at, size in run.device_memory.samples]))
    if run.host_memory:
        lines.append(Curve("host", 1, [(at, size / 2**30) for at, size in run.host_memory.samples]))
    most = max([at for curve in lines for at, _ in curve.points] + [end for *_, end in run.timeline])
    _, high, _ = _scale([0.0, most], True, 5)
    shades = []
    for name, start, end in run.timeline:
        told = f"{phase_title(name)}: {seconds(end - start)}"
        box = (
            '<rect x="{x:.1f}" y="10" width="{w:.1f}" height="194" fill="{c}" fill-opacity=".22">'
            "<title>{t}</title></rect>"
        )
        at = _LEFT + (WIDTH - _LEFT - _RIGHT) * start / high
        wide = (WIDTH - _LEFT - _RIGHT) * max(end - start, 0) / high
        shades.append(Markup(box).format(x=at, w=wide, c=PHASE_COLOURS[name], t=told))
    across, up = Axis("seconds since the start", _short), Axis("GiB", _short)
    return svg(250, title, [*shades, *_panel(lines, across, up, 10, 204, None, title_up=True, most=most)])


def _panel(
    lines: Sequence[Curve],
    across: Axis,
    up: Axis,
    top: float,
    bottom: float,
    mark: tuple[float, str] | None,
    title_up: bool = False,
    most: float | None = None,
    ticks_across: bool = True,
) -> list[Markup]:
    values = [y for curve in lines for _, y in curve.points if math.isfinite(y)]
    far = most if most is not None else max((x for curve in lines for x, _ in curve.points), default=1.0)
    left, right, steps = _scale([0.0, far], True, 5)
    low, high, ticks = _scale([*values, *([mark[0]] if mark else [])] or [0.0], up.zero, 5 if bottom - top > 120 else 3)

    def place(point: Point) -> Point:
        x = _LEFT + (WIDTH - _LEFT - _RIGHT) * (point[0] - left) / (right - left)
        return x, bottom - (bottom - top) * (point[1] - low) / (high - low)

    parts = []
    for tick in ticks:
        y = place((0, tick))[1]
        parts += [line(_LEFT, y, WIDTH - _RIGHT, y), text(_LEFT - 6, y + 4, up.tell(tick), "end")]
    for tick in steps if ticks_across else ():
        parts.append(text(place((tick, low))[0], bottom + 16, across.tell(tick), "middle"))
    if mark:
        y = place((0, mark[0]))[1]
        parts += [line(_LEFT, y, WIDTH - _RIGHT, y, dashed=True), text(WIDTH - _RIGHT, y + 13, mark[1], "end")]
    for curve in lines:
        points = [place(point) for point in _thinned(curve.points) if math.isfinite(point[1])]
        if points:
            path = "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in points)
            shape = (
                '<path d="{d}" fill="none" stroke="{c}" stroke-width="1.5" stroke-opacity=".85" '
                'stroke-linejoin="round" stroke-dasharray="{s}"><title>{t}</title></path>'
            )
            parts.append(Markup(shape).format(d=path, c=colour(curve.of), s=dashes(curve.of) or "none", t=curve.name))
            if len(points) <= 12:
                dot = '<circle cx="{x:.1f}" cy="{y:.1f}" r="2.6" fill="{c}"/>'
                parts += [Markup(dot).format(x=x, y=y, c=colour(curve.of)) for x, y in points]
    if ticks_across:
        parts.append(text((_LEFT + WIDTH - _RIGHT) / 2, bottom + 36, across.title, "middle"))
    if title_up:
        upwards = '<text transform="translate(11 {y}) rotate(-90)" text-anchor="middle" class="t">{t}</text>'
        parts.append(Markup(upwards).format(y=(top + bottom) / 2, t=up.title))
    return parts


def key(place: int) -> Markup:
    """A backend's line for a legend."""
    shape = (
        '<svg viewBox="0 0 30 10" width="30" height="10" aria-hidden="true"><path d="M1 5H29" stroke="{c}" '
        'stroke-width="2.5" stroke-dasharray="{s}"/></svg>'
    )
    return Markup(shape).format(c=colour(place), s=dashes(place) or "none")


def _thinned(points: Sequence[Point]) -> Sequence[Point]:
    if len(points) <= _MOST_POINTS:
        return points
    return [points[round(n * (len(points) - 1) / (_MOST_POINTS - 1))] for n in range(_MOST_POINTS)]


def _scale(values: Sequence[float], zero: bool, most: int) -> tuple[float, float, list[float]]:
    """Bounds at round numbers about the values, and the ticks between them."""
    known = [value for value in values if math.isfinite(value)] or [0.0]
    low, high = min(known), max(known)
    if zero:
        low = min(0.0, low)
    if high <= low:
        low, high = (0.0, 1.0) if high == 0 else (low - abs(low) * 0.05, high + abs(high) * 0.05)
        low = 0.0 if zero and low > 0 else low
    rough = (high - low) / most
    size = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * size for factor in (1, 2, 5, 10) if factor * size >= rough * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return first * step, last * step, [n * step for n in range(first, last + 1)]


def _short(value: float) -> str:
    return f"{value:,.4g}"


def _label(x: float, y: float, name: str, value: str = "") -> Markup:
    label = '<text x="{x:.1f}" y="{y:.1f}" class="t"><tspan class="name">{t}</tspan><tspan dx="7">{v}</tspan></text>'
    return Markup(label).format(x=x, y=y, t=name, v=value)


def _warning(x: float, y: float, content: str) -> Markup:
    return Markup('<text x="{x}" y="{y:.1f}" class="t why" fill="{c}">{t}</text>').format(x=x, y=y, c=WARN, t=content)
