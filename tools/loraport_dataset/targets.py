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
FamilyOfFolder = Annotated[
    str | None,
    typer.Option("--family", metavar="NAME", help="DIR: model family of the captions; ideogram4 when left out."),
]
CheckpointOfFolder = Annotated[
    str | None,
    typer.Option(
        "--checkpoint", metavar="DIR|ID", help="DIR: checkpoint whose tokenizer counts; the family's when left out."
    ),
]
CaptionExtOfFolder = Annotated[
    Literal["json", "txt", "caption"] | None,
    typer.Option("--caption-ext", help="DIR: extension of the caption files; that of most when left out."),
]
ResolutionOfFolder = Annotated[
    int | None,
    typer.Option("--resolution", min=64, max=4096, metavar="PIXELS", help="DIR: as dataset.resolution; 1024."),
]
TriggerWordOfFolder = Annotated[
    str | None, typer.Option("--trigger-word", metavar="WORD", help="DIR: as dataset.trigger_word.")
]
#: Of `loraport_dataset.sources.Said`: where a spec says the same.
_FIELDS = {
    "family": "model.family",
    "checkpoint": "model.checkpoint",
    "caption_ext": "dataset.caption_ext",
    "resolution": "dataset.resolution",
    "trigger_word": "dataset.trigger_word",
}


def read_target(target: Path, said: Said, overrides: list[str] | None) -> tuple[list[Source], TrainSpec | None]:
    """The datasets of a folder, with what is said of it, or of a spec, which comes with them.

    Raises DataError where there is neither, SpecError for options of the one given for the other, and what
    `read_spec_sources` and `folder_source` raise.
    """
    from loraport.errors import DataError, SpecError
    from loraport_dataset.sources import folder_source

    if not target.exists():
        raise DataError(f"There is no folder and no spec {target}.", hint="Name a folder of images, or a spec (YAML).")
    if not target.is_dir():
        given = [name for name, value in vars(said).items() if value is not None]
        if given:
            options = ", ".join(f"--{name.replace('_', '-')}" for name in given)
            instead = " ".join(f"--set {_FIELDS[name]}=..." for name in given)
            raise SpecError(f"{options}: for a folder, and {target} is a spec.", hint=f"Say it with {instead}")
        return read_spec_sources(target, overrides)
    if overrides:
        raise SpecError(
            "--set changes a spec, and this is a folder.",
            hint="It has options of its own, such as --resolution and --trigger-word.",
        )
    return [folder_source(target, said)], None


def read_spec_sources(path: Path, overrides: list[str] | None) -> tuple[list[Source], TrainSpec]:
    """Every dataset of a spec, those of the hub downloaded, and the spec with their folders."""
    from loraport.cli.options import read_spec
    from loraport.hub_datasets import on_disk
    from loraport_dataset.sources import spec_sources

    spec = on_disk(read_spec(path, overrides), None, tell=lambda line: typer.echo(line, err=True))
    return spec_sources(spec), spec


def check_place(path: Path) -> None:
    """Raises RunFolderError where no file can be written, before any work is done."""
    from loraport.errors import RunFolderError

    if path.is_dir():
        raise RunFolderError(f"{path} is a folder.", hint="Name a file in it with -o.")
    if not path.absolute().parent.is_dir():
        raise RunFolderError(
            f"{path} cannot be written: the folder {path.absolute().parent} is not there.",
            hint="Make it, or name another file with -o.",
        )


@contextlib.contextmanager
def opened_outside(path: Path, sources: list[Source]) -> Iterator[TextIO]:
    """A new file that appears when it is whole, and never within a dataset."""
    from loraport.errors import RunFolderError
    from loraport.files import atomic_path

    check_place(path)
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
