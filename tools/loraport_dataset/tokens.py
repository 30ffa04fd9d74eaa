"""How long captions are in tokens: exactly, where the checkpoint's tokenizer is on this machine, else estimated."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from loraport.families import BYTES_PER_TOKEN


@dataclass(frozen=True)
class TokenCounter:
    """Counts a caption's tokens; `source` says how, for a person."""

    count: Callable[[str], int]
    exact: bool
    source: str


ESTIMATE = TokenCounter(
    lambda caption: -(-len(caption.encode("utf-8", "replace")) // BYTES_PER_TOKEN),
    exact=False,
    source=f"estimated at {BYTES_PER_TOKEN} bytes a token, as no tokenizer of the checkpoint is on this machine",
)


def token_counter(checkpoint: str, revision: str | None = None, backend: Any = None) -> TokenCounter:
    """The counter that a backend has for a checkpoint (a folder or a hub id), else an estimate. Downloads nothing.

    backend: one with a `token_counter` (`loraport.backend.Backend`); the default one when left out. Raises DataError
    for a tokenizer that is there and broken.
    """
    from loraport.plugins import plugins
    from loraport.run.api import DEFAULT_BACKEND

    chosen = plugins().backend(DEFAULT_BACKEND) if backend is None else backend
    find: Callable[[str, str | None], Callable[[str], int] | None] | None = getattr(chosen, "token_counter", None)
    count = None if find is None else find(checkpoint, revision)
    if count is None:
        return ESTIMATE

    def of_any_text(caption: str) -> int:
        # Half a character, which JSON can escape, is no text for a tokenizer; training refuses it.
        return count(caption.encode("utf-8", "replace").decode())

    return TokenCounter(of_any_text, True, f"counted by the tokenizer of {checkpoint}")
