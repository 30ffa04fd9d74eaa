"""Captions as they are written: which are meant as JSON, and reading that strictly, with errors that say the fix."""

from __future__ import annotations

import json
import re
from collections import Counter
from typing import Any, Literal, NoReturn

from loraport.rules import Caption

_BEGINS_LIKE_JSON = re.compile(r"(?:```\w*\s*)?\{\s*(?:[\"'}]|$)")
_STRING_OR_CONSTANT = re.compile(r'"(?:[^"\\]|\\.)*"|NaN|-?Infinity')

_PLAIN = (
    "This is plain text, not JSON.",
    "Make JSON of it with `loraport dataset wrap --caption-ext json`, or save it as .txt.",
)


class CaptionSyntaxError(ValueError):
    """The text is not JSON. `message` has line and column, `fix` what to do; as a string, it is both."""

    def __init__(self, message: str, fix: str):
        super().__init__(f"{message} {fix}")
        self.message, self.fix = message, fix


class JsonObject(dict[str, Any]):
    """An object that remembers which of its keys were written more than once."""

    def __init__(self, pairs: list[tuple[str, Any]]):
        super().__init__(pairs)
        counts = Counter(key for key, _ in pairs)
        self.repeated = [key for key, count in counts.items() if count > 1]


def make_caption(name: str, text: str, caption_format: Literal["json", "text"], encoding: str = "utf-8") -> Caption:
    """The record of a caption's text, parsed where it is meant as JSON: in a `.json` file, or for a family whose
    captions are JSON (`Family.caption_format`) by its looks."""
    meant = name.lower().endswith(".json") or (caption_format == "json" and looks_like_json(text))
    if not meant or not text.strip():
        return Caption(name, text, encoding=encoding)
    try:
        return Caption(name, text, parse(text), encoding=encoding)
    except CaptionSyntaxError as error:
        syntax = _PLAIN if is_plain_text(text) else (error.message, error.fix)
        return Caption(name, text, syntax=syntax, encoding=encoding)


def looks_like_json(text: str) -> bool:
    """Whether a text is meant as JSON: it begins like an object or ends like one, also in a code fence (```json)."""
    stripped = text.strip()
    end = stripped.removesuffix("```").rstrip()
    return "{" in stripped and (end.endswith("}") or _BEGINS_LIKE_JSON.match(stripped) is not None)


def is_plain_text(text: str) -> bool:
    """Whether a text that is no JSON was never meant as such: it has no object, and begins like no other value."""
    return "{" not in text and not text.lstrip("\ufeff \t\r\n").startswith(("[", '"', "`"))


def json_after(text: str) -> tuple[str, str] | None:
    """(what stands before the JSON, the JSON) of a caption that would be one without it; else None."""
    brace = text.find("{")
    if brace <= 0 or not text[:brace].strip("\ufeff \t\r\n"):
        return None
    try:
        parse(text[brace:])
    except CaptionSyntaxError:
        return None
    return text[:brace].strip(), text[brace:]


def parse(text: str) -> Any:
    """The value that `text` holds, its objects as `JsonObject`.

    Raises CaptionSyntaxError for anything that the JSON standard does not know, NaN and Infinity among it.
    """
    try:
        return json.loads(text, object_pairs_hook=JsonObject, parse_constant=_refuse_constant)
    except json.JSONDecodeError as error:
        place = f"line {error.lineno}, column {error.colno}"
        raise CaptionSyntaxError(f"Not valid JSON at {place}: {error.msg}.", _advice(text, error)) from error
    except RecursionError as error:
        raise CaptionSyntaxError("Nested too deeply to be a caption.", "Objects and lists go four deep.") from error
    except _NotANumber as error:
        message = f"Not valid JSON at {_place_of_constant(text)}: {error} is no number."
        raise CaptionSyntaxError(message, "Write a number, or take the key out.") from error
    except ValueError as error:  # Python refuses to read whole numbers of thousands of digits.
        raise CaptionSyntaxError("Not a caption: a number has thousands of digits.", "Shorten it.") from error


class _NotANumber(ValueError):
    """NaN and its like, which Python's reader would take."""


def _refuse_constant(name: str) -> NoReturn:
    raise _NotANumber(name)


def _place_of_constant(text: str) -> str:
    """Where the first NaN or Infinity outside of a string is."""
    found = next(match for match in _STRING_OR_CONSTANT.finditer(text) if not match[0].startswith('"'))
    line_start = text.rfind("\n", 0, found.start()) + 1
    return f"line {text.count(chr(10), 0, found.start()) + 1}, column {found.start() - line_start + 1}"


def _advice(text: str, error: json.JSONDecodeError) -> str:
    if not text.strip():
        return "The caption is empty: write one."
    if text.startswith("\ufeff"):
        return "Save the file as UTF-8 without a byte order mark."
    if text.lstrip().startswith("```"):
        return "Take the code fence (```) away, at the end too."
    brace = text.find("{")
    if brace > 0 and text[:brace].strip() and not text.lstrip().startswith(("[", '"')):
        return f"There is text before the JSON ({text[:brace].strip()[:40]!r}): it belongs inside, or nowhere."
    if "Extra data" in error.msg:
        return f"Remove what follows the caption ({text[error.pos :].strip()[:40]!r})."
    if text[error.pos : error.pos + 1] == "'":
        return "JSON has double quotes: this looks like a Python dict; write it with json.dumps."
    before = text[: error.pos].rstrip()
    if before.endswith(","):
        return "Remove the comma before the closing bracket."
    return "Check quotes, commas and brackets there."
