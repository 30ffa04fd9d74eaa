"""Registers the LoRA dialects and the commands that convert, compare and combine LoRA files."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from loraport.hookspecs import hookimpl

if TYPE_CHECKING:
    import typer

    from loraport.lora.dialect import Dialect


@hookimpl
def register_dialects(register: Callable[[Dialect], None]) -> None:
    from loraport_convert.comfyui import ComfyUI
    from loraport_convert.dialects.ai_toolkit import AiToolkit
    from loraport_convert.dialects.bare import Bare
    from loraport_convert.dialects.diffsynth import DiffSynth
    from loraport_convert.dialects.diffusers import Diffusers
    from loraport_convert.dialects.kohya import Kohya
    from loraport_convert.dialects.lycoris import Lycoris
    from loraport_convert.dialects.old_diffusers import OldDiffusers
    from loraport_convert.dialects.onetrainer import OneTrainer
    from loraport_convert.dialects.peft import Peft

    kinds = (ComfyUI, Peft, Diffusers, Kohya, Lycoris, AiToolkit, OneTrainer, DiffSynth, OldDiffusers, Bare)
    for kind in kinds:
        register(kind())


@hookimpl
def register_commands(cli: typer.Typer) -> None:
    from loraport_convert.commands import add_commands

    add_commands(cli)
