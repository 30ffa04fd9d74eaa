"""Captions that are too long. ai-toolkit would cut them off without a word, so they are found before it starts."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

from loraport.dataset import Item
from loraport.errors import DataError
from loraport_ai_toolkit.progress import diagnose

#: Tokens that the chat template may add to a caption, at most.
_TEMPLATE = 64

#: Runs in ai-toolkit's interpreter: counts tokens as its Ideogram 4 does, of captions given on standard input.
_COUNT = """
import json, sys
from transformers import AutoTokenizer
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
def count(caption):
    message = [{"role": "user", "content": [{"type": "text", "text": caption}]}]
    text = tokenizer.apply_chat_template(message, add_generation_prompt=True, tokenize=False)
    return len(tokenizer(text, add_special_tokens=False)["input_ids"])
json.dump([count(caption) for caption in json.load(sys.stdin)], sys.stdout)
"""


def check_lengths(
    items: list[Item], limit: int, python: Path, text_encoder: str, folder: Path, environment: dict[str, str]
) -> None:
    """Raise DataError for the first caption of more than `limit` tokens.

    The tokenizer is asked about those captions only that could be too long: a token is at least one byte. `folder` is
    where ai-toolkit runs, which `text_encoder` may be relative to. Raises what ended the tokenizer, where it does.
    """
    long = [item for item in items if len(item.caption.encode()) + _TEMPLATE > limit]
    if not long:
        return
    command = [str(python), "-c", _COUNT, text_encoder]
    texts = json.dumps([item.caption for item in long])
    done = subprocess.run(command, input=texts, capture_output=True, text=True, cwd=folder, env=environment)
    if done.returncode:
        raise diagnose(done.returncode, done.stderr.splitlines())
    for item, count in zip(long, json.loads(done.stdout), strict=True):
        if count > limit:
            raise DataError(
                f"The caption of {item.image} has {count} tokens, more than dataset.max_text_tokens ({limit}).",
                hint="Shorten it; ai-toolkit would cut it off there.",
            )
