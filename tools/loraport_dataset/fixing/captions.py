"""One caption put right, whatever it is: JSON, nearly JSON, or plain text."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from loraport.caption_json import JsonObject
from loraport.rules import NO_JSON, Caption, Setting
from loraport_dataset.fixing.changes import Change, Changes
from loraport_dataset.fixing.ideogram4 import Boxes, fix_root
from loraport_dataset.fixing.syntax import recover

#: Family → what puts the parsed root of one of its captions right.
FIXERS: dict[str, Callable[[Any, Boxes, Changes], Any]] = {"ideogram4": fix_root}
_MOST_PASSES = 10


@dataclass(frozen=True)
class Fixed:
    """A caption's text as it should be, and what was done to it. Without changes the text is the old one."""

    text: str
    changes: tuple[Change, ...] = ()


def fix_caption(caption: Caption, setting: Setting, boxes: Boxes | None = None) -> Fixed:
    """Put a caption right where what is meant is certain; nothing is raised, and the rest stays as it is.

    The trigger word of `setting` is placed where it is missing: inside the JSON of a JSON caption. A caption with a key
    written twice, or with half a character, stays whole: writing it anew would lose something.
    """
    old = Fixed(caption.text)
    if caption.unreadable is not None or not caption.text.strip():
        return old
    changes = Changes()
    if caption.encoding != "utf-8":
        changes.add("encoding", "", f"{caption.encoding} became utf-8")
    root, word = parsed(caption, changes)
    if root is NO_JSON and caption.syntax is not None:
        return Fixed(caption.text, tuple(changes.made))
    words = [each for each in (word, setting.trigger_word) if each]
    if root is NO_JSON:
        return Fixed(_with_words(caption.text, words, setting, changes), tuple(changes.made))
    text = None if _has_repeated_keys(root) else _fixed_json(root, setting, boxes or Boxes(), changes)
    if text is None:
        return old
    if text != caption.text and not changes.made:
        changes.add("serialisation", "", "it is written compactly, as UTF-8")
    if isinstance(root, dict) and root:
        placed = _with_words(text, words, setting, changes)
        if placed != text:  # the word may be the first description there is, and other parts go with it
            text = _fixed_json(json.loads(placed), setting, Boxes(), changes) or placed
    return Fixed(text, tuple(changes.made))


def _fixed_json(root: Any, setting: Setting, boxes: Boxes, changes: Changes) -> str | None:
    """The fixed root as text. What one pass takes out can make room for another key's right name, so passes follow each
    other until nothing changes; boxes are converted in the first alone."""
    fixer = FIXERS.get(setting.family.name)
    if fixer is None:
        return _compact(root)
    for _ in range(_MOST_PASSES):
        made = len(changes.made)
        root = fixer(root, boxes, changes)
        if len(changes.made) == made:
            break
        boxes = Boxes()
    return _compact(root)


def parsed(caption: Caption, changes: Changes) -> tuple[Any, str | None]:
    """The JSON value that a caption is meant as, and a word that stood before it; `NO_JSON` for plain text and where it
    takes a guess."""
    if caption.syntax is None:
        return caption.root, None
    recovered = recover(caption.text, changes)
    return (NO_JSON, None) if recovered is None else (recovered.root, recovered.word)


def _with_words(text: str, words: list[str], setting: Setting, changes: Changes) -> str:
    for word in words:
        placed = setting.family.place_trigger(text, word)
        if placed != text:
            changes.add("trigger-word", "", f"{word!r} was put in")
            text = placed
    return text


def _has_repeated_keys(root: Any) -> bool:
    waiting = [root]
    while waiting:
        value = waiting.pop()
        if isinstance(value, JsonObject) and value.repeated:
            return True
        if isinstance(value, dict | list):
            waiting += value.values() if isinstance(value, dict) else value
    return False


def _compact(root: Any) -> str | None:
    """None for what cannot be written: half a surrogate pair, a number beyond all bounds."""
    try:
        text = json.dumps(root, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
        text.encode()
    except (ValueError, RecursionError):  # UnicodeEncodeError is a ValueError
        return None
    return text
