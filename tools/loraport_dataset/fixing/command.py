"""`loraport dataset fix`"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from loraport.cli.options import AsJson
from loraport_dataset.options import CaptionExt, FamilyName, Folder, ImagesOption, OutFolder, TriggerWord, read_folder

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from loraport.rules import Setting
    from loraport_dataset.boxes import Convention
    from loraport_dataset.fixing.dataset import FixedImage
    from loraport_dataset.fixing.folders import Images
    from loraport_dataset.fixing.report import Report

BoxesOption = Annotated[
    str,
    typer.Option(
        "--boxes",
        metavar="CONVENTION",
        help="How boxes are written now: auto (told from all of them), official, or ORDER-FORM-UNIT such as "
        "xy-corners-pixels (order xy or yx; corners or size; pixels, thousandths, fraction or percent).",
    ),
]
InPlace = Annotated[bool, typer.Option("--in-place", help="Change DIR itself; originals go to DIR/.originals/.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Show what would change; write nothing.")]
Diffs = Annotated[int, typer.Option("--diffs", min=0, metavar="N", help="Show the first N changed captions as diffs.")]


def add_commands(app: typer.Typer) -> None:
    @app.command()
    def fix(
        folder: Folder,
        out: OutFolder = None,
        in_place: InPlace = False,
        dry_run: DryRun = False,
        trigger_word: TriggerWord = None,
        boxes: BoxesOption = "auto",
        caption_ext: CaptionExt = None,
        family: FamilyName = None,
        images: ImagesOption = "copy",
        diffs: Diffs = 20,
        as_json: AsJson = False,
    ) -> None:
        """Put captions right where what is meant is certain, into a new folder; the rest is listed, not guessed."""
        import json

        from loraport.errors import DataError
        from loraport_dataset.fixing.dataset import fix_dataset
        from loraport_dataset.fixing.report import Report
        from loraport_dataset.targets import with_bar

        place = _place(out, in_place, dry_run)
        source = read_folder(folder, family, caption_ext, trigger_word)
        setting, report = source.setting, Report()
        convention = _convention(boxes, folder, setting, report)
        if convention is not None and not as_json:
            typer.echo(f"All boxes are read as {report.boxes}.")
        results = with_bar(fix_dataset(folder, setting, convention), source.images, "Fixing")
        shown: list[FixedImage] = []
        for fixed in _written(results, folder, out, place, images):
            report.add(fixed)
            if fixed.changed and report.changed <= diffs and not as_json:
                shown.append(fixed)
        for fixed in shown:
            _show(fixed)
        if as_json:
            written = {"out": str(out) if place == "out" else str(folder) if place == "in-place" else None}
            typer.echo(json.dumps({**report.as_json(), **written}, indent=2))
        else:
            _tell(report, folder, out, place, diffs)
        if report.errors:
            raise typer.Exit(DataError.exit_code)


Place = Literal["out", "in-place", "nowhere"]


def _place(out: Path | None, in_place: bool, dry_run: bool) -> Place:
    from loraport.errors import SpecError

    if out is not None and in_place:
        raise SpecError("-o and --in-place exclude each other.", hint="Keep one of them.")
    if dry_run:
        return "nowhere"
    if out is None and not in_place:
        raise SpecError(
            "Where to? Nothing is changed without being told.",
            hint="Give a new folder with -o OUT, or say --in-place, or --dry-run to only see the changes.",
        )
    return "in-place" if in_place else "out"


def _convention(name: str, folder: Path, setting: Setting, report: Report) -> Convention | None:
    """The convention that boxes are read in; None to leave them as they are. The report hears of it."""
    from loraport.errors import SpecError, unknown
    from loraport_dataset.boxes import CONVENTIONS, OFFICIAL
    from loraport_dataset.fixing.dataset import recognise_boxes

    named = {"official": OFFICIAL} | {f"{one.order}-{one.form}-{one.unit}": one for one in CONVENTIONS}
    if name != "auto":
        if name not in named:
            raise SpecError(unknown("--boxes:", name, ["auto", *named]))
        report.boxes = f"{named[name]}, as you say"
        return named[name]
    found = recognise_boxes(folder, setting)
    if found is None:
        return None
    if not found.is_certain:
        report.add_undecided_boxes(found)
        return None
    report.boxes = f"{found.convention}: {found.evidence}"
    return found.convention


def _written(
    results: Iterable[FixedImage],
    folder: Path,
    out: Path | None,
    place: Place,
    images: Images,
) -> Iterator[FixedImage]:
    """The same results, each written where it belongs."""
    from loraport_dataset.fixing import writing

    if place == "out":
        assert out is not None
        return writing.into_new_folder(results, folder, out, images)
    return writing.in_place(results, folder) if place == "in-place" else iter(results)


def _show(fixed: FixedImage) -> None:
    from loraport_dataset.findings import printable
    from loraport_dataset.fixing.diffs import diff

    caption = fixed.image.caption
    assert caption is not None
    assert fixed.fixed is not None
    lines = list(diff(caption.name, caption.text, fixed.fixed.text))
    if not lines:
        lines = [printable(f"{caption.name}: {change.what}") for change in fixed.fixed.changes]
    colours = {"+": typer.colors.GREEN, "-": typer.colors.RED, "@": typer.colors.CYAN}
    for line in lines:
        typer.secho(line, fg=colours.get(line[:1]))


def _tell(report: Report, folder: Path, out: Path | None, place: Place, diffs: int) -> None:
    from loraport_dataset.findings import printable

    if diffs and report.changed > diffs:
        typer.echo(f"… and {report.changed - diffs:,} more changed captions; --diffs N shows more.")
    for line in report.lines():
        typer.echo(line)
    if place == "out":
        typer.echo(printable(f"Wrote {out}; {folder} is as it was. Look over it with: loraport dataset check {out}"))
    elif place == "in-place" and report.changed:
        typer.echo(printable(f"Changed {folder}; the originals are in {folder}/.originals/."))
    elif place == "nowhere":
        typer.echo("Nothing was written.")
