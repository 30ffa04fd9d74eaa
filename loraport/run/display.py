"""What a person or a machine sees of a run: a live bar, plain lines, or JSON, all from the same events.

The end of a failed or stopped run is not told here: it is the error that the caller gets.
"""

from __future__ import annotations

import os
import sys
from types import TracebackType
from typing import Protocol, Self, TextIO

from loraport.run import events
from loraport.run.eta import Eta, Smoothed, duration
from loraport.run.events import Event

PLAIN_SECONDS = 10.0  #: a plain step line comes after so many seconds, or after this share of the steps
PLAIN_SHARE = 0.1

_PHASES = {
    "start": "Starting",
    "load": "Loading",
    "cache": "Preparing",
    "compile": "Compiling",
    "train": "Training",
    "validate": "Measuring the held-out loss",
    "sample": "Drawing samples",
    "save": "Saving",
    "convert": "Converting",
}


class Display(Protocol):
    """Shows events as they come; entered before the first, left after the last."""

    def __call__(self, event: Event) -> None: ...

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


def choose_display(as_json: bool = False, stream: TextIO | None = None) -> Display:
    """JSON lines when asked for, a live bar on a terminal, else plain lines. `stream` is standard output by default."""
    stream = sys.stdout if stream is None else stream
    if as_json:
        return JsonLines(stream)
    if stream.isatty() and os.environ.get("TERM") != "dumb":
        return LiveBar(stream)
    return PlainLines(stream)


class _OnStream:
    """A display that needs nothing opened or closed."""

    def __init__(self, stream: TextIO):
        self._stream = stream

    def _print(self, text: str) -> None:
        print(text, file=self._stream, flush=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        pass


class JsonLines(_OnStream):
    """Each event as one line of JSON, as in events.jsonl."""

    def __call__(self, event: Event) -> None:
        self._print(event.model_dump_json())


class PlainLines(_OnStream):
    """A line for each phase and whatever matters, and a step line now and then."""

    def __init__(self, stream: TextIO):
        super().__init__(stream)
        self._meter = _Meter()
        self._phases: set[str] = set()
        self._told_time = float("-inf")
        self._told_step = 0

    def __call__(self, event: Event) -> None:
        self._meter.take(event)
        if isinstance(event, events.Step):
            if self._due(event):
                self._told_time, self._told_step = event.time, event.step
                self._print(f"step {event.step}/{event.total}  {self._meter.facts()}".rstrip())
        elif isinstance(event, events.PhaseStarted):
            phase = _phase(event)
            # Training comes back after every measurement, whose own line follows: once is enough.
            if phase not in self._phases and event.phase != "validate":
                self._phases.add(phase)
                self._print(phase)
        elif (text := _sentence(event)) is not None:
            self._print(text)

    def _due(self, event: events.Step) -> bool:
        ahead = event.step - self._told_step
        return (
            event.time - self._told_time >= PLAIN_SECONDS
            or not 0 <= ahead < PLAIN_SHARE * event.total
            or event.step == event.total
        )


class LiveBar:
    """One live line on a terminal: phase, bar, steps, loss, pace, memory, time left. What matters scrolls above it."""

    def __init__(self, stream: TextIO):
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn

        self._meter = _Meter()
        self._progress = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("{task.fields[facts]}", markup=False),
            console=Console(file=stream),
            transient=True,
        )
        self._task = self._progress.add_task(_PHASES["start"], total=None, facts="")

    def __call__(self, event: Event) -> None:
        self._meter.take(event)
        if isinstance(event, events.PhaseStarted):
            # A new task, because rich cannot make the total of an old one unknown again.
            self._progress.remove_task(self._task)
            self._task = self._progress.add_task(_phase(event), total=None, facts="")
        elif isinstance(event, events.Progress):
            self._progress.update(self._task, completed=event.done, total=event.total)
        elif isinstance(event, events.Step):
            self._progress.update(
                self._task,
                description=_PHASES["train"],
                completed=event.step,
                total=event.total,
                facts=self._meter.facts(),
            )
        elif (text := _sentence(event)) is not None:
            self._progress.console.print(text, markup=False, highlight=False)

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()


class _Meter:
    """What step events add up to."""

    def __init__(self) -> None:
        self._eta = Eta()
        self._loss = Smoothed()
        self._memory: float | None = None

    def take(self, event: Event) -> None:
        if isinstance(event, events.Started | events.Resumed) or (
            isinstance(event, events.PhaseStarted) and event.phase == "compile"
        ):
            self._eta.restart()
        elif isinstance(event, events.Step):
            self._eta.add(event.step, event.total, event.time, event.seconds)
            self._memory = event.peak_memory_gib
            if event.loss is not None:
                self._loss.add(event.loss)

    def facts(self) -> str:
        """Loss, pace, memory and time left, as far as they are known."""
        parts = []
        if self._loss.value is not None:
            parts.append(f"loss {self._loss.value:.4f}")
        if self._eta.seconds_a_step is not None:
            parts.append(f"{self._eta.seconds_a_step:.2f} s/step")
        if self._memory is not None:
            parts.append(f"{self._memory:.1f} GiB")
        if self._eta.remaining is not None:
            parts.append(f"{duration(self._eta.remaining)} left")
        return "  ".join(parts)


def _phase(event: events.PhaseStarted) -> str:
    title = _PHASES[event.phase]
    return f"{title}: {event.detail}" if event.detail else title


def _sentence(event: Event) -> str | None:
    """What is worth a line of its own."""
    match event:
        case events.Started():
            return f"{'Going on' if event.resume else 'Starting'} with {event.backend}"
        case events.Resumed():
            return f"Going on from step {event.step}"
        case events.Checkpoint():
            return f"Checkpoint at step {event.step}: {event.path}"
        case events.Validation():
            return f"Held-out loss at step {event.step}: {event.loss:.4f}"
        case events.Sample():
            return f"Sample at step {event.step}: {event.path}"
        case events.Warn():
            return f"Warning: {event.message}"
        case events.Stopping():
            return "Stopping after a checkpoint; ask again (Ctrl-C) to stop at once"
        case events.Finished():
            return (
                f"Finished at step {event.step}: {event.lora}, proven to match what was trained "
                f"(largest difference {event.worst_difference:.1e}, {event.proof})"
            )
        case _:
            return None
