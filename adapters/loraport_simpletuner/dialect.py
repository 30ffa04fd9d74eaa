"""SimpleTuner's LoRA files: `transformer.<module>.lora_A.weight` from PEFT, `lycoris_<module>.lokr_*` from LyCORIS.

The scale is alpha / rank. LyCORIS files hold alpha as a tensor, and SimpleTuner's checkpoints name PEFT's in the
metadata; its final PEFT file tells nothing, and is read only with the alpha that `collect` wrote into its metadata.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from loraport.errors import DataError
from loraport.lora.canonical import Array, Factors, LoHa, LoKr, LoraFile, LoraModule, LowRank
from loraport.lora.storage import parse_json, read_tensors

#: Metadata key for alpha, written by `collect`.
ALPHA = "loraport.simpletuner.alpha"
PEFT, LYCORIS = "transformer.", "lycoris_"
_PEFT_KEY = re.compile(r"transformer\.(.+)\.lora_([AB])\.weight")
_LYCORIS_KEY = re.compile(r"lycoris_(.+)\.(lokr|hada)_(\w+)")
#: Module names have underscores where LyCORIS also puts them for dots.
_LYCORIS_MODULE = re.compile(r"layers_(\d+)_(attention|feed_forward|adaln_modulation)(?:_(qkv|o|w[123]))?")


class SimpleTunerDialect:
    """Reads LoRA, LoKr and LoHa as SimpleTuner writes them for Ideogram 4."""

    name = "simpletuner"

    def detect(
        self, keys: Collection[str], shapes: Mapping[str, tuple[int, ...]], metadata: Mapping[str, str]
    ) -> float:
        """The share of keys that are SimpleTuner's; fused attention tells its files from diffusers' own."""
        if not keys:
            return 0.0
        if ALPHA in metadata:
            return 1.0
        starts = (f"{PEFT}layers.", f"{LYCORIS}layers_")
        mine = sum(key.startswith(starts) and _name(key) is not None for key in keys) / len(keys)
        split = any(".to_q." in key for key in keys)
        return 0.0 if split else 0.9 * mine

    def read(self, path: Path) -> LoraFile:
        """Raises DataError when the file does not tell its scale, or a module is not whole."""
        tensors = read_tensors(path)
        grouped: dict[str, dict[str, Array]] = {}
        used: set[str] = set()
        for key in tensors:
            named = _name(key)
            if named is not None:
                module, factor = named
                grouped.setdefault(module, {})[factor] = tensors[key]
                used.add(key)
        scale = _PeftScale(path, tensors.metadata)
        try:
            modules = {
                name: _lycoris(name, factors)
                if "alpha" in factors or "A" not in factors
                else _peft(name, factors, scale)
                for name, factors in grouped.items()
            }
        except (KeyError, TypeError) as error:
            raise DataError(f"{path}: not a whole LoRA of SimpleTuner's ({type(error).__name__}: {error}).") from error
        unread = tuple(key for key in tensors if key not in used)
        return LoraFile("ideogram4", modules, dict(tensors.metadata), unread)


class _PeftScale:
    """alpha of a PEFT module: as `collect` wrote it, else as a checkpoint's metadata has it."""

    def __init__(self, path: Path, metadata: Mapping[str, str]):
        self.path = path
        self.alpha: float | None = None
        self.patterns: dict[str, float] = {}
        try:
            if ALPHA in metadata:
                self.alpha = float(metadata[ALPHA])
            elif "lora_adapter_metadata" in metadata:
                told = parse_json(metadata["lora_adapter_metadata"])
                self.alpha = float(told[f"{PEFT}lora_alpha"])
                self.patterns = told.get(f"{PEFT}alpha_pattern") or {}
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(f"{path}: the metadata about alpha is damaged ({error}).") from error

    def of(self, module: str, rank: int) -> float:
        if self.alpha is None:
            raise DataError(
                f"{self.path} does not tell its alpha, and so not its scale.",
                hint="It is SimpleTuner's final file, which loses it: convert the one of the same name in the last "
                "checkpoint-N instead.",
            )
        return self.patterns.get(module, self.alpha) / rank


def _name(key: str) -> tuple[str, str] | None:
    if found := _PEFT_KEY.fullmatch(key):
        return found[1], found[2]
    if found := _LYCORIS_KEY.fullmatch(key):
        module = _module(found[1])
        return None if module is None else (module, f"{found[2]}_{found[3]}")
    if key.startswith(LYCORIS) and key.endswith(".alpha"):
        module = _module(key[len(LYCORIS) : -len(".alpha")])
        return None if module is None else (module, "alpha")
    return None


def _module(flat: str) -> str | None:
    found = _LYCORIS_MODULE.fullmatch(flat)
    return ".".join(part for part in ("layers", *found.groups()) if part) if found else None


def _peft(name: str, factors: dict[str, Array], scale: _PeftScale) -> LoraModule:
    low_rank = LowRank(down=factors["A"], up=factors["B"])
    return LoraModule(name, low_rank, scale.of(name, low_rank.rank))


def _lycoris(name: str, factors: dict[str, Array]) -> LoraModule:
    """alpha counts for nothing where both factors are whole."""
    stored = factors.pop("alpha")
    if stored.size != 1:
        raise DataError(f"LoRA module {name}: alpha must be one number, not {stored.shape}.")
    alpha = float(stored.astype("float64").reshape(()))
    kinds: dict[str, type[Any]] = {"lokr": LoKr, "hada": LoHa}
    kind = kinds[next(iter(factors), "").partition("_")[0]]
    made: Factors = kind(**{factor.partition("_")[2]: array for factor, array in factors.items()})
    return LoraModule(name, made, 1.0 if made.rank is None else alpha / made.rank)
