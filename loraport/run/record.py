"""What a run tells, written down and passed on: events.jsonl, state.json, and whoever listens."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Self

from loraport.errors import RunFolderError
from loraport.listeners import Listener
from loraport.run import events
from loraport.run.events import Event
from loraport.run.folder import RunFolder
from loraport.run.state import State

STATE_SECONDS = 1.0  #: state.json is written at most this often for steps, and at once for all that matters more

_AT_ONCE = (
    events.Started,
    events.Checkpoint,
    events.Stopping,
    events.Interrupted,
    events.Failed,
    events.Finished,
)


class Record:
    """The events of one run, in order. Needs the folder's lock; as a context manager it closes its file.

    Each event is in events.jsonl before anybody hears of it. A line there is whole or absent: what a crash tore is cut
    off when the file is opened again. An exception in a listener becomes one warning, and the run goes on.
    """

    def __init__(
        self, folder: RunFolder, listeners: Iterable[Listener] = (), on_event: Callable[[Event], None] | None = None
    ):
        self.state: State = folder.read_state()
        self._folder = folder
        self._hearers: list[tuple[str, Callable[[Event], None]]] = [
            (type(listener).__name__, listener.handle) for listener in listeners
        ]
        if on_event is not None:
            self._hearers.append(("on_event", on_event))
        self._warned: set[str] = set()
        self._written = 0.0
        try:
            self._file = os.open(folder.events_file, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
            self._size = _cut_torn_line(self._file)
        except OSError as error:
            raise _cannot_append(folder.events_file, error) from error

    def emit(self, event: Event) -> None:
        """Write the event down, bring the state up to date, and tell the listeners.

        Raises RunFolderError when the folder cannot be written any more.
        """
        self._append(event)
        self.state = self.state.after(event)
        if isinstance(event, _AT_ONCE) or time.monotonic() - self._written >= STATE_SECONDS:
            self._write_state()
        failures = {}
        for name, hear in self._hearers:
            try:
                hear(event)
            except Exception as error:  # a tracker or a display must not cost anybody a training
                failures[name] = error
        for name, failure in failures.items():
            self.warn_once(name, f"{name} failed and may miss events: {type(failure).__name__}: {failure}")

    def warn_once(self, about: str, message: str) -> None:
        """Tell a warning unless there was one about the same thing."""
        if about not in self._warned:
            self._warned.add(about)
            self.emit(events.Warn(message=message))

    def mark_trained(self) -> None:
        """The trainer's own LoRA is there: from now on resuming redoes only its conversion."""
        self.state = replace(self.state, trained=True, updated=time.time())
        self._write_state()

    def close(self) -> None:
        """Close the file of events."""
        os.close(self._file)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _append(self, event: Event) -> None:
        line = event.model_dump_json().encode() + b"\n"
        try:
            written = os.write(self._file, line)
            if written < len(line):
                os.write(self._file, line[written:])  # says why the first write was short
        except OSError as error:
            with contextlib.suppress(OSError):
                os.ftruncate(self._file, self._size)
            raise _cannot_append(self._folder.events_file, error) from error
        self._size += len(line)

    def _write_state(self) -> None:
        self._folder.write_state(self.state)
        self._written = time.monotonic()


def read_events(path: Path) -> Iterator[Event]:
    """The events in an events.jsonl, without a torn last line. Raises RunFolderError naming a line that is no event."""
    try:
        file = open(path, "rb")  # noqa: SIM115 - closed below; only opening it is guarded
    except OSError as error:
        raise RunFolderError(f"{path} cannot be read: {error.strerror}.") from error
    with file:
        for number, line in enumerate(file, 1):
            if not line.endswith(b"\n"):
                return
            try:
                yield events.decode(line.decode())
            except ValueError as error:
                raise RunFolderError(f"{path}: line {number} is not an event.") from error


def _cut_torn_line(descriptor: int) -> int:
    """Cut off what follows the last newline; the size that is left."""
    size = end = os.fstat(descriptor).st_size
    while end > 0:
        start = max(0, end - 65536)
        newline = os.pread(descriptor, end - start, start).rfind(b"\n")
        if newline >= 0:
            end = start + newline + 1
            break
        end = start
    if end < size:
        os.ftruncate(descriptor, end)
    return end


def _cannot_append(path: Path, error: OSError) -> RunFolderError:
    return RunFolderError(
        f"{path} cannot be written: {error.strerror or error}.",
        hint=f"Free some space, then go on with: loraport resume {path.parent}",
    )
