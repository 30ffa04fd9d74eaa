"""A bench's rows put together: each backend's repeats within a group, and what the group shows beyond their spread."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import get_args

from loraport_bench.records import PhaseName, Results, Run
from loraport_bench.schedule import group_name

PHASES: tuple[PhaseName, ...] = get_args(PhaseName)


@dataclass(frozen=True)
class Numbers:
    """Values with their median and their 10th and 90th percentiles."""

    count: int
    median: float
    p10: float
    p90: float
    low: float
    high: float

    def apart_from(self, other: Numbers) -> bool:
        """Whether each median lies outside the other's range from 10th to 90th percentile."""
        return not other.p10 <= self.median <= other.p90 and not self.p10 <= other.median <= self.p90


def numbers(values: Iterable[float | None]) -> Numbers | None:
    """Of the values that were measured; None when none was."""
    known = [value for value in values if value is not None]
    if not known:
        return None
    deciles = statistics.quantiles(known, n=10, method="inclusive") if len(known) > 1 else known * 9
    return Numbers(len(known), statistics.median(known), deciles[0], deciles[-1], min(known), max(known))


@dataclass(frozen=True)
class Entry:
    """A backend within a group: all of its repeats."""

    backend: str
    runs: list[Run]

    @cached_property
    def good(self) -> list[Run]:
        """The repeats that came to their end."""
        return [run for run in self.runs if run.status == "ok"]

    @cached_property
    def step_s(self) -> Numbers | None:
        """Of every measured step of every repeat."""
        return numbers(each for run in self.good if run.steps for each in run.steps.each)

    @cached_property
    def images_per_second(self) -> Numbers | None:
        return numbers(run.images_per_second for run in self.good)

    @cached_property
    def device_bytes(self) -> Numbers | None:
        """Peaks, one for each repeat."""
        return numbers(run.device_memory.peak_bytes if run.device_memory else None for run in self.good)

    @cached_property
    def device_gib(self) -> Numbers | None:
        return numbers(run.device_memory.peak_bytes / 2**30 if run.device_memory else None for run in self.good)

    @cached_property
    def host_bytes(self) -> Numbers | None:
        return numbers(run.host_memory.peak_bytes if run.host_memory else None for run in self.good)

    @cached_property
    def total_s(self) -> Numbers | None:
        return numbers(run.total_s for run in self.good)

    @cached_property
    def joules_per_image(self) -> Numbers | None:
        """Of the measured steps; not what earlier versions recorded, into which compiling went."""
        told = [run.energy for run in self.good if run.energy and run.energy.steps_joules is not None]
        return numbers(each.joules_per_image for each in told)

    @cached_property
    def joules(self) -> Numbers | None:
        """Of whole runs."""
        return numbers(run.energy.joules if run.energy else None for run in self.good)

    def device_in(self, phase: PhaseName) -> Numbers | None:
        """Peaks of device memory in a phase, bytes."""
        return numbers(run.device_memory.by_phase.get(phase) if run.device_memory else None for run in self.good)

    @cached_property
    def first_steps_s(self) -> Numbers | None:
        """Seconds of training before the measured steps: what is left of the phase without those."""
        return numbers(
            max(0.0, run.phases["train"] - run.steps.wall_mean * (run.work.steps - run.steps.warm_up))
            for run in self.good
            if run.steps and run.steps.wall_mean and run.work and "train" in run.phases
        )

    @cached_property
    def loss(self) -> Numbers | None:
        """Held-out losses, one for each repeat and so for each seed."""
        return numbers(run.quality.loss if run.quality else None for run in self.good)

    @cached_property
    def gain(self) -> Numbers | None:
        return numbers(run.quality.gain if run.quality else None for run in self.good)

    @cached_property
    def scopes(self) -> list[str]:
        """What the device memory is of."""
        return sorted({run.device_memory.scope for run in self.good if run.device_memory})

    def phase(self, name: PhaseName) -> Numbers | None:
        """Seconds in a phase, over the repeats that had it."""
        return numbers(run.phases.get(name) for run in self.good)

    @cached_property
    def why_not(self) -> str:
        """Why no repeat came to its end, in a word or two; empty when one did."""
        if self.good:
            return ""
        return ", ".join(sorted({run.failure.reason.replace("-", " ") for run in self.runs if run.failure}))


@dataclass(frozen=True)
class Group:
    """Rows that may be compared with each other: one tier, one quantisation, one batch size."""

    tier: str
    profile: str
    batch: int
    entries: list[Entry]

    @property
    def name(self) -> str:
        return group_name(self.tier, self.profile, self.batch)

    @property
    def title(self) -> str:
        tier = "Matched" if self.tier == "matched" else "Best effort"
        batch = "" if self.batch == 1 else f", batch {self.batch}"
        return f"{tier}, {'as the spec says' if self.profile == 'spec' else self.profile}{batch}"

    @cached_property
    def without(self) -> float | None:
        """The held-out loss of the model without a LoRA."""
        scored = numbers(run.quality.without if run.quality else None for one in self.entries for run in one.good)
        return scored.median if scored else None

    @cached_property
    def phases(self) -> list[PhaseName]:
        """The phases that any run had, in their order."""
        return [name for name in PHASES if any(name in run.phases for one in self.entries for run in one.good)]

    def headlines(self) -> list[str]:
        """A sentence each on speed, memory and quality: who leads, and whether beyond the spread of the repeats."""
        return [
            *_lead(self.entries, lambda one: one.step_s, _speed),
            *self._memory_headlines(),
            *_lead(self.entries, lambda one: one.loss, _quality(self.without)),
        ]

    def _memory_headlines(self) -> list[str]:
        """Of training and of the whole run apart where these differ: caching and loading may take more."""
        training, whole = (
            _lead(self.entries, of, _memory)
            for of in (lambda one: one.device_in("train"), lambda one: one.device_bytes)
        )
        if training == whole:
            return [f"Device memory: {text}" for text in whole]
        told = (("Device memory while training", training), ("Device memory over the whole run", whole))
        return [f"{what}: {text}" for what, texts in told for text in texts]


def groups(results: Results) -> list[Group]:
    """Every tier, quantisation and batch size, in the order in which they were asked for; the backends likewise."""
    wanted = list(dict.fromkeys(run.group for run in results.runs))
    told = results.protocol
    order = list(itertools.product(told.tiers, told.profiles, told.batches))
    found = []
    for group in sorted(wanted, key=lambda each: order.index(each) if each in order else len(order)):
        rows = [run for run in results.runs if run.group == group]
        names = dict.fromkeys([*results.protocol.backends, *(run.backend for run in rows)])
        entries = [Entry(name, [run for run in rows if run.backend == name]) for name in names]
        found.append(Group(*group, [one for one in entries if one.runs]))
    return found


def _lead(
    entries: Sequence[Entry], of: Callable[[Entry], Numbers | None], tell: Callable[[str, Numbers, str, Numbers], str]
) -> list[str]:
    """The sentence on who has least of something; none where fewer than two were measured."""
    measured = [(found.median, one.backend, found) for one in entries if (found := of(one)) is not None]
    if len(measured) < 2:
        return []
    (_, first, lead), (_, second, behind), *_ = sorted(measured, key=lambda each: each[0])
    return [tell(first, lead, second, behind)]


def _speed(first: str, lead: Numbers, second: str, behind: Numbers) -> str:
    if not lead.apart_from(behind) or not lead.median:
        return f"Speed: {first} and {second} are level, at {seconds(lead.median)} and {seconds(behind.median)} a step."
    times = f"{behind.median / lead.median:.2f} times as long"
    return f"Speed: {first} is first at {seconds(lead.median)} a step; {second}, the next, takes {times}."


def _memory(first: str, lead: Numbers, second: str, behind: Numbers) -> str:
    if not lead.apart_from(behind):
        return f"{first} and {second} are level, at {gib(lead.median)} and {gib(behind.median)}."
    return f"{first} takes least, {gib(lead.median)}; {second}, the next, takes {gib(behind.median)}."


def _quality(without: float | None) -> Callable[[str, Numbers, str, Numbers], str]:
    def tell(first: str, lead: Numbers, second: str, behind: Numbers) -> str:
        beside = f" ({without:.4f} without a LoRA)" if without is not None else ""
        if lead.count < 2 or behind.count < 2:
            seeds = "; of one seed, so the difference may be chance"
        elif lead.apart_from(behind):
            seeds = ", beyond the spread over the seeds"
        else:
            seeds = ", within the spread over the seeds"
        return (
            f"Held-out loss: {first} {lead.median:.4f}, {second} {behind.median:.4f}{beside}; lower is better{seeds}."
        )

    return tell


def seconds(value: float) -> str:
    """A time with three significant digits: 0.462 s, 31.2 s, 1,240 s."""
    return f"{value:,.0f} s" if value >= 100 else f"{value:#.3g} s"


def gib(value: float) -> str:
    """A size in GiB, below half of one in MiB, and below ten of those in KiB."""
    if value >= 2**29:
        return f"{value / 2**30:.2f} GiB"
    return f"{value / 2**20:.0f} MiB" if value >= 10 * 2**20 else f"{value / 2**10:,.0f} KiB"


def joules(value: float) -> str:
    return f"{value / 1000:.2f} kJ" if value >= 1000 else f"{value:.0f} J"


def ranged(found: Numbers | None, tell: Callable[[float], str]) -> str:
    """A median with its 10th and 90th percentile, when it is of several values; – when nothing was measured."""
    if found is None:
        return "–"
    return tell(found.median) if found.count < 2 else f"{tell(found.median)} ({tell(found.p10)} – {tell(found.p90)})"
