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

from loraport_bench import nvml

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
    throttle: int | None


@dataclass
class Samples:
    """Everything seen, each with its moment in seconds since 1970."""

    host: list[tuple[float, int]] = field(default_factory=list)  #: resident bytes of all processes
    own: list[tuple[float, int]] = field(default_factory=list)  #: device bytes of the tree's processes
    device: list[tuple[float, int]] = field(default_factory=list)  #: device bytes in use by anything on these cards
    cards: list[list[CardSample]] = field(default_factory=list)  #: of each card
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
        self._driver = contextlib.ExitStack()
        self._handles: list[Any] = []

    def __enter__(self) -> Self:
        if self._driver.enter_context(nvml.driver()):
            self._handles = nvml.handles(self._cards)
            self.samples.cards = [[] for _ in self._handles]
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
        self._driver.close()
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
        moment = time.time()
        used = [nvml.used_bytes(handle) for handle in self._handles]
        told = [nvml.process_bytes(handle) for handle in self._handles]
        ours = [size for each in told for pid, size in (each or {}).items() if pid in self._tree and size is not None]
        self.samples.tells_processes |= bool(ours)
        if None not in used:
            self.samples.device.append((moment, sum(size for size in used if size is not None)))
        if None not in told:
            self.samples.own.append((moment, sum(ours)))

    def _look_slowly(self) -> None:
        self._find_tree()
        self.samples.sizes.append((time.time(), sum(size_of(folder) for folder in self._folders)))
        for handle, seen in zip(self._handles, self.samples.cards, strict=True):
            seen.append(look_at(handle))

    def _find_tree(self) -> None:
        """The processes of the tree; one that was seen stays known, so that what it did still counts."""
        with contextlib.suppress(psutil.Error):
            root = self._tree.get(self._root) or psutil.Process(self._root)
            self._tree = {each.pid: self._tree.get(each.pid, each) for each in [root, *root.children(recursive=True)]}


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

    def scaled(value: float | None, unit: float) -> float | None:
        return None if value is None else value * unit

    use = nvml.ask(pynvml.nvmlDeviceGetUtilizationRates, handle)
    return CardSample(
        time=time.time(),
        clock_mhz=nvml.ask(pynvml.nvmlDeviceGetClockInfo, handle, pynvml.NVML_CLOCK_SM),
        memory_clock_mhz=nvml.ask(pynvml.nvmlDeviceGetClockInfo, handle, pynvml.NVML_CLOCK_MEM),
        power_w=scaled(nvml.ask(pynvml.nvmlDeviceGetPowerUsage, handle), 1e-3),
        temperature_c=nvml.ask(pynvml.nvmlDeviceGetTemperature, handle, pynvml.NVML_TEMPERATURE_GPU),
        utilisation_percent=None if use is None else use.gpu,
        energy_j=scaled(nvml.ask(pynvml.nvmlDeviceGetTotalEnergyConsumption, handle), 1e-3),
        throttle=nvml.ask(pynvml.nvmlDeviceGetCurrentClocksThrottleReasons, handle),
    )


def throttled(samples: Sequence[CardSample]) -> list[str] | None:
    """The reasons for which the clocks were lowered in any sample; None when the card tells none of any."""
    told = [sample.throttle for sample in samples if sample.throttle is not None]
    if not told:
        return None
    seen = 0
    for bits in told:
        seen |= bits
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
