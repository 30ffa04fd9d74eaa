"""How fast requests go out: evenly spaced, later after a failure, never while the service asked to be left alone."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime

#: Seconds before the second attempt; each further attempt waits twice as long, up to `LONGEST_BACKOFF`.
FIRST_BACKOFF = 1.0
LONGEST_BACKOFF = 60.0


class Pace:
    """Turns for all workers together: at most `per_minute` a minute, one every 60 / `per_minute` seconds."""

    def __init__(
        self,
        per_minute: float | None,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ):
        self._interval = 60 / per_minute if per_minute else 0.0
        self._clock, self._sleep = clock, sleep
        self._next = self._closed_until = clock()
        self._one_at_a_time = asyncio.Lock()

    async def turn(self) -> None:
        """Wait until the next request may go out. Turns are given in the order they were asked for."""
        async with self._one_at_a_time:
            while (wait := max(self._next, self._closed_until) - self._clock()) > 0:
                await self._sleep(wait)
            self._next = self._clock() + self._interval

    def hold(self, seconds: float) -> None:
        """Give no turn for that long."""
        self._closed_until = max(self._closed_until, self._clock() + seconds)

    async def back_off(self, failures: int) -> None:
        """Wait after the given number of failures of one request; by chance, so that workers don't come back as one."""
        longest = min(LONGEST_BACKOFF, FIRST_BACKOFF * 2 ** (failures - 1))
        await self._sleep(longest * random.uniform(0.5, 1.0))


def retry_after(header: str | None, now: datetime | None = None) -> float | None:
    """Seconds that a Retry-After header asks for, a number or a date (RFC 9110, 10.2.3); None when it says nothing."""
    if header is None:
        return None
    try:
        seconds = float(header)
    except ValueError:
        try:
            moment = parsedate_to_datetime(header)
        except ValueError:
            return None
        if moment.tzinfo is None:
            moment = moment.replace(tzinfo=UTC)
        seconds = (moment - (now or datetime.now(UTC))).total_seconds()
    return max(0.0, seconds) if seconds < float("inf") else None
