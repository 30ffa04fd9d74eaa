"""PEFT's own files: `base_model.model.<module>.lora_A.weight`, `adapter_config.json` beside them.

The tensors do not tell the scale. It is alpha / r, or alpha / √r with `use_rslora`, where `alpha_pattern` may set
another alpha for some modules and r is the rank that the tensors have. A DoRA's magnitude is divided by the row norms
of the changed weights. Files that wrap the prefix once more, as `transformer.base_model.model.`, are read too.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path

from loraport.errors import DataError
from loraport.lora.canonical import LoraFile
from loraport.lora.storage import parse_json
from loraport_convert.codec.scale import Told, from_peft, nothing
from loraport_convert.codec.write import CONFIG, write_peft_adapter
from loraport_convert.dialects.base import Reader, share

WEIGHTS = "adapter_model.safetensors"
# These starts also change the base weights, so the factors alone are not the change from the original model.
_MOVES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")


class Peft(Reader):
    """Reads and writes LoRA, rsLoRA and DoRA adapters of PEFT."""

    name = "peft"
    hint = f"PEFT keeps the scale of a LoRA in {CONFIG}: copy the whole adapter folder, not only its tensors."

    def detect(
        self, keys: Collection[str], shapes: Mapping[str, tuple[int, ...]], metadata: Mapping[str, str]
    ) -> float:
        """The share of keys with PEFT's prefix."""
        return share(keys, lambda key: "base_model.model." in key)

    def read(self, path: Path) -> LoraFile:
        """Read an adapter's folder or its tensor file. A DoRA comes without the norms of the base weights."""
        return super().read(_weights(path))

    def read_with_alpha(self, path: Path, alpha: float | None) -> LoraFile:
        return super().read_with_alpha(_weights(path), alpha)

    def told(self, path: Path, metadata: Mapping[str, str]) -> Told:
        """Raises DataError when the configuration is damaged, or of another kind than LoRA."""
        config = path.with_name(CONFIG)
        if not config.is_file():
            return nothing
        try:
            content = parse_json(config.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise DataError(f"{config} cannot be read: {error}.") from error
        if not isinstance(content, dict) or content.get("peft_type") != "LORA" or "lora_alpha" not in content:
            raise DataError(f"{config} is not the config of a LoRA adapter.")
        start = content.get("init_lora_weights")
        if isinstance(start, str) and start.lower().startswith(_MOVES_BASE):
            raise DataError(
                f"{config}: training began with init_lora_weights={start!r}, which also changed the base weights.",
                hint="Save it as a plain LoRA: save_pretrained(..., path_initial_model_for_weight_conversion=...).",
            )
        return from_peft(content)

    def write(self, lora: LoraFile, path: Path, dtype: str | None, metadata: Mapping[str, str]) -> None:
        """Write an adapter, its configuration beside it.

        Raises DataError when the family is not known, and NotExact for anything but LoRA.
        """
        write_peft_adapter(lora, path, dtype, metadata)


def _weights(path: Path) -> Path:
    return path / WEIGHTS if path.is_dir() else path
