"""What this package adds to LoraPort: the `bench` commands."""

from __future__ import annotations

from typing import TYPE_CHECKING

from loraport.hookspecs import hookimpl

if TYPE_CHECKING:
    import typer


@hookimpl
def register_commands(cli: typer.Typer) -> None:
    from loraport_bench.cli import app

    cli.add_typer(app, name="bench")
