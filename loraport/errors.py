"""Errors a user can cause or must act on. Each carries the process exit code that `docs/exit-codes.md` documents."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class LoraPortError(ValueError):
    """A failure told in one message: what failed, where, and (in `hint`) what to do about it."""

    exit_code = 1

    def __init__(self, message: str, hint: str | None = None):
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return self.message if self.hint is None else f"{self.message}\n  {self.hint}"


class SpecError(LoraPortError):
    """The spec, or the command line that changes it, asks for something that is not there or not possible."""

    exit_code = 3


class DataError(LoraPortError):
    """An image, a caption, a LoRA file or a checkpoint cannot be used."""

    exit_code = 4


class BackendError(LoraPortError):
    """The trainer is not ready, failed, or ended without the file it should have written."""

    exit_code = 5


class OutOfMemoryError(LoraPortError):
    """The device or the host ran out of memory."""

    exit_code = 6


class RunFolderError(LoraPortError):
    """The run folder is taken, locked, not a folder, not writable, or full."""

    exit_code = 7


class DifferentError(LoraPortError):
    """What was compared is not the same: two LoRA files are other adapters, or a bench got worse."""

    exit_code = 8


class Interrupted(LoraPortError):
    """The run was stopped on request; the message says how to go on."""

    exit_code = 130


def nearest(name: str, choices: Iterable[str]) -> str | None:
    """The choice that looks most like `name`, or None when none is close."""
    found = difflib.get_close_matches(name, list(choices), n=1, cutoff=0.6)
    return found[0] if found else None


def unknown(what: str, name: str, choices: Iterable[str]) -> str:
    """One sentence for a name that is not among `choices`: the nearest one and all of them."""
    known = sorted(choices)
    close = nearest(name, known)
    guess = f" Did you mean {close!r}?" if close else ""
    return f"{what} {name!r} is not known.{guess} Choices: {', '.join(known) or 'none'}."
