"""kohya's layout: `lora_unet_` and the module with underscores for dots, `lora_down`, `lora_up` and `alpha`.

sd-scripts, musubi-tuner, ai-toolkit for Stable Diffusion and many others write it; text encoders are `lora_te1_` and so
on. A file without alpha tensors may still name alpha in its metadata.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path

from loraport.lora.canonical import LoraFile
from loraport_convert.codec.write import write_kohya
from loraport_convert.dialects.base import Reader, share

_PREFIXES = ("lora_unet_", "lora_te_", "lora_te1_", "lora_te2_", "lora_te3_", "oft_unet_")


class Kohya(Reader):
    name = "kohya"

    def detect(
        self, keys: Collection[str], shapes: Mapping[str, tuple[int, ...]], metadata: Mapping[str, str]
    ) -> float:
        """The share of keys with kohya's prefixes."""
        return 0.96 * share(keys, lambda key: key.startswith(_PREFIXES))

    def write(self, lora: LoraFile, path: Path, dtype: str | None, metadata: Mapping[str, str]) -> None:
        """Write kohya's layout, with diffusers' names for SD 1.5 and native names elsewhere, as sd-scripts does.

        Raises DataError when the family is not known, and NotExact for a DoRA or rows of several adapters.
        """
        write_kohya(lora, path, dtype, metadata)
