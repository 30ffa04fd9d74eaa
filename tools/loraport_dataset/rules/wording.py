"""How findings name values, keys and places."""

from __future__ import annotations

import json
import re
import reprlib
from collections.abc import Iterator, Sequence
from typing import Any

from loraport.errors import nearest
from loraport.rules import Problem

_PLAIN_KEY = re.compile(r"\w+", re.ASCII)

# Findings quote what people wrote; neither its length nor its depth may get out of hand.
_short = reprlib.Repr()
_short.maxstring = _short.maxother = 60


def shown(value: Any) -> str:
    """A value in at most some 60 characters."""
    return _short.repr(value)


def kind(value: Any) -> str:
    """What a JSON value is, in words."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "a true or false"
    names = {dict: "an object", list: "a list", str: "a string", int: "a number", float: "a number"}
    return next(name for type_, name in names.items() if isinstance(value, type_))


def listed(words: Sequence[str]) -> str:
    return ", ".join(words)


def join(path: str, key: str) -> str:
    """The JSON path of a key; one that is no word is quoted."""
    if not _PLAIN_KEY.fullmatch(key):
        return f"{path}[{json.dumps(key)}]"
    return f"{path}.{key}" if path else key


def guess(word: str, choices: Sequence[str]) -> str:
    """`Did you mean …?` with a blank after it, or nothing."""
    found = nearest(word, choices)
    return f"Did you mean '{found}'? " if found else ""


def not_a_string(path: str, value: Any) -> Iterator[Problem]:
    if not isinstance(value, str):
        yield Problem(f"This is {kind(value)}, not a string.", "Write a sentence or a few words in quotes.", path)
