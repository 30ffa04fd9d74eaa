"""What the commands that look at datasets share: what they look at, a bar while they do, and where they write."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, TextIO, TypeVar

import typer

if TYPE_CHECKING:
    from loraport.spec.models import TrainSpec
    from loraport_dataset.checking import Progress
    from loraport_dataset.sources import Said, Source

T = TypeVar("T")
Target = Annotated[Path, typer.Argument(metavar="DIR|SPEC", help="A folder of images, or a spec.")]
FamilyOfFolder = Annotated[str | None, typer.Option("--family", help="DIR: family whose captions these are.")]
CheckpointOfFolder = Annotated[
    str | None, typer.Option("--checkpoint", help="DIR: checkpoint whose tokenizer counts, a folder or hub id.")
]
CaptionExtOfFolder = Annotated[
    Literal["json", "txt", "caption"] | None,
    typer.Option("--caption-ext", help="DIR: extension of the captions; by default the one that most have."),
]
ResolutionOfFolder = Annotated[
    int | None, typer.Option("--resolution", min=64, max=4096, help="DIR: as dataset.resolution.")
]
TriggerWordOfFolder = Annotated[str | None, typer.Option("--trigger-word", help="DIR: as dataset.trigger_word.")]


def read_target(target: Path, said: Said, overrides: list[str] | None) -> tuple[list[Source], TrainSpec | None]:
    """The datasets of a folder, with what is said of it, or of a spec, which comes with them.

    Raises DataError where there is neither, SpecError for options of the one given for the other, and what
    `read_spec_sources` and `folder_source` raise.
    """
    from loraport.errors import DataError, SpecError
    from loraport_dataset.sources import Said, folder_source

    if not target.exists():
        raise DataError(f"There is no folder and no spec {target}.", hint="Name a folder of images, or a spec (YAML).")
    if not target.is_dir():
        if said != Said():
            raise SpecError("The options of a folder are given for a spec.", hint="Change it with --set instead.")
        return read_spec_sources(target, overrides)
    if overrides:
        raise SpecError("--set changes a spec, and this is a folder.", hint="See --help for its own options.")
    return [folder_source(target, said)], None


def read_spec_sources(path: Path, overrides: list[str] | None) -> tuple[list[Source], TrainSpec]:
    """Every dataset of a spec, those of the hub downloaded, and the spec with their folders."""
    from loraport.cli.options import read_spec
    from loraport.hub_datasets import on_disk
    from loraport_dataset.sources import spec_sources

    spec = on_disk(read_spec(path, overrides), None, tell=lambda line: typer.echo(line, err=True))
    return spec_sources(spec), spec


@contextlib.contextmanager
def opened_outside(path: Path, sources: list[Source]) -> Iterator[TextIO]:
    """A new file that appears when it is whole, and never within a dataset."""
    from loraport.errors import RunFolderError
    from loraport.files import atomic_path

    folder = path.absolute().parent.resolve()
    for source in sources:
        if folder.is_relative_to(source.folder.resolve()):
            raise RunFolderError(
                f"{path} is inside the dataset {source.folder}, which is never written to.",
                hint="Choose another place for it.",
            )
    with atomic_path(path) as temporary, open(temporary, "w", encoding="utf-8") as file:
        yield file


def with_bar(results: Iterable[T], total: int, doing: str) -> Iterator[T]:
    """The same results, with a bar of how many there were."""
    with progress_bar(total, doing) as progress:
        for number, result in enumerate(results, 1):
            yield result
            if progress is not None:
                progress(number, total, "")


@contextlib.contextmanager
def progress_bar(total: int, doing: str = "Checking") -> Iterator[Progress | None]:
    """A bar on standard error where a person is watching; nothing elsewhere."""
    if not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bar

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    done = 0
    # What is printed to standard output meanwhile belongs there, not beside the bar.
    with Bar(*columns, console=Console(stderr=True), transient=True, redirect_stdout=False) as bar:
        task = bar.add_task(doing, total=total)

        def advance(images: int, of: int, title: str) -> None:
            nonlocal done
            done += 1
            if done % 50 == 0 or done == total:
                bar.update(task, completed=done, description=f"{doing} {title}".strip())

        yield advance
