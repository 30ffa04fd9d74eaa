"""LoraPort's own rules: one class each, registered through the hook like anybody's."""

from __future__ import annotations

from loraport.rules import Rule


def built_in() -> list[type[Rule]]:
    """The rules that hold for every family, in the order of the documentation."""
    from loraport_dataset.rules.duplicates import RULES as DUPLICATES
    from loraport_dataset.rules.images import RULES as IMAGES
    from loraport_dataset.rules.names import RULES as NAMES
    from loraport_dataset.rules.texts import RULES as TEXTS
    from loraport_dataset.rules.tokens import RULES as TOKENS
    from loraport_dataset.rules.triggers import RULES as TRIGGERS

    return [*IMAGES, *DUPLICATES, *NAMES, *TEXTS, *TOKENS, *TRIGGERS]
