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
    from loraport_convert.peft import Peft

    register(ComfyUI())
    register(Peft())


@hookimpl
def register_commands(cli: typer.Typer) -> None:
    from loraport_convert.commands import add_commands

    add_commands(cli)
