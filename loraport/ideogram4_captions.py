"""The shape of an Ideogram 4 caption as a JSON Schema, and the shortest caption that holds a plain text.

The schema says what the model was trained on (the official verifier's rules). The order of its properties is the order
of the keys; its descriptions say what belongs there, in words that a vision model is asked with.
"""

from __future__ import annotations

import json
from typing import Any

_TEXT = {"type": "string"}


def _object(required: list[str], **properties: dict[str, Any]) -> dict[str, Any]:
    return {"type": "object", "properties": properties, "required": required, "additionalProperties": False}


def _said(description: str) -> dict[str, Any]:
    return {**_TEXT, "description": description}


def _palette(most: int, of: str) -> dict[str, Any]:
    return {
        "type": "array",
        "items": {"type": "string", "pattern": "^#[0-9A-F]{6}$"},
        "maxItems": most,
        "description": f"At most {most} main colours of {of}, as #RRGGBB in capitals.",
    }


_BOX = {
    "type": "array",
    "items": {"type": "integer", "minimum": 0, "maximum": 1000},
    "minItems": 4,
    "maxItems": 4,
    "description": "[ymin, xmin, ymax, xmax] in thousandths of the picture's height and width, from the upper left.",
}
_AESTHETICS = _said("Mood and composition in a few words.")
_LIGHTING = _said("Where the light comes from and what it is like.")
_MEDIUM = {
    **_said("What kind of picture it is."),
    "enum": ["photograph", "illustration", "3d_render", "painting", "graphic_design"],
}
_STYLE_PALETTE = _palette(16, "the whole picture")
_ELEMENT_PALETTE = _palette(5, "the element")

#: Draft 2020-12: the official verifier's rules, and for `medium` the words of the official prompt guide.
CAPTION_SCHEMA: dict[str, Any] = _object(
    ["compositional_deconstruction"],
    high_level_description=_said("The whole picture in one or two sentences."),
    style_description={
        "description": "The form with photo for a photograph, the form with art_style for anything else.",
        "anyOf": [
            _object(
                ["aesthetics", "lighting", "photo", "medium"],
                aesthetics=_AESTHETICS,
                lighting=_LIGHTING,
                photo=_said("Lens, depth of field, angle, film: how it was photographed."),
                medium=_MEDIUM,
                color_palette=_STYLE_PALETTE,
            ),
            _object(
                ["aesthetics", "lighting", "medium", "art_style"],
                aesthetics=_AESTHETICS,
                lighting=_LIGHTING,
                medium=_MEDIUM,
                art_style=_said("Style and technique of the drawing, painting, rendering or design."),
                color_palette=_STYLE_PALETTE,
            ),
        ],
    },
    compositional_deconstruction=_object(
        ["background", "elements"],
        background=_said("What is behind and around the elements."),
        elements={
            "type": "array",
            "description": "Each thing and each piece of writing that one sees, the most important first.",
            "items": {
                "anyOf": [
                    _object(
                        ["type", "desc"],
                        type={"type": "string", "enum": ["obj"]},
                        bbox=_BOX,
                        desc=_said("The thing: what it is, its look, where it is."),
                        color_palette=_ELEMENT_PALETTE,
                    ),
                    _object(
                        ["type", "text", "desc"],
                        type={"type": "string", "enum": ["text"]},
                        bbox=_BOX,
                        text=_said("The writing exactly as it stands in the picture."),
                        desc=_said("What the writing is on, its lettering and colour."),
                        color_palette=_ELEMENT_PALETTE,
                    ),
                ]
            },
        },
    ),
)


def wrap_caption(text: str) -> str:
    """A plain-text caption as the shortest JSON caption: the text is the description of the whole picture.

    The background is empty and there are no elements, since the text does not say which of its words those would be.
    """
    caption = {
        "high_level_description": text,
        "compositional_deconstruction": {"background": "", "elements": []},
    }
    return json.dumps(caption, ensure_ascii=False, separators=(",", ":"))
