"""Model families: what the port must know about a kind of model without loading it."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from loraport.errors import SpecError, unknown

if TYPE_CHECKING:
    from loraport.spec.models import TrainSpec

#: Bytes of a caption in UTF-8 that count as a token where no tokenizer is at hand: Qwen's takes 3 to 4 of English and
#: of JSON, so that this counts rather too many.
BYTES_PER_TOKEN = 3


@dataclass(frozen=True)
class Dimensions:
    """The shapes that decide how much memory a model takes, in module names and numbers of channels and parameters."""

    blocks: int  #: transformer blocks, all alike
    width: int  #: channels of a token
    feed_forward: int  #: channels inside a block's feed-forward
    block_name: str  #: a block's module name, with `{}` for its number
    block_linears: dict[str, tuple[int, int]]  #: Linears of one block: name within it → (outputs, inputs)
    other_linears: dict[str, tuple[int, int]]  #: Linears around the blocks that training runs: name → (outputs, inputs)
    text_features: int  #: channels of a token's text features before they are projected to `width`
    text_encoder_blocks: int
    text_encoder_block_parameters: int  #: of one block
    text_encoder_other_parameters: int  #: the embedding, mostly
    vae_parameters: int
    vae_channels: int  #: of the VAE's first layer

    @property
    def block_parameters(self) -> int:
        """Numbers in the weights of one block's Linears, biases and norms left out."""
        return sum(outputs * inputs for outputs, inputs in self.block_linears.values())

    @property
    def other_parameters(self) -> int:
        """Numbers in the weights of the Linears around the blocks."""
        return sum(outputs * inputs for outputs, inputs in self.other_linears.values())

    def matched(self, patterns: list[str]) -> list[tuple[int, int]]:
        """(outputs, inputs) of every Linear of the model whose whole name a pattern matches."""
        names = {
            self.block_name.format(n) + f".{name}": shape
            for n in range(self.blocks)
            for name, shape in self.block_linears.items()
        }
        return [shape for name, shape in (names | self.other_linears).items() if matches(patterns, name)]


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
    #: where captions are JSON: the JSON Schema of one, its properties in the order of the keys, each described
    caption_schema: dict[str, Any] | None = None
    wrap_caption: Callable[[str], str] | None = None  #: where captions are JSON: plain text → the shortest one with it
    side_multiple: int = 16  #: image sides are multiples of this many pixels
    dimensions: Dimensions | None = None  #: of the official weights
    read_dimensions: Callable[[Path], Dimensions] | None = None  #: those of a checkpoint folder, from headers alone

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
