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
        size: Annotated[
            Literal["tiny", "full"],
            typer.Option(help="A few MB, or the real dimensions (36 GB; 18 GB with --fp8) for measuring."),
        ] = "tiny",
        device: Annotated[str, typer.Option(help="Where the weights are made: cpu, cuda, cuda:1, …")] = "cpu",
        unconditional: Annotated[
            bool, typer.Option(help="Write the second transformer, which only samples with guidance use.")
        ] = True,
    ) -> None:
        """Write a complete random checkpoint: a few megabytes, or the real model's size."""
        from loraport.errors import SpecError, unknown

        if family != "ideogram4":
            raise SpecError(unknown("Family", family, ["ideogram4"]))
        if fp8 and layout != "official":
            raise SpecError("--fp8 goes with --layout official: the diffusers layout has no fp8 form.")
        from loraport_native.device import find_device
        from loraport_native.sizes import SIZES
        from loraport_native.tiny import write_checkpoint

        write_checkpoint(folder, layout, SIZES[size], seed, fp8, find_device(device, "--device"), unconditional)
        written = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
        typer.echo(f"Wrote {folder} ({written / 2**20:,.1f} MiB, {layout} layout).")
