"""The machine's NVIDIA cards, asked from the driver (no torch), and the hardware profile that suits one."""

from __future__ import annotations

import itertools
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from loraport.planning import Plan
    from loraport.profiles import Profile
    from loraport.spec.models import TrainSpec


#: The least compute capability (major, minor) that multiplies in 8-bit floats.
FP8_CAPABILITY = (8, 9)
#: A card tells less memory than it is sold with: up to a sixteenth goes to error correction, and some to itself.
_REPORTED = 0.93


@dataclass(frozen=True)
class Card:
    """A GPU: its name, its memory in GiB, and its compute capability (major, minor)."""

    name: str
    memory_gib: float
    compute_capability: tuple[int, int]


def cards() -> list[Card]:
    """The NVIDIA cards that CUDA_VISIBLE_DEVICES names, in its order, or all of this machine, in the driver's; none
    without an NVIDIA driver. A trainer counts them alike: it is started with CUDA_DEVICE_ORDER=PCI_BUS_ID.

    The cards stay open until this process ends. A driver without persistence takes a card down when nobody has it open
    any more, and to bring it up again takes seconds, which the trainer that is started next would wait once more
    (https://docs.nvidia.com/deploy/driver-persistence/overview.html).
    """
    import pynvml

    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return []
    return [card for card in map(_card, _visible(pynvml.nvmlDeviceGetCount())) if card is not None]


def cards_for(spec: TrainSpec) -> list[Card]:
    """Those of `cards` that a spec trains on: the one that `backend.options.device` names, or the first
    `train.gpus`."""
    kind, _, number = str(spec.backend.options.get("device", "auto")).partition(":")
    first = int(number) if kind == "cuda" and number.isdecimal() else 0
    return cards()[first : first + spec.train.gpus]


def profiles_up_to(card_gib: float, profiles: Mapping[tuple[str, str], Profile]) -> list[Profile]:
    """The hardware profiles for cards that are not larger than this one, those for the largest first."""
    fitting = [
        (profile.card_gib, profile.name, profile)
        for (kind, _), profile in profiles.items()
        if kind == "hardware" and profile.card_gib is not None and profile.card_gib * _REPORTED <= card_gib
    ]
    return [profile for _, _, profile in sorted(fitting, key=lambda each: each[:2], reverse=True)]


def profile_for(card_gib: float, profiles: Mapping[tuple[str, str], Profile]) -> Profile | None:
    """The hardware profile for the largest card that is not larger than this one; None when all are larger."""
    return next(iter(profiles_up_to(card_gib, profiles)), None)


def settings_for(card: Card, profiles: Mapping[tuple[str, str], Profile]) -> tuple[Profile, dict[str, Any]] | None:
    """The hardware profile for a card, and what it sets there: int8 storage where the profile computes in fp8 and the
    card cannot, which takes the same memory. None when the card is smaller than that of every profile."""
    profile = profile_for(card.memory_gib, profiles)
    if profile is None:
        return None
    quantized = profiles.get(("quantize", profile.sets.get("quantize", "")))
    computes = (profile.sets | (quantized.sets if quantized else {})).get("compute")
    if computes != "fp8" or card.compute_capability >= FP8_CAPABILITY:
        return profile, dict(profile.sets)
    kept = {name: value for name, value in profile.sets.items() if name not in ("quantize", "storage", "compute")}
    return profile, {"storage": "int8", "compute": "model", **kept}


def lacking(plan: Plan, card: Card) -> str | None:
    """What a plan does that this card has no hardware for, and what to do. None when there is nothing, and where the
    spec names another device."""
    from loraport.planning import Kind

    device = plan.spec.backend.options.get("device", "auto")
    done = any(v.path == "memory.compute" and v.kind in (Kind.EXACT, Kind.APPROXIMATED) for v in plan.verdicts)
    if device not in ("auto", "cuda") or plan.spec.memory.compute != "fp8" or not done:
        return None
    if card.compute_capability >= FP8_CAPABILITY:
        return None
    least, there = _dotted(FP8_CAPABILITY), _dotted(card.compute_capability)
    return (
        f"memory.compute: fp8 needs a card of compute capability {least} or more, and {card.name} has {there}. "
        "Set memory.quantize: int8, which takes the same memory; memory.profile: auto does so by itself."
    )


def _dotted(version: tuple[int, int]) -> str:
    return ".".join(map(str, version))


def _visible(count: int) -> list[str]:
    """Indices or UUIDs of the cards that CUDA shows; as it does, those that are named before one that is not there."""
    told = os.environ.get("CUDA_VISIBLE_DEVICES")
    if told is None:
        return [str(index) for index in range(count)]
    names = (name.strip() for name in told.split(","))
    there = lambda name: int(name) < count if name.isdecimal() else name.startswith(("GPU-", "MIG-"))  # noqa: E731
    return list(itertools.takewhile(there, names))


def _card(name: str) -> Card | None:
    import pynvml

    try:
        by_index = name.isdecimal()
        handle = pynvml.nvmlDeviceGetHandleByIndex(int(name)) if by_index else pynvml.nvmlDeviceGetHandleByUUID(name)
    except pynvml.NVMLError:  # CUDA takes the beginning of a UUID too
        return None
    try:
        memory = pynvml.nvmlDeviceGetMemoryInfo(handle).total / 2**30
        major, minor = pynvml.nvmlDeviceGetCudaComputeCapability(handle)
    except pynvml.NVMLError_NotSupported:  # a card that shares the host's memory has none of its own to tell
        return None
    return Card(pynvml.nvmlDeviceGetName(handle), memory, (major, minor))
