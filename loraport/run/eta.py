"""How long a run will still take, and a loss that can be read: sums over step events, without a clock of their own."""

from __future__ import annotations

from collections import deque
from statistics import median

WARM_UP = 3  #: steps left out after a start: the first ones allocate, tune and compile
WINDOW = 31  #: recent steps that count; their median shrugs off a checkpoint, a recompilation, a busy neighbour


class Eta:
    """Time left, from the median of the recent step times after a warm-up."""

    def __init__(self) -> None:
        self._times: deque[float] = deque(maxlen=WINDOW)
        self._left = 0
        self.restart()

    def restart(self) -> None:
        """A new start: what comes first is warm-up again."""
        self._times.clear()
        self._seen = 0
        self._last: tuple[int, float] | None = None

    def add(self, step: int, total: int, now: float, seconds: float | None) -> None:
        """A step was done. Without its own `seconds` it took the time since the step before, shared among both."""
        if seconds is None and self._last is not None and step > self._last[0]:
            seconds = (now - self._last[1]) / (step - self._last[0])
        self._last = (step, now)
        self._left = total - step
        self._seen += 1
        if seconds is not None and self._seen > WARM_UP:
            self._times.append(seconds)

    @property
    def seconds_a_step(self) -> float | None:
        """Median seconds of a step, or None during the warm-up."""
        return median(self._times) if self._times else None

    @property
    def remaining(self) -> float | None:
        """Seconds until the last step, or None during the warm-up."""
        pace = self.seconds_a_step
        return None if pace is None else pace * self._left


class Smoothed:
    """Exponential mean without the pull of its start towards zero (the bias correction of Adam)."""

    def __init__(self, keep: float = 0.95):
        self._keep = keep
        self._sum = 0.0
        self._weight = 0.0

    def add(self, value: float) -> None:
        self._sum = self._keep * self._sum + (1 - self._keep) * value
        self._weight = self._keep * self._weight + (1 - self._keep)

    @property
    def value(self) -> float | None:
        """The mean, or None before the first value."""
        return self._sum / self._weight if self._weight else None


def duration(seconds: float) -> str:
    """Seconds as people say them: 45 s, 12 min, 3 h 05 min, 2 d 4 h."""
    whole = round(seconds)
    if whole < 90:
        return f"{whole} s"
    minutes = round(whole / 60)
    if minutes < 90:
        return f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours < 48 else f"{hours // 24} d {hours % 24} h"
