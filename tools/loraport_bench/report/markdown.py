"""The report in Markdown, with no plots: what is read in a terminal or beside code."""

from __future__ import annotations

import re
from collections.abc import Sequence

from loraport_bench.records import Results
from loraport_bench.report import tables, words
from loraport_bench.report.numbers import Group, groups
from loraport_bench.report.tables import Table

#: What Markdown would take for markup. Texts of trainers and of people are shown as they are.
_MARKUP = re.compile(r"([\\`*_{}\[\]<>|#~&$])")


def markdown(results: Results) -> str:
    """The whole report."""
    parts = [f"# Benchmark: {escaped(results.name)}", words.state(results)]
    parts.append("Plots, configurations and verdicts are in `report.html`, all data in `results.json`.")
    for group in groups(results):
        parts += _group(group, results)
    for title, table in (
        ("Runs without a result", tables.unfinished(results)),
        ("Overhead", tables.overheads(results)),
    ):
        if table:
            parts += [f"## {title}", _table(table)]
    if notes := tables.notes(results):
        parts += ["## Notes", "\n".join(f"- {escaped(note)} ({escaped(', '.join(keys))})" for note, keys in notes)]
    parts += ["## Protocol", _pairs(tables.protocol(results)), "## Machine", _pairs(tables.machines(results))]
    parts += [*_versions(results), "## Every run", _table(tables.every_run(results))]
    return "\n\n".join(parts) + "\n"


def leading(results: Results, brief: bool = False) -> str:
    """The first table of each group alone, under its title: for a page that names the whole report. `brief`: speed,
    memory and time alone."""
    found = groups(results)
    parts = [f"**{escaped(group.title)}**\n\n{_table(tables.headline(group, brief))}" for group in found]
    return "\n\n".join(parts) + "\n"


def _versions(results: Results) -> list[str]:
    table = tables.versions(results)
    return ["## Versions", _table(table)] if table.rows else []


def _group(group: Group, results: Results) -> list[str]:
    parts = [f"## {escaped(group.title)}", "\n".join(f"- {escaped(each)}" for each in group.headlines())]
    parts += [_table(tables.headline(group)), *(escaped(each) for each in words.under_headline(group))]
    if group.phases:
        parts += [f"### {tables.phases(group).caption}", _table(tables.phases(group)), *words.under_phases(group)]
    for table in (
        tables.memory(group),
        tables.resources(group),
        tables.work(group),
        tables.unequal(results, group.name),
    ):
        if table and table.rows:
            parts += [f"### {escaped(table.caption)}", _table(table)]
    return [part for part in parts if part]


def _table(table: Table) -> str:
    lines = [_line(table.head), "|" + "|".join(_rule(table, at) for at in range(len(table.head))) + "|"]
    return "\n".join([*lines, *(_line(row) for row in table.rows)])


def _rule(table: Table, at: int) -> str:
    return "---" if at == 0 or table.head[at] in table.words else "---:"


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(escaped(cell) for cell in cells) + " |"


def _pairs(pairs: list[tuple[str, str]]) -> str:
    return "\n".join(f"- {escaped(name)}: {escaped(text)}" for name, text in pairs)


def escaped(text: str) -> str:
    """A text that Markdown shows as it is, on one line."""
    return _MARKUP.sub(r"\\\1", " ".join(text.split()))
