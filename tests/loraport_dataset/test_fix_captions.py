from __future__ import annotations

import copy
import json
import time
from collections.abc import Callable
from random import Random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loraport.caption_json import make_caption
from loraport.ideogram4 import IDEOGRAM4
from loraport.plugins import plugins
from loraport.rules import Setting
from loraport_dataset.boxes import OFFICIAL, Convention
from loraport_dataset.checking import caption_findings
from loraport_dataset.fixing.captions import Fixed, fix_caption
from loraport_dataset.fixing.ideogram4 import Boxes
from loraport_dataset.fixing.palettes import colour

SETTING = Setting(IDEOGRAM4)
RULES = list(plugins().rules().values())
GOOD: dict[str, Any] = {
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
            {"type": "obj", "bbox": [100, 200, 900, 800], "desc": "a shop front", "color_palette": ["#A0B0C0"]},
            {"type": "text", "bbox": [120, 300, 200, 700], "text": "CAFÉ", "desc": "a red neon sign"},
        ],
    },
}


def compact(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))


def fix(text: str, trigger: str | None = None, boxes: Boxes | None = None) -> Fixed:
    return fix_caption(make_caption("a.json", text, "json"), Setting(IDEOGRAM4, trigger_word=trigger), boxes)


def changed(change: Callable[[dict[str, Any]], object]) -> dict[str, Any]:
    caption = copy.deepcopy(GOOD)
    change(caption)
    return caption


def style(caption: dict[str, Any]) -> dict[str, Any]:
    return caption["style_description"]


def element(caption: dict[str, Any], index: int = 0) -> dict[str, Any]:
    return caption["compositional_deconstruction"]["elements"][index]


def findings(text: str) -> list[tuple[str, str]]:
    return [(one.rule, one.json_path) for one in caption_findings(make_caption("a.json", text, "json"), SETTING, RULES)]


def test_a_good_caption_stays_as_it_is() -> None:
    assert fix(compact(GOOD)) == Fixed(compact(GOOD))


def _reversed_keys(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _reversed_keys(value[key]) for key in reversed(value)}
    return [_reversed_keys(each) for each in value] if isinstance(value, list) else value


def _respelled(value: Any) -> Any:
    """Keys as people write them: highLevelDescription, Bbox."""
    if isinstance(value, dict):
        return {_camel(key): _respelled(content) for key, content in value.items()}
    return [_respelled(each) for each in value] if isinstance(value, list) else value


def _camel(key: str) -> str:
    first, *rest = key.split("_")
    return first + "".join(word.title() for word in rest) if rest else key.title()


@pytest.mark.parametrize(
    "written",
    [
        json.dumps(GOOD, indent=2),
        compact(_reversed_keys(GOOD)),
        compact(_respelled(GOOD)),
        "```json\n" + json.dumps(GOOD) + "\n```",
        compact(GOOD).replace('"]}', '",],}'),
        repr(GOOD),
        "\ufeff" + compact(GOOD),
        compact(changed(lambda c: element(c).update(color_palette=["#a0b0c0"]))),
        compact(changed(lambda c: element(c).update(color_palette=["#A0B0C0", "a0b0c0"]))),
        compact(changed(lambda c: element(c).update(color_palette="rgb(160, 176, 192)"))),
        compact(changed(lambda c: element(c).update(color_palette=[[160, 176, 192]]))),
        compact(changed(lambda c: element(c).update(type="Object"))),
        compact(changed(lambda c: element(c).update(bbox=["100", 200.0, 900, 800]))),
        compact(changed(lambda c: element(c).update(text=None))),
        compact(changed(lambda c: element(c, 1).update(color_palette=None))),
        compact(changed(lambda c: element(c, 1).pop("type"))),
        compact(changed(lambda c: style(c).update(medium="Photograph"))),
        compact(changed(lambda c: style(c).update(art_style="none"))),
    ],
)
def test_what_people_write_becomes_the_caption_that_is_meant(written: str) -> None:
    fixed = fix(written)
    assert fixed.text == compact(GOOD)
    assert fixed.changes


def test_each_change_names_its_rule_its_place_and_both_values() -> None:
    (change,) = fix(compact(changed(lambda c: element(c).update(color_palette=["#a0b0c0"])))).changes
    assert change.rule == "palette"
    assert change.json_path == "compositional_deconstruction.elements[0].color_palette[0]"
    assert change.what == "'#a0b0c0' became #A0B0C0"


def test_an_oil_painting_described_as_a_photo_gets_an_art_style() -> None:
    fixed = json.loads(fix(compact(changed(lambda c: style(c).update(medium="painting", photo="oil")))).text)
    assert list(style(fixed)) == ["aesthetics", "lighting", "medium", "art_style", "color_palette"]
    assert style(fixed)["art_style"] == "oil"


def test_colours_beyond_the_number_that_fits_are_cut_from_the_end() -> None:
    many = [f"#0000{number:02X}" for number in range(20)]
    fixed = json.loads(fix(compact(changed(lambda c: style(c).update(color_palette=many)))).text)
    assert style(fixed)["color_palette"] == many[:16]


@pytest.mark.parametrize(
    ("written", "read"),
    [
        ("#abc", "#AABBCC"),
        ("aabbcc", "#AABBCC"),
        ("red", "#FF0000"),
        ("hsl(120, 100%, 50%)", "#00FF00"),
        ("#aabbccff", "#AABBCC"),
        ("#aabbcc80", None),
        ("rgb(300, 0, 0)", None),
        ("reddish", None),
        ("#ab", None),
        ([1, 2, 300], None),
        (12, None),
        (None, None),
    ],
)
def test_colours_are_read_as_css_writes_them(written: Any, read: str | None) -> None:
    assert colour(written) == read


@pytest.mark.parametrize(
    ("convention", "box"),
    [
        (Convention("xy", "corners", "pixels"), [80, 50, 320, 450]),
        (Convention("xy", "size", "pixels"), [80, 50, 240, 400]),
        (Convention("yx", "corners", "fraction"), [0.1, 0.2, 0.9, 0.8]),
        (Convention("xy", "corners", "thousandths"), [200, 100, 800, 900]),
    ],
)
def test_boxes_of_another_convention_become_the_official_ones(convention: Convention, box: list[float]) -> None:
    only = changed(lambda c: c["compositional_deconstruction"]["elements"].pop())
    element(only)["bbox"] = box
    fixed = fix(compact(only), boxes=Boxes(convention, (400, 500)))
    assert element(json.loads(fixed.text))["bbox"] == [100, 200, 900, 800]
    assert [change.rule for change in fixed.changes] == ["bbox-convention"]


@pytest.mark.parametrize("box", [[0.1, 0.2, 0.9, 0.8], [900, 200, 100, 800], [1, 2, 3], "everywhere", [0, 0, 1500, 3]])
def test_a_box_that_could_mean_several_things_is_left_and_reported(box: Any) -> None:
    fixed = fix(compact(changed(lambda c: element(c).update(bbox=box))))
    assert not fixed.changes
    assert findings(fixed.text) == [("bbox", "compositional_deconstruction.elements[0].bbox")]


@pytest.mark.parametrize(
    "text",
    [
        compact(GOOD).replace('"medium":"photograph"', '"medium":"photograph","medium":"painting"'),
        compact(GOOD).replace("CAFÉ", "\\ud83d"),
        compact(GOOD) + " and more",
        compact(GOOD)[:-3],
        "Here is the JSON caption that you asked me for: " + compact(GOOD),
        "{'medium': 'photograph', 'medium': 'painting'}",
        "[" * 100_000,
        compact(changed(lambda c: element(c, 1).update(type="obj"))),
        compact(changed(lambda c: style(c).update(art_style="watercolour"))),
        compact(changed(lambda c: element(c).pop("desc"))),
        compact(changed(lambda c: c.update(title="A café"))),
    ],
)
def test_what_would_take_a_guess_is_left_as_it_is_and_reported(text: str) -> None:
    fixed = fix(text)
    assert fixed == Fixed(text)
    assert any(severity == "error" for severity in _severities(text)) or "repeated-key" in dict(findings(text))


def _severities(text: str) -> list[str]:
    return [one.severity for one in caption_findings(make_caption("a.json", text, "json"), SETTING, RULES)]


def test_a_trigger_word_before_the_json_goes_into_it() -> None:
    fixed = fix("mp_buggy, " + compact(GOOD))
    assert json.loads(fixed.text)["high_level_description"] == "mp_buggy, A café at night."
    assert findings(fixed.text) == []


def test_the_trigger_word_is_placed_inside_once() -> None:
    fixed = fix("mp_buggy, " + compact(GOOD), trigger="mp_buggy")
    assert fixed.text.count("mp_buggy") == 1
    assert fix(fixed.text, trigger="mp_buggy") == Fixed(fixed.text)


def test_the_part_that_every_caption_has_is_added_empty() -> None:
    fixed = fix('{"high_level_description":"A dog."}')
    assert json.loads(fixed.text)["compositional_deconstruction"] == {"background": "", "elements": []}
    assert findings(fixed.text) == []


def test_plain_text_gets_the_trigger_word_and_nothing_else() -> None:
    plain = make_caption("a.txt", "a dog,  on a beach", "json")
    assert fix_caption(plain, SETTING) == Fixed("a dog,  on a beach")
    assert fix_caption(plain, Setting(IDEOGRAM4, trigger_word="mp_dog")).text == "mp_dog, a dog,  on a beach"


@pytest.mark.parametrize(
    "text",
    [
        compact({"style_description": {"color_palette": [f"#{number:06x}" for number in range(90_000)]}}),
        compact({"style_description": {"color_palette": " " * 900_000 + ")"}}),
        compact({f"Key{number}": number for number in range(60_000)}),
        '{"a":"' + '\\"' * 400_000 + '",}',
        "word " * 100_000 + "{",
        "{" + "," * 900_000 + "}",
        "```" + "`" * 900_000,
        "{'a':" * 50_000,
    ],
    ids=["colours", "blanks", "keys", "quotes", "words", "commas", "fence", "nested"],
)
def test_a_hostile_caption_takes_no_time(text: str) -> None:
    start = time.process_time()
    fix(text, trigger="mp_dog")
    assert time.process_time() - start < 5


text_or_scalar = st.one_of(
    st.text(st.characters(exclude_categories=["Cs"]), max_size=8),
    st.none(),
    st.booleans(),
    st.integers(-2000, 2000),
    st.floats(allow_nan=False, allow_infinity=False, width=32),
)
KEYS = (
    "high_level_description highLevelDescription style_description compositional_deconstruction background elements "
    "type bbox BBOX desc description text color_palette palette photo art_style medium aesthetics lighting Lighting"
)
WORDS = "obj,object,TEXT,photograph,Painting,3D Render,,none,#abc,red,#FF0000,a dog,12"
keys = st.sampled_from(KEYS.split())
words = st.sampled_from(WORDS.split(","))
boxes = st.lists(st.one_of(st.integers(-5, 1200), st.floats(0, 2, width=32), st.just("7")), min_size=3, max_size=5)
palettes = st.lists(words, max_size=20)
value = st.recursive(
    st.one_of(words, text_or_scalar, boxes, palettes),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(keys, inner, max_size=6)),
    max_leaves=20,
)
captions = st.builds(
    lambda base, style, element, root: (
        GOOD | base | {"style_description": style, "compositional_deconstruction": {"elements": [element]} | root}
    ),
    st.dictionaries(keys, value, max_size=3),
    st.dictionaries(keys, value, max_size=7),
    st.dictionaries(keys, value, max_size=7),
    st.dictionaries(keys, value, max_size=2),
)


@settings(max_examples=300, deadline=None)
@given(st.one_of(captions, value), st.sampled_from([None, "mp_dog"]))
def test_fixing_twice_is_fixing_once(caption: Any, trigger: str | None) -> None:
    once = fix(json.dumps(caption), trigger)
    again = fix(once.text, trigger)
    assert again == Fixed(once.text)


said = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
hexes = st.lists(st.from_regex(r"#[0-9A-F]{6}", fullmatch=True), max_size=5, unique=True)
spans = st.tuples(st.integers(0, 500), st.integers(0, 500), st.integers(500, 1000), st.integers(500, 1000)).map(list)
optional = {"bbox": spans, "color_palette": hexes}
objects = st.fixed_dictionaries({"type": st.just("obj"), "desc": said}, optional=optional)
writings = st.fixed_dictionaries({"type": st.just("text"), "text": said, "desc": said}, optional=optional)
photos = st.fixed_dictionaries(
    {"aesthetics": said, "lighting": said, "photo": said, "medium": st.just("photograph")},
    optional={"color_palette": hexes},
)
drawings = st.fixed_dictionaries(
    {"aesthetics": said, "lighting": said, "medium": st.just("painting"), "art_style": said},
    optional={"color_palette": hexes},
)
compositions = st.fixed_dictionaries({"background": said, "elements": st.lists(objects | writings, max_size=3)})
whole = st.fixed_dictionaries(
    {"compositional_deconstruction": compositions},
    optional={"high_level_description": said, "style_description": photos | drawings},
)


@settings(max_examples=100, deadline=None)
@given(whole, st.randoms(use_true_random=False))
def test_any_caption_survives_shuffled_keys_small_letters_and_line_breaks(caption: Any, random: Random) -> None:
    def disturbed(value: Any) -> Any:
        if isinstance(value, dict):
            mixed = random.sample(list(value.items()), len(value))
            return {_camel(key): disturbed(content) for key, content in mixed}
        if isinstance(value, list):
            return [disturbed(each) for each in value]
        return value.lower() if isinstance(value, str) and colour(value) == value else value

    fixed = fix(json.dumps(disturbed(caption), indent=random.choice([None, 4])))
    assert json.loads(fixed.text) == caption
    assert not [rule for rule, _ in findings(fixed.text) if rule in ("root", "style", "element", "palette", "bbox")]


@given(st.sampled_from(["xy", "yx"]), st.lists(st.integers(0, 1000), min_size=4, max_size=4))
def test_the_official_convention_changes_no_box(order: str, box: list[int]) -> None:
    whole = changed(lambda c: element(c).update(bbox=box))
    assert fix(compact(whole), boxes=Boxes(OFFICIAL, (640, 480))).text == compact(whole)
