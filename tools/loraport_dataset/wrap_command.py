"""`loraport dataset wrap`"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

import typer

from loraport.cli.options import AsJson
from loraport_dataset.options import FamilyName, Folder, ImagesOption, OutFolder, TriggerWord, read_folder

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

    from loraport.rules import Finding
    from loraport_dataset.wrapping import Wrapped

PlainExt = Annotated[
    Literal["txt", "caption", "json"], typer.Option("--caption-ext", help="Extension of the plain-text caption files.")
]
InPlace = Annotated[bool, typer.Option("--in-place", help="Write the JSON captions beside the plain ones, in DIR.")]
_TOLD = 20


def add_commands(app: typer.Typer) -> None:
    @app.command()
    def wrap(
        folder: Folder,
        out: OutFolder = None,
        in_place: InPlace = False,
        trigger_word: TriggerWord = None,
        caption_ext: PlainExt = "txt",
        family: FamilyName = None,
        images: ImagesOption = "copy",
        as_json: AsJson = False,
    ) -> None:
        """Turn plain-text captions into the shortest valid JSON ones; nothing is invented."""
        import json
        from dataclasses import asdict

        from loraport.errors import DataError, SpecError
        from loraport_dataset import wrapping
        from loraport_dataset.targets import with_bar

        if (out is None) != in_place:
            raise SpecError(
                "Where to? Give either -o OUT, a new folder, or --in-place, which writes beside the plain captions."
            )
        source = read_folder(folder, family, caption_ext, trigger_word)
        results = with_bar(wrapping.wrap_dataset(folder, source.setting), source.images, "Wrapping")
        written = (
            wrapping.beside(results, folder) if out is None else wrapping.into_new_folder(results, folder, out, images)
        )
        counts, problems = _count(written)
        if as_json:
            found = [asdict(problem) for problem in problems]
            place = str(folder if out is None else out)
            told = {**counts, "left_out": list(wrapping.LEFT_OUT), "problems": found, "out": place}
            typer.echo(json.dumps(told, indent=2))
        else:
            _tell(counts, problems, folder if out is None else out)
        if counts["nothing"]:
            raise typer.Exit(DataError.exit_code)


def _count(results: Iterable[Wrapped]) -> tuple[dict[str, int], list[Finding]]:
    counts = {"wrapped": 0, "json": 0, "nothing": 0}
    problems: list[Finding] = []
    for result in results:
        counts[result.state] += 1
        problems += result.problems
    return counts, problems


def _tell(counts: dict[str, int], problems: list[Finding], place: Path) -> None:
    from loraport_dataset.findings import printable
    from loraport_dataset.wrapping import LEFT_OUT

    typer.echo(f"{counts['wrapped']:,} captions became JSON: the text is their high_level_description.")
    if counts["json"]:
        typer.echo(f"{counts['json']:,} were JSON already and stay as they are.")
    if counts["wrapped"]:
        typer.echo(
            f"Left out or empty, as a text doesn't tell them apart: {', '.join(LEFT_OUT)}. "
            "`loraport dataset caption` has a vision model write them."
        )
    for problem in problems[:_TOLD]:
        place_in_it = f" {problem.json_path}:" if problem.json_path else ""
        said = f"{problem.severity} [{problem.rule}] {problem.message} {problem.fix}"
        typer.echo(printable(f"  {problem.file}:{place_in_it} {said}"))
    if len(problems) > _TOLD:
        typer.echo(f"  and {len(problems) - _TOLD:,} more; --json has them.")
    typer.echo(printable(f"Wrote {place}; look over it with: loraport dataset check {place}"))
