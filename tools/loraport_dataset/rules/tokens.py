"""The length of captions in the tokens of the model's text encoder."""

from __future__ import annotations

import json
from collections.abc import Iterator

from loraport.families import BYTES_PER_TOKEN
from loraport.rules import NO_JSON, Caption, CaptionRule, Problem, Setting

#: Tokens that the chat around a caption adds, at most.
_AROUND = 64


class TooLong(CaptionRule):
    id, severity = "caption-too-long", "error"
    explanation = "A caption has at most dataset.max_text_tokens, counted by the checkpoint's own tokenizer."
    fix = "Shorten it, or raise dataset.max_text_tokens."

    def check(self, caption: Caption, setting: Setting) -> Iterator[Problem]:
        limit, count = setting.max_text_tokens, setting.count_tokens
        if count is None or len(caption.text.encode("utf-8", "replace")) + _added(setting) <= limit:
            return  # a token is at least one byte
        tokens = count(as_trained(caption, setting))
        if tokens > limit:
            yield Problem(f"{tokens:,} tokens; the limit is {limit:,}.", self.fix)


class PerhapsTooLong(CaptionRule):
    id, severity = "caption-perhaps-too-long", "warning"
    explanation = (
        "Where the checkpoint's tokenizer is not on this machine, the length of a caption is estimated: a token for "
        f"each {BYTES_PER_TOKEN} bytes of UTF-8."
    )
    fix = "Shorten it, raise dataset.max_text_tokens, or check again once the checkpoint is here."

    def check(self, caption: Caption, setting: Setting) -> Iterator[Problem]:
        if setting.count_tokens is not None or len(caption.text) * 4 + _added(setting) <= setting.max_text_tokens:
            return
        tokens = len(as_trained(caption, setting).encode("utf-8", "replace")) // BYTES_PER_TOKEN
        if tokens > setting.max_text_tokens:
            message = f"About {tokens:,} tokens (estimated from its bytes); the limit is {setting.max_text_tokens:,}."
            yield Problem(message, self.fix)


RULES = (TooLong, PerhapsTooLong)


def as_trained(caption: Caption, setting: Setting) -> str:
    """The text that the model is given: JSON compactly, but as it is where it stands in a text file; the trigger word
    is in it."""
    text = caption.text.strip()
    try:
        if caption.root is not NO_JSON and not caption.name.lower().endswith((".txt", ".caption")):
            text = json.dumps(caption.root, ensure_ascii=False, separators=(",", ":"))
        return setting.family.place_trigger(text, setting.trigger_word) if setting.trigger_word else text
    except RecursionError:  # nested by the hundred; its own length tells enough
        return text


def _added(setting: Setting) -> int:
    return _AROUND + len((setting.trigger_word or "").encode())
