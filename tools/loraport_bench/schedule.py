"""Which trainings a bench consists of, in the order A B C, C B A: a drift of the machine then hits all of them."""

from __future__ import annotations

import statistics
from collections.abc import Iterable
from dataclasses import dataclass

from loraport_bench.records import Protocol, Run, Tier
from loraport_bench.settings import Settings


@dataclass(frozen=True)
class Job:
    """One training of the schedule."""

    position: int
    tier: Tier
    profile: str
    batch: int
    backend: str
    seed: int
    repeat: int

    @property
    def group(self) -> tuple[Tier, str, int]:
        """What it is compared within: (tier, profile, batch)."""
        return self.tier, self.profile, self.batch

    @property
    def key(self) -> str:
        return f"{group_name(*self.group)}/{self.backend}/{self.seed}/{self.repeat}"

    @property
    def folder(self) -> str:
        """Name of its folder among the rows."""
        return self.key.replace("/", "-")


def group_name(tier: str, profile: str, batch: int) -> str:
    """What a group is called: `matched/fp8`, or `matched/fp8/batch-4`."""
    return f"{tier}/{profile}" + ("" if batch == 1 else f"/batch-{batch}")


def schedule(settings: Settings | Protocol) -> list[Job]:
    """All trainings, in order, as they are asked for or as a bench's protocol has them. Each repeat takes the next
    seed, and every odd one the backends backwards."""
    jobs = []
    for repeat in range(settings.repeats):
        seed = settings.seeds[repeat % len(settings.seeds)]
        backends = settings.backends if repeat % 2 == 0 else settings.backends[::-1]
        for tier in settings.tiers:
            for profile in settings.profiles:
                for batch in settings.batches:
                    jobs += [(tier, profile, batch, backend, seed, repeat) for backend in backends]
    return [Job(position, *each) for position, each in enumerate(jobs)]


def part_of(jobs: list[Job], number: int, count: int) -> list[Job]:
    """The share of one of `count` machines. What belongs to one (backend, profile, seed) stays together."""
    groups = list(dict.fromkeys((job.backend, job.profile, job.seed) for job in jobs))
    mine = {group for place, group in enumerate(groups) if place % count == number}
    return [job for job in jobs if (job.backend, job.profile, job.seed) in mine]


def expected_seconds(job: Job, done: Iterable[Run]) -> float | None:
    """How long a training will take: the median of those done that are most like it; None when nothing is known.

    Of those that failed only what was out of time tells anything; the others broke off early.
    """
    reasons = (None, "time-out")
    finished = [run for run in done if run.backend == job.backend and (run.failure and run.failure.reason) in reasons]
    for alike in (
        [run for run in finished if run.group == job.group],
        [run for run in finished if (run.profile, run.batch) == (job.profile, job.batch)],
        finished,
    ):
        if alike:
            return statistics.median(run.total_s for run in alike)
    return None
