"""`loraport workflow`: a ComfyUI workflow that shows what LoRAs do."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from loraport.errors import DataError
from loraport_convert.commands.options import OutFile

Loras = Annotated[
    list[str], typer.Argument(metavar="FILE[:STRENGTH]...", help="LoRAs for ComfyUI; several are used together.")
]
Prompt = Annotated[str | None, typer.Option(help="Default: the LoRA's trigger phrase.")]
Seed = Annotated[int, typer.Option(min=0, help="The seed of every picture.")]
Side = Annotated[int | None, typer.Option(min=256, max=8192, help="Width and height in pixels, a multiple of 16.")]
Model = Annotated[str | None, typer.Option(help="The checkpoint's name in ComfyUI. Default: that of its templates.")]
FamilyName = Annotated[str | None, typer.Option("--family", help="The model, where the file does not tell it.")]


def add_commands(cli: typer.Typer) -> None:
    @cli.command()
    def workflow(
        loras: Loras,
        out: OutFile,
        prompt: Prompt = None,
        seed: Seed = 42,
        side: Side = None,
        model: Model = None,
        family: FamilyName = None,
    ) -> None:
        """Write a ComfyUI workflow (API format): no LoRA, 0.7, 1.0 and 1.5, with the same seed and prompt."""
        from loraport.files import write_atomic
        from loraport.plugins import plugins
        from loraport_convert.inspection import inspect
        from loraport_convert.merging import parse_ingredient
        from loraport_convert.workflows import Ingredient, Picture, workflow

        if side is not None and side % 16:
            raise DataError(f"--side: {side} is not a multiple of 16.")
        parsed = [parse_ingredient(text) for text in loras]
        facts = [inspect(path, plugins().dialects()) for path, _ in parsed]
        found = {each.family for each in facts if each.family} if family is None else {family}
        if len(found) > 1:
            raise DataError(f"The LoRAs are of different models: {', '.join(sorted(found))}.")
        name = next(iter(found), None)
        if out.exists() and (out.suffix != ".json" or any(out.samefile(path) for path, _ in parsed)):
            raise DataError(f"{out} exists and is not a workflow.", hint="Choose a file that ends in .json.")
        ingredients = [
            Ingredient(path.name, strength, any(".text_model." in m.name or "lora_te" in m.name for m in each.modules))
            for (path, strength), each in zip(parsed, facts, strict=True)
        ]
        text = prompt if prompt is not None else _prompt(facts[0].metadata.get("modelspec.trigger_phrase"), name)
        nodes = workflow(name, ingredients, Picture(text, seed, side, model))
        write_atomic(out, json.dumps(nodes, indent=2, ensure_ascii=False) + "\n")
        typer.echo(f"{out}: {len(nodes)} nodes for {name}. Put these into ComfyUI's models folder:")
        for file in sorted(_files(nodes)):
            typer.echo(f"  {file}")
        for each in facts:
            if not each.comfyui.fine:
                typer.secho(f"note: ComfyUI does not load all of {each.path} as it is; convert it first", err=True)


def _prompt(trigger: str | None, family: str | None) -> str:
    """The trigger phrase, in the form in which the family reads its captions."""
    from loraport.plugins import plugins

    text = trigger or "a photograph"
    known = plugins().families().get(family or "")
    if known is not None and known.caption_format == "json":
        return json.dumps({"high_level_description": text}, ensure_ascii=False)
    return text


def _files(nodes: dict[str, dict[str, dict[str, object]]]) -> set[str]:
    """The files that the nodes load."""
    values = (value for node in nodes.values() for value in node["inputs"].values())
    return {Path(value).name for value in values if isinstance(value, str) and value.endswith(".safetensors")}
