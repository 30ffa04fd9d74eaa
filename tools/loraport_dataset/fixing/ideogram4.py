"""A parsed Ideogram 4 caption put right: one function for each part of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from loraport.rules import Size
from loraport_dataset.boxes import Convention
from loraport_dataset.fixing.bboxes import fix_box
from loraport_dataset.fixing.changes import Changes
from loraport_dataset.fixing.keys import order_keys, snake_case, spell_keys
from loraport_dataset.fixing.palettes import fix_palette
from loraport_dataset.rules.ideogram4.form import MAX_ELEMENT_COLOURS, MAX_STYLE_COLOURS
from loraport_dataset.rules.ideogram4.parts import (
    ART_KEYS,
    COMPOSITION_KEYS,
    ELEMENT_KEYS,
    MEDIA,
    PHOTO_KEYS,
    ROOT_KEYS,
)
from loraport_dataset.rules.wording import shown

_TYPES = {"obj": "obj", "object": "obj", "text": "text"}
#: What people write where there is nothing to say.
_NOTHING = ("", "none", "null", "n/a", "na", "-")
_COMPOSITION = "compositional_deconstruction"


@dataclass(frozen=True)
class Boxes:
    """How the boxes of a caption are to be read."""

    convention: Convention | None = None  #: that of the whole set; None when it is the official one, or not known
    size: Size = (0, 0)  #: of the upright image in pixels; (0, 0) when it is not known


def fix_root(root: Any, boxes: Boxes, changes: Changes) -> Any:
    """The caption with everything put right that is certain. `root` is not changed."""
    if not isinstance(root, dict):
        return root
    fixed = spell_keys(root, "", ROOT_KEYS, "root", changes)
    if "high_level_description" in fixed and fixed["high_level_description"] is None:
        del fixed["high_level_description"]
        changes.add("high-level-description", "high_level_description", "an empty description was taken out")
    style = fixed.get("style_description")
    if isinstance(style, dict) and style:
        fixed["style_description"] = _fix_style(style, changes)
    elif "style_description" in fixed and style in (None, {}):
        del fixed["style_description"]
        changes.add("style", "style_description", "an empty style was taken out")
    if isinstance(fixed.get(_COMPOSITION), dict):
        fixed[_COMPOSITION] = _fix_composition(fixed[_COMPOSITION], boxes, changes)
    elif fixed.get(_COMPOSITION) is None and any(key in fixed for key in ROOT_KEYS[:2]):
        fixed[_COMPOSITION] = {"background": "", "elements": []}
        changes.add("root", _COMPOSITION, "the part that every caption has was added, empty")
    return order_keys(fixed, "", ROOT_KEYS, "root", changes)


def _fix_style(style: dict[str, Any], changes: Changes) -> dict[str, Any]:
    path = "style_description"
    style = spell_keys(style, path, (*PHOTO_KEYS, "art_style"), "style", changes)
    _fix_medium(style, changes)
    style = _fix_branch(style, changes)
    if ("photo" in style) != ("art_style" in style):
        style = order_keys(style, path, PHOTO_KEYS if "photo" in style else ART_KEYS, "style", changes)
    fix_palette(style, path, MAX_STYLE_COLOURS, changes)
    return style


def _fix_medium(style: dict[str, Any], changes: Changes) -> None:
    medium = style.get("medium")
    if isinstance(medium, str) and medium not in MEDIA and snake_case(medium) in MEDIA:
        style["medium"] = snake_case(medium)
        changes.add("medium", "style_description.medium", f"{shown(medium)} became {style['medium']!r}")


def _fix_branch(style: dict[str, Any], changes: Changes) -> dict[str, Any]:
    """One of photo and art_style: the one that says something, under the name that the medium asks for."""
    path, medium = "style_description", style.get("medium")
    for key in ("photo", "art_style"):
        if "photo" in style and "art_style" in style and _says_nothing(style[key]):
            changes.add("style", f"{path}.{key}", f"{shown(style[key])} was taken out")
            style = {name: value for name, value in style.items() if name != key}
    if medium not in MEDIA or ("photo" in style) == ("art_style" in style):
        return style
    wanted = "photo" if medium == "photograph" else "art_style"
    present = "photo" if "photo" in style else "art_style"
    if present != wanted:
        changes.add("style-of-medium", f"{path}.{present}", f"it became {wanted}, as the medium is {medium}")
    return {wanted if key == present else key: value for key, value in style.items()}


def _says_nothing(value: Any) -> bool:
    return value is None or value is False or (isinstance(value, str) and value.strip().lower() in _NOTHING)


def _fix_composition(composition: dict[str, Any], boxes: Boxes, changes: Changes) -> dict[str, Any]:
    fixed = spell_keys(composition, _COMPOSITION, COMPOSITION_KEYS, "composition", changes)
    for key, empty in (("background", ""), ("elements", [])):
        if fixed.get(key) is None:
            fixed[key] = empty
            changes.add("composition", f"{_COMPOSITION}.{key}", "it was added, empty")
    fixed = order_keys(fixed, _COMPOSITION, COMPOSITION_KEYS, "composition", changes)
    if isinstance(fixed["elements"], list):
        fixed["elements"] = [
            _fix_element(element, f"{_COMPOSITION}.elements[{index}]", boxes, changes)
            if isinstance(element, dict)
            else element
            for index, element in enumerate(fixed["elements"])
        ]
    return fixed


def _fix_element(element: dict[str, Any], path: str, boxes: Boxes, changes: Changes) -> dict[str, Any]:
    fixed = spell_keys(element, path, ELEMENT_KEYS["text"], "element", changes)
    _fix_type(fixed, path, changes)
    if fixed.get("type") == "obj" and "text" in fixed and _says_nothing(fixed["text"]):
        del fixed["text"]
        changes.add("element", f"{path}.text", "an empty text was taken out of an obj")
    fix_box(fixed, path, boxes.convention, boxes.size, changes)
    fix_palette(fixed, path, MAX_ELEMENT_COLOURS, changes)
    return order_keys(fixed, path, ELEMENT_KEYS["text"], "element", changes)


def _fix_type(element: dict[str, Any], path: str, changes: Changes) -> None:
    """The type in the model's words; where there is none, the keys tell: only a text has a text."""
    old = element.get("type")
    if old is None:
        has_text = not _says_nothing(element.get("text"))
        if "desc" not in element:
            return
        element["type"] = "text" if has_text else "obj"
        changes.add("element", f"{path}.type", f"it was added: {element['type']}")
    elif isinstance(old, str) and old not in ELEMENT_KEYS and old.strip().lower() in _TYPES:
        element["type"] = _TYPES[old.strip().lower()]
        changes.add("element", f"{path}.type", f"{shown(old)} became {element['type']!r}")
