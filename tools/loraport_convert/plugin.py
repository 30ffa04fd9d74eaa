"""Registers the LoRA dialects."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from loraport.hookspecs import hookimpl

if TYPE_CHECKING:
    from loraport.lora.dialect import Dialect


@hookimpl
def register_dialects(register: Callable[[Dialect], None]) -> None:
    from loraport_convert.comfyui import ComfyUI
    from loraport_convert.peft import Peft

    register(ComfyUI())
    register(Peft())
