"""`python -m loraport_native.lengthen CHECKPOINT TOKENS FOLDER`: make every caption exactly that many tokens long.

For measurements: the .txt captions of FOLDER are continued with their own words, and to the exact length with digits.
"""

from __future__ import annotations

import sys
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from loraport.errors import DataError, LoraPortError
from loraport.run.errors_line import encode_error
from loraport_native.models.checkpoint import find_checkpoint, load_tokenizer
from loraport_native.models.tokens import tokenize


def main() -> int:
    checkpoint, tokens, folder = sys.argv[1:]
    try:
        tokenizer = load_tokenizer(find_checkpoint(checkpoint, unconditional=False))
        for file in sorted(Path(folder).glob("*.txt")):
            file.write_text(lengthen(tokenizer, file.read_text(encoding="utf-8"), int(tokens)), encoding="utf-8")
    except LoraPortError as error:
        print(encode_error(error), flush=True)
        return error.exit_code
    return 0


def lengthen(tokenizer: PreTrainedTokenizerBase, caption: str, tokens: int) -> str:
    """`caption`, or its beginning, continued until the chat message with it has exactly `tokens` tokens.

    Raises DataError when no such caption is found.
    """

    def count(text: str) -> int:
        return len(tokenize(tokenizer, text, sys.maxsize))

    words = caption.split()
    text, used = "", 0
    while count(f"{(longer := f'{text} {words[used % len(words)]}'.strip())} 7") <= tokens:
        text, used = longer, used + 1
    # A digit is a token of its own for Qwen's tokenizer and for the random checkpoints'. There is at least one: a space
    # at the end would go when the caption is read.
    text += " "
    text += "7" * (tokens - count(text))
    if count(text.strip()) != tokens:
        raise DataError(f"No caption of exactly {tokens} tokens could be made with this checkpoint's tokenizer.")
    return text


if __name__ == "__main__":
    sys.exit(main())
