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
    text = caption.text
    if root is not NO_JSON:
        fixer = FIXERS.get(setting.family.name)
        fixed = root if fixer is None else fixer(root, boxes or Boxes(), changes)
        written = None if _has_repeated_keys(root) else _compact(fixed)
        if written is None:
            return old
        if written != text and not changes.made:
            changes.add("serialisation", "", "it is written compactly, as UTF-8")
        text = written
    return Fixed(*_with_words(text, root, (word, setting.trigger_word), setting, changes))


def parsed(caption: Caption, changes: Changes) -> tuple[Any, str | None]:
    """The JSON value that a caption is meant as, and a word that stood before it; `NO_JSON` for plain text and where it
    takes a guess."""
    if caption.syntax is None:
        return caption.root, None
    recovered = recover(caption.text, changes)
    return (NO_JSON, None) if recovered is None else (recovered.root, recovered.word)


def _with_words(
    text: str, root: Any, words: tuple[str | None, ...], setting: Setting, changes: Changes
) -> tuple[str, tuple[Change, ...]]:
    for word in words:
        if word and (root is NO_JSON or isinstance(root, dict)):
            placed = setting.family.place_trigger(text, word)
            if placed != text:
                changes.add("trigger-word", "", f"{word!r} was put in")
                text = placed
    return text, tuple(changes.made)


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
