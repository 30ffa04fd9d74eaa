"""`loraport tiny`: a complete random checkpoint for trying things out."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer


def add_commands(cli: typer.Typer) -> None:
    @cli.command()
    def tiny(
        family: Annotated[str, typer.Argument(help="Model family; ideogram4.")],
        folder: Annotated[Path, typer.Argument(help="Folder to write; it must not exist, or be empty.")],
        layout: Annotated[
            Literal["diffusers", "official"], typer.Option(help="File layout; both hold the same weights.")
        ] = "diffusers",
        fp8: Annotated[bool, typer.Option("--fp8", help="Official layout: fp8 rows with scales.")] = False,
        seed: Annotated[int, typer.Option(help="Seed of the weights.")] = 0,
    ) -> None:
        """Write a complete random checkpoint of a few megabytes."""
        from loraport.errors import SpecError, unknown

        if family != "ideogram4":
            raise SpecError(unknown("Family", family, ["ideogram4"]))
        if fp8 and layout != "official":
            raise SpecError("--fp8 goes with --layout official: the diffusers layout has no fp8 form.")
        from loraport_native.tiny import write_tiny

        write_tiny(folder, layout=layout, seed=seed, fp8=fp8)
        size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
        typer.echo(f"Wrote {folder} ({size / 2**20:.1f} MiB, {layout} layout).")
