"""Captions in the form that ai-toolkit reads back as they are.

It cuts a caption at its commas and joins the parts with ", ": each comma gains a space (get_caption in
toolkit/dataloader_mixins.py). A JSON caption after Ideogram's rules is then parsed and written compactly
(toolkit/ideogram_caption.py), so spaces between its parts do no harm, but those inside its texts stay. There a comma
may also be written \\u002c, which the cut does not see and the parser turns back into a comma. The words [name] and
[trigger] it takes out, or replaces (`toolkit/prompt_utils.py`); in JSON their bracket is escaped likewise.
"""

from __future__ import annotations

import json
import re
from typing import Any

_ESCAPES = {",": "\\u002c", "[name]": "\\u005bname]", "[trigger]": "\\u005btrigger]"}


def staged(caption: str) -> str:
    """The caption to write for ai-toolkit, on one line.

    A JSON caption that ai-toolkit parses keeps every character. In any other text, the space after a comma is left out,
    for ai-toolkit puts it there; a comma without one gains it.
    """
    content = _structured(caption)
    if content is None:
        return re.sub(r", ", ",", " ".join(caption.splitlines()))
    return _dump(content)


def cut_and_joined(text: str) -> str:
    """What ai-toolkit makes of a caption file's text before it looks for JSON in it."""
    return ", ".join(text.split(","))


def _structured(caption: str) -> dict[str, Any] | None:
    """The content of a caption that ai-toolkit parses: a JSON object with a compositional_deconstruction."""
    try:
        content = json.loads(caption)
    except (ValueError, RecursionError):
        return None
    known = isinstance(content, dict) and isinstance(content.get("compositional_deconstruction"), dict)
    return content if known else None


def _dump(content: Any) -> str:
    """Compact JSON whose only commas are those between its parts."""
    if isinstance(content, dict):
        return "{" + ",".join(f"{_dump(key)}:{_dump(value)}" for key, value in content.items()) + "}"
    if isinstance(content, list):
        return "[" + ",".join(_dump(value) for value in content) + "]"
    text = json.dumps(content, ensure_ascii=False)
    if isinstance(content, str):
        for plain, escaped in _ESCAPES.items():
            text = text.replace(plain, escaped)
    return text
