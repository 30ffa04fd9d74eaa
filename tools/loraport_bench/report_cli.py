"""`loraport bench report` and `loraport bench compare`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from loraport.cli.options import AsJson
from loraport_bench import RESULTS


def report(
    folders: Annotated[
        list[Path], typer.Argument(metavar="DIR...", help="Folders of benches, or their results.json files.")
    ],
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Folder for the reports; where the results are when left out.")
    ] = None,
) -> None:
    """Write a bench's report.md and report.html anew from its results.json, or one report on several benches.

    Of several, on the same images, a results.json of all rows is written beside the report.
    """
    from loraport.errors import RunFolderError, SpecError
    from loraport_bench.gather import gathered
    from loraport_bench.records import Results
    from loraport_bench.report import write_reports

    sources = [results_in(folder) for folder in folders]
    if len(sources) > 1 and out is None:
        raise SpecError("A report on several benches needs a folder of its own: name it with --out.")
    place = out or sources[0].parent
    if len(sources) > 1 and (place / RESULTS).resolve() in [source.resolve() for source in sources]:
        raise SpecError(f"--out: {place} holds one of these benches; name a folder of its own.")
    results = Results.read(sources[0])
    if len(sources) > 1:
        results = gathered(dict(zip(_names(sources), map(Results.read, sources), strict=True)))
    try:
        place.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RunFolderError(f"{place} cannot be made: {error.strerror}.") from error
    if len(sources) > 1:
        results.write(place / RESULTS)
        typer.echo(f"Wrote {place / RESULTS}")
    for path in write_reports(results, place):
        typer.echo(f"Wrote {path}")


def compare(
    old: Annotated[Path, typer.Argument(metavar="OLD", help="Results to compare with: a bench's folder or its file.")],
    new: Annotated[Path, typer.Argument(metavar="NEW", help="Results to judge.")],
    threshold: Annotated[
        str, typer.Option(metavar="SHARE", help="Least change of speed, memory and phases that counts.")
    ] = "5%",
    quality_threshold: Annotated[
        str,
        typer.Option(metavar="SHARE", help="Least change of the held-out loss, as a share of that without a LoRA."),
    ] = "1%",
    of: Annotated[
        str, typer.Option("--of", help="What to compare, separated by commas.")
    ] = "speed,memory,phases,quality",
    as_json: AsJson = False,
) -> None:
    """Show what changed beyond the noise between two benches; exit code 8 when something got worse.

    A number has changed when each median lies outside the other's range from 10th to 90th percentile, and they differ
    by more than the threshold. Rows that no longer come to their end count as worse.
    """
    import json

    from loraport.errors import DifferentError
    from loraport_bench import compare as comparing
    from loraport_bench.records import Results

    found = comparing.compare(
        Results.read(results_in(old)),
        Results.read(results_in(new)),
        comparing.share_of(threshold, "--threshold"),
        comparing.share_of(quality_threshold, "--quality-threshold"),
        comparing.aspects_of(of),
    )
    if as_json:
        typer.echo(json.dumps(found.as_json(), indent=2, ensure_ascii=False))
    else:
        for line in found.lines():
            typer.echo(line)
    if found.worse:
        things = "thing" if found.worse == 1 else "things"
        raise DifferentError(f"{found.worse} {things} got worse beyond the noise.")


def _names(sources: list[Path]) -> list[str]:
    """What each bench is called: its folder, or where two folders have the same name, its number with it."""
    folders = [source.absolute().parent.name for source in sources]
    return [name if folders.count(name) == 1 else f"{name} ({number})" for number, name in enumerate(folders, start=1)]


def results_in(place: Path) -> Path:
    """The results.json of a bench's folder, or the file itself."""
    return place / RESULTS if place.is_dir() else place
