"""`loraport bench ...`"""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from loraport.cli.options import AsJson
from loraport_bench.report_cli import compare, report
from loraport_bench.run_cli import SpecOrCommand, need_psutil, run

if TYPE_CHECKING:
    from loraport_bench.results import DataFile
    from loraport_bench.rows import Row

app = typer.Typer(cls=SpecOrCommand, help="Measure trainers.", no_args_is_help=True)
app.command()(run)
app.command()(report)
app.command()(compare)

STEPS, QUALITY_STEPS, WARM_UP = 30, 200, 10


@app.callback()
def _bench() -> None:
    """Measure trainers."""


@app.command()
def step(
    out: Annotated[Path, typer.Option("--out", "-o", help="Data file; rows that it holds are not run again.")] = Path(
        "bench-step.jsonl"
    ),
    rows: Annotated[str | None, typer.Option(help="Rows to run, separated by commas; all when left out.")] = None,
    steps: Annotated[
        int | None, typer.Option(min=2, help=f"Steps to measure; {STEPS}, or {QUALITY_STEPS} in all with --quality.")
    ] = None,
    warm_up: Annotated[int, typer.Option(min=1, help="Steps before those, which compile and tune.")] = WARM_UP,
    checkpoint: Annotated[
        Path | None, typer.Option(help="Checkpoint folder; a random one of the real dimensions when left out.")
    ] = None,
    images: Annotated[
        Path | None, typer.Option(help="Photographs with captions; the quickstart's when left out.")
    ] = None,
    work: Annotated[
        Path | None, typer.Option(help="Folder for checkpoint, data and runs; the cache's when left out.")
    ] = None,
    limit_memory: Annotated[
        float | None, typer.Option(metavar="GIB", min=0.01, help="Most that torch may take of the card, in every row.")
    ] = None,
    quality: Annotated[bool, typer.Option("--quality", help="Measure held-out loss instead of time.")] = False,
    seeds: Annotated[str, typer.Option(help="Seeds for --quality, separated by commas.")] = "0,1,2",
    gpus: Annotated[int, typer.Option(min=1, help="Cards over which --quality spreads its runs.")] = 1,
    per_gpu: Annotated[int, typer.Option(min=1, help="Runs that --quality has on each of those at once.")] = 1,
    again: Annotated[
        bool, typer.Option("--again", help="Run rows anew that the file holds; the newest counts.")
    ] = False,
    wait: Annotated[bool, typer.Option("--queue", help="Wait while another bench measures on this machine.")] = False,
    as_json: AsJson = False,
) -> None:
    """Measure a training step under each memory profile: seconds, memory, distance to diffusers' recipe and the floor.

    Each row is a real `loraport train` of its own; docs/benchmarks says what is measured how. A session that was cut
    off goes on where it was when the same command is given again.
    """
    need_psutil()
    from loraport.errors import SpecError
    from loraport_bench.data import make_checkpoint, photographs, work_folder
    from loraport_bench.idle import alone_on_machine
    from loraport_bench.measure import Bench, with_limit
    from loraport_bench.results import DataFile
    from loraport_bench.rows import QUALITY_ROWS, ROWS, select
    from loraport_bench.session import Session, places

    def tell(text: str) -> None:
        typer.echo(text, err=True)

    try:
        numbers = [int(seed) for seed in seeds.split(",")]
    except ValueError:
        raise SpecError(f"--seeds: {seeds!r} is not a list of whole numbers such as 0,1,2.") from None
    names = rows.split(",") if rows else None
    chosen = _here(select(QUALITY_ROWS if quality else ROWS, names), named=bool(names), quality=quality)
    if not quality and (gpus, per_gpu) != (1, 1):
        raise SpecError("--gpus and --per-gpu are for --quality: a run whose time is measured has its card to itself.")
    at_once = places(gpus, per_gpu)
    file = DataFile(out)
    place = (work or work_folder()).expanduser().absolute()
    source = photographs(images).absolute()
    if checkpoint is None:
        tell(f"The checkpoint lies in {place / 'random-full-fp8'}.")
    chosen = [with_limit(row, limit_memory) for row in chosen]
    with alone_on_machine(f"loraport bench step for {out}", wait):  # the checkpoint is made on the card, too
        model = checkpoint.expanduser().absolute() if checkpoint else make_checkpoint(place / "random-full-fp8")
        bench = Bench(model, source, place, steps or (QUALITY_STEPS if quality else STEPS), 0 if quality else warm_up)
        session = Session(bench, file, tell, again, _options(names, steps, warm_up, limit_memory, quality, seeds))
        if quality:
            session.quality(chosen, numbers, at_once)
        else:
            session.steps(chosen)
    _print(file, as_json)


@app.command()
def table(
    file: Annotated[
        Path | None,
        typer.Argument(metavar="[FILE]", help="Data file of `loraport bench step`, or the results.json of a bench."),
    ] = None,
    into: Annotated[
        Path | None, typer.Option(help="Page whose tables, between its markers, are made anew from their files.")
    ] = None,
) -> None:
    """Print a data file's tables in Markdown, or renew those in a page.

    In a page a table stands between <!-- bench: FILE --> and <!-- /bench -->.
    """
    from loraport.errors import SpecError
    from loraport.files import write_atomic
    from loraport_bench.table import fill, printed, tables_in

    if (file is None) == (into is None):
        raise SpecError("Give a data file to print, or a page with --into.")
    if into is not None:
        text = fill(into)
        write_atomic(into, text)
        number = tables_in(text)
        typer.echo(f"Renewed {number} {'table' if number == 1 else 'tables'} in {into}")
    elif file is not None:
        if not file.is_file():
            raise SpecError(f"{file} is not there.")
        typer.echo(printed(file), nl=False)


@app.command()
def fields(
    schema: Annotated[bool, typer.Option("--schema", help="Print the JSON schema instead.")] = False,
) -> None:
    """Print what `results.json` holds: every field with its type and meaning, in Markdown."""
    import json

    from loraport_bench.fields import fields_page
    from loraport_bench.records import Results

    typer.echo(json.dumps(Results.model_json_schema(), indent=2) if schema else fields_page(), nl=schema)


def _here(rows: list[Row], named: bool, quality: bool) -> list[Row]:
    """The rows for which this machine has enough cards, unless they were asked for by name."""
    from loraport_bench.monitor import machine

    cards = machine()["cards"]
    return rows if named or quality else [row for row in rows if row.gpus <= max(1, cards)]


def _options(
    names: list[str] | None, steps: int | None, warm_up: int, limit: float | None, quality: bool, seeds: str
) -> str:
    """The command's options that change what is measured, for the record."""
    given: dict[str, object] = {"rows": ",".join(names) if names else None, "steps": steps, "limit-memory": limit}
    given |= {"warm-up": None if warm_up == WARM_UP else warm_up, "seeds": seeds if quality else None}
    words = ["--quality"] if quality else []
    words += [f"--{name} {shlex.quote(str(value))}" for name, value in given.items() if value is not None]
    return " ".join(words)


def _print(file: DataFile, as_json: bool) -> None:
    import json

    from rich.console import Console
    from rich.table import Table

    from loraport_bench.table import QUALITY_HEAD, missed, quality_cells, step_cells, step_head

    if as_json:
        typer.echo(json.dumps(list(file.rows.values()), indent=2, ensure_ascii=False))
        return
    for head, lines in ((step_head(file), step_cells(file)), (QUALITY_HEAD, quality_cells(file))):
        if lines:
            shown = Table(*head, show_edge=False, pad_edge=False)
            for line in lines:
                shown.add_row(*line)
            Console(width=None if sys.stdout.isatty() else 200).print(shown)
    if missed(file):
        typer.echo(f"Below a bar: {', '.join(missed(file))}.")
