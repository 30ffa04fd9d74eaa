"""The PEFT dialect: `adapter_model.safetensors` with `adapter_config.json` beside it, as `save_pretrained`
leaves them.

The tensors do not tell the scale. It is alpha / r, or alpha / √r with `use_rslora` (arXiv 2312.03732), where
`alpha_pattern` may set another alpha for some modules and r is the rank that the tensors have. A DoRA's
magnitude is divided by the row norms of the changed weights.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from loraport.errors import DataError
from loraport.lora.canonical import LoraFile, LoraModule, LowRank, RowScale
from loraport.lora.storage import read_tensors

PREFIX = "base_model.model."
WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
_DOWN, _UP, _MAGNITUDE = ".lora_A.weight", ".lora_B.weight", ".lora_magnitude_vector"
# These starts also change the base weights, so the factors alone are not the change from the original model.
_MOVES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")


class Peft:
    """Reads LoRA, rsLoRA and DoRA adapters that PEFT saved."""

    name = "peft"

    def detect(
        self, keys: Collection[str], shapes: Mapping[str, tuple[int, ...]], metadata: Mapping[str, str]
    ) -> float:
        """The share of keys that start as PEFT's do."""
        return sum(key.startswith(PREFIX) for key in keys) / len(keys) if keys else 0.0

    def read(self, path: Path) -> LoraFile:
        """Read an adapter's folder or its tensor file. A DoRA comes without the norms of the base weights.

        Raises DataError when the config is missing or of another kind, or a module is not whole.
        """
        path = path / WEIGHTS if path.is_dir() else path
        config = _config(path.parent / CONFIG)
        tensors = read_tensors(path)
        names = {key[len(PREFIX) : -len(_DOWN)]: None for key in tensors if _is(key, _DOWN)}
        names |= {key[len(PREFIX) : -len(_UP)]: None for key in tensors if _is(key, _UP)}
        modules, used = {}, set()
        for name in names:
            down, up, magnitude = (PREFIX + name + suffix for suffix in (_DOWN, _UP, _MAGNITUDE))
            missing = [key for key in (down, up) if key not in tensors]
            if missing:
                raise DataError(f"{path}: LoRA module {name} is not whole: {missing[0]} is missing.")
            factors = LowRank(down=tensors[down], up=tensors[up])
            dora = RowScale(tensors[magnitude].reshape(-1)) if magnitude in tensors else None
            modules[name] = LoraModule(name, factors, _scale(config, name, factors.rank), dora)
            used |= {down, up, magnitude}
        unread = tuple(key for key in tensors if key not in used)
        return LoraFile(None, modules, tensors.metadata, unread)


def _is(key: str, suffix: str) -> bool:
    return key.startswith(PREFIX) and key.endswith(suffix)


def _config(path: Path) -> dict[str, Any]:
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(
            f"{path} cannot be read: {error}.",
            hint="PEFT keeps the scale of a LoRA there: copy the whole adapter folder, not only its tensors.",
        ) from error
    if not isinstance(config, dict) or config.get("peft_type") != "LORA" or "lora_alpha" not in config:
        raise DataError(f"{path} is not the config of a LoRA adapter.")
    start = config.get("init_lora_weights")
    if isinstance(start, str) and start.lower().startswith(_MOVES_BASE):
        raise DataError(
            f"{path}: training began with init_lora_weights={start!r}, which also changed the base weights.",
            hint="Save it as a plain LoRA: save_pretrained(..., path_initial_model_for_weight_conversion=...).",
        )
    return config


def _scale(config: Mapping[str, Any], name: str, rank: int) -> float:
    alphas: Mapping[str, float] = config.get("alpha_pattern") or {}
    # PEFT takes the first pattern that matches the whole name or the end of it after a dot.
    found = next((key for key in alphas if re.match(rf"(.*\.)?({key})$", name)), None)
    alpha = config["lora_alpha"] if found is None else alphas[found]
    return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
