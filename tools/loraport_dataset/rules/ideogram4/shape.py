"""Which keys a caption has, in which order, and what kind of value each: the official verifier's rules.

The model was trained on captions of one exact shape. Trainers accept anything and train a malformed caption as plain
text, so the mistake shows only in the pictures afterwards.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from loraport.caption_json import JsonObject
from loraport.rules import NO_JSON, Caption, Problem, Setting
from loraport_dataset.rules.ideogram4.parts import (
    ART_KEYS,
    COMPOSITION_KEYS,
    ELEMENT_KEYS,
    MEDIA,
    OPTIONAL_KEYS,
    PHOTO_KEYS,
    ROOT_KEYS,
    Ideogram4Rule,
    as_object,
    elements,
)
from loraport_dataset.rules.wording import guess, join, kind, listed, not_a_string, shown


class Root(Ideogram4Rule):
    id, severity = "root", "error"
    explanation = f"The keys of a caption are {listed(ROOT_KEYS)}; the last one is required."
    fix = "Keep these keys and no others."

    def check(self, caption: Caption, setting: Setting) -> Iterator[Problem]:
        if caption.root is NO_JSON:
            return
        if not isinstance(caption.root, dict):
            yield Problem(f"This is {kind(caption.root)}, not an object.", f"Write {listed(ROOT_KEYS)}.")
            return
        yield from _unknown_keys("", caption.root, ROOT_KEYS)
        path = "compositional_deconstruction"
        if path not in caption.root:
            yield Problem("Required and missing.", 'Write at least {"background":"...","elements":[]}.', path)


class HighLevelDescription(Ideogram4Rule):
    id, severity = "high-level-description", "error"
    explanation = "high_level_description is a string."
    fix = "Describe the whole picture in one or two sentences, in quotes."

    def check(self, caption: Caption, setting: Setting) -> Iterator[Problem]:
        root = as_object(caption.root)
        if "high_level_description" in root:
            yield from not_a_string("high_level_description", root["high_level_description"])


class Style(Ideogram4Rule):
    id, severity = "style", "error"
    explanation = (
        f"style_description has either photo ({listed(PHOTO_KEYS)}) or art_style ({listed(ART_KEYS)}), in this order; "
        "only color_palette may be left out."
    )
    fix = "Keep photo for a photograph and art_style for anything else, with the other keys in their order."

    def check(self, caption: Caption, setting: Setting) -> Iterator[Problem]:
        root, path = as_object(caption.root), "style_description"
        if path not in root:
            return
        style = root[path]
        if not isinstance(style, dict):
            yield Problem(f"This is {kind(style)}, not an object.", f"Write {listed(PHOTO_KEYS)}.", path)
        elif ("photo" in style) == ("art_style" in style):
            state = "Both photo and art_style are" if "photo" in style else "Neither photo nor art_style is"
            fix = (
                f"Keep exactly one: photo for a photograph, as {listed(PHOTO_KEYS)}; "
                f"art_style for anything else, as {listed(ART_KEYS)}."
            )
            yield Problem(f"{state} there.", fix, path)
        else:
            yield from _shape(path, style, PHOTO_KEYS if "photo" in style else ART_KEYS)


class StyleOfMedium(Ideogram4Rule):
    id, severity = "style-of-medium", "warning"
    explanation = "The medium photograph goes with photo, every other one with art_style."
    fix = "Describe a painting, a drawing or a rendering under art_style, a photograph under photo."

    def check(self, caption: Caption, setting: Setting) -> Iterator[Problem]:
        path = "style_description"
        style = as_object(as_object(caption.root).get(path))
        medium = style.get("medium")
        if not isinstance(medium, str) or medium not in MEDIA or ("photo" in style) == ("art_style" in style):
            return
        if "photo" in style and medium != "photograph":
            fix = f"Rename photo to art_style, with the keys in the order {listed(ART_KEYS)}."
            yield Problem(f"The medium is {medium}, but the style is described under photo.", fix, f"{path}.photo")
        elif "art_style" in style and medium == "photograph":
            fix = f"Rename art_style to photo, with the keys in the order {listed(PHOTO_KEYS)}."
            message = "The medium is photograph, but the style is described under art_style."
            yield Problem(message, fix, f"{path}.art_style")


class Composition(Ideogram4Rule):
    id, severity = "composition", "error"
    explanation = (
        "compositional_deconstruction has exactly background (a string), then elements (a list, possibly empty)."
    )
    fix = 'Write {"background":"...","elements":[...]}.'

    def check(self, caption: Caption, setting: Setting) -> Iterator[Problem]:
        root, path = as_object(caption.root), "compositional_deconstruction"
        if path not in root:
            return
        composition = root[path]
        if not isinstance(composition, dict):
            message = f"This is {kind(composition)}, not an object."
            yield Problem(message, f"Write {listed(COMPOSITION_KEYS)}.", path)
            return
        yield from _shape(path, composition, COMPOSITION_KEYS)
        if "background" in composition:
            yield from not_a_string(f"{path}.background", composition["background"])
        if "elements" in composition and not isinstance(composition["elements"], list):
            message = f"This is {kind(composition['elements'])}, not a list."
            yield Problem(message, "Write [...], or [] for none.", f"{path}.elements")


class Element(Ideogram4Rule):
    id, severity = "element", "error"
    explanation = (
        f"An element is an obj ({listed(ELEMENT_KEYS['obj'])}) or a text ({listed(ELEMENT_KEYS['text'])}), in this "
        "order; only bbox and color_palette may be left out."
    )
    fix = "Keep these keys in their order; the words on a sign are a text, the sign is an obj."

    def check(self, caption: Caption, setting: Setting) -> Iterator[Problem]:
        for path, element in elements(caption.root):
            if not isinstance(element, dict):
                yield Problem(f"This is {kind(element)}, not an object.", f"Write {listed(ELEMENT_KEYS['obj'])}.", path)
                continue
            type_ = element.get("type")
            if type_ not in ("obj", "text"):
                state = f"The type {shown(type_)} is not known" if "type" in element else "The type is missing"
                fix = 'Write "obj" for a thing, "text" for words in the picture.'
                yield Problem(f"{state}.", fix, f"{path}.type")
            elif type_ == "obj" and "text" in element:
                fix = 'Make the type "text", or move the words into desc.'
                yield Problem("An obj has no text.", fix, f"{path}.text")
                others = {key: value for key, value in element.items() if key != "text"}
                yield from _shape(path, others, ELEMENT_KEYS["obj"])
            else:
                yield from _shape(path, element, ELEMENT_KEYS[type_])


class TextValues(Ideogram4Rule):
    id, severity = "text-values", "warning"
    explanation = "Every description in the style and in the elements is a string."
    fix = "Write a sentence or a few words in quotes."

    def check(self, caption: Caption, setting: Setting) -> Iterator[Problem]:
        style = as_object(as_object(caption.root).get("style_description"))
        for key in ("aesthetics", "lighting", "photo", "medium", "art_style"):
            if key in style:
                yield from not_a_string(f"style_description.{key}", style[key])
        for path, element in elements(caption.root):
            for key in ("text", "desc"):
                if key in as_object(element):
                    yield from not_a_string(f"{path}.{key}", element[key])


class RepeatedKey(Ideogram4Rule):
    id, severity = "repeated-key", "warning"
    explanation = "No object has a key twice: a reader keeps the last and drops the others."
    fix = "Keep one of them."

    def check(self, caption: Caption, setting: Setting) -> Iterator[Problem]:
        waiting: list[tuple[str, Any]] = [("", caption.root)]
        while waiting:
            path, value = waiting.pop()
            if isinstance(value, JsonObject):
                for key in value.repeated:
                    yield Problem("The key is there twice, and only the last one counts.", "Keep one.", join(path, key))
                waiting += [(join(path, key), child) for key, child in value.items()]
            elif isinstance(value, list):
                waiting += [(f"{path}[{index}]", child) for index, child in enumerate(value)]


class Medium(Ideogram4Rule):
    id, severity = "medium", "advice"
    explanation = f"medium is one of {listed(MEDIA)}, by the official prompt guide; the verifier does not enforce it."
    fix = "Write the one that is nearest."

    def check(self, caption: Caption, setting: Setting) -> Iterator[Problem]:
        medium = as_object(as_object(caption.root).get("style_description")).get("medium")
        if isinstance(medium, str) and medium not in MEDIA:
            fix = f"{guess(medium, MEDIA)}It has {listed(MEDIA)}."
            yield Problem(f"{shown(medium)} is not a medium of the prompt guide.", fix, "style_description.medium")


RULES = (
    Root,
    HighLevelDescription,
    Style,
    StyleOfMedium,
    Composition,
    Element,
    TextValues,
    RepeatedKey,
    Medium,
)


def _shape(path: str, value: dict[str, Any], keys: Sequence[str]) -> Iterator[Problem]:
    """Keys that should not be there, keys that are missing, and the order of the others."""
    yield from _unknown_keys(path, value, keys)
    for key in keys:
        if key not in value and key not in OPTIONAL_KEYS:
            yield Problem("Required and missing.", f"The keys are {listed(keys)}.", join(path, key))
    present = [key for key in value if key in keys]
    wanted = [key for key in keys if key in value]
    if present != wanted:
        yield Problem(f"The keys come as {listed(present)}.", f"The order is {listed(wanted)}.", path)


def _unknown_keys(path: str, value: dict[str, Any], keys: Sequence[str]) -> Iterator[Problem]:
    for key in value:
        if key not in keys:
            fix = f"{guess(key, keys)}The keys are {listed(keys)}."
            yield Problem("This key does not belong here.", fix, join(path, key))
