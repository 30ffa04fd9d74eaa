"""`loraport spec`: the schema and the reference of the spec, and of the events a run tells."""

from __future__ import annotations

import json
from typing import Annotated

import typer


def add_commands(cli: typer.Typer) -> None:
    spec = typer.Typer(no_args_is_help=True, help="About the formats: the spec, and the events of a run.")
    cli.add_typer(spec, name="spec")

    @spec.command()
    def schema() -> None:
        """Print the spec's JSON schema, for editors that complete YAML."""
        from loraport.spec.models import TrainSpec

        typer.echo(json.dumps(TrainSpec.model_json_schema(), indent=2, ensure_ascii=False))

    @spec.command()
    def reference() -> None:
        """Print the spec's reference page (docs/spec.md)."""
        from loraport.spec.reference import reference_page

        typer.echo(reference_page(), nl=False)

    @spec.command()
    def events(
        as_schema: Annotated[bool, typer.Option("--schema", help="Print the JSON schema of a line.")] = False,
    ) -> None:
        """Print the page on the events of a run (docs/events.md)."""
        from loraport.run.events import json_schema
        from loraport.run.events_reference import events_page

        if as_schema:
            typer.echo(json.dumps(json_schema(), indent=2, ensure_ascii=False))
        else:
            typer.echo(events_page(), nl=False)
