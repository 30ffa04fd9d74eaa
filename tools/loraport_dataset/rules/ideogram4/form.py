"""How a caption's values are written: colours, and the text of the JSON itself."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from typing import Any

from loraport.rules import NO_JSON, Caption, Problem, Setting
from loraport_dataset.rules.ideogram4.parts import Ideogram4Rule, as_object, elements
from loraport_dataset.rules.wording import kind, shown

MAX_STYLE_COLOURS = 16
MAX_ELEMENT_COLOURS = 5

_COLOUR = re.compile(r"#[0-9A-F]{6}")
# What may sit between two values, or one whole string: in valid JSON these two never overlap.
_STRING_OR_SPACE = re.compile(r'"(?:[^"\\]|\\.)*"|[ \t\r\n]+')
# A pair of surrogates, any other character by number, or a short escape such as \\n.
_ESCAPE = re.compile(r"\\(?:u[dD][89abAB]..\\u[dD][c-fC-F]..|u....|.)")
_COMPACT = "Serialise with json.dumps(caption, ensure_ascii=False, separators=(',', ':'))."


class Palette(Ideogram4Rule):
    id, severity = "palette", "error"
    explanation = (
        f"A palette is a list of #RRGGBB in capitals, at most {MAX_STYLE_COLOURS} for the style "
        f"and {MAX_ELEMENT_COLOURS} for an element."
    )
    fix = "Write six hexadecimal digits in capitals after #, and keep the colours that matter most."

    def check(self, caption: Caption, setting: Setting) -> Iterator[Problem]:
        style = as_object(caption.root).get("style_description")
        yield from _palette("style_description", style, MAX_STYLE_COLOURS)
        for path, element in elements(caption.root):
            yield from _palette(path, element, MAX_ELEMENT_COLOURS)


def _palette(owner_path: str, owner: Any, most: int) -> Iterator[Problem]:
    if not isinstance(owner, dict) or "color_palette" not in owner:
        return
    path, palette = f"{owner_path}.color_palette", owner["color_palette"]
    if not isinstance(palette, list):
        yield Problem(f"This is {kind(palette)}, not a list.", 'Write ["#RRGGBB",...].', path)
        return
    if len(palette) > most:
        yield Problem(f"{len(palette)} colours are too many.", f"Keep the {most} that matter most.", path)
    for index, colour in enumerate(palette):
        if not isinstance(colour, str) or not _COLOUR.fullmatch(colour):
            capitals = isinstance(colour, str) and _COLOUR.fullmatch(colour.upper())
            fix = f'"{colour.upper()}"' if capitals else "#RRGGBB with six hexadecimal digits in capitals"
            message = f"{shown(colour)} is not a colour as the model knows it."
            yield Problem(message, f"Write {fix}.", f"{path}[{index}]")


class Serialisation(Ideogram4Rule):
    id, severity = "serialisation", "warning"
    explanation = (
        "A caption is compact UTF-8: no blanks between its parts, no \\uXXXX where the character can stand. LoraPort "
        "writes `.json` captions compactly for every trainer; another reader takes them as they are."
    )
    fix = _COMPACT

    def check(self, caption: Caption, setting: Setting) -> Iterator[Problem]:
        if caption.root is NO_JSON:
            return
        tokens = _STRING_OR_SPACE.findall(caption.text.strip())
        if any(not token.startswith('"') for token in tokens):
            yield Problem("There are blanks or line breaks between the parts, which cost tokens.", _COMPACT)
        for character in _avoidable_escapes(tokens):
            if "\ud800" <= character <= "\udfff":
                yield Problem(f"{shown(character)} is half a character, which UTF-8 cannot hold.", "Take it out.")
            else:
                yield Problem(
                    f"{shown(character)} is written as \\uXXXX, which the model reads as other text.", _COMPACT
                )
            return  # One example is enough: the fix is for the whole file.


def _avoidable_escapes(tokens: Sequence[str]) -> Iterator[str]:
    """Characters written by number although JSON demands it only of control characters."""
    for token in tokens:
        if "\\u" not in token:
            continue
        for escape in _ESCAPE.findall(token):
            if escape.startswith("\\u"):
                character = json.loads(f'"{escape}"')
                if character >= " ":
                    yield character


RULES = (Palette, Serialisation)
