"""What a caption says: writing that is seen belongs in text elements, and descriptions are more than lists of tags."""

from __future__ import annotations

import re
from collections.abc import Iterator

from loraport.rules import NO_JSON, Caption, Problem, Setting
from loraport_dataset.rules.ideogram4.parts import Ideogram4Rule, as_object, descriptions, elements, writings
from loraport_dataset.rules.tags import looks_like_tags
from loraport_dataset.rules.wording import shown

#: A verb or noun of writing with quoted words soon after it: a sign that says "OPEN", the title 'Dune'.
_QUOTED = re.compile(
    r"\b(?:say(?:s|ing)|read(?:s|ing)|spell(?:s|ing)|words?|text|lettering|letters|title(?:d)?|caption(?:ed)?|"
    r"label(?:l?ed)?|inscription|inscribed|logo|slogan|written|printed|engraved|neon sign|sign)\b"
    r"[^\"“”'‘’.!?]{0,40}"
    r"(?:\"(?P<a>[^\"]{1,80})\"|“(?P<b>[^”]{1,80})”|(?<!\w)'(?P<c>[^']{1,80})'(?!\w)|‘(?P<d>[^’]{1,80})’(?!\w))",
    re.IGNORECASE,
)


class TextElement(Ideogram4Rule):
    id, severity = "text-element", "warning"
    explanation = (
        "Writing that is seen in the picture is the `text` of a text element, letter by letter; what only a "
        "description quotes, the model does not learn to draw."
    )
    fix = 'Add {"type":"text","text":"the words","desc":"where they are and what they look like"} to elements.'

    def check(self, caption: Caption, setting: Setting) -> Iterator[Problem]:
        if not isinstance(caption.root, dict):
            return
        seen = " ".join(_plain(text) for _, text in writings(caption.root))
        for path, text in descriptions(caption.root):
            for match in _QUOTED.finditer(text):
                words = next(group for group in match.groups() if group is not None)
                if _plain(words) and _plain(words) not in seen:
                    yield Problem(f"{shown(words)} is quoted here and is in no text element.", self.fix, path)
        for path, element in elements(caption.root):
            if as_object(element).get("type") == "text" and as_object(element).get("text") == "":
                fix = "Write the words that are seen, or make it an obj."
                yield Problem("A text element without its words.", fix, f"{path}.text")


def _plain(text: str) -> str:
    """Letters and digits alone, so that capitals, line breaks and punctuation make no difference."""
    return "".join(character for character in text.casefold() if character.isalnum())


class TagsInDescription(Ideogram4Rule):
    id, severity = "tags-in-description", "warning"
    explanation = "high_level_description is a sentence or two; a list of tags is not what Ideogram 4 was trained on."
    fix = "Write one or two sentences on the whole picture, and an element for each thing in it."

    def check(self, caption: Caption, setting: Setting) -> Iterator[Problem]:
        said = as_object(caption.root).get("high_level_description")
        if isinstance(said, str) and looks_like_tags(said):
            yield Problem("This is a list of tags, not a sentence.", self.fix, "high_level_description")


class TriggerPlace(Ideogram4Rule):
    id, severity = "trigger-place", "warning"
    explanation = (
        "The trigger word stands in high_level_description or an element's desc. In a text element the model draws its "
        "letters; in the style or the background it learns it for those."
    )
    fix = "Move it into high_level_description, or the desc of the element that it names."

    def check(self, caption: Caption, setting: Setting) -> Iterator[Problem]:
        word = setting.trigger_word
        if not word or not isinstance(caption.root, dict):
            return
        said = [path for path, text in descriptions(caption.root) if word in text]
        drawn = [path for path, text in writings(caption.root) if word in text]
        if any(path == "high_level_description" or path.endswith(".desc") for path in said):
            return
        if said or drawn:
            where = "as writing that is seen" if not said else "in none of the two places where it names the subject"
            yield Problem(f"{word!r} stands {where}.", self.fix, (said or drawn)[0])


class EmptyDescription(Ideogram4Rule):
    id, severity = "empty-description", "warning"
    explanation = "A caption says something of the picture: a high_level_description, a background or an element."
    fix = "Describe the picture; an empty frame teaches the model that the picture goes with any words."

    def check(self, caption: Caption, setting: Setting) -> Iterator[Problem]:
        root = caption.root
        if root is NO_JSON or not isinstance(root, dict) or "compositional_deconstruction" not in root:
            return
        if not any(text.strip() for _, text in [*descriptions(root), *writings(root)]):
            yield Problem("Nothing in this caption describes the picture.", self.fix)


RULES = (TextElement, TagsInDescription, TriggerPlace, EmptyDescription)
