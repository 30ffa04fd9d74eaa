"""Colour palettes as the model knows them: #RRGGBB in capitals, no colour twice, no more than fit."""

from __future__ import annotations

import re
from typing import Any

from PIL import ImageColor

from loraport_dataset.fixing.changes import Changes
from loraport_dataset.rules.wording import shown

#: Sixteen colours in the longest notation have fewer characters.
_LONGEST_TEXT = 1000
_HEX = re.compile(r"(?:[0-9a-fA-F]{3}){1,2}")
# Between colours, but not within the parentheses of rgb(1, 2, 3).
_BETWEEN = re.compile(r"[,;\s]+(?![^(]*\))")


def colour(value: Any) -> str | None:
    """#RRGGBB for a colour as CSS writes it (`#abc`, `#aabbcc`, `rgb(1, 2, 3)`, `hsl(…)`, a name), for hexadecimal
    digits without their sign, or for three whole numbers from 0 to 255. None for anything else, and for a colour that
    is partly transparent."""
    if isinstance(value, list | tuple):
        if len(value) == 3 and all(type(part) is int and 0 <= part <= 255 for part in value):
            return "#{:02X}{:02X}{:02X}".format(*value)
        return None
    if not isinstance(value, str) or len(value) > 60:
        return None
    text = value.strip()
    try:
        found = ImageColor.getrgb(f"#{text}" if _HEX.fullmatch(text) else text)
    except ValueError:
        return None
    if not all(0 <= part <= 255 for part in found) or (len(found) == 4 and found[3] != 255):
        return None
    return "#{:02X}{:02X}{:02X}".format(*found[:3])


def fix_palette(owner: dict[str, Any], path: str, most: int, changes: Changes) -> None:
    """Put an object's `color_palette` right. Colours that cannot be read stay; a null palette is taken out."""
    if "color_palette" not in owner:
        return
    path, palette = f"{path}.color_palette", owner["color_palette"]
    if palette is None:
        del owner["color_palette"]
        changes.add("palette", path, "an empty palette was taken out")
        return
    if isinstance(palette, str) and len(palette) <= _LONGEST_TEXT:
        parts = [part for part in _BETWEEN.split(palette) if part]
        if not parts or any(colour(part) is None for part in parts):
            return
        changes.add("palette", path, f"{shown(palette)} became a list")
        palette = parts
    if not isinstance(palette, list):
        return
    kept: list[Any] = []
    seen: set[str] = set()
    for index, old in enumerate(palette):
        new = colour(old)
        if new is None:
            kept.append(old)
        elif new in seen:
            changes.add("palette", f"{path}[{index}]", f"{shown(old)} was there already")
        else:
            kept.append(new)
            seen.add(new)
            if new != old:
                changes.add("palette", f"{path}[{index}]", f"{shown(old)} became {new}")
    if len(kept) > most and all(isinstance(each, str) and colour(each) == each for each in kept):
        changes.add("palette", path, f"of {len(kept)} colours the first {most} were kept")
        kept = kept[:most]
    owner["color_palette"] = kept
