"""The rules of an Ideogram 4 JSON caption, one function each.

The model was trained on captions of one exact shape: the same keys, in the same order, boxes in thousandths
of the picture. Trainers accept anything and train a malformed caption as plain text, so the mistake shows
only in the pictures afterwards. The rules marked `error` are those of the official caption verifier; the
others keep a caption from saying less than it seems to.
"""

from __future__ import annotations

import json
import re
import reprlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from loraport.errors import nearest
from loraport_dataset.parsing import CaptionSyntaxError, JsonObject, parse

Severity = Literal["error", "warning", "advice"]

ROOT_KEYS = ("high_level_description", "style_description", "compositional_deconstruction")
PHOTO_KEYS = ("aesthetics", "lighting", "photo", "medium", "color_palette")
ART_KEYS = ("aesthetics", "lighting", "medium", "art_style", "color_palette")
COMPOSITION_KEYS = ("background", "elements")
ELEMENT_KEYS = {
    "obj": ("type", "bbox", "desc", "color_palette"),
    "text": ("type", "bbox", "text", "desc", "color_palette"),
}
OPTIONAL_KEYS = ("bbox", "color_palette")
MEDIA = ("photograph", "illustration", "3d_render", "painting", "graphic_design")
MAX_STYLE_COLOURS = 16
MAX_ELEMENT_COLOURS = 5
BBOX_ORDER = "[ymin, xmin, ymax, xmax]"
BBOX_MAX = 1000

_COLOUR = re.compile(r"#[0-9A-F]{6}")
# What may sit between two values, or one whole string: in valid JSON these two never overlap.
_STRING_OR_SPACE = re.compile(r'"(?:[^"\\]|\\.)*"|[ \t\r\n]+')
# A pair of surrogates, any other character by number, or a short escape such as \\n.
_ESCAPE = re.compile(r"\\(?:u[dD][89abAB]..\\u[dD][c-fC-F]..|u....|.)")
_PLAIN_KEY = re.compile(r"\w+", re.ASCII)

# Findings quote what people wrote; neither its length nor its depth may get out of hand.
_short = reprlib.Repr()
_short.maxstring = _short.maxother = 60


@dataclass(frozen=True)
class Finding:
    """One thing to change in one caption.

    `json_path` reads like `compositional_deconstruction.elements[2].bbox`; it is empty for the whole caption.
    `message` says what is wrong and what to write instead.
    """

    rule: str
    severity: Severity
    json_path: str
    message: str


@dataclass(frozen=True)
class Caption:
    """A caption as it is written, and what the JSON in it says."""

    text: str
    root: Any


Problem = tuple[str, str]
"""A JSON path and a message: what a rule yields."""


@dataclass(frozen=True)
class Rule:
    """A rule tells only its own matter: it passes over whatever another rule already reports."""

    id: str
    severity: Severity
    explanation: str
    problems: Callable[[Caption], Iterator[Problem]]

    def check(self, caption: Caption) -> list[Finding]:
        return [Finding(self.id, self.severity, path, message) for path, message in self.problems(caption)]


RULES: list[Rule] = []


def _rule(
    id: str, severity: Severity, explanation: str
) -> Callable[[Callable[[Caption], Iterator[Problem]]], Callable[[Caption], Iterator[Problem]]]:
    def register(problems: Callable[[Caption], Iterator[Problem]]) -> Callable[[Caption], Iterator[Problem]]:
        RULES.append(Rule(id, severity, explanation, problems))
        return problems

    return register


def check_caption(text: str) -> list[Finding]:
    """All findings of one caption, in the order of `RULES`; none for a caption as the model was taught it.

    Text that is not JSON gives one finding of the rule `json`, which names line and column.
    """
    try:
        root = parse(text)
    except CaptionSyntaxError as error:
        return [Finding("json", "error", "", str(error))]
    caption = Caption(text, root)
    return [finding for rule in RULES for finding in rule.check(caption)]


@_rule("root", "error", f"The keys of a caption are {', '.join(ROOT_KEYS)}; the last one is required.")
def _root(caption: Caption) -> Iterator[Problem]:
    if not isinstance(caption.root, dict):
        yield "", f"This is {_kind(caption.root)}, not an object. Write {_keys(ROOT_KEYS)}."
        return
    yield from _unknown_keys("", caption.root, ROOT_KEYS)
    if "compositional_deconstruction" not in caption.root:
        message = 'Required and missing. Write at least {"background":"...","elements":[]}.'
        yield "compositional_deconstruction", message


@_rule("high-level-description", "error", "high_level_description is a string.")
def _high_level_description(caption: Caption) -> Iterator[Problem]:
    root = _object(caption.root)
    if "high_level_description" in root:
        yield from _not_a_string("high_level_description", root["high_level_description"])


@_rule(
    "style",
    "error",
    f"style_description has either photo ({', '.join(PHOTO_KEYS)}) or art_style ({', '.join(ART_KEYS)}), "
    "in this order; only color_palette may be left out.",
)
def _style(caption: Caption) -> Iterator[Problem]:
    root = _object(caption.root)
    if "style_description" not in root:
        return
    path, style = "style_description", root["style_description"]
    if not isinstance(style, dict):
        yield path, f"This is {_kind(style)}, not an object. Write {_keys(PHOTO_KEYS)}."
    elif ("photo" in style) == ("art_style" in style):
        state = "Both photo and art_style are" if "photo" in style else "Neither photo nor art_style is"
        message = (
            f"{state} there. Keep exactly one: photo for a photograph, as {_keys(PHOTO_KEYS)}; "
            f"art_style for anything else, as {_keys(ART_KEYS)}."
        )
        yield path, message
    else:
        yield from _shape(path, style, PHOTO_KEYS if "photo" in style else ART_KEYS)


@_rule(
    "composition",
    "error",
    "compositional_deconstruction has exactly background (a string), then elements (a list, possibly empty).",
)
def _composition(caption: Caption) -> Iterator[Problem]:
    root = _object(caption.root)
    if "compositional_deconstruction" not in root:
        return
    path, composition = "compositional_deconstruction", root["compositional_deconstruction"]
    if not isinstance(composition, dict):
        yield path, f"This is {_kind(composition)}, not an object. Write {_keys(COMPOSITION_KEYS)}."
        return
    yield from _shape(path, composition, COMPOSITION_KEYS)
    if "background" in composition:
        yield from _not_a_string(f"{path}.background", composition["background"])
    if "elements" in composition and not isinstance(composition["elements"], list):
        message = f"This is {_kind(composition['elements'])}, not a list. Write [...], or [] for none."
        yield f"{path}.elements", message


@_rule(
    "element",
    "error",
    f"An element is an obj ({', '.join(ELEMENT_KEYS['obj'])}) or a text ({', '.join(ELEMENT_KEYS['text'])}), "
    "in this order; only bbox and color_palette may be left out.",
)
def _element(caption: Caption) -> Iterator[Problem]:
    for path, element in _elements(caption.root):
        if not isinstance(element, dict):
            yield path, f"This is {_kind(element)}, not an object. Write {_keys(ELEMENT_KEYS['obj'])}."
            continue
        kind = element.get("type")
        if kind not in ("obj", "text"):
            state = f"The type {_shown(kind)} is not known" if "type" in element else "The type is missing"
            yield f"{path}.type", f'{state}. Write "obj" for a thing, "text" for words in the picture.'
        elif kind == "obj" and "text" in element:
            yield f"{path}.text", 'An obj has no text. Make the type "text", or move the words into desc.'
            others = {key: value for key, value in element.items() if key != "text"}
            yield from _shape(path, others, ELEMENT_KEYS["obj"])
        else:
            yield from _shape(path, element, ELEMENT_KEYS[kind])


@_rule("bbox", "error", f"A bbox is {BBOX_ORDER}, whole numbers from 0 to {BBOX_MAX}, minimum before maximum.")
def _bbox(caption: Caption) -> Iterator[Problem]:
    for path, element in _elements(caption.root):
        if isinstance(element, dict) and "bbox" in element:
            for message in _bbox_problems(element["bbox"]):
                yield f"{path}.bbox", message


def _bbox_problems(box: Any) -> Iterator[str]:
    unit = f"{BBOX_ORDER} in thousandths of the picture's height and width"
    if not isinstance(box, list) or len(box) != 4:
        found = f"a list of {len(box)}" if isinstance(box, list) else _kind(box)
        yield f"This is {found}, not four numbers. Write {unit}."
    elif not all(isinstance(side, int) and not isinstance(side, bool) for side in box):
        yield f"{_shown(box)} is not all whole numbers. Write {unit}, from 0 to {BBOX_MAX}."
    elif not all(0 <= side <= BBOX_MAX for side in box):
        yield f"{_shown(box)} leaves the range 0 to {BBOX_MAX}. These are no pixels: write {unit}."
    elif box[0] > box[2] or box[1] > box[3]:
        axis = "ymin is over ymax" if box[0] > box[2] else "xmin is over xmax"
        yield f"{_shown(box)}: {axis}. The order is {BBOX_ORDER}, y before x, and no width or height."


@_rule(
    "palette",
    "error",
    f"A palette is a list of #RRGGBB in capitals, at most {MAX_STYLE_COLOURS} for the style "
    f"and {MAX_ELEMENT_COLOURS} for an element.",
)
def _palette(caption: Caption) -> Iterator[Problem]:
    yield from _palette_problems("style_description", _object(caption.root).get("style_description"), MAX_STYLE_COLOURS)
    for path, element in _elements(caption.root):
        yield from _palette_problems(path, element, MAX_ELEMENT_COLOURS)


def _palette_problems(owner_path: str, owner: Any, most: int) -> Iterator[Problem]:
    if not isinstance(owner, dict) or "color_palette" not in owner:
        return
    path, palette = f"{owner_path}.color_palette", owner["color_palette"]
    if not isinstance(palette, list):
        yield path, f'This is {_kind(palette)}, not a list. Write ["#RRGGBB",...].'
        return
    if len(palette) > most:
        yield path, f"{len(palette)} colours are too many. Keep the {most} that matter most."
    for index, colour in enumerate(palette):
        if not isinstance(colour, str) or not _COLOUR.fullmatch(colour):
            capitals = isinstance(colour, str) and _COLOUR.fullmatch(colour.upper())
            fix = f'"{colour.upper()}"' if capitals else "#RRGGBB with six hexadecimal digits in capitals"
            yield f"{path}[{index}]", f"{_shown(colour)} is not a colour as the model knows it. Write {fix}."


@_rule(
    "serialisation",
    "warning",
    "A caption is compact UTF-8: no blanks between its parts, no \\uXXXX where the character can stand.",
)
def _serialisation(caption: Caption) -> Iterator[Problem]:
    fix = "Serialise with json.dumps(caption, ensure_ascii=False, separators=(',', ':'))."
    tokens = _STRING_OR_SPACE.findall(caption.text.strip())
    if any(not token.startswith('"') for token in tokens):
        yield "", f"There are blanks or line breaks between the parts, which cost tokens. {fix}"
    for character in _avoidable_escapes(tokens):
        if "\ud800" <= character <= "\udfff":
            yield "", f"{_shown(character)} is half a character, which UTF-8 cannot hold. Take it out."
        else:
            yield "", f"{_shown(character)} is written as \\uXXXX, which the model reads as other text. {fix}"
        return  # One example is enough: the fix is for the whole file.


def _avoidable_escapes(tokens: Sequence[str]) -> Iterator[str]:
    """Characters written by number although JSON demands it only of control characters."""
    for token in tokens:
        for escape in _ESCAPE.findall(token):
            if escape.startswith("\\u"):
                character = json.loads(f'"{escape}"')
                if character >= " ":
                    yield character


@_rule("text-values", "warning", "Every description in the style and in the elements is a string.")
def _text_values(caption: Caption) -> Iterator[Problem]:
    style = _object(_object(caption.root).get("style_description"))
    for key in ("aesthetics", "lighting", "photo", "medium", "art_style"):
        if key in style:
            yield from _not_a_string(f"style_description.{key}", style[key])
    for path, element in _elements(caption.root):
        for key in ("text", "desc"):
            if key in _object(element):
                yield from _not_a_string(f"{path}.{key}", element[key])


@_rule("repeated-key", "warning", "No object has a key twice: a reader keeps the last and drops the others.")
def _repeated_key(caption: Caption) -> Iterator[Problem]:
    waiting: list[tuple[str, Any]] = [("", caption.root)]
    while waiting:
        path, value = waiting.pop()
        if isinstance(value, JsonObject):
            for key in value.repeated:
                yield _join(path, key), "The key is there twice, and only the last one counts. Keep one."
            waiting += [(_join(path, key), child) for key, child in value.items()]
        elif isinstance(value, list):
            waiting += [(f"{path}[{index}]", child) for index, child in enumerate(value)]


@_rule("medium", "advice", f"medium is one of {', '.join(MEDIA)}.")
def _medium(caption: Caption) -> Iterator[Problem]:
    medium = _object(_object(caption.root).get("style_description")).get("medium")
    if isinstance(medium, str) and medium not in MEDIA:
        guess = nearest(medium, MEDIA)
        hint = f"Did you mean '{guess}'? " if guess else ""
        message = f"{_shown(medium)} is not a medium of the prompt guide. {hint}It has {_keys(MEDIA)}."
        yield "style_description.medium", message


def _object(value: Any) -> dict[str, Any]:
    """The value where it is an object, else an empty one: another rule reports that it is not."""
    return value if isinstance(value, dict) else {}


def _elements(root: Any) -> Iterator[tuple[str, Any]]:
    """Path and value of each element, whatever the value is."""
    elements = _object(_object(root).get("compositional_deconstruction")).get("elements")
    if isinstance(elements, list):
        for index, element in enumerate(elements):
            yield f"compositional_deconstruction.elements[{index}]", element


def _shape(path: str, value: dict[str, Any], keys: Sequence[str]) -> Iterator[Problem]:
    """Keys that should not be there, keys that are missing, and the order of the others."""
    yield from _unknown_keys(path, value, keys)
    for key in keys:
        if key not in value and key not in OPTIONAL_KEYS:
            yield _join(path, key), f"Required and missing. The keys are {_keys(keys)}."
    present = [key for key in value if key in keys]
    wanted = [key for key in keys if key in value]
    if present != wanted:
        yield path, f"The keys come as {_keys(present)}. The order is {_keys(wanted)}."


def _unknown_keys(path: str, value: dict[str, Any], keys: Sequence[str]) -> Iterator[Problem]:
    for key in value:
        if key not in keys:
            guess = nearest(key, keys)
            hint = f"Did you mean '{guess}'? " if guess else ""
            yield _join(path, key), f"This key does not belong here. {hint}The keys are {_keys(keys)}."


def _not_a_string(path: str, value: Any) -> Iterator[Problem]:
    if not isinstance(value, str):
        yield path, f"This is {_kind(value)}, not a string. Write it as a sentence or a few words in quotes."


def _join(path: str, key: str) -> str:
    if not _PLAIN_KEY.fullmatch(key):
        return f"{path}[{json.dumps(key)}]"
    return f"{path}.{key}" if path else key


def _keys(keys: Sequence[str]) -> str:
    return ", ".join(keys)


def _shown(value: Any) -> str:
    return _short.repr(value)


def _kind(value: Any) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "a true or false"
    names = {dict: "an object", list: "a list", str: "a string", int: "a number", float: "a number"}
    return next(name for type_, name in names.items() if isinstance(value, type_))
