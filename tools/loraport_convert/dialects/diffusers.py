"""diffusers' own files: `transformer.` or `unet.`, and `text_encoder.`, with PEFT's `lora_A` and `lora_B`.

The scale is in the metadata `lora_adapter_metadata`, where diffusers 0.34 and later write it; older files have none.
SimpleTuner's files look the same, also where it trains a model of another layout than diffusers'.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from pathlib import Path

from loraport.lora.canonical import LoraFile
from loraport_convert.codec.scale import ADAPTER_METADATA
from loraport_convert.codec.write import write_peft
from loraport_convert.dialects.base import Reader, share

_KEY = re.compile(r"(?:transformer|unet|text_encoder(?:_[23])?)\.(?!base_model\.).+\.(?:lora_(?:[AB]|magnitude)|alpha)")


class Diffusers(Reader):
    name = "diffusers"
    hint = (
        "diffusers keeps it in the metadata lora_adapter_metadata, and SimpleTuner in that of its checkpoints: convert "
        "the file of the same name in the last checkpoint."
    )

    def detect(
        self, keys: Collection[str], shapes: Mapping[str, tuple[int, ...]], metadata: Mapping[str, str]
    ) -> float:
        """The share of keys with diffusers' prefixes and PEFT's endings."""
        return (0.98 if ADAPTER_METADATA in metadata else 0.95) * share(keys, lambda key: _KEY.match(key) is not None)

    def write(self, lora: LoraFile, path: Path, dtype: str | None, metadata: Mapping[str, str]) -> None:
        """Write what `load_lora_weights` reads, with the scales in `lora_adapter_metadata`.

        Raises DataError when the family is not known, and NotExact for anything but LoRA.
        """
        write_peft(lora, path, dtype, metadata)
