from __future__ import annotations

import asyncio
from datetime import UTC, datetime

import pytest

from loraport_dataset.captioning.pace import FIRST_BACKOFF, LONGEST_BACKOFF, Pace, retry_after


class Clock:
    """Time that passes only while somebody sleeps."""

    def __init__(self) -> None:
        self.now = 100.0
        self.slept: list[float] = []

    def __call__(self) -> float:
        return self.now

    async def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        self.now += seconds
        await asyncio.sleep(0)


def moments(pace: Pace, clock: Clock, turns: int) -> list[float]:
    async def one() -> float:
        await pace.turn()
        return clock.now - 100

    async def all_of_them() -> list[float]:
        return list(await asyncio.gather(*(one() for _ in range(turns))))

    return asyncio.run(all_of_them())


def test_turns_are_evenly_spaced_for_all_workers_together() -> None:
    clock = Clock()
    assert moments(Pace(30, clock, clock.sleep), clock, 4) == [0, 2, 4, 6]


def test_without_a_rate_every_turn_is_at_once() -> None:
    clock = Clock()
    assert moments(Pace(None, clock, clock.sleep), clock, 3) == [0, 0, 0]


def test_nobody_gets_a_turn_while_the_service_is_to_be_left_alone() -> None:
    clock = Clock()
    pace = Pace(60, clock, clock.sleep)
    pace.hold(5)
    pace.hold(2)
    assert moments(pace, clock, 2) == [5, 6]


def test_each_failure_waits_longer_up_to_a_limit() -> None:
    clock = Clock()
    pace = Pace(None, clock, clock.sleep)

    async def fail() -> None:
        for failures in range(1, 12):
            await pace.back_off(failures)

    asyncio.run(fail())
    for number, seconds in enumerate(clock.slept):
        longest = min(LONGEST_BACKOFF, FIRST_BACKOFF * 2**number)
        assert longest / 2 <= seconds <= longest


@pytest.mark.parametrize(
    ("header", "seconds"),
    [
        (None, None),
        ("7", 7),
        ("0.5", 0.5),
        ("-3", 0),
        ("Wed, 21 Oct 2026 07:28:10 GMT", 10),
        ("Wed, 21 Oct 2026 07:27:00 GMT", 0),
        ("Wed, 21 Oct 2026 07:28:10", 10),
        ("soon", None),
        ("", None),
        ("inf", None),
        ("nan", None),
    ],
)
def test_retry_after_is_read_as_seconds_or_as_a_date(header: str | None, seconds: float | None) -> None:
    assert retry_after(header, datetime(2026, 10, 21, 7, 28, tzinfo=UTC)) == seconds
