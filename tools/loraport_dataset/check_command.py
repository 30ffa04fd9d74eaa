"""`loraport dataset check`, `loraport dataset rules` and `loraport check`."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, TextIO

import typer

from loraport.cli.options import AsJson, Overrides

if TYPE_CHECKING:
    from loraport.rules import Finding
    from loraport_dataset.checking import Progress
    from loraport_dataset.sources import Source

Strict = Annotated[bool, typer.Option("--strict", help="Warnings count as errors do.")]
Pixels = Annotated[
    bool, typer.Option("--pixels", help="Decode every image too: damaged ones, blank ones and near duplicates.")
]
Findings = Annotated[
    Path | None, typer.Option("--output", "-o", metavar="FILE", help="Write every finding to this JSON file.")
]


def add_commands(app: typer.Typer) -> None:
    """The commands of `loraport dataset`."""

    @app.command()
    def check(
        target: Annotated[Path, typer.Argument(metavar="DIR|SPEC", help="A folder of images, or a spec.")],
        as_json: AsJson = False,
        strict: Strict = False,
        pixels: Pixels = False,
        output: Findings = None,
        family: Annotated[str | None, typer.Option(help="DIR: family whose captions these are.")] = None,
        checkpoint: Annotated[
            str | None, typer.Option(help="DIR: checkpoint whose tokenizer counts, a folder or hub id.")
        ] = None,
        caption_ext: Annotated[
            Literal["json", "txt", "caption"] | None,
            typer.Option(help="DIR: extension of the captions; by default the one that most have."),
        ] = None,
        resolution: Annotated[int | None, typer.Option(min=64, max=4096, help="DIR: as dataset.resolution.")] = None,
        trigger_word: Annotated[str | None, typer.Option(help="DIR: as dataset.trigger_word.")] = None,
        overrides: Overrides = None,
    ) -> None:
        """Check images and captions before they are trained. Nothing is written to the dataset.

        Ends with 0, or with 4 when there are errors (with --strict: or warnings).
        """
        from loraport.errors import SpecError
        from loraport_dataset.sources import Said, folder_source

        said = Said(family, checkpoint, caption_ext, resolution, trigger_word)
        if not target.is_dir():
            if said != Said():
                raise SpecError("The options of a folder are given for a spec.", hint="Change it with --set instead.")
            sources = _of_spec(target, overrides)
        else:
            if overrides:
                raise SpecError("--set changes a spec, and this is a folder.", hint="See --help for its own options.")
            sources = [folder_source(target, said)]
        _check(sources, as_json, strict, pixels, output)

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
        _check(_of_spec(spec, overrides), as_json, strict, pixels, output)


def _of_spec(path: Path, overrides: list[str] | None) -> list[Source]:
    from loraport.cli.options import read_spec
    from loraport.hub_datasets import on_disk
    from loraport_dataset.sources import spec_sources

    spec = on_disk(read_spec(path, overrides), None, tell=lambda line: typer.echo(line, err=True))
    return spec_sources(spec)


def _check(sources: list[Source], as_json: bool, strict: bool, pixels: bool, output: Path | None) -> None:
    from loraport.errors import DataError
    from loraport_dataset.checking import check
    from loraport_dataset.display import show
    from loraport_dataset.findings import FindingsWriter

    with contextlib.ExitStack() as stack:
        writers = [FindingsWriter(stack.enter_context(_opened(output, sources)))] if output is not None else []
        writers += [FindingsWriter(sys.stdout)] if as_json else []

        def tell(dataset: str, finding: Finding) -> None:
            for writer in writers:
                writer(dataset, finding)

        with _progress(sum(source.images for source in sources)) as progress:
            report = check(sources, pixels, progress, tell)
        for writer in writers:
            writer.finish(report)
    if not as_json:
        show(report, output)
    if report.fails(strict):
        raise typer.Exit(DataError.exit_code)


@contextlib.contextmanager
def _opened(path: Path, sources: list[Source]) -> Iterator[TextIO]:
    """A findings file that appears when it is whole, and never within a dataset."""
    from loraport.errors import RunFolderError
    from loraport.files import atomic_path

    folder = path.absolute().parent.resolve()
    for source in sources:
        if folder.is_relative_to(source.folder.resolve()):
            raise RunFolderError(
                f"{path} is inside the dataset {source.folder}, which is never written to.",
                hint="Choose another place for the findings.",
            )
    with atomic_path(path) as temporary, open(temporary, "w", encoding="utf-8") as file:
        yield file


@contextlib.contextmanager
def _progress(total: int) -> Iterator[Progress | None]:
    """A bar on standard error where a person is watching; nothing elsewhere."""
    if not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bar

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    done = 0
    with Bar(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("Checking", total=total)

        def advance(images: int, of: int, title: str) -> None:
            nonlocal done
            done += 1
            if done % 50 == 0 or done == total:
                bar.update(task, completed=done, description=f"Checking {title}")

        yield advance
