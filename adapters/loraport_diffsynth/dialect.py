"""DiffSynth's LoRA file: bare `<module>.lora_A.default.weight` and `….lora_B.default.weight`, and no scale. No torch.

The scale is alpha / rank. DiffSynth writes its arguments to `training_args.json` beside the LoRA; its own scripts train
with alpha = rank, our entry adds `lora_alpha` there when it asks for another. Without that file nothing tells that the
tensors are DiffSynth's at all, so the scale is not guessed.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from pathlib import Path

from loraport.errors import DataError
from loraport.lora.canonical import LoraFile, LoraModule, LowRank
from loraport.lora.dialect import UnknownScale
from loraport.lora.storage import read_tensors

_DOWN, _UP = ".lora_A.default.weight", ".lora_B.default.weight"
_PREFIXES = ("base_model.", "diffusion_model.", "transformer.", "unet.", "text_encoder")
ARGUMENTS = "training_args.json"


class DiffSynthDialect:
    name = "diffsynth"

    def detect(
        self, keys: Collection[str], shapes: Mapping[str, tuple[int, ...]], metadata: Mapping[str, str]
    ) -> float:
        """The share of keys that end as DiffSynth's do, under no prefix of another trainer's."""
        own = sum(key.endswith((_DOWN, _UP)) and not key.startswith(_PREFIXES) for key in keys)
        return own / len(keys) if keys else 0.0

    def read(self, path: Path) -> LoraFile:
        """Raises DataError when a module is not whole, and UnknownScale when nothing beside the file tells it."""
        return self._read(path, *_trained_with(path))

    def read_with_alpha(self, path: Path, alpha: float | None) -> LoraFile:
        """Read with what a person says of the scale; None stands for the rank."""
        return self._read(path, None, alpha)

    def _read(self, path: Path, rank: int | None, alpha: float | None) -> LoraFile:
        tensors = read_tensors(path)
        modules = {}
        for name in dict.fromkeys(key.removesuffix(_DOWN).removesuffix(_UP) for key in tensors):
            missing = [name + suffix for suffix in (_DOWN, _UP) if name + suffix not in tensors]
            if missing:
                raise DataError(f"{path}: LoRA module {name} is not whole: {', '.join(missing)} is missing.")
            factors = LowRank(down=tensors[name + _DOWN], up=tensors[name + _UP])
            if rank is not None and factors.rank != rank:
                raise DataError(
                    f"{path}: LoRA module {name} has rank {factors.rank}, but {ARGUMENTS} beside it tells of {rank}.",
                    hint=f"Put the {ARGUMENTS} of the training that wrote this file beside it.",
                )
            modules[name] = LoraModule(name, factors, 1.0 if alpha is None else alpha / factors.rank)
        return LoraFile(None, modules, dict(tensors.metadata))


def _trained_with(path: Path) -> tuple[int, float]:
    """Rank and alpha, from the arguments beside a LoRA file."""
    arguments = path.with_name(ARGUMENTS)
    try:
        content = json.loads(arguments.read_text(encoding="utf-8"))
        rank = int(content["lora_rank"])
        return rank, float(content.get("lora_alpha", rank))
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise UnknownScale(
            f"{path} does not tell its scale, and {arguments} cannot be read ({type(error).__name__}: {error}).",
            hint=f"DiffSynth writes {ARGUMENTS} into the folder of its LoRA files: put the two beside each other. Or "
            "give the alpha it was trained with (--alpha N), or say that it was the rank (--assume-alpha rank).",
        ) from error
