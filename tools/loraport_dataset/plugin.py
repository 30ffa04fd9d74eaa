"""What this package adds to LoraPort: the `dataset` commands, `check`, and the rules that hold for every family."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from loraport.hookspecs import hookimpl

if TYPE_CHECKING:
    import typer

    from loraport.rules import Rule


@hookimpl
def register_commands(cli: typer.Typer) -> None:
    from loraport_dataset.check_command import add_top_commands
    from loraport_dataset.cli import app

    cli.add_typer(app, name="dataset")
    add_top_commands(cli)


@hookimpl
def register_rules(register: Callable[[type[Rule]], None]) -> None:
    from loraport_dataset.rules import built_in

    for rule in built_in():
        register(rule)
