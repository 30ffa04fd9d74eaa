"""LoraPort's own rules: one class each, registered through the hook like anybody's."""

from __future__ import annotations

from loraport.rules import Rule


def built_in() -> list[type[Rule]]:
    """The rules that hold for every family, in the order of the documentation."""
    from loraport_dataset.rules import duplicates, images, names, texts, tokens, triggers

    modules = (images, duplicates, names, texts, tokens, triggers)
    return [rule for module in modules for rule in module.RULES]
