"""How a supervised process tells which error ended it: one line of `PREFIX` and JSON in its output."""

from __future__ import annotations

import json

from loraport import errors
from loraport.errors import LoraPortError

PREFIX = "@loraport-error "


def encode_error(error: LoraPortError) -> str:
    """The line for a process to print before it exits with `error.exit_code`."""
    content = {"kind": type(error).__name__, "message": error.message, "hint": error.hint}
    return PREFIX + json.dumps(content, ensure_ascii=False)


def find_error(log_tail: str) -> LoraPortError | None:
    """The last error told in some lines of output, or None."""
    for line in reversed(log_tail.splitlines()):
        error = _decode(line)
        if error is not None:
            return error
    return None


def _decode(line: str) -> LoraPortError | None:
    """The error in a line, or None. A line may be cut off, or another process may have written into it."""
    if not line.startswith(PREFIX):
        return None
    try:
        told = json.loads(line.removeprefix(PREFIX))
        kind: type[LoraPortError] = getattr(errors, told["kind"])
        return kind(told["message"], told["hint"])
    except (ValueError, TypeError, KeyError, AttributeError):
        return None
