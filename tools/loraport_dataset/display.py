"""A report for a person: one screen that sums up, then the findings themselves."""

from __future__ import annotations

import shutil
from pathlib import Path

import typer

from loraport.rules import SEVERITIES, Finding, Severity
from loraport_dataset.findings import Checked, Report, RuleCount, printable

_COLOURS = {"error": typer.colors.RED, "warning": typer.colors.YELLOW, "advice": typer.colors.CYAN}
_WORDS = {"error": ("error", "errors"), "warning": ("warning", "warnings"), "advice": ("advice", "advice")}
_DATASETS, _ROWS = 5, 12  #: that are listed, so that the summary is one screen of 24 lines


def show(report: Report, findings_file: Path | None) -> None:
    """Print the summary, then up to `report.keep` findings of each rule."""
    for dataset in report.datasets[:_DATASETS]:
        typer.secho(_head(dataset, alone=len(report.datasets) == 1), bold=True)
    if len(report.datasets) > _DATASETS:
        typer.echo(f"… and {len(report.datasets) - _DATASETS} more datasets")
    _summary(report)
    for counted in report.ordered():
        _details(counted, len(report.datasets) > 1)
    for rule, reason in report.broken_rules.items():
        typer.secho(f"\nThe rule {rule} failed and was left out: {printable(reason)}", fg=typer.colors.RED)
    if findings_file is not None:
        typer.echo(f"\nEvery finding is in {printable(str(findings_file))}.")
    elif any(counted.count > len(counted.examples) for counted in report.rules.values()):
        typer.echo("\nEvery finding: -o findings.json")


def totals(report: Report) -> str:
    """Such as `3 errors, 12 warnings, 1 advice`."""
    return ", ".join(_count(report.counts[severity], severity) for severity in SEVERITIES)


def _head(dataset: Checked, alone: bool) -> str:
    place = "" if alone else f" ({dataset.title})"
    counts = f"{_number(dataset.images, 'image')}, {_number(dataset.captions, 'caption')} (.{dataset.caption_ext})"
    return f"{printable(dataset.folder)}{place}: {counts}, for {dataset.family} at {dataset.resolution} px"


def _summary(report: Report) -> None:
    typer.echo(f"{totals(report)}.")
    tokens = sorted({dataset.tokens for dataset in report.datasets if dataset.tokens})
    for source in tokens:
        typer.secho(f"Caption lengths: {printable(source)}.", dim=True)
    ordered = report.ordered()
    if not ordered:
        return
    typer.echo()
    wide = max(len(counted.rule.id) for counted in ordered[:_ROWS])
    for counted in ordered[:_ROWS]:
        severity = typer.style(f"{counted.rule.severity:8}", fg=_COLOURS[counted.rule.severity])
        line = f"{counted.rule.id:{wide}} {counted.count:>7,}  {_example(counted)}"
        typer.echo(f"  {severity} {_cut(line)}")
    if len(ordered) > _ROWS:
        typer.echo(f"  … and {len(ordered) - _ROWS} more rules, below")


def _example(counted: RuleCount) -> str:
    _, finding = counted.examples[0]
    place = f"{printable(finding.file)}: " if finding.file else ""
    return place + printable(finding.message)


def _details(counted: RuleCount, several: bool) -> None:
    rule = counted.rule
    typer.echo()
    typer.secho(f"{rule.severity} {rule.id}", fg=_COLOURS[rule.severity], bold=True, nl=False)
    typer.echo(f" ({counted.count:,}) {rule.explanation}")
    said = None
    for dataset, finding in counted.examples:
        typer.echo(f"  {_place(dataset, finding, several)}{printable(finding.message)}")
        if finding.fix != said:
            typer.secho(f"      {printable(finding.fix)}", dim=True)
        said = finding.fix
    if counted.count > len(counted.examples):
        typer.echo(f"  … and {counted.count - len(counted.examples):,} more")


def _place(dataset: str, finding: Finding, several: bool) -> str:
    parts = [f"{dataset} " if several else "", printable(finding.file)]
    if finding.json_path:
        parts.append(f" {printable(finding.json_path)}")
    place = "".join(parts).strip()
    return f"{place}: " if place else ""


def _count(count: int, severity: Severity) -> str:
    return f"{count:,} {_WORDS[severity][count != 1]}"


def _number(count: int, what: str) -> str:
    return f"{count:,} {what}{'s' if count != 1 else ''}"


def _cut(text: str) -> str:
    """At most what is left of the terminal's width beside the severity."""
    width = max(shutil.get_terminal_size((120, 24)).columns, 60) - 12
    return text if len(text) <= width else text[: width - 1] + "…"
