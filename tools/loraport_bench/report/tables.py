"""The report's tables as plain texts, the same for Markdown and HTML."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Sequence
from dataclasses import dataclass

from loraport_bench.records import Card, Overhead, Protocol, Results, Run
from loraport_bench.report.numbers import Entry, Group, gib, joules, numbers, ranged, seconds
from loraport_bench.schedule import group_name

FIRST_STEPS = "first steps of it"  #: the column of what training took before the measured steps
#: Looks at a card below which its power and clock are not told.
_FEW_SAMPLES = 5


@dataclass(frozen=True)
class Table:
    """Columns and rows; the first cell of a row is its name. `words` are columns of prose, the others are numbers."""

    caption: str
    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    words: frozenset[str] = frozenset()

    @property
    def stays(self) -> bool:
        """Whether the names are short enough to stay in sight while a phone scrolls the table sideways."""
        return all(len(row[0]) <= 14 for row in self.rows)


def headline(group: Group, brief: bool = False) -> Table:
    """Each backend's speed, memory, time, energy and quality; speed, memory and time alone where `brief`."""
    energy = any(one.joules_per_image for one in group.entries)
    head = ["backend", "s a step", "images/s", "memory, training", "memory, whole run", "whole run"]
    if not brief:
        head += [*(["J an image"] * energy), "held-out loss", "repeats"]
    rows = []
    for one in group.entries:
        repeats = f"{len(one.good)} of {len(one.runs)}"
        if not one.good:
            why = (one.why_not, "–") if brief else ("–", f"{repeats}: {one.why_not}")
            rows.append((one.backend, why[0], *["–"] * (len(head) - 3), why[1]))
            continue
        speed, training = one.images_per_second, one.device_in("train")
        cells = [
            ranged(one.step_s, _bare),
            _bare(speed.median) if speed else "–",
            f"{gib(training.median)}{_scope(one.scopes)}" if training else "–",
            f"{gib(one.device_bytes.median)}{_scope(one.scopes)}" if one.device_bytes else "–",
            seconds(one.total_s.median) if one.total_s else "–",
            *([joules(one.joules_per_image.median) if one.joules_per_image else "–"] * energy),
            _loss(one),
            repeats,
        ]
        rows.append((one.backend, *cells[: len(head) - 1]))
    return Table(group.title, head, rows, frozenset({"repeats"}))


def _bare(value: float) -> str:
    return f"{value:#.3g}" if value < 100 else f"{value:,.0f}"


def _scope(scopes: Sequence[str]) -> str:
    """The mark of memory that is of the whole card."""
    return " *" if "device" in scopes else ""


def _loss(one: Entry) -> str:
    if one.loss is None or one.gain is None:
        return "–"
    spread = f" ({one.loss.low:.4f} – {one.loss.high:.4f})" if one.loss.count > 1 else ""
    return f"{one.loss.median:.4f}{spread}, {-100 * one.gain.median:+.1f} %"


def phases(group: Group) -> Table:
    """Median seconds of each phase, and what of training went before the measured steps."""
    names = group.phases
    first = any(one.first_steps_s for one in group.entries)
    rows = []
    for one in group.entries:
        if one.good:
            cells = [f"{each.median:,.1f}" if (each := one.phase(name)) else "–" for name in names]
            if first:
                extra = f"{one.first_steps_s.median:,.1f}" if one.first_steps_s else "–"
                cells.insert(names.index("train") + 1, extra)
            rows.append((one.backend, *cells))
    head = [phase_title(name) for name in names]
    if first:
        head.insert(names.index("train") + 1, FIRST_STEPS)
    return Table("Seconds in each phase (median of the repeats)", ("backend", *head), rows)


def memory(group: Group) -> Table:
    """The peak of device memory in each phase; no rows where none was measured."""
    names = [name for name in group.phases if any(one.device_in(name) for one in group.entries)]
    rows = [
        (one.backend, *(gib(each.median) if (each := one.device_in(name)) else "–" for name in names))
        for one in group.entries
        if one.good and one.device_bytes
    ]
    return Table("Peak of device memory in each phase", ("backend", *map(phase_title, names)), rows)


def phase_title(name: str) -> str:
    return "load, quantise" if name == "load_quantise" else name


def resources(group: Group) -> Table:
    """What else a run takes and did; power and clock of the measured steps, where a card was looked at often enough."""
    told = any(_seen(run) for one in group.entries for run in one.good)
    sizes = ("host memory", "torch allocated", "torch reserved", "written", "cache", "LoRA")
    head = ("backend", *sizes, "energy of the run", *(("power", "clock") if told else ()))
    rows = []
    for one in group.entries:
        if not one.good:
            continue
        runs = one.good
        peaks = [run.torch_peaks for run in runs if run.torch_peaks]
        disks = [run.disk for run in runs if run.disk]
        cards = [run.cards for run in runs if _seen(run)]
        cells = [
            one.host_bytes,
            numbers(each.allocated_bytes for each in peaks),
            numbers(each.reserved_bytes for each in peaks),
            numbers(each.written_bytes for each in disks),
            numbers(each.cache_bytes for each in disks),
            numbers(each.lora_bytes for each in disks),
        ]
        power = numbers(_power(each) for each in cards)
        clock = numbers(card.clock_mhz.median if card.clock_mhz else None for each in cards for card in each)
        rows.append(
            (
                one.backend,
                *(gib(each.median) if each else "–" for each in cells),
                joules(one.joules.median) if one.joules else "–",
                *([f"{power.median:.0f} W" if power else "–", f"{clock.median:.0f} MHz" if clock else "–"] * told),
            )
        )
    return Table("What else it takes (medians of the repeats)", head, rows)


def _seen(run: Run) -> bool:
    """Whether the cards were looked at often enough while steps were measured."""
    return bool(run.cards) and all((card.samples or 0) >= _FEW_SAMPLES for card in run.cards)


def _power(cards: Sequence[Card]) -> float | None:
    """Of all cards together; None where one doesn't tell its own."""
    told = [card.power_w.median for card in cards if card.power_w]
    return sum(told) if len(told) == len(cards) else None


def work(group: Group) -> Table:
    """What was done, counted in the outputs."""
    head = ("backend", "steps", "images", "modules", "parameters", "differs")
    rows = []
    for one in group.entries:
        counted = dict.fromkeys(
            (
                f"{run.work.steps:,} of {run.work.expected_steps:,}",
                _count(run.work.images, f" of {run.work.expected_images:,}"),
                _count(run.work.modules),
                _count(run.work.parameters),
                "; ".join(run.work.differs) or "no",
            )
            for run in one.good
            if run.work
        )
        rows += [(one.backend, *cells) for cells in counted]
    return Table("Work, counted in the outputs", head, rows, frozenset({"differs"}))


def _count(value: int | None, after: str = "") -> str:
    return "not told" if value is None else f"{value:,}{after}"


def _change(each: list[float], median: float, unit: str) -> str:
    """A signed difference, with the least and the greatest where there are several."""
    between = f" ({min(each):+.2f} – {max(each):+.2f})" if len(each) > 1 else ""
    return f"{median:+.2f}{unit}{between}"


def _in_phases(overhead: Overhead) -> str:
    """What each phase takes longer, but for what rounds to nothing."""
    told = [
        f"{phase_title(name)} {extra:+.1f} s" for name, extra in overhead.phase_extras_s.items() if abs(extra) >= 0.05
    ]
    return "; ".join(told) or "–"


def overheads(results: Results) -> Table | None:
    """What going through LoraPort costs; None when it was not measured."""
    rows = [
        (
            run.backend,
            group_name(*run.group),
            seconds(run.overhead.step_median_s),
            _change([100 * share for share in run.overhead.step_shares], 100 * run.overhead.step_share, " %"),
            seconds(run.overhead.run_s),
            _change(run.overhead.run_extras_s, run.overhead.run_extra_s, " s"),
            _in_phases(run.overhead),
            f"{run.overhead.pairs}",
        )
        for run in results.runs
        if run.overhead
    ]
    step, run = ("step by hand", "step through LoraPort"), ("run by hand", "run through LoraPort", "in its phases")
    head = ("backend", "group", *step, *run, "pairs")
    caption = "The same configuration started by hand and through LoraPort: medians (least – greatest) of the pairs"
    return Table(caption, head, rows, frozenset({"group", "in its phases"})) if rows else None


def unfinished(results: Results) -> Table | None:
    """Every row without a result, with its reason; None when there is none."""
    rows = [
        (
            run.key,
            run.failure.reason.replace("-", " "),
            run.failure.message,
            "–" if run.failure.exit_code is None else str(run.failure.exit_code),
            "not begun" if run.status == "refused" else seconds(run.total_s),
        )
        for run in results.runs
        if run.failure
    ]
    head = ("run", "reason", "what was told", "exit code", "after")
    return Table("Runs without a result", head, rows, frozenset({"reason", "what was told"})) if rows else None


def every_run(results: Results) -> Table:
    """One row a run."""
    head = ("run", "status", "started, UTC", "s a step", "clock", "device memory", "whole run", "held-out loss")
    rows = [
        (
            run.key,
            _ending(run),
            f"{run.started:%m-%d %H:%M}",
            f"{_bare(run.steps.seconds.median)} ({_bare(run.steps.seconds.p10)} – {_bare(run.steps.seconds.p90)})"
            if run.steps
            else "–",
            run.steps.measured if run.steps else "–",
            f"{gib(run.device_memory.peak_bytes)}{_scope([run.device_memory.scope])}" if run.device_memory else "–",
            "–" if run.status == "refused" else seconds(run.total_s),
            f"{run.quality.loss:.4f}" if run.quality else "–",
        )
        for run in results.runs
    ]
    return Table("Every run, in the order of the schedule", head, rows, frozenset({"status", "clock", "started, UTC"}))


def _ending(run: Run) -> str:
    reason = run.failure.reason.replace("-", " ") if run.failure else run.status
    return run.status if reason == run.status else f"{run.status}: {reason}"


def unequal(results: Results, group: str) -> Table | None:
    """What is still different between the backends that have rows in a group; None when nothing is."""
    found = results.inequalities.get(group, [])
    if not found:
        return None
    there = {run.backend for run in results.runs if group_name(*run.group) == group}
    names = [name for name in dict.fromkeys(name for each in found for name in each.backends) if name in there]
    if len(names) < 2:  # nothing to be compared with
        return None
    rows = [(each.path, _plain(each.value), *(each.backends.get(name, "–") for name in names)) for each in found]
    return Table(f"Still different in {group}", ("field", "spec", *names), rows, frozenset({"spec", *names}))


def _plain(value: object) -> str:
    return "–" if value is None else str(value)


def protocol(results: Results) -> list[tuple[str, str]]:
    """How the bench was run, in pairs of a name and a text. Of several benches: what each did otherwise, with its
    name."""
    if not results.sources:
        return _protocol(results.protocol, results.spec_sha256, results.command)
    told: dict[tuple[str, str], list[str]] = {}
    for one in results.sources:
        for pair in _protocol(one.protocol, one.spec_sha256, one.command):
            told.setdefault(pair, []).append(one.place)
    places = ", ".join(one.place for one in results.sources)
    alike = [pair for pair, of in told.items() if len(of) == len(results.sources)]
    apart = [(f"{name} ({', '.join(of)})", text) for (name, text), of in told.items() if (name, text) not in alike]
    return [("Gathered from", places), *alike, *apart]


def _protocol(told: Protocol, spec_sha256: str, command: str) -> list[tuple[str, str]]:
    seeds = ", ".join(map(str, told.seeds))
    order = f"{told.repeats} repeats, forwards and backwards in turn" if told.repeats > 1 else "1 repeat"
    sizes = " or ".join(map(str, told.images_a_step))
    sets, most = (f" in {told.sets} sets", "most ") if told.sets > 1 else ("", "")
    batch = "1 image" if told.images_a_step == [1] else f"{sizes} images"
    return [
        ("Order", f"{order}: {', '.join(told.backends)}; {'seeds' if len(told.seeds) > 1 else 'seed'} {seeds}"),
        (
            "Steps",
            f"{told.steps:,} optimizer steps a run, of {batch} each, of which the first {told.warm_up} are not timed",
        ),
        (
            "Images",
            f"{told.images:,} trained on{sets}, {told.held_out:,} held out, at {most}{told.resolution} px, "
            "sized beforehand",
        ),
        ("Of images and captions", f"SHA-256 {told.images_sha256}"),
        ("Text", told.text_tokens),
        ("Memory", f"sampled every {1000 * told.sampling_s:.0f} ms from outside, over the whole process tree"),
        ("Limit", f"{told.time_limit_s:,.0f} s a run"),
        ("Matched tier", "exact in every backend: " + ", ".join(told.matched_fields)),
        *(("Changed by the bench", f"{path} = {why}") for path, why in told.changed.items()),
        ("Spec", f"SHA-256 {spec_sha256}"),
        ("Command", command),
    ]


def machines(results: Results) -> list[tuple[str, str]]:
    """The hardware, drivers and dates; several when runs were on several machines."""
    found: dict[str, list[Run]] = {}
    for run in results.runs:
        if (at := run.machine) is not None:
            card = "no GPU"
            if at.card:
                capability = ".".join(map(str, at.compute_capability or ())) or "unknown"
                size = f", {gib(at.card_bytes)}" if at.card_bytes else ""
                card = f"{at.cards} × {at.card}{size}, compute capability {capability}, driver {at.driver or 'unknown'}"
            host = f"{at.processor}, {at.cores} cores, {gib(at.memory_bytes)}; {at.system}"
            found.setdefault(f"{card}; {host}", []).append(run)
    pairs = []
    for text, runs in found.items():
        name = "Machine" if len(found) == 1 else f"Machine of {len(runs)} runs"
        first, last = min(run.started for run in runs), max(run.started for run in runs)
        pairs += [(name, text), ("Started", f"{first:%Y-%m-%d %H:%M} to {last:%Y-%m-%d %H:%M} UTC")]
        idle = [run.machine.idle for run in runs if run.machine and run.machine.idle]
        used = numbers(each.used_bytes for each in idle)
        if used:
            busy = numbers(each.utilisation_percent for each in idle)
            use = f", at most {busy.high:.0f} % busy" if busy else ""
            pairs.append(("Before the runs", f"at most {gib(used.high)} of the card in use{use}"))
        cards = [card for run in runs for card in run.cards]
        throttled = [card.throttled for card in cards if card.throttled is not None]
        if throttled:
            reasons = sorted({why for each in throttled for why in each})
            pairs.append(("Clocks lowered", ", ".join(reasons) or "in no run"))
        heat = numbers(card.temperature_c.high if card.temperature_c else None for card in cards)
        if heat:
            pairs.append(("Hottest", f"{heat.high:.0f} °C"))
    pairs.append(
        (
            "Report",
            f"LoraPort {importlib.metadata.version('loraport')}; results of {results.updated:%Y-%m-%d %H:%M} UTC",
        )
    )
    return pairs


def versions(results: Results) -> Table:
    """Every version that any run recorded, a column for each backend."""
    backends = list(dict.fromkeys(run.backend for run in results.runs))
    names = sorted({name for run in results.runs for name in run.versions})
    rows = []
    for name in names:
        cells = []
        for backend in backends:
            of = [run.versions[name] for run in results.runs if run.backend == backend and name in run.versions]
            cells.append(", ".join(dict.fromkeys(of)) or "–")
        rows.append((name, *cells))
    return Table("Versions", ("", *backends), rows, frozenset(backends))


def notes(results: Results) -> list[tuple[str, list[str]]]:
    """Each remark on runs, with the runs."""
    found: dict[str, list[str]] = {}
    for run in results.runs:
        for note in run.notes:
            found.setdefault(note, []).append(run.key)
    return list(found.items())


def evaluators(runs: list[Run]) -> str:
    """Who scored them, on what; empty when nothing was scored."""
    found = {
        f"{run.quality.evaluator}, on {run.quality.triples} fixed triples of image, noise and time "
        f"({run.quality.images} held-out images)"
        for run in runs
        if run.quality
    }
    return "; ".join(sorted(found))
