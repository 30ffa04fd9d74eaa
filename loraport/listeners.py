"""Run-event listeners: trackers, plots, notifications. Registered through the `register_listeners` hook."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Protocol

from loraport.run.events import Event
from loraport.spec.models import TrainSpec


class Listener(Protocol):
    """Follows one run. An exception in a listener is reported as a warning and never stops the run."""

    def handle(self, event: Event) -> None:
        """Called with each event, in order, after it is in events.jsonl."""


#: Makes the listener of a run from its spec, backend name and folder; None when the run does not concern it.
ListenerFactory = Callable[[TrainSpec, str, Path], Listener | None]
