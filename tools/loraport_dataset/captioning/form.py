"""What a model is asked to write, and how its answer becomes a caption of the family."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

from loraport.caption_json import is_plain_text, json_after, make_caption
from loraport.rules import Rule, Setting
from loraport_dataset.boxes import Convention
from loraport_dataset.captioning.answers import Message
from loraport_dataset.checking import caption_findings
from loraport_dataset.fixing.captions import fix_caption
from loraport_dataset.fixing.ideogram4 import Boxes

BoxOrder = Literal["none", "yx", "xy"]
"""Whether boxes are asked for, and in which order the model is used to writing them."""

_BOX, _PALETTE = "bbox", "color_palette"
_X_FIRST = "[xmin, ymin, xmax, ymax] in thousandths of the picture's width and height, x before y, from the upper left."
_JSON = (
    "You write captions that an image model is trained on. Look at the picture and describe what is there, in English; "
    "guess nothing that one cannot see. Answer with one JSON object of the schema below, keys in the schema's order, "
    "and nothing else: no Markdown, no comment."
)
_TEXT = (
    "You write captions that an image model is trained on. Look at the picture and describe what is there in one to "
    "three plain sentences, in English; guess nothing that one cannot see. Answer with the caption and nothing else."
)
_TOLD_PROBLEMS = 8
_NAME = "answer.json"
#: Reasoning models close their thoughts so where the server doesn't take them out.
_END_OF_THOUGHT = "</think>"


@dataclass(frozen=True)
class Reading:
    """An answer as a caption, and what the rules find in it, to be told to the model. `caption` is None with an error;
    with warnings alone it can be used."""

    caption: str | None
    problems: tuple[str, ...] = ()


class Form:
    """The captions of one family, as a model is asked for them.

    boxes, palettes: whether each element gets a `bbox` and each part a `color_palette`. instructions: the person's own,
    added to ours. The trigger word of `setting` is put into every caption after it was checked.
    """

    def __init__(
        self, setting: Setting, boxes: BoxOrder = "none", palettes: bool = False, instructions: str | None = None
    ):
        self.setting = setting
        self._boxes: BoxOrder = boxes
        self._rules: list[type[Rule]] | None = None
        left_out = ({_BOX} if boxes == "none" else set()) | (set() if palettes else {_PALETTE})
        family = setting.family
        self.schema = None if family.caption_schema is None else strict_schema(family.caption_schema, left_out)
        if boxes == "xy" and self.schema is not None:
            _describe_boxes(self.schema, _X_FIRST)
        self._system = _TEXT if self.schema is None else f"{_JSON}\n\n{json.dumps(self.schema, ensure_ascii=False)}"
        if instructions:
            self._system += f"\n\n{instructions.strip()}"

    def question(self, picture: bytes) -> list[Message]:
        """The conversation's beginning, with the picture as JPEG."""
        return [Message("system", self._system), Message("user", "Write the caption of this picture.", picture)]

    def correction(self, answer: str, problems: tuple[str, ...]) -> list[Message]:
        """The turns that ask for a better answer."""
        told = "\n".join(f"- {problem}" for problem in problems[:_TOLD_PROBLEMS])
        return [
            Message("assistant", answer),
            Message("user", f"This is not right yet:\n{told}\nWrite the whole caption again, corrected."),
        ]

    def read(self, answer: str) -> Reading:
        """The caption in an answer, written as the family wants it, its key order and colours put right. What stands
        around the JSON, such as a model's thoughts, is dropped; nothing is guessed."""
        text = answer.rpartition(_END_OF_THOUGHT)[2].strip()
        if not text:
            return Reading(None, ("The answer is empty.",))
        if self.setting.family.caption_format != "json":
            return Reading(self._with_trigger(" ".join(text.split())))
        before_and_json = json_after(text)
        if before_and_json is not None:
            text = before_and_json[1]
        bare = Setting(self.setting.family, max_text_tokens=self.setting.max_text_tokens)
        convention = Convention("xy", "corners", "thousandths") if self._boxes == "xy" else None
        if is_plain_text(text):
            return Reading(None, ("The answer is plain text, not JSON. Write the JSON object alone.",))
        fixed = fix_caption(make_caption(_NAME, text, "json"), bare, Boxes(convention, (1000, 1000)))
        caption = make_caption(_NAME, fixed.text, "json")
        found = [one for one in caption_findings(caption, bare, self._all_rules()) if one.severity != "advice"]
        problems = tuple(f"{one.json_path or 'The caption'}: {one.message} {one.fix}" for one in found)
        unusable = any(one.severity == "error" for one in found)
        return Reading(None if unusable else self._with_trigger(fixed.text), problems)

    def _all_rules(self) -> list[type[Rule]]:
        from loraport.plugins import plugins

        if self._rules is None:
            self._rules = list(plugins().rules().values())
        return self._rules

    def _with_trigger(self, text: str) -> str:
        word = self.setting.trigger_word
        return self.setting.family.place_trigger(text, word) if word else text


def strict_schema(schema: dict[str, Any], left_out: set[str]) -> dict[str, Any]:
    """A schema as services enforce it strictly: no object has the properties `left_out`, each has all others, and none
    beside them. Properties keep their order."""
    strict = copy.deepcopy(schema)
    for node in _nodes(strict):
        if isinstance(node.get("properties"), dict):
            node["properties"] = {name: part for name, part in node["properties"].items() if name not in left_out}
            node["required"] = list(node["properties"])
            node["additionalProperties"] = False
    return strict


def _describe_boxes(schema: dict[str, Any], description: str) -> None:
    for node in _nodes(schema):
        box = node.get("properties", {}).get(_BOX) if isinstance(node.get("properties"), dict) else None
        if isinstance(box, dict):
            box["description"] = description


def _nodes(schema: Any) -> Iterator[dict[str, Any]]:
    waiting = [schema]
    while waiting:
        node = waiting.pop()
        if isinstance(node, dict):
            yield node
            waiting += node.values()
        elif isinstance(node, list):
            waiting += node
