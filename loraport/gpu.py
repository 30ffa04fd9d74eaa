"""The machine's NVIDIA cards, asked from the driver (no torch), and the hardware profile that suits one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from loraport.profiles import Profile


@dataclass(frozen=True)
class Card:
    """A GPU: its name, its memory in GiB, and its compute capability (major, minor)."""

    name: str
    memory_gib: float
    compute_capability: tuple[int, int]


def cards() -> list[Card]:
    """The NVIDIA cards of this machine, by index; none when there is no NVIDIA driver."""
    import pynvml

    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return []
    try:
        found = [_card(index) for index in range(pynvml.nvmlDeviceGetCount())]
        return [card for card in found if card is not None]
    finally:
        pynvml.nvmlShutdown()


def profile_for(card_gib: float, profiles: Mapping[tuple[str, str], Profile]) -> Profile | None:
    """The hardware profile for the largest card that is not larger than this one; None when all are larger.

    Memory is rounded to whole GiB: a "24 GB" card reports 23.99.
    """
    fitting = [
        (profile.card_gib, profile.name)
        for (kind, _), profile in profiles.items()
        if kind == "hardware" and profile.card_gib is not None and profile.card_gib <= round(card_gib)
    ]
    return profiles["hardware", max(fitting)[1]] if fitting else None


def _card(index: int) -> Card | None:
    import pynvml

    handle = pynvml.nvmlDeviceGetHandleByIndex(index)
    try:
        memory = pynvml.nvmlDeviceGetMemoryInfo(handle).total / 2**30
        major, minor = pynvml.nvmlDeviceGetCudaComputeCapability(handle)
    except pynvml.NVMLError_NotSupported:  # a card that shares the host's memory has none of its own to tell
        return None
    return Card(pynvml.nvmlDeviceGetName(handle), memory, (major, minor))
