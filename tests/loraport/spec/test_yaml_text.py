"""The YAML dialect of specs: numbers as people write them, and no surprises."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loraport.errors import SpecError
from loraport.spec.yaml_text import MAX_DEPTH, dump_yaml, parse_yaml


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-4", 1e-4),
        ("5.0e-5", 5e-5),
        ("1E3", 1000.0),
        (".5", 0.5),
        ("1_000", 1000),
        ("-7", -7),
        ("0x1f", 31),
        ("1_000.5", 1000.5),
        ("true", True),
        ("False", False),
        ("~", None),
        ("", None),
    ],
)
def test_numbers_are_read_as_people_write_them(text: str, value: Any) -> None:
    found = parse_yaml(f"key: {text}", "spec.yaml")["key"]
    assert found == value
    assert type(found) is type(value)


@pytest.mark.parametrize(
    "text", ["16:9", "1:30:00", "on", "yes", "No", "off", "y", "2024-05-01", "007", "0o17", "1.2.3", "e5", "=", "<<"]
)
def test_text_stays_text(text: str) -> None:
    assert parse_yaml(f"key: {text}", "spec.yaml") == {"key": text}


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("a: 1\na: 2", "line 2, column 1 is not valid YAML: the key 'a' is there twice"),
        ("a: {b: 1, b: 2}", "the key 'b' is there twice"),
        ("a:\n\tb: 1", "line 2, column 1 is not valid YAML: a tab; YAML is indented with spaces"),
        ("a:\n  b:\t1", "a tab; YAML is indented with spaces"),
        ("a: &x 1\nb: *x", "aliases (*name) are not allowed"),
        ("a: !!int abc", "tags (tag:yaml.org,2002:int) are not allowed"),
        ("a: !!python/object/apply:os.system ['true']", "are not allowed in a spec"),
        ("a: 0x_", "not a number that can be read"),
        ("a: " + "9" * 5000, "not a number that can be read"),
        ("a: .inf", "a number must be finite"),
        ("a: .nan", "a number must be finite"),
        ("a: 1e999", "a number must be finite"),
        ("1: a", "keys are text, so put 1 in quotes"),
        ("? [a, b]\n: c", "keys are text"),
        ('a: "\\ud800"', "half a character"),
        ("a: 1\nb: \x01", "line 2 is not valid YAML: a character that is no text (#x01)"),
        ("---\na: 1\n---\nb: 2", "a second document"),
        ("a: [1, 2", "line 1"),
        ("a: 'open", "is not valid YAML"),
    ],
)
def test_broken_yaml_is_told_with_its_place(text: str, says: str) -> None:
    with pytest.raises(SpecError) as caught:
        parse_yaml(text, "spec.yaml")
    assert str(caught.value).startswith("spec.yaml:")
    assert says in str(caught.value)


def test_a_bomb_of_aliases_is_refused_before_it_grows() -> None:
    bomb = "a0: &a0 [x]\n" + "".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 12))
    with pytest.raises(SpecError, match="aliases"):
        parse_yaml(bomb, "spec.yaml")


@pytest.mark.parametrize("depth", [MAX_DEPTH + 1, 1000, 100_000])
@pytest.mark.parametrize(("opening", "closing"), [("[", "]"), ("{a: ", "}")])
def test_nesting_has_a_limit(depth: int, opening: str, closing: str) -> None:
    with pytest.raises(SpecError, match="nested more than"):
        parse_yaml(opening * depth + closing * depth, "spec.yaml")


def test_shared_parts_are_written_out() -> None:
    shared = ["a", "b"]
    assert parse_yaml(dump_yaml({"one": shared, "two": shared}), "spec.yaml") == {"one": shared, "two": shared}


_text = st.text(st.characters(codec="utf-8"), max_size=20) | st.sampled_from(
    ["1e-4", "12e4567", "1_000", "on", "16:9", "~", "0x1f", ".5", "", " ", "null", "a: b", "- a", "#", "\x85", "\ufeff"]
)
_plain = st.recursive(
    _text | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.booleans() | st.none(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(_text, inner, max_size=3),
    max_leaves=8,
)


@settings(deadline=None, max_examples=200)
@given(_plain)
def test_plain_data_is_read_back_as_it_was_written(content: Any) -> None:
    assert parse_yaml(dump_yaml(content), "spec.yaml") == content


@settings(deadline=None, max_examples=200)
@given(st.text(st.sampled_from("ab:-[]{}#&*!|>'\"%@`,? \n\t0123_.eExX~<=\\u"), max_size=40))
def test_any_text_is_read_or_refused_as_a_spec_error(text: str) -> None:
    with contextlib.suppress(SpecError):
        parse_yaml(text, "spec.yaml")
