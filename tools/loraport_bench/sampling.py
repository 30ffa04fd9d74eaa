"""What a run takes of the machine, looked at from outside while it goes: memory, disk, power, clocks, energy.

Everything is of the process tree under one process. Nothing is asked of the trainer: the numbers mean the same for all.
"""

from __future__ import annotations

import contextlib
import os
import statistics
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import psutil

from loraport_bench.monitor import card_handle

#: Seconds between two looks at what changes slowly: which processes there are, clocks, energy, sizes on disk.
SLOW = 0.5

#: nvml.h, nvmlClocksEventReason*: what lowers the clocks of a card that has work to do.
_THROTTLE = {
    0x4: "power limit",
    0x8: "hardware slowdown",
    0x20: "thermal limit (software)",
    0x40: "thermal limit (hardware)",
    0x80: "power brake",
}


@dataclass(frozen=True)
class CardSample:
    """A card at one moment (seconds since 1970); None where it does not tell."""

    time: float
    clock_mhz: float | None
    memory_clock_mhz: float | None
    power_w: float | None
    temperature_c: float | None
    utilisation_percent: float | None
    energy_j: float | None
    throttle: int


@dataclass
class Samples:
    """Everything seen, each with its moment in seconds since 1970."""

    host: list[tuple[float, int]] = field(default_factory=list)  #: resident bytes of all processes
    own: list[tuple[float, int]] = field(default_factory=list)  #: device bytes of the tree's processes
    device: list[tuple[float, int]] = field(default_factory=list)  #: device bytes in use by anything on these cards
    card: list[CardSample] = field(default_factory=list)  #: of the first card
    sizes: list[tuple[float, int]] = field(default_factory=list)  #: bytes under the watched folders
    written: int | None = None
    read: int | None = None
    tells_processes: bool = False  #: whether the driver named a process of the tree with its memory


class TreeSampler:
    """Samples the tree under process `pid` every `interval` seconds until the block ends.

    `cards` are the cards that the tree uses, as indices or UUIDs; without an NVIDIA driver there is nothing of them.
    `folders` are those whose size is watched, links not followed.
    """

    def __init__(self, pid: int, interval: float, cards: Sequence[str], folders: Sequence[Path] = ()):
        self.samples = Samples()
        self._root = pid
        self._interval = interval
        self._cards = cards
        self._folders = folders
        self._tree: dict[int, psutil.Process] = {}
        self._io: dict[int, tuple[int, int]] = {}
        self._over = threading.Event()
        self._threads = [
            threading.Thread(target=self._repeat, args=(work, seconds), daemon=True)
            for work, seconds in ((self._look, interval), (self._look_slowly, SLOW))
        ]
        self._handles: list[Any] = []

    def __enter__(self) -> Self:
        self._handles = _handles(self._cards)
        self._find_tree()
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._over.set()
        for thread in self._threads:
            thread.join()
        if self._handles:
            import pynvml

            pynvml.nvmlShutdown()
        if self._io:
            self.samples.read = sum(read for read, _ in self._io.values())
            self.samples.written = sum(written for _, written in self._io.values())

    def _repeat(self, work: Callable[[], None], seconds: float) -> None:
        due = time.monotonic()
        while not self._over.is_set():
            work()
            due = max(due + seconds, time.monotonic())  # one that took too long is not made up for
            self._over.wait(max(0.0, due - time.monotonic()))

    def _look(self) -> None:
        moment, total = time.time(), 0
        for pid, process in list(self._tree.items()):
            with contextlib.suppress(psutil.Error):
                total += process.memory_info().rss
            with contextlib.suppress(psutil.Error, AttributeError):  # macOS tells no process's disk use
                used = process.io_counters()
                self._io[pid] = (used.read_bytes, used.write_bytes)
        self.samples.host.append((moment, total))
        if self._handles:
            self._look_at_cards()

    def _look_at_cards(self) -> None:
        import pynvml

        moment, used, own = time.time(), 0, 0
        for handle in self._handles:
            used += int(pynvml.nvmlDeviceGetMemoryInfo(handle).used)
            with contextlib.suppress(pynvml.NVMLError):
                for process in pynvml.nvmlDeviceGetComputeRunningProcesses(handle):
                    if process.pid in self._tree and process.usedGpuMemory is not None:
                        own += int(process.usedGpuMemory)
                        self.samples.tells_processes = True
        self.samples.device.append((moment, used))
        self.samples.own.append((moment, own))

    def _look_slowly(self) -> None:
        self._find_tree()
        self.samples.sizes.append((time.time(), sum(size_of(folder) for folder in self._folders)))
        if self._handles:
            self.samples.card.append(look_at(self._handles[0]))

    def _find_tree(self) -> None:
        """The processes of the tree; one that was seen stays known, so that what it did still counts."""
        with contextlib.suppress(psutil.Error):
            root = self._tree.get(self._root) or psutil.Process(self._root)
            self._tree = {each.pid: self._tree.get(each.pid, each) for each in [root, *root.children(recursive=True)]}


def visible_cards(count: int) -> list[str]:
    """The first `count` cards that CUDA_VISIBLE_DEVICES names, or the machine's first; none where it hides all."""
    told = os.environ.get("CUDA_VISIBLE_DEVICES")
    if told is None:
        return [str(number) for number in range(count)]
    return [card.strip() for card in told.split(",") if card.strip() not in ("", "-1")][:count]


def size_of(folder: Path) -> int:
    """Bytes of the files under a folder that others may be changing; links count for nothing, and are not followed."""
    total = 0
    waiting = [folder]
    while waiting:
        try:
            entries = list(os.scandir(waiting.pop()))
        except OSError:
            continue
        for entry in entries:
            with contextlib.suppress(OSError):
                if entry.is_dir(follow_symlinks=False):
                    waiting.append(Path(entry.path))
                elif not entry.is_symlink():
                    total += entry.stat(follow_symlinks=False).st_size
    return total


def look_at(handle: Any) -> CardSample:
    """A card's clocks, power, temperature, use and energy counter now."""
    import pynvml

    def asked(ask: Callable[..., float], *arguments: Any, unit: float = 1.0) -> float | None:
        try:
            return ask(handle, *arguments) * unit
        except pynvml.NVMLError:
            return None

    reasons = asked(pynvml.nvmlDeviceGetCurrentClocksThrottleReasons)
    try:
        use: float | None = pynvml.nvmlDeviceGetUtilizationRates(handle).gpu
    except pynvml.NVMLError:
        use = None
    return CardSample(
        time=time.time(),
        clock_mhz=asked(pynvml.nvmlDeviceGetClockInfo, pynvml.NVML_CLOCK_SM),
        memory_clock_mhz=asked(pynvml.nvmlDeviceGetClockInfo, pynvml.NVML_CLOCK_MEM),
        power_w=asked(pynvml.nvmlDeviceGetPowerUsage, unit=1e-3),
        temperature_c=asked(pynvml.nvmlDeviceGetTemperature, pynvml.NVML_TEMPERATURE_GPU),
        utilisation_percent=use,
        energy_j=asked(pynvml.nvmlDeviceGetTotalEnergyConsumption, unit=1e-3),
        throttle=int(reasons or 0),
    )


def throttled(samples: Sequence[CardSample]) -> list[str]:
    """The reasons for which the clocks were lowered in any sample."""
    seen = 0
    for sample in samples:
        seen |= sample.throttle
    return [name for bit, name in _THROTTLE.items() if seen & bit]


def energy_between(samples: Sequence[CardSample], start: float, end: float) -> float | None:
    """Joules by the card's counter from `start` to `end`, between samples in proportion; None when it has none."""
    known = [(sample.time, sample.energy_j) for sample in samples if sample.energy_j is not None]
    if len(known) < 2:
        return None

    def at(moment: float) -> float:
        before = max((each for each in known if each[0] <= moment), default=known[0])
        after = min((each for each in known if each[0] >= moment), default=known[-1])
        if after[0] == before[0]:
            return before[1]
        return before[1] + (after[1] - before[1]) * (moment - before[0]) / (after[0] - before[0])

    return at(end) - at(start)


def range_of(values: Sequence[float | None]) -> tuple[float, float, float] | None:
    """(least, median, most) of what was told; None when nothing was."""
    told = [value for value in values if value is not None]
    return (min(told), statistics.median(told), max(told)) if told else None


def _handles(cards: Sequence[str]) -> list[Any]:
    import pynvml

    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return []
    return [card_handle(card) for card in cards[: pynvml.nvmlDeviceGetCount()]]
