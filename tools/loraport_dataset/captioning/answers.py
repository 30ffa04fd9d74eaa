"""What a describer is, and how it fails: the words between the job, the endpoint and the local model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, Protocol


@dataclass(frozen=True)
class Message:
    """One turn of the conversation; `picture` is a JPEG's bytes."""

    role: Literal["system", "user", "assistant"]
    text: str
    picture: bytes | None = None


@dataclass(frozen=True)
class Answer:
    """What the model said. `cut_off` when it met a limit before its end; tokens are 0 where nobody counted."""

    text: str
    cut_off: bool = False
    prompt_tokens: int = 0
    answer_tokens: int = 0


class Describer(Protocol):
    """Something that can be asked about a picture."""

    async def answer(self, messages: list[Message], schema: dict[str, Any] | None) -> Answer:
        """The model's next turn, in the shape of `schema` where the describer can enforce it.

        Raises Unanswered or Refused for this picture alone, a LoraPortError when no picture can be described.
        """
        ...

    async def close(self) -> None:
        """Let connections and threads go."""
        ...


class Unanswered(Exception):
    """The service did not answer, after all attempts: it may be down for the next picture too."""


class Refused(Exception):
    """The service answered that it will not describe this picture, or not in this way."""
