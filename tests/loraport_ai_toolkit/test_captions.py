from __future__ import annotations

import json

from hypothesis import given
from hypothesis import strategies as st

from loraport_ai_toolkit.captions import cut_and_joined, staged

TEXT = st.text(alphabet=st.characters(blacklist_categories=["Cs", "Cc"]), max_size=30)


def structured(description: str, elements: list[str]) -> str:
    content = {
        "high_level_description": description,
        "compositional_deconstruction": {
            "background": description,
            "elements": [{"type": "obj", "bbox": [0, 1, 2, 3], "desc": text} for text in elements],
        },
    }
    return json.dumps(content, ensure_ascii=False, separators=(",", ":"))


@given(TEXT, st.lists(TEXT, max_size=3))
def test_a_structured_caption_means_the_same_after_ai_toolkit_has_cut_it_at_its_commas(
    description: str, elements: list[str]
) -> None:
    caption = structured(description, elements)

    assert json.loads(cut_and_joined(staged(caption))) == json.loads(caption)


def test_without_the_escape_a_comma_in_a_text_would_gain_a_space() -> None:
    caption = structured("red, green", [])

    assert json.loads(cut_and_joined(caption)) != json.loads(caption)


@given(st.lists(st.text(alphabet="ab .", min_size=1).filter(lambda part: part == part.strip()), max_size=5))
def test_a_plain_caption_with_spaces_after_its_commas_is_read_as_it_is(parts: list[str]) -> None:
    caption = ", ".join(parts)

    assert cut_and_joined(staged(caption)) == caption


def test_a_comma_without_a_space_gains_one_in_a_plain_caption() -> None:
    assert cut_and_joined(staged("1,000 lamps")) == "1, 000 lamps"


def test_json_that_ai_toolkit_does_not_parse_is_staged_without_escapes() -> None:
    assert staged('{"a":"b,c"}') == '{"a":"b,c"}'


def test_a_staged_caption_is_one_line() -> None:
    assert staged("one,\ntwo") == "one,two"
