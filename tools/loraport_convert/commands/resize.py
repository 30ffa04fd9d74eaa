"""`loraport resize`: a LoRA of another rank, with what it costs."""

from __future__ import annotations

import json
import math
from typing import TYPE_CHECKING, Annotated

import typer

from loraport.cli.options import AsJson
from loraport_convert.commands.options import (
    Alpha,
    AssumeAlpha,
    DtypeOption,
    FamilyName,
    LoraPath,
    OutFile,
    Overwrite,
    To,
    dtype_of,
    scale_of,
    writer_named,
)
from loraport_convert.stopping import stoppable

if TYPE_CHECKING:
    from loraport_convert.publishing import Published

Rank = Annotated[int, typer.Option("--rank", min=1, help="The rank of each module that has a higher one.")]


def add_commands(cli: typer.Typer) -> None:
    @cli.command()
    @stoppable()
    def resize(
        path: LoraPath,
        rank: Rank,
        out: OutFile,
        to: To = "comfyui",
        alpha: Alpha = None,
        assume_alpha: AssumeAlpha = None,
        family: FamilyName = None,
        dtype: DtypeOption = "keep",
        overwrite: Overwrite = False,
        as_json: AsJson = False,
    ) -> None:
        """Write the closest LoRA of a smaller rank (or of any kind, as a LoRA), and tell the error of each module."""
        from loraport.plugins import plugins
        from loraport_convert.publishing import Target, check_target, publish
        from loraport_convert.reading import lora_file, read_lora

        source = lora_file(path)
        target = Target(out, writer_named(to), dtype_of(dtype), overwrite, "svd", rank, every=True)
        check_target(target, [source])
        found = read_lora(source, plugins().dialects(), scale_of(alpha, assume_alpha), family)
        published = publish(found.lora, target, [source])
        total = total_error(published)
        if as_json:
            typer.echo(json.dumps({"total": total} | published.to_json(), indent=2, ensure_ascii=False))
            return
        for module in published.proof.modules:
            typer.echo(f"{module.name}: {module.difference:.2%}")
        typer.echo(f"{out}: rank {rank}; {total:.2%} of the whole change is lost")


def total_error(published: Published) -> float:
    """‖difference‖ over ‖ΔW‖ of all modules together."""
    squares = {
        module.name: (module.difference * published.norms[module.name]) ** 2 for module in published.proof.modules
    }
    whole = math.sqrt(sum(norm**2 for norm in published.norms.values()))
    return math.sqrt(sum(squares.values())) / whole if whole else 0.0
