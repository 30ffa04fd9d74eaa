"""The Ideogram 4 family: a built-in plugin of the port."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any

from loraport.families import Family
from loraport.hookspecs import hookimpl

_ATTENTION = [r"layers\.\d+\.attention\.(qkv|o)"]
_MLP = [r"layers\.\d+\.feed_forward\.w[123]"]
_MODULATION = [r"layers\.\d+\.adaln_modulation"]


def place_trigger(caption: str, word: str) -> str:
    """Put a trigger word into a caption that lacks it, keeping a JSON caption valid JSON.

    Ideogram 4 reads JSON captions; a word in front of the JSON would make it plain text. The word goes to the front of
    `high_level_description`, or of the first element's `desc` when there is no such description, or becomes that
    description. A plain-text caption gets it in front. A caption whose text already holds the word is unchanged.
    """
    content = _json_object(caption)
    if content is None:
        if word in caption:
            return caption
        return f"{word}, {caption}" if caption else word
    if any(word in text for text in _texts(content)):
        return caption
    description, element = content.get("high_level_description"), _first_element(content)
    if isinstance(description, str) and description:
        content["high_level_description"] = f"{word}, {description}"
    elif element is not None and "high_level_description" not in content:
        element["desc"] = f"{word}, {element['desc']}" if element["desc"] else word
    else:
        content = {"high_level_description": word} | content | {"high_level_description": word}
    return json.dumps(content, ensure_ascii=False, separators=(",", ":"))


def _json_object(caption: str) -> dict[str, Any] | None:
    try:
        content = json.loads(caption)
    except (ValueError, RecursionError):
        return None
    return content if isinstance(content, dict) else None


def _texts(content: dict[str, Any]) -> Iterator[str]:
    """Every text in a JSON object; keys are not text."""
    waiting: list[Any] = [content]
    while waiting:
        value = waiting.pop()
        if isinstance(value, str):
            yield value
        elif isinstance(value, dict | list):
            waiting += value.values() if isinstance(value, dict) else value


def _first_element(content: dict[str, Any]) -> dict[str, Any] | None:
    """The first element with a description, in a caption of the usual shape."""
    composition = content.get("compositional_deconstruction")
    elements = composition.get("elements") if isinstance(composition, dict) else None
    for element in elements if isinstance(elements, list) else []:
        if isinstance(element, dict) and isinstance(element.get("desc"), str):
            return element
    return None


IDEOGRAM4 = Family(
    name="ideogram4",
    title="Ideogram 4",
    checkpoint="ideogram-ai/ideogram-4-fp8",
    caption_format="json",
    targets={
        "attention": _ATTENTION,
        "attention+mlp": _ATTENTION + _MLP,
        "all": _ATTENTION + _MLP + _MODULATION,
    },
    architecture="ideogram-4/lora",
    place_trigger=place_trigger,
)


@hookimpl
def register_families(register: Callable[[Family], None]) -> None:
    register(IDEOGRAM4)
