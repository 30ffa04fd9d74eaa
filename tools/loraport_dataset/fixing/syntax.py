"""JSON that is not quite: the few mistakes that leave no doubt of what was meant."""

from __future__ import annotations

import ast
import json
import re
from dataclasses import dataclass
from typing import Any

from loraport.caption_json import CaptionSyntaxError, json_after, parse
from loraport_dataset.fixing.changes import Changes
from loraport_dataset.rules.wording import shown

_FENCE = "```"
# A whole string, or a comma with nothing but blanks before a closing bracket.
_STRING_OR_LAST_COMMA = re.compile(r'("(?:[^"\\]|\\.)*")|,(?=\s*[}\]])', re.DOTALL)
#: What stands before the JSON is taken for a trigger word up to this many words; more is talk.
_MOST_WORDS = 4
_AROUND_A_WORD = " \t\r\n,;:.-–—|"


@dataclass(frozen=True)
class Recovered:
    """The value that a broken JSON text was meant as, and the word that stood before it."""

    root: Any
    word: str | None = None


def recover(text: str, changes: Changes) -> Recovered | None:
    """Read a text that is no JSON, or None where it takes a guess.

    Understood are a Markdown fence around the JSON, a trigger word before it, commas before closing brackets, and a
    Python dict of texts, numbers, lists and None.
    """
    told = Changes()
    text = _without_fence(text, told)
    for attempt in (_whole, _after_a_word, _without_last_commas, _python):
        found = attempt(text, told)
        if found is not None:
            changes.made += told.made
            return found
    return None


def _without_fence(text: str, changes: Changes) -> str:
    inner = text.strip()
    if len(inner) < 2 * len(_FENCE) or not (inner.startswith(_FENCE) and inner.endswith(_FENCE)):
        return text
    changes.add("json", "", "the Markdown fence was taken off")
    return inner[len(_FENCE) : -len(_FENCE)].strip().removeprefix("json").strip()


def _whole(text: str, changes: Changes) -> Recovered | None:
    try:
        return Recovered(parse(text.strip("\ufeff \t\r\n")))
    except CaptionSyntaxError:
        return None


def _after_a_word(text: str, changes: Changes) -> Recovered | None:
    parts = json_after(text)
    if parts is None:
        return None
    before, content = parts
    word = before.strip(_AROUND_A_WORD)
    if not word or len(word.split()) > _MOST_WORDS or any(sign in word for sign in '"[]{}`'):
        return None
    changes.add("json", "", f"{shown(word)}, which stood before the JSON, went into it")
    return Recovered(parse(content), word)


def _without_last_commas(text: str, changes: Changes) -> Recovered | None:
    cleaned = _STRING_OR_LAST_COMMA.sub(lambda match: match[1] or "", text)
    if cleaned == text:
        return None
    found = _whole(cleaned, changes)
    if found is not None:
        changes.add("json", "", "commas before closing brackets were taken out")
    return found


def _python(text: str, changes: Changes) -> Recovered | None:
    if not text.lstrip().startswith("{"):
        return None
    try:
        tree = ast.parse(text.strip(), mode="eval")
        if _repeats_a_key(tree):
            return None
        root = parse(json.dumps(ast.literal_eval(tree), allow_nan=False))
    except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
        return None
    if not isinstance(root, dict):
        return None
    changes.add("json", "", "a Python dict became JSON")
    return Recovered(root)


def _repeats_a_key(tree: ast.AST) -> bool:
    """Whether a dict has a key twice, or keys that are no texts, which JSON would make texts of."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Dict):
            keys = [key.value if isinstance(key, ast.Constant) else None for key in node.keys]
            if not all(isinstance(key, str) for key in keys) or len(set(keys)) < len(keys):
                return True
    return False
