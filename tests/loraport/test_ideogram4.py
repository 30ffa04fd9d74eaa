"""The trigger word goes inside a JSON caption, which stays the JSON that the model was taught."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loraport.ideogram4 import place_trigger
from loraport.rules import Finding
from loraport_dataset.captions import check_caption

QUICKSTART = sorted((Path(__file__).parents[2] / "examples" / "quickstart" / "images").glob("*.json"))

_words = st.text(st.characters(codec="utf-8", categories=("L", "N", "P", "Zs")), max_size=30)


def ordered(**fields: st.SearchStrategy[Any]) -> st.SearchStrategy[dict[str, Any]]:
    """Dictionaries with their keys in this order, which a caption's rules ask for."""
    return st.tuples(*fields.values()).map(lambda values: dict(zip(fields, values, strict=True)))


_obj = ordered(type=st.just("obj"), desc=_words)
_text = ordered(type=st.just("text"), text=_words, desc=_words)
_composition = ordered(background=_words, elements=st.lists(_obj | _text, max_size=3))
_style = ordered(aesthetics=_words, lighting=_words, photo=_words, medium=st.just("photograph"))


@st.composite
def captions(draw: st.DrawFn) -> dict[str, Any]:
    """A caption as the model was taught it, with and without its optional parts."""
    caption: dict[str, Any] = {}
    if draw(st.booleans()):
        caption["high_level_description"] = draw(_words)
    if draw(st.booleans()):
        caption["style_description"] = draw(_style)
    return {**caption, "compositional_deconstruction": draw(_composition)}


def errors(caption: str) -> list[Finding]:
    """What breaks the official rules; whether random words make sense is no matter here."""
    return [finding for finding in check_caption(caption) if finding.severity == "error"]


def compact(content: Any) -> str:
    return json.dumps(content, ensure_ascii=False, separators=(",", ":"))


def texts(value: Any) -> list[str]:
    if isinstance(value, str):
        return [value]
    children = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return [text for child in children for text in texts(child)]


@settings(deadline=None, max_examples=200)
@given(captions(), st.sampled_from(["mp_buggy", 'qu"ote', "back\\slash", "狗", "photo", "type"]))
def test_a_valid_caption_stays_valid_and_says_the_word(content: dict[str, Any], word: str) -> None:
    caption = compact(content)
    assert errors(caption) == []
    placed = place_trigger(caption, word)
    assert errors(placed) == []
    assert any(word in text for text in texts(json.loads(placed)))
    assert place_trigger(placed, word) == placed


@settings(deadline=None, max_examples=100)
@given(captions())
def test_nothing_but_one_description_changes(content: dict[str, Any]) -> None:
    before, after = texts(content), texts(json.loads(place_trigger(compact(content), "mp_buggy")))
    changed = [text for text in after if "mp_buggy" in text]
    assert len(changed) == 1
    rest = changed[0].removeprefix("mp_buggy").removeprefix(", ")
    assert sorted([*(text for text in after if "mp_buggy" not in text), rest]) in (
        sorted(before),
        sorted([*before, ""]),
    )


@pytest.mark.parametrize("path", QUICKSTART, ids=lambda path: path.stem)
def test_real_captions_get_the_word_in_front_of_their_description(path: Path) -> None:
    caption = path.read_text(encoding="utf-8")
    placed = json.loads(place_trigger(caption, "mp_buggy"))
    original = json.loads(caption)
    assert placed == {**original, "high_level_description": f"mp_buggy, {original['high_level_description']}"}
    assert list(placed) == list(original)


def test_without_a_description_the_first_element_gets_the_word() -> None:
    caption = compact(
        {"compositional_deconstruction": {"background": "a wall", "elements": [{"type": "obj", "desc": "a dog"}]}}
    )
    elements = json.loads(place_trigger(caption, "rex"))["compositional_deconstruction"]["elements"]
    assert elements == [{"type": "obj", "desc": "rex, a dog"}]


def test_with_neither_the_word_becomes_the_description_and_comes_first() -> None:
    caption = compact({"compositional_deconstruction": {"background": "a wall", "elements": []}})
    placed = place_trigger(caption, "rex")
    assert placed.startswith('{"high_level_description":"rex",')
    assert errors(placed) == []


@pytest.mark.parametrize(
    ("caption", "expected"),
    [
        ("a dog", "rex, a dog"),
        ("", "rex"),
        ("a dog called rex", "a dog called rex"),
        ("[1, 2]", "rex, [1, 2]"),
        ("{broken", "rex, {broken"),
    ],
)
def test_a_plain_caption_gets_the_word_in_front(caption: str, expected: str) -> None:
    assert place_trigger(caption, "rex") == expected


def test_the_word_is_found_however_the_json_is_written() -> None:
    caption = '{ "high_level_description": "\\u72d7 in the sun" }'
    assert place_trigger(caption, "狗") == caption


def test_a_key_of_the_json_is_not_the_word() -> None:
    caption = compact({"high_level_description": "a dog", "compositional_deconstruction": {}})
    assert json.loads(place_trigger(caption, "description"))["high_level_description"] == "description, a dog"


@pytest.mark.parametrize(
    "content",
    [
        {},
        {"compositional_deconstruction": "a wall"},
        {"compositional_deconstruction": {"elements": "none"}},
        {"compositional_deconstruction": {"elements": [1, {"desc": 2}]}},
        {"high_level_description": None},
        {"high_level_description": 5, "compositional_deconstruction": {"elements": [{"desc": "a"}]}},
        {"high_level_description": ""},
        {"caption": "a dog"},
    ],
)
def test_a_caption_of_an_odd_shape_is_still_json_with_the_word(content: dict[str, Any]) -> None:
    assert any("rex" in text for text in texts(json.loads(place_trigger(compact(content), "rex"))))


def test_a_caption_nested_beyond_reading_is_taken_as_text() -> None:
    caption = '{"a":' * 100_000 + "1" + "}" * 100_000
    assert place_trigger(caption, "rex") == f"rex, {caption}"
