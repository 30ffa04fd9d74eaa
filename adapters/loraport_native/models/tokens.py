"""Captions as tokens: the checkpoint's tokenizer, with as little imported as that takes."""

from __future__ import annotations

import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loraport.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def read_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """Load the tokenizer in a folder with its chat template. Raises DataError when it cannot be read."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
    except Exception as error:  # transformers raises whatever its many readers raise
        raise DataError(f"{folder}: the tokenizer cannot be read: {error}") from error
    if not tokenizer.chat_template:
        raise DataError(
            f"{folder} has no chat template, and captions are encoded as a chat message.",
            hint="tokenizer_config.json or chat_template.jinja of the original checkpoint holds it.",
        )
    return tokenizer


def tokenize(tokenizer: PreTrainedTokenizerBase, caption: str, max_tokens: int) -> list[int]:
    """Turn a caption into the token ids of one chat message from the user, as the pipeline does.

    Raises DataError when there are more than `max_tokens`.
    """
    messages: list[Any] = [{"role": "user", "content": [{"type": "text", "text": caption}]}]
    text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    if len(ids) > max_tokens:
        start = caption if len(caption) <= 60 else caption[:60] + "…"
        raise DataError(
            f"A caption has {len(ids)} tokens, the limit is {max_tokens}: {start}",
            hint="Shorten it or raise `dataset.max_text_tokens`.",
        )
    return ids


def token_counter(checkpoint: str, revision: str | None = None) -> Callable[[str], int] | None:
    """Counts the tokens of a caption as training will, where the checkpoint's tokenizer is on this machine.

    checkpoint: a folder, or a hub id that the hub's cache may hold; nothing is downloaded, and None is returned where
    there is no tokenizer, or no library that reads it. Raises DataError for a broken one.
    """
    if find_spec("transformers") is None:
        return None
    folder = _local_tokenizer(checkpoint, revision)
    if folder is None:
        return None
    tokenizer = read_tokenizer(folder)
    return lambda caption: len(tokenize(tokenizer, caption, sys.maxsize))


def _local_tokenizer(checkpoint: str, revision: str | None) -> Path | None:
    folder = Path(checkpoint).expanduser()
    if folder.is_dir():
        return folder / "tokenizer" if (folder / "tokenizer" / "tokenizer.json").is_file() else None
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        file = try_to_load_from_cache(checkpoint, "tokenizer/tokenizer.json", revision=revision)
    except HFValidationError:  # `tiny`, or the path of a folder that is not there
        return None
    return Path(file).parent if isinstance(file, str) else None
