"""How a captioning run is followed: a bar on a terminal, a line now and then elsewhere, and what it came to."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import typer

from loraport_dataset.captioning.job import Outcome, Summary
from loraport_dataset.findings import printable

_TOLD = 20
#: Seconds between two lines where there is no terminal.
_EVERY = 30.0


@contextmanager
def followed(total: int, quiet: bool) -> Iterator[Callable[[Outcome], None]]:
    """Hear each outcome and show how far the run is, on standard error."""
    if quiet or not total:
        yield lambda outcome: None
    elif sys.stderr.isatty():
        with _bar(total) as tell:
            yield tell
    else:
        yield _Lines(total)


@contextmanager
def _bar(total: int) -> Iterator[Callable[[Outcome], None]]:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("captions"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as progress:
        bar = progress.add_task("captions", total=total)

        def tell(outcome: Outcome) -> None:
            progress.advance(bar)
            if outcome.problem:
                progress.console.print(line(outcome), markup=False, highlight=False)

        yield tell


class _Lines:
    """Failures at once, and every half minute how many are done."""

    def __init__(self, total: int):
        self._total, self._done = total, 0
        self._started = self._told = time.monotonic()

    def __call__(self, outcome: Outcome) -> None:
        self._done += 1
        if outcome.problem:
            typer.echo(line(outcome), err=True)
        now = time.monotonic()
        if now - self._told >= _EVERY:
            self._told = now
            a_minute = 60 * self._done / (now - self._started)
            typer.echo(f"{self._done:,} of {self._total:,} pictures, {a_minute:.1f} a minute", err=True)


def line(outcome: Outcome) -> str:
    return printable(f"{outcome.task.name}: {outcome.problem or outcome.doubt}")


def as_json(summary: Summary) -> dict[str, Any]:
    """The summary for machines."""
    return {
        "written": summary.written,
        "kept": summary.kept,
        "failed": [{"file": one.task.name, "problem": one.problem} for one in summary.failed],
        "doubtful": [{"file": one.task.name, "doubt": one.doubt} for one in summary.doubtful],
        "prompt_tokens": summary.prompt_tokens,
        "answer_tokens": summary.answer_tokens,
    }


def lines(summary: Summary) -> list[str]:
    """The summary for people."""
    told = [
        f"{summary.written:,} captions written, {summary.kept:,} kept, {len(summary.failed):,} pictures without one."
    ]
    if summary.prompt_tokens or summary.answer_tokens:
        told.append(f"Tokens: {summary.prompt_tokens:,} asked, {summary.answer_tokens:,} answered.")
    for what, outcomes in (("Look at these again", summary.doubtful), ("Not captioned", summary.failed)):
        if outcomes:
            told.append(f"{what}:")
            told += [f"  {line(outcome)}" for outcome in outcomes[:_TOLD]]
            if len(outcomes) > _TOLD:
                told.append(f"  and {len(outcomes) - _TOLD:,} more; --json has them.")
    if summary.failed:
        told.append("The same command asks again for those without a caption.")
    return told
