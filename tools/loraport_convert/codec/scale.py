"""How strong a LoRA is, where its tensors do not say: from metadata, or as the caller was told.

Files keep alpha, and the scale is alpha / rank, or alpha / √rank with rsLoRA (arXiv 2312.03732).
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from typing import Any

from loraport.errors import DataError
from loraport.lora.storage import parse_json
from loraport_convert.codec.keys import MODEL, Module

#: (module, rank) → scale, or None where nothing is told about it.
Told = Callable[[Module, int], float | None]

ADAPTER_METADATA = "lora_adapter_metadata"
_ROOTS = {
    MODEL: ("transformer", "unet"),
    "te1": ("text_encoder",),
    "te2": ("text_encoder_2",),
    "te3": ("text_encoder_3",),
}


def nothing(module: Module, rank: int) -> float | None:
    return None


def first_told(*rules: Told) -> Told:
    """What the first rule says that says something."""

    def told(module: Module, rank: int) -> float | None:
        return next((scale for rule in rules if (scale := rule(module, rank)) is not None), None)

    return told


def from_peft(config: Mapping[str, Any]) -> Told:
    """The rule of a PEFT configuration: `lora_alpha`, `alpha_pattern`, `use_rslora`.

    Raises DataError when alpha is not a number.
    """
    try:
        alpha = float(config["lora_alpha"])
        patterns = {_pattern(key): float(value) for key, value in (config.get("alpha_pattern") or {}).items()}
    except DataError:
        raise
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise DataError(f"The metadata about alpha is damaged: {type(error).__name__}: {error}.") from error
    root = math.sqrt if config.get("use_rslora") else float

    def told(module: Module, rank: int) -> float:
        found = next((pattern for pattern in patterns if pattern.match(module.name)), None)
        return (alpha if found is None else patterns[found]) / root(rank)

    return told


def _pattern(key: str) -> re.Pattern[str]:
    """As PEFT reads a key: the first pattern that matches the whole name, or its end after a dot, counts.

    Raises DataError for one that is no pattern, or that could take for ever on a name made for it: with a repeated
    group, or many open repetitions.
    """
    repetitions = len(re.findall(r"[*+]|\{\d*,\}", key))
    if len(key) > 300 or repetitions > 3 or re.search(r"\)[*+{]", key):
        raise DataError(f"The metadata about alpha holds a pattern that is not safe to try: {key[:80]}.")
    try:
        return re.compile(rf"(.*\.)?({key})$")
    except (re.error, RecursionError, OverflowError) as error:
        raise DataError(f"The metadata about alpha holds {key!r}, which is no pattern: {error}.") from error


def from_adapter_metadata(metadata: Mapping[str, str]) -> Told:
    """The rule of diffusers' `lora_adapter_metadata`, which holds PEFT's configuration of each part of the model."""
    if ADAPTER_METADATA not in metadata:
        return nothing
    try:
        told = parse_json(metadata[ADAPTER_METADATA])
    except ValueError as error:
        raise DataError(f"The metadata {ADAPTER_METADATA} is not JSON: {error}.") from error
    if not isinstance(told, dict):
        raise DataError(f"The metadata {ADAPTER_METADATA} is not a JSON object.")
    configs = {}
    for part, roots in _ROOTS.items():
        for root in (*roots, None) if part == MODEL else roots:
            start = "" if root is None else f"{root}."
            config = {key[len(start) :]: value for key, value in told.items() if key.startswith(start)}
            if "lora_alpha" in config:
                configs[part] = from_peft(config)
                break
    return lambda module, rank: configs[module.part](module, rank) if module.part in configs else None


def from_kohya(metadata: Mapping[str, str]) -> Told:
    """The rule of `ss_network_alpha`, for modules of the rank `ss_network_dim`: others have an alpha of their own."""
    try:
        alpha, rank = float(metadata["ss_network_alpha"]), int(metadata["ss_network_dim"])
    except (KeyError, ValueError):
        return nothing
    return lambda module, actual: alpha / rank if actual == rank else None


def always_rank(module: Module, rank: int) -> float:
    """The rule of trainers whose alpha is always the rank where they write none."""
    return 1.0


def given(alpha: float | None) -> Told:
    """The rule of a caller who knows alpha; None stands for each module's own rank."""
    return lambda module, rank: 1.0 if alpha is None else alpha / rank
