"""Ctrl-C, SIGTERM and SIGHUP while a LoRA is being written: drafts are taken away first, and no output is half done."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from loraport.errors import Interrupted

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class _Stop:
    """What became of the signals of this process's one command."""

    held = 0  # how many `undivided` blocks are being run
    waiting: int | None = None  # the signal that came meanwhile
    raised = False

    def handle(self, number: int, frame: FrameType | None = None) -> None:
        if self.raised:
            return  # the drafts are being taken away; a second Ctrl-C would only leave some of them
        if self.held:
            self.waiting = number
            return
        self.raised = True
        raise Interrupted(
            f"Stopped by {signal.Signals(number).name}. What was being written is taken away; nothing else was changed."
        )


_stop = _Stop()


@contextmanager
def stoppable() -> Iterator[None]:
    """Have the first signal that asks to stop raise Interrupted here. One that is ignored (as nohup does) stays so.

    Elsewhere than in the main thread, where Python hears signals, it does nothing.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    _stop.raised, _stop.waiting = False, None
    before: dict[int, Any] = {}
    try:
        for number in _SIGNALS:
            if signal.getsignal(number) is not signal.SIG_IGN:
                before[number] = signal.signal(number, _stop.handle)
        yield
    finally:
        for caught, handler in before.items():
            signal.signal(caught, handler)


@contextmanager
def undivided() -> Iterator[None]:
    """Do this whole: a signal that comes meanwhile is heard at the end."""
    _stop.held += 1
    try:
        yield
    finally:
        _stop.held -= 1
        if not _stop.held and _stop.waiting is not None:
            number, _stop.waiting = _stop.waiting, None
            _stop.handle(number)
