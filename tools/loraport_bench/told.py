"""What a run's events say: its phases one after the other, its steps, losses and checkpoints."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import TypeVar, cast

from loraport.run import events
from loraport.run.events import Event
from loraport_bench.measure import spread
from loraport_bench.records import Loss, PhaseName, Spread, Steps

T = TypeVar("T")
Span = tuple[PhaseName, float, float]  #: phase, its beginning and end in seconds since 1970

_MOST_STEPS, _MOST_LOSSES = 1000, 500
_NAMES: dict[str, PhaseName] = {"load": "load_quantise"}
#: Steps of which the trainer must tell the time, for its own clock to be taken.
_ENOUGH = 0.9


@dataclass
class Told:
    """A run's events, sorted out. Times in seconds since 1970."""

    spans: list[Span] = field(default_factory=list)
    steps: list[events.Step] = field(default_factory=list)
    gaps: dict[int, float] = field(default_factory=dict)  #: step → seconds since the one before it, pauses left out
    checkpoints: list[events.Checkpoint] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    failure: events.Failed | None = None

    def phases(self) -> dict[PhaseName, float]:
        """Seconds in each phase."""
        total: dict[PhaseName, float] = {}
        for name, start, end in self.spans:
            total[name] = total.get(name, 0.0) + end - start
        return {name: round(seconds, 3) for name, seconds in total.items()}

    def trained_until(self, moment: float) -> float:
        """Seconds of training up to a moment."""
        return sum(max(0.0, min(end, moment) - start) for name, start, end in self.spans if name == "train")

    def trained_at(self, checkpoint: events.Checkpoint) -> float:
        """Seconds of training up to the step of a checkpoint, which may be told while training goes on."""
        ended = (step.time for step in self.steps if step.step == checkpoint.step)
        return self.trained_until(next(ended, checkpoint.time))

    def images(self) -> int | None:
        """Images trained, by what the trainer tells of each step; None when it doesn't tell of any."""
        told = [
            round(step.images_per_second * step.seconds)
            for step in self.steps
            if step.images_per_second and step.seconds
        ]
        untold = len(self.steps) - len(told)
        if not told or (untold and len(set(told)) > 1):
            return None
        return sum(told) + untold * told[0]

    def losses(self, images_a_step: int) -> list[Loss]:
        """The trainer's loss curve, thinned."""
        points = [
            Loss(
                step=step.step,
                images=step.step * images_a_step,
                train_s=round(self.trained_until(step.time), 3),
                loss=step.loss,
            )
            for step in self.steps
            if step.loss is not None
        ]
        return thinned(points, _MOST_LOSSES)

    def measured_spans(self, warm_up: int) -> list[tuple[float, float]]:
        """(beginning, end) of what was trained from the end of the warm-up to that of the last step, without pauses;
        empty when no step was measured."""
        before = [step.time for step in self.steps if step.step <= warm_up]
        after = [step.time for step in self.steps if step.step > warm_up]
        if not after:
            return []
        since, until = max(before, default=0.0), max(after)
        spans = [(max(start, since), min(end, until)) for name, start, end in self.spans if name == "train"]
        return [(start, end) for start, end in spans if start < end]

    def measured(self, warm_up: int) -> Steps | None:
        """Seconds of the steps after the warm-up; None when there is none."""
        outside = [seconds for step, seconds in self.gaps.items() if step > warm_up]
        after = [step for step in self.steps if step.step > warm_up]
        told = [step.seconds for step in after if step.seconds is not None]
        if not after or not (told or outside):
            return None
        trainers = len(told) >= _ENOUGH * len(after) or not outside
        values = told if trainers else outside
        return Steps(
            warm_up=warm_up,
            seconds=Spread(count=len(values), **spread(values)),
            measured="trainer" if trainers else "outside",
            wall_mean=round(statistics.fmean(outside), 4) if outside else None,
            each=[round(value, 5) for value in thinned(values, _MOST_STEPS)],
        )


def sort_out(told: Iterable[Event], began: float, ended: float) -> Told:
    """The events of a run whose process lived from `began` to `ended`. What comes before its first phase is `start`.

    Of a trainer that tells no phase of saving, the time from a step to the checkpoint after it is `save`. So is what
    any trainer still does after its last step.
    """
    events_told = list(told)
    saves_itself = any(isinstance(event, events.PhaseStarted) and event.phase == "save" for event in events_told)
    found = Told()
    phase: PhaseName = "start"
    since = began
    before: float | None = None  # when the last step ended, if nothing came between

    def switch(to: PhaseName, moment: float) -> None:
        nonlocal phase, since
        if moment > since:
            found.spans.append((phase, since, moment))
        phase, since = to, max(since, moment)

    for event in events_told:
        match event:
            case events.PhaseStarted():
                name = _NAMES.get(event.phase, cast(PhaseName, event.phase))
                if name != phase:
                    switch(name, event.time)
                    before = None
            case events.Step():
                if found.steps and event.step <= found.steps[-1].step:
                    continue
                if phase != "train":
                    switch("train", max(since, event.time - (event.seconds or 0.0)))
                # A step may be told with another clock than the one before it, which some trainers tell late.
                if before is not None and event.time > before:
                    found.gaps[event.step] = event.time - before
                before = event.time
                found.steps.append(event)
            case events.Checkpoint():
                found.checkpoints.append(event)
                if before is not None and phase == "train" and not saves_itself:
                    switch("save", before)
                    switch("train", event.time)
                    before = event.time
            case events.Warn():
                found.warnings.append(event.message)
            case events.Failed():
                found.failure = event
            case events.Finished():
                if phase != "convert":
                    switch("convert", event.time)
            case _:
                pass
    switch(phase, max(ended, since))
    if found.steps and found.steps[-1].step == found.steps[-1].total:
        _end_training(found)
    return found


def _end_training(found: Told) -> None:
    """What a trainer still does after its last step, until the next phase, is `save`: its last file, and its end."""
    last = max([found.steps[-1].time, *(each.time for each in found.checkpoints)])
    spans: list[Span] = []
    for name, start, end in found.spans:
        if name == "train" and start <= last < end:
            spans += [("train", start, last)] if start < last else []
            spans.append(("save", last, end))
        elif name == "train" and start > last:
            spans.append(("save", start, end))
        else:
            spans.append((name, start, end))
    found.spans = spans


def thinned(values: Sequence[T], most: int) -> list[T]:
    """At most `most` of the values, evenly spread, the first and the last among them."""
    if len(values) <= most:
        return list(values)
    return [values[round(number * (len(values) - 1) / (most - 1))] for number in range(most)]
