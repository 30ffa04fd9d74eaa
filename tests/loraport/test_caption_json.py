from __future__ import annotations

import pytest

from loraport.caption_json import CaptionSyntaxError, JsonObject, json_after, looks_like_json, make_caption, parse
from loraport.rules import NO_JSON


@pytest.mark.parametrize(
    ("text", "place", "advice"),
    [
        ("", "line 1, column 1", "empty"),
        ("  \n", "line 2, column 1", "empty"),
        ('\ufeff{"a":1}', "line 1, column 1", "byte order mark"),
        ('buggy {"a":1}', "line 1, column 1", "text before the JSON ('buggy')"),
        ("{'a':1}", "line 1, column 2", "Python dict"),
        ('{\n"a":1,\n}', "line 3, column 1", "comma"),
        ('{"a":1} the end', "line 1, column 9", "'the end'"),
        ('{"a":1', "line 1, column 7", "brackets"),
        ('```json\n{"a":1}\n```', "line 1, column 1", "code fence"),
        ('{"NaN":1,\n "a":NaN}', "line 2, column 6", "NaN is no number"),
        ("[-Infinity]", "line 1, column 2", "-Infinity is no number"),
    ],
)
def test_a_syntax_error_has_its_place_and_what_to_do(text: str, place: str, advice: str) -> None:
    with pytest.raises(CaptionSyntaxError) as caught:
        parse(text)
    assert f"{place}:" in str(caught.value)
    assert advice in str(caught.value)


def test_a_number_of_thousands_of_digits_is_refused_in_words() -> None:
    with pytest.raises(CaptionSyntaxError, match="Shorten it"):
        parse("1" * 5000)


def test_an_object_remembers_keys_that_were_written_twice() -> None:
    value = parse('{"a":1,"b":{"c":1,"c":2},"a":3}')
    assert value == {"a": 3, "b": {"c": 2}}
    assert isinstance(value["b"], JsonObject)
    assert (value.repeated, value["b"].repeated) == (["a"], ["c"])


@pytest.mark.parametrize(
    ("text", "meant"),
    [
        ('{"a":1}', True),
        ('rex, {"a":1}', True),
        ('{"a":1', True),
        ('{"a":1} and more', True),
        ("{'a': 1", True),
        ('```json\n{"a":1}\n```', True),
        ("{", True),
        ("a dog on a beach", False),
        ("a {red|blue} dog", False),
        ("{red|blue} dogs", False),
        ("", False),
    ],
)
def test_what_begins_or_ends_like_json_is_meant_as_json(text: str, meant: bool) -> None:
    assert looks_like_json(text) == meant
    caption = make_caption("a.txt", text, "json")
    assert (caption.root is not NO_JSON or caption.syntax is not None) == meant
    assert make_caption("a.txt", text, "text").syntax is None


def test_a_json_file_is_meant_as_json_whatever_it_holds() -> None:
    assert make_caption("a.JSON", "a dog", "text").syntax is not None
    assert make_caption("a.json", "[1]", "text").root == [1]
    assert make_caption("a.json", " ", "json").syntax is None  # empty, which is another matter


@pytest.mark.parametrize(
    ("text", "split"),
    [
        ('rex, {"a":1}', ("rex,", '{"a":1}')),
        ('{"a":1}', None),
        (' \n{"a":1}', None),
        ('rex, {"a":1', None),
        ("rex", None),
    ],
)
def test_only_whole_json_has_something_before_it(text: str, split: tuple[str, str] | None) -> None:
    assert json_after(text) == split
