"""The lines of a trainer's log that tell a person why it ended: the error, without the traceback above it."""

from __future__ import annotations

import re

_PLACE = re.compile(r'\s*File ".*", line \d+')
_ERROR = re.compile(r"[\w.]*(Error|Exception|Interrupt)\b")
_AFTER_ERROR = 2  # lines of one message that may follow its first
_LONGEST = 400  # characters of a line that are shown


def lines_that_matter(log: str, most: int = 6) -> list[str]:
    """The last exception in a log after the place in code that raised it; where there is none, the last `most` lines.

    Events, progress bars and the frames of a traceback are never among them.
    """
    lines = [line.rstrip() for line in re.split(r"[\r\n]+", log) if _is_text(line)]
    error = next((number for number in range(len(lines) - 1, -1, -1) if _ERROR.match(lines[number])), None)
    if error is None:
        return [_short(line) for line in _without_frames(lines)[-most:]]
    place = next((line for line in reversed(lines[:error]) if _PLACE.match(line)), None)
    told = _without_frames(lines[error : error + 1 + _AFTER_ERROR])
    return [_short(line) for line in ([place] if place else []) + told]


def indented(lines: list[str]) -> str:
    """Lines as they are put under the sentence of an error."""
    return "".join(f"\n    {line}" for line in lines)


def _is_text(line: str) -> bool:
    return bool(line.strip()) and not line.startswith("@loraport ") and not re.search(r"\d+%\|", line)


def _without_frames(lines: list[str]) -> list[str]:
    kept, inside = [], False
    for line in lines:
        inside = line.startswith("Traceback (most recent call last)") or (inside and line.startswith(" "))
        if not inside:
            kept.append(line)
    return kept


def _short(line: str) -> str:
    line = line.strip()
    return line if len(line) <= _LONGEST else f"{line[:_LONGEST]} …"
