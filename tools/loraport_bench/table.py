"""The table of a data file: what was measured, beside the bar and the floor."""

from __future__ import annotations

import re
import statistics
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from loraport.errors import DataError
from loraport_bench import RESULTS
from loraport_bench.records import Results
from loraport_bench.report.markdown import leading
from loraport_bench.results import DataFile
from loraport_bench.rows import QUALITY_ROWS, ROWS, Row

#: A table in a page; its last group is empty where the next one begins, or the page ends, before its end.
_MARKED = re.compile(
    r"(<!-- bench: (\S+)( short)? -->\n).*?(<!-- /bench -->|(?=<!-- bench: \S+(?: short)? -->\n)|\Z)", re.DOTALL
)

STEP_HEAD = (
    *("profile", "s/step", "mean", "bar", "× stock", "bar", "× floor"),
    *("peak GiB", "bar", "floor", "whole card GiB"),
)
_SHORT = (0, 1, 4, 7)  #: columns of STEP_HEAD that a short table has
HELD_OUT = "held-out loss − bf16's (± over seeds)"  #: the column more where the file has held-out losses
QUALITY_HEAD = ("profile", "held-out loss before", "after", "after − bf16's, by seed", "seeds")
MET, MISSED = "✓", "✗"


def printed(path: Path, brief: bool = False) -> str:
    """The tables of a file in Markdown, the short ones where asked: of `loraport bench step`, or, where it is called
    results.json, of a bench of trainers. Raises DataError for a file that is neither."""
    if path.name == RESULTS:
        return leading(Results.read(path), brief)
    return (short if brief else markdown)(DataFile(path))


def markdown(file: DataFile) -> str:
    """Both tables in Markdown; the one that has no rows is left out."""
    parts = [_table(step_head(file), step_cells(file)), _table(QUALITY_HEAD, quality_cells(file))]
    return "\n".join(part for part in parts if part)


def short(file: DataFile) -> str:
    """Seconds and memory alone in Markdown, without percentiles, bars and floors."""
    lines = [
        [line[column].partition(" (")[0] if column == 1 else line[column] for column in _SHORT]
        for line in step_cells(file)
    ]
    return _table([STEP_HEAD[column] for column in _SHORT], lines)


def fill(page: Path) -> str:
    """The text of a page with each table between `<!-- bench: FILE -->` and `<!-- /bench -->` made anew; with the word
    short after FILE, a short one.

    FILE is relative to the page. Raises DataError for a page or a file that is not there, for a page without markers,
    and for a table without an end.
    """

    def made(match: re.Match[str]) -> str:
        if not match[4]:
            raise DataError(f"{page}: the table of {match[2]} has no end.", hint="Put <!-- /bench --> after it.")
        data = page.parent / match[2]
        if not data.is_file():
            raise DataError(f"{page} names {match[2]}, which is not there.")
        return f"{match[1]}{printed(data, brief=bool(match[3]))}{match[4]}"

    try:
        text = page.read_text(encoding="utf-8")
    except OSError as error:
        raise DataError(f"{page} cannot be read: {error.strerror}.") from error
    if not tables_in(text):
        raise DataError(
            f"{page} has no marker of a table.",
            hint="Put the lines <!-- bench: FILE --> and <!-- /bench --> where one is to stand.",
        )
    return _MARKED.sub(made, text)


def tables_in(text: str) -> int:
    """How many tables a page has between markers."""
    return len(_MARKED.findall(text))


def step_head(file: DataFile) -> tuple[str, ...]:
    """The columns of `step_cells`."""
    return (*STEP_HEAD, HELD_OUT) if _has_held_out(file) else STEP_HEAD


def step_cells(file: DataFile) -> list[list[str]]:
    """A line for each row and each stock recipe that was tried, in the order of ROWS. Where the file has held-out
    losses, each row ends in how far that of its storage and compute is from bf16's."""
    lines = [_step_line(row, file) for row in ROWS if (row.name, None) in file.rows]
    stock = [_stock_line(line) for (name, _), line in file.rows.items() if name.startswith("stock-")]
    if _has_held_out(file):
        measured = [row for row in ROWS if (row.name, None) in file.rows]
        lines = [[*line, _held_out(row, file)] for row, line in zip(measured, lines, strict=True)]
        stock = [[*line, "–"] for line in stock]
    return lines + stock


def _has_held_out(file: DataFile) -> bool:
    return any(_ends(file, row.name) for row in QUALITY_ROWS)


def _held_out(row: Row, file: DataFile) -> str:
    """What `quality_cells` tells of the row's quantisation: a difference, or of bf16 the loss itself."""
    reference, *others = QUALITY_ROWS
    quantize = _quantize(row)
    if quantize == reference.memory["quantize"]:
        ends = _ends(file, reference.name)
        return f"0, at {_mean(ends.values())}" if ends else "–"
    return next((_apart(other, file) for other in others if other.memory["quantize"] == quantize), "–")


def _quantize(row: Row) -> str | None:
    """The quantisation of a row, or of the preset that it names."""
    from loraport.plugins import plugins

    if "profile" not in row.memory:
        return row.memory.get("quantize")
    return str(plugins().profiles()["hardware", row.memory["profile"]].sets["quantize"])


def _apart(row: Row, file: DataFile) -> str:
    """How far a row's held-out losses are from those of the first of QUALITY_ROWS at the same seeds."""
    reference, ends = _ends(file, QUALITY_ROWS[0].name), _ends(file, row.name)
    apart = [ends[seed] - reference[seed] for seed in ends if seed in reference]
    return _mean(apart, sign="+") + (" (one seed)" if len(apart) == 1 else "") if apart else "–"


def quality_cells(file: DataFile) -> list[list[str]]:
    """A line for each profile whose held-out loss was measured: mean ± standard deviation over the seeds."""
    lines = []
    for row in QUALITY_ROWS:
        ends = _ends(file, row.name)
        if not ends:
            continue
        starts = [file.rows[row.name, seed]["held_out"]["start"] for seed in ends]
        difference = "–" if row is QUALITY_ROWS[0] else _apart(row, file)
        seeds = ", ".join(map(str, sorted(ends)))
        lines.append([row.name.removeprefix("quality-"), _mean(starts), _mean(ends.values()), difference, seeds])
    return lines


def missed(file: DataFile) -> list[str]:
    """The measured rows that do not reach a bar."""
    return [line[0] for line in step_cells(file) if any(MISSED in cell for cell in line)]


def _ends(file: DataFile, name: str) -> dict[int, float]:
    return {
        seed: line["held_out"]["end"]
        for (row, seed), line in file.rows.items()
        if row == name and seed is not None and "held_out" in line and line["status"] == "ok"
    }


def _step_line(row: Row, file: DataFile) -> list[str]:
    line = file.rows[row.name, None]
    if "step_s" not in line or line["status"] != "ok":
        return [row.name, line["status"], *["–"] * (len(STEP_HEAD) - 2)]
    step, bar, floor = line["step_s"], row.bar, line.get("floor", {})
    seconds, peak = step["median"], line["peak_allocated_gib"]
    ratio, other = line.get("times_stock"), file.beside(bar.of, line) if bar.of else None
    return [
        row.name + (f" ({row.batch} images)" if row.batch > 1 else ""),
        f"{seconds:.3f} ({step['p10']:.3f} to {step['p90']:.3f})",
        f"{step['mean']:.3f}",
        _seconds_bar(row, line, other),
        f"{ratio:.2f}" if ratio else "–",
        _bar(f"≥ {bar.ratio:g}", ratio >= bar.ratio) if bar.ratio and ratio else "–",
        f"{seconds / floor['seconds']:.2f}" if floor else "–",
        f"{peak:.2f}",
        _bar(f"≤ {bar.gib:g}", peak <= bar.gib) if bar.gib else "–",
        f"{floor['gib']:.2f}" if "gib" in floor else "–",
        _card(line, row.limit_gib),
    ]


def _seconds_bar(row: Row, line: dict[str, Any], other: dict[str, Any] | None) -> str:
    bar, seconds = row.bar, line["step_s"]["median"]
    if bar.seconds:
        return _bar(f"≤ {bar.seconds:g}", seconds <= bar.seconds)
    if other and bar.times:
        times = seconds / other["step_s"]["median"]
        return _bar(f"{times:.3f} × {bar.of}, ≤ {bar.times:g}", times <= bar.times)
    if other and bar.throughput:
        times = line["images_per_second"] / other["images_per_second"]
        return _bar(f"{times:.3f} × the images/s of {bar.of}, ≥ {bar.throughput:g}", times >= bar.throughput)
    return "–"


def _stock_line(line: dict[str, Any]) -> list[str]:
    name = f"*{line['row']}*"
    if line["status"] != "ok":
        return [name, line["status"], *["–"] * (len(STEP_HEAD) - 2)]
    step = line["step_s"]
    told = f"{step['median']:.3f} ({step['p10']:.3f} to {step['p90']:.3f})"
    mean, peak = f"{step['mean']:.3f}", f"{line['peak_allocated_gib']:.2f}"
    return [name, told, mean, "–", "1", "–", "–", peak, "–", "–", _card(line, None)]


def _card(line: dict[str, Any], limit: float | None) -> str:
    peaks = line.get("card_peak_gib") or {}
    if not peaks:
        return "–"
    return f"{max(peaks.values()):.1f}" + (f" (limit {limit:g})" if limit else "")


def _bar(text: str, met: bool) -> str:
    return f"{text} {MET if met else MISSED}"


def _mean(values: Iterable[float], sign: str = "") -> str:
    values = list(values)
    deviation = f" ± {statistics.stdev(values):.5f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):{sign}.5f}{deviation}"


def _table(head: Iterable[str], lines: list[list[str]]) -> str:
    if not lines:
        return ""
    head = list(head)
    rows = [head, ["---"] * len(head), *lines]
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)
