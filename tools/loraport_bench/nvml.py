"""NVIDIA's driver, asked so that what it does not tell is None: no card, driver or container tells everything."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any


@contextlib.contextmanager
def driver() -> Iterator[bool]:
    """The driver, for as long as the block lasts; False on a machine without one."""
    import pynvml

    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        yield False
        return
    try:
        yield True
    finally:
        pynvml.nvmlShutdown()


def ask(question: Callable[..., Any], *arguments: Any) -> Any:
    """The driver's answer; None where it has none: not supported, not permitted, or the card is gone."""
    import pynvml

    try:
        return question(*arguments)
    except pynvml.NVMLError:
        return None


def visible_cards(count: int) -> list[str]:
    """The first `count` cards that CUDA_VISIBLE_DEVICES names, or the machine's first; none where it hides all."""
    told = os.environ.get("CUDA_VISIBLE_DEVICES")
    if told is None:
        return [str(number) for number in range(count)]
    return [card.strip() for card in told.split(",") if card.strip() not in ("", "-1")][:count]


def card_handle(card: str) -> Any:
    """The driver's handle of a card given as an index or a UUID. Raises NVMLError for one that it does not know."""
    import pynvml

    return pynvml.nvmlDeviceGetHandleByIndex(int(card)) if card.isdecimal() else pynvml.nvmlDeviceGetHandleByUUID(card)


def handles(cards: Sequence[str]) -> list[Any]:
    """The handles of those cards that the driver knows."""
    return [handle for handle in (ask(card_handle, card) for card in cards) if handle is not None]


def used_bytes(handle: Any) -> int | None:
    """Memory in use on a card, as nvidia-smi shows it: without what the driver keeps for itself, if it tells that
    apart. None where the card shares the host's memory."""
    memory = _memory(handle)
    return None if memory is None else int(memory.used)


def total_bytes(handle: Any) -> int | None:
    """A card's memory."""
    memory = _memory(handle)
    return None if memory is None else int(memory.total)


def _memory(handle: Any) -> Any:
    import pynvml

    # The second version of the answer leaves out what is reserved, half a gigabyte and more on large cards.
    found = ask(pynvml.nvmlDeviceGetMemoryInfo, handle, pynvml.nvmlMemory_v2)
    return found if found is not None else ask(pynvml.nvmlDeviceGetMemoryInfo, handle)


def process_bytes(handle: Any) -> dict[int, int | None] | None:
    """Device memory of each process that computes on a card, by process id; None for what is not told."""
    import pynvml

    found = ask(pynvml.nvmlDeviceGetComputeRunningProcesses, handle)
    return None if found is None else {one.pid: one.usedGpuMemory for one in found}
