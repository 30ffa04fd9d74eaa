"""The trigger word: in all captions or in none, spelt one way, and where the model reads it."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from functools import lru_cache
from typing import Any

from loraport.rules import NO_JSON, Caption, CaptionRule, Problem, ScannedImage, SetRule, Setting

_KEPT_NAMES = 1000
#: A word that no dictionary has: letters with digits or underscores, such as mp_buggy or ohwx1.
_MADE_UP = re.compile(r"(?<!\w)(?=\w*[A-Za-z])(?=\w*[_\d])(?!\d)\w{4,40}(?!\w)")
_MOST_WORDS = 5000
_FEWEST_CAPTIONS, _MOSTLY = 5, 0.6


class Spelling(CaptionRule):
    id, severity = "trigger-spelling", "warning"
    explanation = (
        "The trigger word is spelt as in dataset.trigger_word: to the model, other letter case is another word."
    )
    fix = "Write it as in the spec."

    def check(self, caption: Caption, setting: Setting) -> Iterator[Problem]:
        word = setting.trigger_word
        if not word or not word.strip():
            return
        for path, text in texts(caption):
            for match in _variants(word).finditer(text):
                if match[0] != word:
                    yield Problem(f"It is written {match[0]!r}.", f"Write {word!r}.", path)
                    break


class Inconsistent(SetRule):
    id, severity = "trigger-inconsistent", "warning"
    explanation = (
        "All captions have the trigger word, or none: LoraPort puts it in front of the description where it is "
        "missing, and where a hand wrote it, it may stand elsewhere."
    )
    fix = "Write it into this caption as into the others, or leave it to LoraPort in all of them."

    def __init__(self) -> None:
        self._with = self._without = 0
        self._names: list[str] = []

    def see(self, image: ScannedImage, setting: Setting) -> None:
        word, caption = setting.trigger_word, image.caption
        if not word or caption is None or not caption.name or caption.unreadable or not caption.text.strip():
            return
        said = [text for _, text in texts(caption)]
        if any(word in text for text in said):
            self._with += 1
        elif not any(_variants(word).search(text) for text in said):  # else its spelling is told
            self._without += 1
            if len(self._names) < _KEPT_NAMES:
                self._names.append(caption.name)

    def problems(self, setting: Setting) -> Iterator[Problem]:
        if not self._with or not self._without:
            return
        total = self._with + self._without
        counted = f"{self._with:,} of {total:,} captions have {setting.trigger_word!r}"
        for name in self._names:
            yield Problem(f"{counted}; this one doesn't.", self.fix, file=name)
        if self._without > len(self._names):
            yield Problem(f"{counted}; {self._without - len(self._names):,} more don't.", self.fix)


class Missing(SetRule):
    id, severity = "trigger-missing", "advice"
    explanation = (
        "A trigger word that no caption has is put into all of them while training; the files stay as they are."
    )
    fix = "Nothing needs to be done; `loraport dataset fix` writes it into the files."

    def __init__(self) -> None:
        self._seen = 0
        self._has_it = False

    def see(self, image: ScannedImage, setting: Setting) -> None:
        if setting.trigger_word and image.caption is not None and not self._has_it:
            self._seen += 1
            self._has_it = any(setting.trigger_word in text for _, text in texts(image.caption))

    def problems(self, setting: Setting) -> Iterator[Problem]:
        if self._seen and not self._has_it:
            yield Problem(f"No caption has the trigger word {setting.trigger_word!r}; LoraPort puts it in.", self.fix)


class Forgotten(SetRule):
    id, severity = "trigger-forgotten", "warning"
    explanation = (
        "A made-up word (with digits or underscores) that most captions have is a trigger word; without "
        "dataset.trigger_word it stays missing in the others."
    )
    fix = "Set dataset.trigger_word to it, or write it into the captions that lack it."

    def __init__(self) -> None:
        self._captions = 0
        self._words: Counter[str] = Counter()

    def see(self, image: ScannedImage, setting: Setting) -> None:
        caption = image.caption
        if setting.trigger_word or caption is None or not caption.name or not caption.text.strip():
            return
        self._captions += 1
        found = {word for _, text in texts(caption) if " " in text for word in _MADE_UP.findall(text)}
        for word in found:
            if word in self._words or len(self._words) < _MOST_WORDS:
                self._words[word] += 1

    def problems(self, setting: Setting) -> Iterator[Problem]:
        if self._captions < _FEWEST_CAPTIONS:
            return
        for word, count in self._words.most_common(1):
            if _MOSTLY <= count / self._captions < 1:
                message = f"{word!r} is in {count:,} of {self._captions:,} captions, and no trigger word is set."
                yield Problem(message, self.fix)


class InRegularization(CaptionRule):
    id, severity = "trigger-in-regularization", "warning"
    explanation = (
        "Captions of a regularisation set don't have the trigger word: it would be learned for the general class, "
        "which the set is there to keep apart from it."
    )
    fix = "Take the word out of this caption, or the image out of the regularisation set."

    def check(self, caption: Caption, setting: Setting) -> Iterator[Problem]:
        for word in setting.foreign_words:
            for path, text in texts(caption):
                if any(match[0] == word for match in _variants(word).finditer(text)):
                    yield Problem(f"It has the trigger word {word!r}, in a regularisation set.", self.fix, path)


RULES = (Spelling, Inconsistent, Missing, Forgotten, InRegularization)


def texts(caption: Caption) -> Iterator[tuple[str, str]]:
    """JSON path and text of everything that is said; of plain text, all of it. Keys are not text."""
    if caption.root is NO_JSON:
        yield "", caption.text
        return
    waiting: list[tuple[str, Any]] = [("", caption.root)]
    while waiting:
        path, value = waiting.pop()
        if isinstance(value, str):
            yield path, value
        elif isinstance(value, dict):
            waiting += [(f"{path}.{key}" if path else key, child) for key, child in reversed(value.items())]
        elif isinstance(value, list):
            waiting += [(f"{path}[{index}]", child) for index, child in reversed(list(enumerate(value)))]


@lru_cache(maxsize=8)
def _variants(word: str) -> re.Pattern[str]:
    """The word in any letter case, its parts joined by blanks, dashes, underscores or nothing."""
    parts = [re.escape(part) for part in re.split(r"[\s_-]+", word) if part]
    joined = r"[\s_-]*".join(parts) or "(?!)"
    return re.compile(rf"(?<!\w){joined}(?!\w)", re.IGNORECASE)
