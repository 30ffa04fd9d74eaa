from __future__ import annotations

import copy
import json
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loraport.plugins import plugins
from loraport.rules import CaptionRule, Finding
from loraport_dataset.captions import check_caption

PHOTO: dict[str, Any] = {
    "high_level_description": "A café at night.",
    "style_description": {
        "aesthetics": "quiet",
        "lighting": "neon",
        "photo": "35mm, f/2",
        "medium": "photograph",
        "color_palette": ["#10203F"],
    },
    "compositional_deconstruction": {
        "background": "a wet street",
        "elements": [
            {
                "type": "obj",
                "bbox": [100, 200, 900, 800],
                "desc": "a shop front",
                "color_palette": ["#A0B0C0"],
            },
            {"type": "text", "bbox": [120, 300, 200, 700], "text": "CAFÉ", "desc": "a red neon sign"},
        ],
    },
}
STYLE = PHOTO["style_description"]
OBJ, TEXT = PHOTO["compositional_deconstruction"]["elements"]


def compact(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))


def changed(change: Callable[[dict[str, Any]], object]) -> str:
    caption = copy.deepcopy(PHOTO)
    change(caption)
    return compact(caption)


def with_style(style: Any) -> str:
    return compact({**PHOTO, "style_description": style})


def with_composition(composition: Any) -> str:
    return compact({**PHOTO, "compositional_deconstruction": composition})


def with_element(element: Any) -> str:
    return with_composition({"background": "a wall", "elements": [element]})


def with_description(text: str) -> str:
    return compact({**PHOTO, "high_level_description": text})


def with_nothing() -> str:
    return compact({"compositional_deconstruction": {"background": " ", "elements": []}})


def without(value: dict[str, Any], key: str) -> dict[str, Any]:
    return {name: part for name, part in value.items() if name != key}


def only(text: str) -> Finding:
    findings = check_caption(text)
    assert len(findings) == 1, findings
    return findings[0]


ART = {"aesthetics": "bold", "lighting": "flat", "medium": "painting", "art_style": "oil on canvas"}
ELEMENT = "compositional_deconstruction.elements[0]"

BROKEN = [
    ("root", "", compact([PHOTO])),
    ("root", "", "null"),
    ("root", "compositional_deconstruction", compact(without(PHOTO, "compositional_deconstruction"))),
    ("root", "aspect_ratio", compact({**PHOTO, "aspect_ratio": "1:1"})),
    ("high-level-description", "high_level_description", compact({**PHOTO, "high_level_description": ["A"]})),
    ("style", "style_description", with_style("photo")),
    ("style", "style_description", with_style(without(STYLE, "photo"))),
    ("style", "style_description", with_style({**STYLE, "art_style": "oil"})),
    ("style", "style_description.lighting", with_style(without(STYLE, "lighting"))),
    ("style", "style_description.mood", with_style({**STYLE, "mood": "calm"})),
    ("style", "style_description", with_style({"medium": "photograph", **without(STYLE, "medium")})),
    ("style", "style_description", with_style({**without(ART, "medium"), "medium": "painting"})),
    ("composition", "compositional_deconstruction", with_composition([OBJ])),
    (
        "composition",
        "compositional_deconstruction",
        with_composition({"elements": [OBJ], "background": "a wall"}),
    ),
    ("composition", "compositional_deconstruction.background", with_composition({"elements": []})),
    ("composition", "compositional_deconstruction.elements", with_composition({"background": "a wall"})),
    (
        "composition",
        "compositional_deconstruction.background",
        with_composition({"background": None, "elements": []}),
    ),
    (
        "composition",
        "compositional_deconstruction.elements",
        with_composition({"background": "a wall", "elements": {}}),
    ),
    (
        "composition",
        "compositional_deconstruction.camera",
        with_composition({"background": "a wall", "elements": [], "camera": "low"}),
    ),
    ("element", ELEMENT, with_element("a dog")),
    ("element", f"{ELEMENT}.type", with_element({**OBJ, "type": "object"})),
    ("element", f"{ELEMENT}.type", with_element(without(OBJ, "type"))),
    ("element", f"{ELEMENT}.type", with_element({**OBJ, "type": ["obj"]})),
    ("element", f"{ELEMENT}.desc", with_element(without(OBJ, "desc"))),
    ("element", f"{ELEMENT}.text", with_element(without(TEXT, "text"))),
    ("element", f"{ELEMENT}.text", with_element({**OBJ, "text": "OPEN"})),
    ("element", f"{ELEMENT}.label", with_element({**OBJ, "label": "shop"})),
    ("bbox", f"{ELEMENT}.bbox", with_element({**OBJ, "bbox": [0, 0, 10]})),
    ("bbox", f"{ELEMENT}.bbox", with_element({**OBJ, "bbox": "0,0,10,10"})),
    ("bbox", f"{ELEMENT}.bbox", with_element({**OBJ, "bbox": [0.1, 0.2, 0.5, 0.6]})),
    ("bbox", f"{ELEMENT}.bbox", with_element({**OBJ, "bbox": [False, 0, True, 10]})),
    ("bbox", f"{ELEMENT}.bbox", with_element({**OBJ, "bbox": [0, 0, 10, 1001]})),
    ("bbox", f"{ELEMENT}.bbox", with_element({**OBJ, "bbox": [-1, 0, 10, 10]})),
    ("bbox", f"{ELEMENT}.bbox", with_element({**OBJ, "bbox": [500, 0, 499, 10]})),
    ("bbox", f"{ELEMENT}.bbox", with_element({**OBJ, "bbox": [0, 500, 10, 499]})),
    ("palette", "style_description.color_palette", with_style({**STYLE, "color_palette": "#10203F"})),
    ("palette", "style_description.color_palette", with_style({**STYLE, "color_palette": ["#10203F"] * 17})),
    ("palette", f"{ELEMENT}.color_palette", with_element({**OBJ, "color_palette": ["#10203F"] * 6})),
    (
        "palette",
        f"{ELEMENT}.color_palette[1]",
        with_element({**OBJ, "color_palette": ["#10203F", "#a0b0c0"]}),
    ),
    ("palette", f"{ELEMENT}.color_palette[0]", with_element({**OBJ, "color_palette": ["red"]})),
    ("palette", f"{ELEMENT}.color_palette[0]", with_element({**OBJ, "color_palette": ["#FFF"]})),
    ("palette", f"{ELEMENT}.color_palette[0]", with_element({**OBJ, "color_palette": [0]})),
    ("serialisation", "", json.dumps(PHOTO, ensure_ascii=False)),
    ("serialisation", "", json.dumps(PHOTO, ensure_ascii=False, indent=1, separators=(",", ":"))),
    ("serialisation", "", json.dumps(PHOTO, separators=(",", ":"))),
    ("text-values", "style_description.lighting", with_style({**STYLE, "lighting": 3})),
    ("text-values", f"{ELEMENT}.desc", with_element({**OBJ, "desc": None})),
    ("text-values", f"{ELEMENT}.text", with_element({**TEXT, "text": 1984})),
    ("repeated-key", f"{ELEMENT}.desc", with_element(OBJ).replace('"desc":', '"desc":"a shop","desc":')),
    ("medium", "style_description.medium", with_style({**STYLE, "medium": "photography"})),
    ("style-of-medium", "style_description.photo", with_style({**STYLE, "medium": "painting"})),
    ("style-of-medium", "style_description.art_style", with_style({**ART, "medium": "photograph"})),
    ("text-element", f"{ELEMENT}.desc", with_element({**OBJ, "desc": 'a sign that says "OPEN"'})),
    ("text-element", f"{ELEMENT}.desc", with_element({**OBJ, "desc": "a poster with the title 'Dune'"})),
    (
        "text-element",
        "high_level_description",
        compact({**PHOTO, "high_level_description": "A neon sign reads “BAR”."}),
    ),
    ("text-element", f"{ELEMENT}.text", with_element({**TEXT, "text": ""})),
    ("tags-in-description", "high_level_description", with_description("1girl, solo, red hair, smile")),
    ("empty-description", "", with_nothing()),
]


@pytest.mark.parametrize(("rule", "path", "text"), BROKEN)
def test_a_broken_caption_gives_one_finding_with_its_rule_and_place(rule: str, path: str, text: str) -> None:
    finding = only(text)
    assert (finding.rule, finding.json_path) == (rule, path)
    assert finding.severity == plugins().rules()[rule].severity
    assert finding.message.endswith(".")
    assert finding.fix.endswith(".")


def test_every_rule_of_the_family_has_a_broken_example() -> None:
    rules = plugins().rules().values()
    of_captions = {rule.id for rule in rules if rule.family == "ideogram4" and issubclass(rule, CaptionRule)}
    assert {rule for rule, _, _ in BROKEN} == of_captions - {"trigger-place"}  # which needs a word: test_triggers.py


GOOD = [
    compact(PHOTO),
    compact(PHOTO) + "\n",
    compact(without(PHOTO, "high_level_description")),
    compact(without(PHOTO, "style_description")),
    with_style(without(STYLE, "color_palette")),
    with_style(ART),
    with_style({**ART, "color_palette": ["#00FF9A"] * 16}),
    with_composition({"background": "", "elements": []}),
    with_element({**OBJ, "desc": "a dog's bowl that the dog's owner's sign is beside"}),
    with_composition({"background": 'a wall that says "café"', "elements": [TEXT]}),
    with_description("A red car, a blue car, a tree and a dog."),
    with_element({"type": "obj", "desc": "a dog"}),
    with_element({**OBJ, "bbox": [0, 0, 1000, 1000]}),
    with_element({**OBJ, "bbox": [5, 5, 5, 5]}),
    with_element({**OBJ, "color_palette": ["#00FF9A"] * 5}),
    with_element({**OBJ, "color_palette": []}),
    with_element({**TEXT, "text": 'say "a, b: c"\\u0041\t\n \x01'}),
]


@pytest.mark.parametrize("text", GOOD)
def test_a_caption_as_the_model_was_taught_it_has_no_findings(text: str) -> None:
    assert check_caption(text) == []


# Mistakes that public tutorials teach.


def test_a_pixel_box_x_first_is_told_the_unit_and_the_order() -> None:
    fix = only(with_element({**OBJ, "bbox": [64, 128, 1216, 832]})).fix
    assert "thousandths" in fix
    assert "[ymin, xmin, ymax, xmax]" in fix


def test_a_box_of_corner_and_size_is_told_that_there_is_no_width() -> None:
    assert "no width or height" in only(with_element({**OBJ, "bbox": [600, 600, 200, 300]})).fix


def test_a_palette_before_the_description_is_told_the_order() -> None:
    finding = only(with_element({"type": "obj", "color_palette": ["#10203F"], "desc": "a dog"}))
    assert finding.rule == "element"
    assert finding.fix.endswith("The order is type, desc, color_palette.")


def test_an_oil_painting_without_art_style_is_told_both_branches() -> None:
    finding = only(with_style({"aesthetics": "bold", "lighting": "flat", "medium": "painting"}))
    assert "art_style for anything else, as aesthetics, lighting, medium, art_style" in finding.fix


def test_a_trigger_word_in_front_of_the_json_is_sent_inside_it() -> None:
    finding = only("mp_scifi_buggy, " + compact(PHOTO))
    assert (finding.rule, finding.severity) == ("text-before-json", "error")
    assert "'mp_scifi_buggy,'" in finding.message
    assert "inside high_level_description" in finding.fix


def test_lower_case_colours_are_shown_in_capitals() -> None:
    assert '"#A0B0C0"' in only(with_element({**OBJ, "color_palette": ["#a0b0c0"]})).fix


@pytest.mark.parametrize(("typo", "meant"), [("descr", "desc"), ("colour_palette", "color_palette"), ("b_box", "bbox")])
def test_a_misspelt_key_is_told_the_right_one(typo: str, meant: str) -> None:
    assert f"Did you mean '{meant}'?" in only(with_element({**OBJ, typo: "x"})).fix


def test_an_obj_with_text_still_shows_its_other_faults() -> None:
    findings = check_caption(with_element({"type": "obj", "text": "OPEN"}))
    assert [finding.json_path for finding in findings] == [f"{ELEMENT}.text", f"{ELEMENT}.desc"]


def test_an_escaped_emoji_is_shown_as_itself() -> None:
    text = changed(lambda caption: caption.update(high_level_description="EMOJI")).replace("EMOJI", "\\ud83d\\ude00")
    assert "'😀'" in only(text).message


def test_half_a_character_is_told_apart_from_an_escape() -> None:
    text = changed(lambda caption: caption.update(high_level_description="HALF")).replace("HALF", "\\ud83d")
    findings = {finding.rule: finding for finding in check_caption(text)}
    assert set(findings) == {"half-character", "serialisation"}
    assert findings["half-character"].json_path == "high_level_description"
    assert "half a character" in findings["serialisation"].message


def test_every_fault_of_a_caption_is_found_at_once() -> None:
    def break_it(caption: dict[str, Any]) -> None:
        caption["style_description"]["medium"] = "photo"
        caption["compositional_deconstruction"]["elements"][1]["bbox"] = [9, 9, 1, 1]

    rules = [finding.rule for finding in check_caption(json.dumps(json.loads(changed(break_it))))]
    assert sorted(rules) == ["bbox", "medium", "serialisation", "serialisation"]


def test_a_key_that_is_no_word_is_quoted_in_the_path() -> None:
    assert only(compact({**PHOTO, 'a "b"\x01': 1})).json_path == '["a \\"b\\"\\u0001"]'


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters()),
    lambda inner: (
        st.lists(inner, max_size=5)
        | st.dictionaries(
            st.sampled_from([*PHOTO, *STYLE, *OBJ, *TEXT, "background", "elements", "art_style"]) | st.text(),
            inner,
            max_size=6,
        )
    ),
    max_leaves=20,
)


@settings(deadline=None, max_examples=150)
@given(json_values, st.booleans())
def test_no_json_value_crashes_the_checker(value: Any, ascii_only: bool) -> None:
    assert_told_well(check_caption(json.dumps(value, ensure_ascii=ascii_only)))


PLACES: list[list[str | int]] = [
    ["high_level_description"],
    ["style_description"],
    *(["style_description", key] for key in STYLE),
    ["compositional_deconstruction", "elements"],
    *(["compositional_deconstruction", "elements", 1, key] for key in TEXT),
]


@settings(deadline=None, max_examples=150)
@given(st.sampled_from(PLACES), json_values)
def test_no_value_inside_a_good_caption_crashes_the_checker(place: list[str | int], value: Any) -> None:
    caption: Any = copy.deepcopy(PHOTO)
    owner = caption
    for step in place[:-1]:
        owner = owner[step]
    owner[place[-1]] = value
    assert_told_well(check_caption(compact(caption)))


@settings(deadline=None, max_examples=150)
@given(st.text(st.characters() | st.sampled_from('{}[]",:\\u0\n')))
def test_no_text_crashes_the_checker(text: str) -> None:
    assert_told_well(check_caption(text))


@pytest.mark.parametrize("depth", [500, 900, 950, 970, 100_000])
def test_deep_nesting_does_not_crash_the_checker(depth: int) -> None:
    deep = "[" * depth + "]" * depth
    assert check_caption(deep)
    assert check_caption(with_element({**OBJ, "type": "DEEP"}).replace('"DEEP"', deep))


def assert_told_well(findings: list[Finding]) -> None:
    for finding in findings:
        assert finding.message
        finding.json_path.encode("utf-8")
        finding.message.encode("utf-8")
        assert len(finding.message) < 500
