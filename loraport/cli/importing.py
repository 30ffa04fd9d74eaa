"""`loraport import`: a configuration of another trainer becomes a spec."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from loraport.cli.options import BackendName


def add_commands(cli: typer.Typer) -> None:
    @cli.command("import")
    def import_config(
        file: Annotated[Path, typer.Argument(help="SimpleTuner folder, DiffSynth script, ai-toolkit YAML, …")],
        output: Annotated[Path, typer.Option("--output", "-o", help="Spec to write.")] = Path("spec.yaml"),
        backend: BackendName = None,
        force: Annotated[bool, typer.Option("--force", help="Replace a spec that is there.")] = False,
    ) -> None:
        """Turn a trainer's configuration into a spec, and tell what could not be carried."""
        from loraport.errors import SpecError
        from loraport.files import write_atomic
        from loraport.importing import import_config as read
        from loraport.plugins import plugins
        from loraport.spec.load import build_spec

        if output.exists() and not force:
            raise SpecError(f"{output} is there already.", hint="Choose another with -o, or replace it with --force.")
        name, imported = read(file, backend, plugins())
        loaded = build_spec(imported.content, base=file.resolve().parent, origin=str(file))
        write_atomic(output, loaded.spec.to_yaml())
        typer.echo(f"Wrote {output} from a configuration of {name}.")
        for note in [*loaded.notices, *imported.notes]:
            typer.echo(f"  {note}")
