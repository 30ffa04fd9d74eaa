"""Telling a list of tags from a sentence."""

from __future__ import annotations

import re

_SENTENCE_END = re.compile(r"[.!?。！？](?:\s|$)")
_FEWEST_TAGS = 4
_WORDS_A_TAG = 2.5


def looks_like_tags(text: str) -> bool:
    """Whether a text is a list like `1girl, solo, red hair, smile`: short parts between commas and no sentence."""
    parts = [part.strip() for part in re.split(r"[,;，、]", text) if part.strip()]
    if len(parts) < _FEWEST_TAGS or _SENTENCE_END.search(text):
        return False
    words = sum(len(part.replace("_", " ").split()) for part in parts)
    return words / len(parts) <= _WORDS_A_TAG
