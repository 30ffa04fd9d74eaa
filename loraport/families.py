"""Model families: what the port must know about a kind of model without loading it."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from loraport.errors import SpecError, unknown

if TYPE_CHECKING:
    from loraport.spec.models import TrainSpec


@dataclass(frozen=True)
class Family:
    """A kind of model. Module names are those of the official checkpoint, which are ComfyUI's."""

    name: str
    title: str
    checkpoint: str  #: hub id of the official weights
    caption_format: Literal["json", "text"]
    targets: dict[str, list[str]]  #: preset name → regular expressions that match whole module names
    architecture: str  #: modelspec.architecture of a LoRA file
    place_trigger: Callable[[str, str], str]  #: (caption, word) → caption with the word in it
    side_multiple: int = 16  #: image sides are multiples of this many pixels

    def target_patterns(self, targets: str | list[str]) -> list[str]:
        """The patterns of a preset, or the given patterns. Raises SpecError for an unknown preset."""
        if isinstance(targets, list):
            return targets
        if targets not in self.targets:
            raise SpecError(
                unknown("lora.targets:", targets, self.targets),
                hint="Or give a list of regular expressions over module names.",
            )
        return self.targets[targets]


def matches(patterns: list[str], module: str) -> bool:
    """Whether any pattern matches the whole module name."""
    return any(re.fullmatch(pattern, module) for pattern in patterns)


def check_family(spec: TrainSpec, families: dict[str, Family]) -> Family:
    """The spec's family. Raises SpecError when it is not installed or the target preset is not its own."""
    if spec.model.family not in families:
        raise SpecError(unknown("model.family:", spec.model.family, families))
    family = families[spec.model.family]
    family.target_patterns(spec.lora.targets)
    return family
