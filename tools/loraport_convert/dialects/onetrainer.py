"""OneTrainer's three formats: its own `lora_transformer_` with underscores, diffusers' with alpha multiplied in, and
ComfyUI's. Its metadata begin with `ot_`."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path

from loraport_convert.codec.scale import Told, always_rank, nothing
from loraport_convert.dialects.base import Reader, share

_PREFIXES = ("lora_transformer", "lora_te", "lora_unet")
_ANY = (*_PREFIXES, "transformer.", "unet.", "text_encoder", "diffusion_model.")


def _is_own(metadata: Mapping[str, str]) -> bool:
    return any(name.startswith("ot_") for name in metadata)


class OneTrainer(Reader):
    name = "onetrainer"

    def detect(
        self, keys: Collection[str], shapes: Mapping[str, tuple[int, ...]], metadata: Mapping[str, str]
    ) -> float:
        """The share of keys under any of its prefixes where the metadata are its own, else under those that are its
        alone."""
        if _is_own(metadata):
            return 0.98 * share(keys, lambda key: key.startswith(_ANY))
        alone = any(key.startswith("lora_transformer") for key in keys)
        return 0.97 * share(keys, lambda key: key.startswith(_PREFIXES)) if alone else 0.0

    def told(self, path: Path, metadata: Mapping[str, str]) -> Told:
        return always_rank if _is_own(metadata) else nothing
