"""`loraport dataset check`, `loraport dataset rules` and `loraport check`."""

from __future__ import annotations

import contextlib
import sys
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
    opened_outside,
    progress_bar,
    read_spec_sources,
    read_target,
)

if TYPE_CHECKING:
    from loraport.rules import Finding
    from loraport.spec.models import TrainSpec
    from loraport_dataset.sources import Source

Strict = Annotated[bool, typer.Option("--strict", help="Warnings count as errors do.")]
Pixels = Annotated[
    bool, typer.Option("--pixels", help="Decode every image too: damaged ones, blank ones and near duplicates.")
]
Findings = Annotated[
    Path | None, typer.Option("--output", "-o", metavar="FILE", help="Write every finding to this JSON file.")
]


def add_commands(app: typer.Typer) -> None:
    """`loraport dataset check`."""

    @app.command()
    def check(
        target: Target,
        as_json: AsJson = False,
        strict: Strict = False,
        pixels: Pixels = False,
        output: Findings = None,
        family: FamilyOfFolder = None,
        checkpoint: CheckpointOfFolder = None,
        caption_ext: CaptionExtOfFolder = None,
        resolution: ResolutionOfFolder = None,
        trigger_word: TriggerWordOfFolder = None,
        overrides: Overrides = None,
    ) -> None:
        """Check images and captions before they are trained. Nothing is written to the dataset.

        Ends with 0, or with 4 when there are errors (with --strict: or warnings).
        """
        from loraport_dataset.sources import Said

        said = Said(family, checkpoint, caption_ext, resolution, trigger_word)
        sources, spec = read_target(target, said, overrides)
        _check(sources, spec, as_json, strict, pixels, output)


def add_rules_command(app: typer.Typer) -> None:
    """`loraport dataset rules`."""

    @app.command()
    def rules(
        as_page: Annotated[bool, typer.Option("--page", help="Print the documentation's page.")] = False,
        as_json: AsJson = False,
    ) -> None:
        """List the rules that datasets are checked by."""
        import json

        from loraport.plugins import plugins
        from loraport_dataset.rules_page import page, table

        found = list(plugins().rules().values())
        if as_json:
            typer.echo(json.dumps(table(found), indent=2, ensure_ascii=False))
        elif as_page:
            typer.echo(page(found), nl=False)
        else:
            for rule in found:
                typer.echo(f"{rule.severity:8} {rule.id:26} {rule.family or '–':10} {rule.explanation}")


def add_top_commands(cli: typer.Typer) -> None:
    """The command of `loraport` itself."""

    @cli.command("check")
    def check_spec(
        spec: Annotated[Path, typer.Argument(metavar="SPEC", help="The training spec (YAML).")],
        as_json: AsJson = False,
        strict: Strict = False,
        pixels: Pixels = False,
        output: Findings = None,
        overrides: Overrides = None,
    ) -> None:
        """Check SPEC and every dataset it names before anything is trained; ends with 4 when there are errors."""
        sources, read = read_spec_sources(spec, overrides)
        _check(sources, read, as_json, strict, pixels, output)


def _check(
    sources: list[Source], spec: TrainSpec | None, as_json: bool, strict: bool, pixels: bool, output: Path | None
) -> None:
    from loraport.advice import lines
    from loraport.errors import DataError
    from loraport_dataset.checking import check
    from loraport_dataset.display import show
    from loraport_dataset.findings import FindingsWriter

    with contextlib.ExitStack() as stack:
        writers = [FindingsWriter(stack.enter_context(opened_outside(output, sources)))] if output is not None else []
        writers += [FindingsWriter(sys.stdout)] if as_json else []

        def tell(dataset: str, finding: Finding) -> None:
            for writer in writers:
                writer(dataset, finding)

        with progress_bar(sum(source.images for source in sources)) as progress:
            report = check(sources, pixels, progress, tell)
        for writer in writers:
            writer.finish(report)
    if not as_json:
        show(report, output)
        if spec is not None:
            typer.secho("\n" + "\n".join(lines(spec)), dim=True)
    if report.fails(strict):
        raise typer.Exit(DataError.exit_code)
