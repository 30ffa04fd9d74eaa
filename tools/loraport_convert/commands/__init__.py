"""The converter's commands, one file each. Nothing heavy is imported before one runs."""

from __future__ import annotations

import typer

from loraport_convert.commands import convert, inspect, merge, resize, verify, workflow


def add_commands(cli: typer.Typer) -> None:
    for module in (convert, inspect, merge, resize, verify, workflow):
        module.add_commands(cli)
