"""The parts of an Ideogram 4 caption, and the way from a value to them: whatever the value is."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar

from loraport.rules import CaptionRule

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


class Ideogram4Rule(CaptionRule):
    """A rule of Ideogram 4's captions."""

    family: ClassVar[str | None] = "ideogram4"


def as_object(value: Any) -> dict[str, Any]:
    """The value where it is an object, else an empty one: another rule reports that it is not."""
    return value if isinstance(value, dict) else {}


def elements(root: Any) -> Iterator[tuple[str, Any]]:
    """Path and value of each element, whatever the value is."""
    found = as_object(as_object(root).get("compositional_deconstruction")).get("elements")
    if isinstance(found, list):
        for index, element in enumerate(found):
            yield f"compositional_deconstruction.elements[{index}]", element


def descriptions(root: Any) -> Iterator[tuple[str, str]]:
    """Path and text of each part that describes: everything but the writing in the picture."""
    content = as_object(root)
    for owner, path, keys in (
        (content, "", ("high_level_description",)),
        (
            as_object(content.get("style_description")),
            "style_description.",
            ("aesthetics", "lighting", "photo", "medium", "art_style"),
        ),
        (
            as_object(content.get("compositional_deconstruction")),
            "compositional_deconstruction.",
            ("background",),
        ),
    ):
        yield from ((path + key, owner[key]) for key in keys if isinstance(owner.get(key), str))
    for path, element in elements(root):
        text = as_object(element).get("desc")
        if isinstance(text, str):
            yield f"{path}.desc", text


def writings(root: Any) -> Iterator[tuple[str, str]]:
    """Path and text of each `text`: the writing that is seen in the picture."""
    for path, element in elements(root):
        text = as_object(element).get("text")
        if isinstance(text, str):
            yield f"{path}.text", text
