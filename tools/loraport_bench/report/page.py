"""The HTML page: tables, plots and configurations, put into a template that escapes every text."""

from __future__ import annotations

import difflib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from markupsafe import Markup

from loraport import pages
from loraport_bench.records import Configuration, PhaseName, Results, Run, Trace
from loraport_bench.report import charts, tables, words
from loraport_bench.report.charts import Axis, Curve, Point
from loraport_bench.report.numbers import Entry, Group, groups, seconds
from loraport_bench.report.tables import Table

_MOST_DIFFERENCES = 60  #: lines told of how a repeat's files differ from the first one's


@dataclass(frozen=True)
class Plot:
    """A picture with its heading and what to know about it."""

    heading: str
    picture: Markup
    caption: str = ""
    legend: str = ""  #: backends, phases, or empty


@dataclass(frozen=True)
class Chapter:
    """What is told of one group."""

    group: Group
    name: str
    headlines: list[str]
    table: Table
    under: list[str]
    plots: list[Plot]
    losses: list[Plot]
    more: list[Table]
    under_more: list[str]
    backends: list[tuple[str, Markup]]
    phases: list[tuple[str, str]]


@dataclass(frozen=True)
class Detail:
    """What was run for a backend in a group: the first repeat's, and how the others differ."""

    title: str
    key: str
    files: list[tuple[str, str]]
    verdicts: Sequence[tuple[str, str, str, str]]
    verdict_counts: str
    differences: list[tuple[str, str]]
    traces: list[tuple[str, Markup]]


def page(results: Results) -> str:
    """The whole page."""
    found = groups(results)
    return pages.render(
        "loraport_bench.report",
        "page.html.jinja",
        "style.css",
        results=results,
        state=words.state(results),
        about_losses=words.LOSSES,
        chapters=[_chapter(group, results) for group in found],
        protocol=tables.protocol(results),
        machines=tables.machines(results),
        versions=tables.versions(results),
        overheads=tables.overheads(results),
        unfinished=tables.unfinished(results),
        every_run=tables.every_run(results),
        notes=tables.notes(results),
        unequal=[table for group in found if (table := tables.unequal(results, group.name))],
        details=[_detail(group, one) for group in found for one in group.entries],
        device_key=charts.key(0),
        host_key=charts.key(1),
        phase_legend=[(tables.phase_title(name), charts.PHASE_COLOURS[name]) for name in _phases(found)],
    )


def _phases(found: Sequence[Group]) -> list[PhaseName]:
    return [name for name in charts.PHASE_COLOURS if any(name in group.phases for group in found)]


def _chapter(group: Group, results: Results) -> Chapter:
    backends = results.protocol.backends
    return Chapter(
        group,
        "group-" + group.name.replace("/", "-"),
        group.headlines(),
        tables.headline(group),
        words.under_headline(group),
        _plots(group, backends),
        _losses(group, backends),
        [
            table
            for table in (tables.phases(group), tables.memory(group), tables.resources(group), tables.work(group))
            if table.rows
        ],
        words.under_phases(group),
        [(one.backend, charts.key(charts.place_of(backends, one.backend))) for one in group.entries],
        [(tables.phase_title(name), charts.PHASE_COLOURS[name]) for name in group.phases],
    )


def _plots(group: Group, backends: Sequence[str]) -> list[Plot]:
    """The plots for which there are numbers."""
    plots = []
    entries = group.entries
    if any(one.step_s for one in entries):
        picture = charts.ranges(
            entries,
            backends,
            lambda one: one.step_s,
            lambda run: run.steps.seconds.median if run.steps else None,
            Axis("seconds a step", seconds),
            f"Seconds a step, {group.title}",
        )
        plots.append(Plot("Speed", picture, "Bar: 10th to 90th percentile of all steps; line: median; dots: repeats."))
    if any(one.device_bytes for one in entries):
        picture = charts.ranges(
            entries,
            backends,
            lambda one: one.device_gib,
            lambda run: run.device_memory.peak_bytes / 2**30 if run.device_memory else None,
            Axis("peak of device memory, GiB", lambda value: f"{value:.2f} GiB"),
            f"Peak of device memory, {group.title}",
        )
        caption = "Over the whole run, from outside. Dots: the peaks of the repeats."
        plots.append(Plot("Device memory", picture, caption))
    kind, of = ("device", _device) if any(one.device_bytes for one in entries) else ("host", _host)
    memory = _curves(group, backends, of)
    if memory:
        across, up = Axis("seconds since the start", _plain), Axis(f"GiB of {kind} memory", _plain)
        name = f"{kind.capitalize()} memory over time"
        picture = charts.curves(memory, across, up, f"{name}, {group.title}")
        plots.append(Plot(name, picture, "A line a run, from outside.", "backends"))
    if group.phases:
        plots.append(Plot("Phases", charts.stacked(group), "Medians of the repeats.", "phases"))
    if group.without is not None:
        plots += _quality(group, backends, group.without)
    return plots


def _losses(group: Group, backends: Sequence[str]) -> list[Plot]:
    """The trainers' own loss curves, against images and against time."""
    plots, entries = [], group.entries
    losses = [(one.backend, _loss_curves(one, backends, by_time=False)) for one in entries]
    timed = [(one.backend, _loss_curves(one, backends, by_time=True)) for one in entries]
    for told, title, heading in (
        (losses, "images", "Against images"),
        (timed, "seconds of training", "Against time"),
    ):
        shown = [part for part in told if part[1]]
        if shown:
            up = Axis("loss", _plain, zero=False)
            picture = charts.panels(shown, Axis(title, _plain), up, f"Printed losses: {heading}, {group.title}")
            plots.append(Plot(heading, picture))
    return plots


def _quality(group: Group, backends: Sequence[str], without: float) -> list[Plot]:
    plots = []
    picture = charts.ranges(
        group.entries,
        backends,
        lambda one: one.loss,
        lambda run: run.quality.loss if run.quality else None,
        Axis("held-out loss, lower is better", lambda value: f"{value:.4f}", zero=False),
        f"Held-out loss, {group.title}",
        mark=(without, "no LoRA"),
    )
    plots.append(
        Plot("Quality", picture, "A dot a seed; bar: 10th to 90th percentile. The axis doesn't begin at zero.")
    )
    lines = _curves(group, backends, lambda run: [
        (0.0, run.quality.without), *((each.train_s, each.loss) for each in run.quality.curve)
    ] if run.quality and run.quality.curve else [])  # fmt: skip
    if lines:
        across, up = (
            Axis("seconds of training", _plain),
            Axis("held-out loss", lambda value: f"{value:.4g}", zero=False),
        )
        picture = charts.curves(lines, across, up, f"Held-out loss against time, {group.title}", (without, "no LoRA"))
        caption = "A line a run, from the model without a LoRA over its checkpoints. The axis doesn't begin at zero."
        plots.append(Plot("Quality against time", picture, caption, "backends"))
    return plots


def _curves(group: Group, backends: Sequence[str], of: Callable[[Run], list[Point]]) -> list[Curve]:
    """A curve for each run that has points; failed runs too, as far as they came."""
    return [
        Curve(run.key, charts.place_of(backends, one.backend), points)
        for one in group.entries
        for run in one.runs
        if (points := of(run))
    ]


def _loss_curves(one: Entry, backends: Sequence[str], by_time: bool) -> list[Curve]:
    place = charts.place_of(backends, one.backend)
    return [
        Curve(run.key, place, [(each.train_s if by_time else each.images, each.loss) for each in run.losses])
        for run in one.runs
        if run.losses
    ]


def _device(run: Run) -> list[Point]:
    return _in_gib(run.device_memory)


def _host(run: Run) -> list[Point]:
    return _in_gib(run.host_memory)


def _in_gib(trace: Trace | None) -> list[Point]:
    return [(at, size / 2**30) for at, size in trace.samples] if trace else []


def _plain(value: float) -> str:
    return f"{value:,.4g}"


def _detail(group: Group, one: Entry) -> Detail:
    planned = [run for run in one.runs if run.configuration]
    first = planned[0] if planned else one.runs[0]
    files = _files(first.configuration) if first.configuration else []
    kinds = [each.kind for each in first.verdicts]
    counts = ", ".join(f"{kinds.count(kind)} {kind}" for kind in dict.fromkeys(kinds)) or "none"
    differences = []
    for other in planned[1:]:
        assert other.configuration is not None
        if told := _difference(files, _files(other.configuration)):
            differences.append((other.key, told))
    traces = [
        (run.key, charts.trace(run, f"Memory of {run.key}")) for run in one.runs if run.device_memory or run.host_memory
    ]
    verdicts = [(each.path, _as_json(each.value), each.kind, each.reason) for each in first.verdicts]
    return Detail(f"{group.title}: {one.backend}", first.key, files, verdicts, counts, differences, traces)


def _files(made: Configuration) -> list[tuple[str, str]]:
    """The generated files, the command and the spec, by their names."""
    command = json.dumps(made.command, ensure_ascii=False)
    env = "\n".join(f"{name}={value}" for name, value in sorted(made.env.items()))
    spec = json.dumps(made.spec, indent=2, ensure_ascii=False)
    return [
        ("the trainer's command", command),
        *([("its environment", env)] if env else []),
        *sorted(made.files.items()),
        ("the resolved spec", spec),
    ]


def _difference(first: list[tuple[str, str]], other: list[tuple[str, str]]) -> str:
    """Lines that differ between two runs' files."""
    one, two = dict(first), dict(other)
    lines = []
    for name in dict.fromkeys([*one, *two]):
        old, new = one.get(name, "").splitlines(), two.get(name, "").splitlines()
        found = [each for each in difflib.unified_diff(old, new, lineterm="", n=0) if not each.startswith("@@")][2:]
        lines += [f"{name}:", *(f"  {each}" for each in found)] if found else []
    if len(lines) > _MOST_DIFFERENCES:
        lines = [*lines[:_MOST_DIFFERENCES], f"… and {len(lines) - _MOST_DIFFERENCES} more lines, in results.json"]
    return "\n".join(lines)


def _as_json(value: object) -> str:
    return json.dumps(value, ensure_ascii=False, default=str)
