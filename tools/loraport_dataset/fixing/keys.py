"""The keys of an object: their spelling and their order."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from typing import Any

from loraport_dataset.fixing.changes import Changes
from loraport_dataset.rules.wording import shown

_HUMP = re.compile(r"(?<=[a-z0-9])(?=[A-Z])")
_GAP = re.compile(r"[\s\-_]+")
#: Other words for a key that can mean nothing else.
_SYNONYMS = {
    "description": "desc",
    "bounding_box": "bbox",
    "palette": "color_palette",
    "colour_palette": "color_palette",
}


def snake_case(name: str) -> str:
    """`highLevelDescription`, `High-Level Description` and the like as `high_level_description`."""
    return _GAP.sub("_", _HUMP.sub("_", name.strip())).lower()


def spell_keys(value: dict[str, Any], path: str, keys: Sequence[str], rule: str, changes: Changes) -> dict[str, Any]:
    """The object with its keys spelled as in `keys`, in the order they are in; keys that are not known stay.

    A key is not renamed to one that is there already, nor are two keys to the same.
    """
    meant = {key: _meant(key, keys) for key in value}
    targets = Counter(meant.values())
    spelled: dict[str, Any] = {}
    for key, content in value.items():
        new = meant[key] if targets[meant[key]] == 1 else key
        if new != key:
            changes.add(rule, path, f"the key {shown(key)} became {new!r}")
        spelled[new] = content
    return spelled


def order_keys(value: dict[str, Any], path: str, keys: Sequence[str], rule: str, changes: Changes) -> dict[str, Any]:
    """The object with its keys in the order of `keys`; keys that are not known come last, as they were."""
    order = [key for key in keys if key in value] + [key for key in value if key not in keys]
    if order != list(value):
        known = ", ".join(key for key in order if key in keys)
        changes.add(rule, path, f"the keys are now in the order {known}")
    return {key: value[key] for key in order}


def _meant(key: str, keys: Sequence[str]) -> str:
    if key in keys:
        return key
    name = snake_case(key)
    name = name if name in keys else _SYNONYMS.get(name, name)
    return name if name in keys else key
