from __future__ import annotations

import json
from typing import Any

import jsonschema
import pytest
from hypothesis import given
from hypothesis import strategies as st

from loraport.ideogram4_captions import CAPTION_SCHEMA, wrap_caption

STYLE = {"aesthetics": "quiet", "lighting": "neon", "photo": "35mm", "medium": "photograph"}
THING = {"type": "obj", "bbox": [0, 0, 1000, 1000], "desc": "a dog", "color_palette": ["#A0B0C0"]}
WRITING = {"type": "text", "text": "CAFÉ", "desc": "a sign"}


def caption(style: Any = STYLE, elements: Any = (THING, WRITING)) -> dict[str, Any]:
    composition = {"background": "a street", "elements": list(elements)}
    return {"style_description": style, "compositional_deconstruction": composition}


def test_the_schema_is_one() -> None:
    jsonschema.Draft202012Validator.check_schema(CAPTION_SCHEMA)


def test_a_caption_as_the_model_was_taught_it_keeps_the_schema() -> None:
    jsonschema.validate(caption(), CAPTION_SCHEMA)
    drawn = {"aesthetics": "", "lighting": "", "medium": "painting", "art_style": "oil", "color_palette": []}
    jsonschema.validate(caption(style=drawn), CAPTION_SCHEMA)


@pytest.mark.parametrize(
    "wrong",
    [
        {"high_level_description": "a dog"},
        caption() | {"title": "a dog"},
        caption(style=STYLE | {"art_style": "oil"}),
        caption(style={key: value for key, value in STYLE.items() if key != "photo"}),
        caption(style=STYLE | {"color_palette": ["#A0B0C0"] * 17}),
        caption(elements=[THING | {"color_palette": ["#a0b0c0"]}]),
        caption(elements=[THING | {"color_palette": ["#A0B0C0"] * 6}]),
        caption(elements=[THING | {"text": "CAFÉ"}]),
        caption(elements=[THING | {"bbox": [0, 0, 1001, 5]}]),
        caption(elements=[THING | {"bbox": [0, 0, 5]}]),
        caption(elements=[{"type": "text", "desc": "a sign"}]),
    ],
)
def test_what_breaks_a_rule_breaks_the_schema(wrong: dict[str, Any]) -> None:
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(wrong, CAPTION_SCHEMA)


@given(st.text(st.characters(exclude_categories=["Cs"])))
def test_a_wrapped_text_says_the_text_and_nothing_else(text: str) -> None:
    wrapped = json.loads(wrap_caption(text))
    jsonschema.validate(wrapped, CAPTION_SCHEMA)
    assert wrapped == {
        "high_level_description": text,
        "compositional_deconstruction": {"background": "", "elements": []},
    }
