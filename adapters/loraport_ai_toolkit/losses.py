"""Steps of a running ai-toolkit, from its log database; its progress bar fills in what the database leaves out.

The database (`use_ui_logger`, table metrics) has the exact loss, rate and time of every step but a session's first,
which ai-toolkit does not log, and counts steps from 0. The bar shows every loss rounded to four digits.
"""

from __future__ import annotations

import contextlib
import re
import sqlite3
from collections.abc import Iterator
from pathlib import Path

from loraport.run.events import Step, Validation

_BAR = re.compile(r"(\d+)/\d+ \[.*\blr: (\S+) loss: ([^\s\]]+)")


class Steps:
    """Turns what ai-toolkit tells into Step events, each step once and in order."""

    def __init__(self, database: Path, total: int, images_per_step: int, begun: float):
        self.total = total
        self.done = 0  #: optimizer steps that are known to be done
        self.spoilt: set[int] = set()  #: steps whose loss was no number
        self._database = database
        self._images = images_per_step
        self._begun = begun
        self._told = 0
        self._last_time: float | None = None
        self._from_bar: dict[int, tuple[float, float]] = {}
        self._bar: tuple[int, str, str] | None = None
        self._nan = False
        self._validated = -1
        self._pauses: list[float] = []

    def begin(self, step: int) -> None:
        """The session goes on after `step`."""
        self.done = self._told = step

    def paused(self, moment: float) -> None:
        """Between two steps it did something else (a save, a sample), which was seen to end at this moment."""
        self._pauses.append(moment)

    def read_bar(self, line: str) -> None:
        """Take in a line of the progress bar; others are passed over."""
        if "loss is nan" in line:
            self._nan = True
            return
        found = _BAR.search(line)
        if found is None:
            return
        done, rate, loss = int(found.group(1)), found.group(2), found.group(3)
        # The bar is drawn with a step's loss while it still counts the step before, and again when it counts the step.
        if self._bar is not None and self._bar[1:] == (rate, loss) and done <= self._bar[0] + 1:
            self._bar = (done, rate, loss)
            return
        self._bar = (done, rate, loss)
        self.done = max(self.done, done + 1)
        self._from_bar[done + 1] = (float(loss), float(rate))
        if self._nan:
            self.spoilt.add(done + 1)
            self._nan = False

    def nan_in_a_row(self) -> int:
        """How many of the latest steps had a loss that is no number."""
        count = 0
        while self.done - count in self.spoilt:
            count += 1
        return count

    def new(self, last: bool = False) -> Iterator[Step | Validation]:
        """Events since the last call. With `last`, also the steps that only the bar has told."""
        for step, values, time in self._rows():
            if step > self._told:
                yield from self._only_on_bar(step)
                before = self._last_time if step == self._told + 1 else None
                paused = any(before is not None and before <= moment <= time for moment in self._pauses)
                seconds = time - before if before is not None and not paused else None
                self._last_time = time
                told = self._tell(step, values.get("loss/loss"), values.get("learning_rate"), seconds)
                # When it was done, not when it was read: the database is written now and then, and looked at so too.
                yield told.model_copy(update={"time": time})
            if "val/loss" in values and step > self._validated:
                self._validated = step
                yield Validation(step=step, loss=values["val/loss"])
        if last or not self._database.is_file():
            yield from self._only_on_bar(self.done + 1)

    def _only_on_bar(self, before: int) -> Iterator[Step]:
        for step in range(self._told + 1, before):
            loss, rate = self._from_bar.get(step, (None, None))
            if rate is not None:
                yield self._tell(step, loss, rate, None)

    def _tell(self, step: int, loss: float | None, rate: float | None, seconds: float | None) -> Step:
        self._told = step
        self.done = max(self.done, step)
        for old in [known for known in self._from_bar if known <= step]:
            del self._from_bar[old]
        return Step(
            step=step,
            total=self.total,
            loss=None if step in self.spoilt else loss,
            lr=rate,
            seconds=seconds,
            images_per_second=self._images / seconds if seconds else None,
        )

    def _rows(self) -> list[tuple[int, dict[str, float], float]]:
        """(optimizer step, values by key, time) of this session that have not been told."""
        if not self._database.is_file():
            return []
        try:
            with contextlib.closing(sqlite3.connect(f"file:{self._database}?mode=ro", uri=True, timeout=1)) as database:
                rows = database.execute(
                    "SELECT metrics.step, key, value_real, wall_time FROM metrics JOIN steps USING (step) "
                    "WHERE metrics.step >= ? AND wall_time >= ? AND value_real IS NOT NULL ORDER BY metrics.step",
                    (min(self._told, self._validated + 1 if self._validated >= 0 else self._told), self._begun),
                ).fetchall()
        except sqlite3.Error:  # it is being made
            return []
        found: dict[int, tuple[dict[str, float], float]] = {}
        for step, key, value, time in rows:
            found.setdefault(step + 1, ({}, time))[0][key] = value
        return [(step, values, time) for step, (values, time) in found.items()]
