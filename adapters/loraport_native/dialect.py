"""The native trainer's own LoRA file: `<module>.<factor>` keys and every scale in the metadata. No torch.

Factors: `lora_A` (r, in), `lora_B` (out, r); LyCORIS' `lokr_*` and `hada_*`; for DoRA `magnitude`, `base_norm` and
`merged_norm`, each (out,).
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from loraport.errors import DataError
from loraport.lora.canonical import Factors, LoHa, LoKr, LoraFile, LoraModule, LowRank, RowScale
from loraport.lora.storage import parse_json, read_tensors

FORMAT = "loraport-native-1"


class NativeDialect:
    name = "native"

    def detect(
        self, keys: Collection[str], shapes: Mapping[str, tuple[int, ...]], metadata: Mapping[str, str]
    ) -> float:
        return 1.0 if metadata.get("loraport.format") == FORMAT else 0.0

    def read(self, path: Path) -> LoraFile:
        """Raises DataError when the file is damaged or its scales are missing."""
        tensors = read_tensors(path)
        grouped: dict[str, dict[str, Any]] = {}
        for key in tensors:
            module, _, factor = key.rpartition(".")
            grouped.setdefault(module, {})[factor] = tensors[key]
        try:
            scales: dict[str, float] = parse_json(tensors.metadata["loraport.scales"])
            modules = {name: _module(name, factors, scales[name]) for name, factors in grouped.items()}
        except (KeyError, TypeError, ValueError) as error:
            raise DataError(
                f"{path}: not a whole LoRA of the native trainer ({type(error).__name__}: {error})."
            ) from error
        return LoraFile(tensors.metadata.get("loraport.family"), modules, dict(tensors.metadata))


def _module(name: str, factors: dict[str, Any], scale: float) -> LoraModule:
    if "lora_A" not in factors:
        return LoraModule(name, _lycoris(factors), scale)
    dora = None
    if "magnitude" in factors:
        dora = RowScale(factors["magnitude"], factors["base_norm"], factors["merged_norm"])
    return LoraModule(name, LowRank(down=factors["lora_A"], up=factors["lora_B"]), scale, dora)


def _lycoris(factors: dict[str, Any]) -> Factors:
    if any(name.startswith("hada_") for name in factors):
        return LoHa(**{name.removeprefix("hada_"): array for name, array in factors.items()})
    return LoKr(**{name.removeprefix("lokr_"): array for name, array in factors.items()})
