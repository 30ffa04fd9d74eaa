"""`loraport merge`: several LoRAs as one file, exactly."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from loraport.cli.options import AsJson
from loraport.errors import DataError
from loraport_convert.commands.options import (
    Alpha,
    AssumeAlpha,
    DtypeOption,
    FamilyName,
    OutFile,
    Overwrite,
    To,
    dtype_of,
    scale_of,
    writer_named,
)
from loraport_convert.stopping import stoppable

Ingredients = Annotated[
    list[str],
    typer.Argument(metavar="FILE[:STRENGTH]...", help="LoRAs and how much of each, such as a.safetensors:0.7."),
]


def add_commands(cli: typer.Typer) -> None:
    @cli.command()
    @stoppable()
    def merge(
        ingredients: Ingredients,
        out: OutFile,
        to: To = "comfyui",
        alpha: Alpha = None,
        assume_alpha: AssumeAlpha = None,
        family: FamilyName = None,
        dtype: DtypeOption = "keep",
        overwrite: Overwrite = False,
        as_json: AsJson = False,
    ) -> None:
        """Merge LoRAs of one model: each module changes by the sum of strength times change. The ranks add up."""
        from loraport.plugins import plugins
        from loraport_convert.merging import Ingredient, common_dtype, merged, parse_ingredient
        from loraport_convert.publishing import Target, check_target, publish
        from loraport_convert.reading import read_lora

        scale, dialects = scale_of(alpha, assume_alpha), plugins().dialects()
        parsed = [parse_ingredient(text) for text in ingredients]
        if len(parsed) < 2:
            raise DataError("One LoRA alone is not merged with anything.", hint="Name two or more.")
        found = [(read_lora(path, dialects, scale, family), strength) for path, strength in parsed]
        read = [Ingredient(each.path, each.lora, strength) for each, strength in found]
        places = [each.path for each in read]
        target = Target(out, writer_named(to), dtype_of(dtype) or common_dtype(read), overwrite)
        check_target(target, places)
        published = publish(merged(read), target, places)
        if as_json:
            typer.echo(json.dumps(published.to_json(), indent=2, ensure_ascii=False))
            return
        worst = max(module.difference for module in published.proof.modules)
        typer.echo(f"{out}: {len(published.proof.modules)} modules in {target.dtype}; largest difference {worst:.1e}")
