"""Captions of any family: readable, not empty, whole JSON where they are JSON, and of the kind that the model wants."""

from __future__ import annotations

from collections.abc import Iterator

from loraport.caption_json import json_after
from loraport.rules import NO_JSON, Caption, CaptionRule, ImageRule, Problem, ScannedImage, Setting
from loraport_dataset.rules.tags import looks_like_tags
from loraport_dataset.rules.wording import shown


class UnreadableCaption(ImageRule):
    id, severity = "caption-unreadable", "error"
    explanation = "A caption is an ordinary file in UTF-8 of at most 1,000,000 bytes."
    fix = "Save it as UTF-8; even a long caption has but a few thousand bytes."

    def check(self, image: ScannedImage, setting: Setting) -> Iterator[Problem]:
        if image.caption is not None and image.caption.unreadable is not None:
            message, fix = image.caption.unreadable
            yield Problem(message, fix, file=image.caption.name)


class ByteOrderMark(CaptionRule):
    id, severity = "byte-order-mark", "warning"
    explanation = (
        "UTF-8 has no byte order mark. LoraPort drops it; a reader that doesn't, sees a character there and no JSON."
    )
    fix = "Save the file as UTF-8 without a byte order mark."

    def check(self, caption: Caption, setting: Setting) -> Iterator[Problem]:
        if caption.encoding == "utf-8-sig":
            yield Problem("The file starts with a byte order mark.", self.fix)


class EmptyCaption(CaptionRule):
    id, severity = "caption-empty", "error"
    explanation = "A caption says something. To train without captions, set caption_dropout."
    fix = "Write it; `loraport dataset caption` drafts captions."

    def check(self, caption: Caption, setting: Setting) -> Iterator[Problem]:
        # Of JSON that holds nothing, the family's own rules tell what it should hold.
        checked = setting.family.caption_format == "json" and caption.root != ""
        if not caption.text.strip() or (caption.root is not NO_JSON and not caption.root and not checked):
            yield Problem("There is nothing in it.", self.fix)


class TextBeforeJson(CaptionRule):
    id, severity = "text-before-json", "error"
    explanation = (
        "Nothing stands before the JSON, a trigger word neither: it makes the caption plain text, which a trainer then "
        "trains letter by letter, brackets and all."
    )
    fix = "Put a trigger word inside high_level_description or an element's desc; dataset.trigger_word does it for you."
    stops_training = True

    def check(self, caption: Caption, setting: Setting) -> Iterator[Problem]:
        split = json_after(caption.text) if caption.syntax is not None else None
        if split is not None:
            word = setting.trigger_word
            what = "The trigger word" if word and split[0].strip(" ,.:;") == word else "Text"
            yield Problem(f"{what} stands before the JSON ({shown(split[0])}), not inside it.", self.fix)


class Json(CaptionRule):
    id, severity = "json", "error"
    explanation = "What is meant as JSON is JSON: broken, it is trained as plain text, brackets and all."
    fix = "Correct the place that is named; `loraport dataset fix` writes captions anew."
    stops_training = True

    def check(self, caption: Caption, setting: Setting) -> Iterator[Problem]:
        if caption.syntax is not None and json_after(caption.text) is None:
            yield Problem(*caption.syntax)


class HalfCharacter(CaptionRule):
    id, severity = "half-character", "error"
    explanation = "No half of a surrogate pair (\\ud83d without its other half) is in a caption: no file can hold it."
    fix = "Write the character itself, or take it out."
    stops_training = True

    def check(self, caption: Caption, setting: Setting) -> Iterator[Problem]:
        if caption.root is not NO_JSON and "\\ud" in caption.text.lower():
            path = _half_character(caption.root)
            if path is not None:
                yield Problem("There is half of a surrogate pair.", self.fix, path)


class Tags(CaptionRule):
    id, severity = "caption-tags", "warning"
    explanation = "A model that was trained on structured captions gets structured captions, not a flat list of tags."
    fix = "`loraport dataset wrap` makes the shortest valid caption of it; sentences on what is where are better."

    def check(self, caption: Caption, setting: Setting) -> Iterator[Problem]:
        if _is_plain(caption, setting) and looks_like_tags(caption.text):
            yield Problem(f"A flat list of tags, and {setting.family.title} wants JSON.", self.fix)


class PlainText(CaptionRule):
    id, severity = "caption-plain", "advice"
    explanation = "A model that was trained on structured captions follows them best; it takes a plain sentence too."
    fix = "`loraport dataset wrap` puts plain text into a valid structured caption."

    def check(self, caption: Caption, setting: Setting) -> Iterator[Problem]:
        if _is_plain(caption, setting) and not looks_like_tags(caption.text):
            yield Problem(f"Plain text, and {setting.family.title} was trained on JSON.", self.fix)


RULES = (UnreadableCaption, ByteOrderMark, EmptyCaption, TextBeforeJson, Json, HalfCharacter, Tags, PlainText)


def _is_plain(caption: Caption, setting: Setting) -> bool:
    wants_json = setting.family.caption_format == "json"
    return wants_json and caption.root is NO_JSON and caption.syntax is None and bool(caption.text.strip())


def _half_character(root: object) -> str | None:
    """The JSON path of the first text or key with half a surrogate pair."""
    waiting: list[tuple[str, object]] = [("", root)]
    while waiting:
        path, value = waiting.pop()
        if isinstance(value, str) and any("\ud800" <= character <= "\udfff" for character in value):
            return path
        if isinstance(value, dict):
            if any("\ud800" <= character <= "\udfff" for key in value for character in key):
                return path
            waiting += [(f"{path}.{key}" if path else key, child) for key, child in value.items()]
        elif isinstance(value, list):
            waiting += [(f"{path}[{index}]", child) for index, child in enumerate(value)]
    return None
