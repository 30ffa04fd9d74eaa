"""What the trainer's process says, read back: events, and the one error that ended it. No torch."""

from __future__ import annotations

from collections.abc import Iterable

from loraport.errors import BackendError, LoraPortError, OutOfMemoryError
from loraport.run.errors_line import find_error
from loraport.run.events import Event, decode_line
from loraport.run.log_lines import indented, lines_that_matter


def read_line(line: str) -> Iterable[Event] | None:
    """The event in a line of output, or None for ordinary text."""
    event = decode_line(line)
    return None if event is None else [event]


def explain_failure(exit_code: int, log_tail: str) -> LoraPortError:
    """The error the process told, or the best account of how it died."""
    told = find_error(log_tail)
    if told is not None:
        return told
    if exit_code in (-9, 137):
        return OutOfMemoryError(
            "The trainer was killed (SIGKILL), which is what the system does when memory runs out.",
            hint="Close other programs and go on with: loraport resume. Or lower dataset.resolution or "
            "train.batch_size and start again.",
        )
    return BackendError(
        f"The native trainer failed with exit code {exit_code}. It said:{indented(lines_that_matter(log_tail))}",
        hint="The whole log is log.txt in the run folder.",
    )
