"""`loraport train`, `resume` and `runs`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from loraport.cli.options import AsJson, BackendName, Out, Overrides, SpecFile, Strict, read_spec

if TYPE_CHECKING:
    from loraport.run.api import RunResult


def add_commands(cli: typer.Typer) -> None:
    @cli.command()
    def train(
        spec: SpecFile,
        backend: BackendName = None,
        out: Out = None,
        strict: Strict = False,
        as_json: Annotated[bool, typer.Option("--json", help="Print each event as a line of JSON.")] = False,
        overrides: Overrides = None,
    ) -> None:
        """Train SPEC and end with a LoRA that ComfyUI loads. Ctrl-C once writes a checkpoint and stops."""
        from loraport.run.api import train as start
        from loraport.run.display import choose_display

        wanted = read_spec(spec, overrides)
        with choose_display(as_json) as display:
            result = start(wanted, backend, out, strict=strict, on_event=display)
        _tell(result, as_json)

    @cli.command()
    def resume(
        folder: Annotated[Path, typer.Argument(metavar="DIR", help="Run folder.")],
        as_json: Annotated[bool, typer.Option("--json", help="Print each event as a line of JSON.")] = False,
    ) -> None:
        """Go on with a stopped or killed run from its last whole checkpoint."""
        from loraport.run.api import resume as go_on
        from loraport.run.display import choose_display

        with choose_display(as_json) as display:
            result = go_on(folder, on_event=display)
        _tell(result, as_json)

    @cli.command()
    def runs(
        folder: Annotated[Path, typer.Argument(metavar="[DIR]", help="Folder of run folders.")] = Path("runs"),
        as_json: AsJson = False,
    ) -> None:
        """List runs with their state and result."""
        from loraport.run.api import runs as find

        found = find(folder)
        if as_json:
            typer.echo(json.dumps([run.to_dict() for run in found], indent=2, ensure_ascii=False))
            return
        if not found:
            typer.echo(f"No runs in {folder}.")
            return
        from rich.console import Console
        from rich.markup import escape
        from rich.table import Table

        table = Table(show_edge=False, pad_edge=False)
        for column in ("run", "backend", "state", "step", "result"):
            table.add_column(column, overflow="fold")
        for run in found:
            table.add_row(*(escape(cell) for cell in run.cells()))
        Console().print(table)


def _tell(result: RunResult, as_json: bool) -> None:
    if not as_json:
        typer.echo(f"LoRA for ComfyUI: {result.lora}\nProof: {result.proof}")
