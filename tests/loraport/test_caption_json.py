from __future__ import annotations

import pytest

from loraport.caption_json import CaptionSyntaxError, JsonObject, parse


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
