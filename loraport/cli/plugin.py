"""The port's own commands, registered like any plugin's."""

from __future__ import annotations

import typer

from loraport.cli import backends, importing, info, plan, spec, train
from loraport.hookspecs import hookimpl


@hookimpl
def register_commands(cli: typer.Typer) -> None:
    for module in (plan, train, backends, importing, spec, info):
        module.add_commands(cli)
