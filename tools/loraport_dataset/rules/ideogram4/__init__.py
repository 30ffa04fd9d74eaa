"""The rules of Ideogram 4's captions: a plugin of its own, as any family can bring one."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from loraport.hookspecs import hookimpl

if TYPE_CHECKING:
    from loraport.rules import Rule


@hookimpl
def register_rules(register: Callable[[type[Rule]], None]) -> None:
    from loraport_dataset.rules.ideogram4.boxes import RULES as BOXES
    from loraport_dataset.rules.ideogram4.form import RULES as FORM
    from loraport_dataset.rules.ideogram4.shape import RULES as SHAPE
    from loraport_dataset.rules.ideogram4.words import RULES as WORDS

    for rule in (*SHAPE, *BOXES, *FORM, *WORDS):
        register(rule)
