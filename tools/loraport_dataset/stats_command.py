"""`loraport dataset stats`: what a dataset is like, in a few lines, as JSON, and as a page to look at."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from loraport.cli.options import AsJson, Overrides
from loraport_dataset.targets import (
    CaptionExtOfFolder,
    CheckpointOfFolder,
    FamilyOfFolder,
    ResolutionOfFolder,
    Target,
    TriggerWordOfFolder,
    check_place,
    opened_outside,
    progress_bar,
    read_target,
)

if TYPE_CHECKING:
    from loraport.advice import Advice
    from loraport_dataset.findings import Report
    from loraport_dataset.stats import Stats

PICTURES = 48


def add_commands(app: typer.Typer) -> None:
    """The command of `loraport dataset`."""

    @app.command()
    def stats(
        target: Target,
        output: Annotated[
            Path | None, typer.Option("--output", "-o", metavar="FILE", help="Write a page to look at (HTML).")
        ] = None,
        as_json: AsJson = False,
        pictures: Annotated[
            int, typer.Option(min=0, max=500, help="Pictures on the page, evenly spaced over all images.")
        ] = PICTURES,
        force: Annotated[bool, typer.Option("--force", help="Replace a file that is no such page.")] = False,
        family: FamilyOfFolder = None,
        checkpoint: CheckpointOfFolder = None,
        caption_ext: CaptionExtOfFolder = None,
        resolution: ResolutionOfFolder = None,
        trigger_word: TriggerWordOfFolder = None,
        overrides: Overrides = None,
    ) -> None:
        """Tell sizes, buckets, caption lengths, colours and boxes, with advice. Nothing is written to the dataset."""
        import json

        from loraport_dataset.checking import check
        from loraport_dataset.findings import tellable
        from loraport_dataset.sources import Said
        from loraport_dataset.stats import Evenly, Stats, collector
        from loraport_dataset.stats_display import advice_of, show, to_dict

        if output is not None:
            _refuse_other_files(output, force)
        said = Said(family, checkpoint, caption_ext, resolution, trigger_word)
        sources, spec = read_target(target, said, overrides)
        share = max(1, pictures // len(sources)) if pictures else 0
        stats = [Stats(source, Evenly(share if output is not None else 0)) for source in sources]
        with progress_bar(sum(source.images for source in sources)) as progress:
            report = check(sources, progress=progress, rules=[*_rules(), collector(stats)])
        assert "stats" not in report.broken_rules, report.broken_rules["stats"]
        advice = None if spec is None else advice_of(spec, stats)
        if output is not None:
            _write(output, stats, report, advice, spec.name if spec is not None else target.resolve().name)
        if as_json:
            typer.echo(tellable(json.dumps(to_dict(stats, report, advice), ensure_ascii=False)))
        else:
            show(stats, report, advice)
            if output is not None:
                typer.echo(f"\nThe page: {output}")


def _rules() -> list[type]:
    from loraport.plugins import plugins

    return list(plugins().rules().values())


def _write(output: Path, stats: list[Stats], report: Report, advice: Advice | None, title: str) -> None:
    from loraport_dataset.report.page import render

    with opened_outside(output, [each.source for each in stats]) as file:
        file.write(render(stats, report, advice, title))


def _refuse_other_files(output: Path, force: bool) -> None:
    """Raises SpecError where a file would be replaced that is no such page, before any work is done."""
    from loraport.errors import SpecError
    from loraport_dataset.report import MARK

    check_place(output)
    if not output.exists() or force:
        return
    with open(output, "rb") as file:
        head = file.read(4096)
    if MARK.encode() not in head:
        raise SpecError(
            f"{output} is there already, and is no page of loraport dataset stats.",
            hint="Choose another file with -o, or replace it with --force.",
        )
