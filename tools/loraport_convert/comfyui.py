"""The ComfyUI dialect: the names of ComfyUI's own model under `diffusion_model.`, which it accepts for every
architecture.

Low-rank factors are written as `lora_up`/`lora_down` with `.alpha`. ComfyUI reads `lora_A`/`lora_B` as well,
but that pair comes from PEFT, where the scale is not in the file, and several readers of it never look for
`.alpha`; readers of up/down (ComfyUI, the kohya family, diffusers' converters) all multiply by alpha / rank.

Scale, as ComfyUI computes it: alpha / rank where there is an alpha, else 1. The rank is that of `lora_down`,
`hada_w1_b`, or `lokr_w2_b` (else `lokr_w1_b`). A LoKr with both factors direct has no rank and its alpha is
not looked at, so a scale other than 1 is multiplied into its smaller factor.

DoRA: ComfyUI divides `dora_scale` (out, 1) by the row norms of W, not of W + ΔW, so the trained magnitude is
written multiplied by ‖W‖ / ‖W + ΔW‖. ComfyUI also adds the machine epsilon of the dtype it merges in to ‖W‖;
that dtype depends on the user's device, so it is not compensated: 1.2e-7 / ‖W‖ of each row in fp32, 9.8e-4 /
‖W‖ in fp16.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np

from loraport.errors import DataError
from loraport.lora.canonical import Array, Factors, LoHa, LoKr, LoraFile, LoraModule, LowRank, RowScale
from loraport.lora.storage import read_tensors, write_tensors
from loraport_convert.dtypes import cast

PREFIX = "diffusion_model."
FAMILY_KEY = "loraport.family"

# Suffixes of up and down in the order in which ComfyUI looks for them; the first pair found is the one it
# applies.
_LOW_RANK = [
    (".lora_up.weight", ".lora_down.weight"),
    ("_lora.up.weight", "_lora.down.weight"),
    (".lora_B.weight", ".lora_A.weight"),
    (".lora.up.weight", ".lora.down.weight"),
    (".lora_B", ".lora_A"),
    (".lora_linear_layer.up.weight", ".lora_linear_layer.down.weight"),
    (".lora_B.default.weight", ".lora_A.default.weight"),
]
_LOHA = {f".hada_{name}": name for name in ("w1_a", "w1_b", "w2_a", "w2_b")}
_LOKR = {f".lokr_{name}": name for name in ("w1", "w2", "w1_a", "w1_b", "w2_a", "w2_b", "t2")}
_LETTERS = {"loha": "hada", "lokr": "lokr"}
_ALPHA, _DORA = ".alpha", ".dora_scale"
# ComfyUI applies these, and they change what the module's other keys mean.
_UNSUPPORTED = (".lora_mid.weight", ".hada_t1", ".hada_t2", ".reshape_weight")

_SUFFIXES = sorted(
    [*(each for pair in _LOW_RANK for each in pair), *_LOHA, *_LOKR, _ALPHA, _DORA, *_UNSUPPORTED],
    key=len,
    reverse=True,
)


class ComfyUI:
    """Reads and writes files the way ComfyUI interprets them."""

    name = "comfyui"

    def detect(
        self, keys: Collection[str], shapes: Mapping[str, tuple[int, ...]], metadata: Mapping[str, str]
    ) -> float:
        """The share of keys under `diffusion_model.` with a suffix that ComfyUI reads."""
        return sum(_split(key) is not None for key in keys) / len(keys) if keys else 0.0

    def read(self, path: Path) -> LoraFile:
        """What ComfyUI makes of a file; keys it does not apply to the diffusion model are in `unread`.

        Raises DataError when half of a pair is missing, a shape does not fit, or a module uses a kind that
        is not supported (Tucker LoRA or LoHa, padded weights).
        """
        tensors = read_tensors(path)
        grouped: dict[str, dict[str, str]] = defaultdict(dict)
        unread = []
        for key in tensors:
            parts = _split(key)
            if parts is None:
                unread.append(key)
            else:
                grouped[parts[0]][parts[1]] = key
        modules = {}
        for name, keys in grouped.items():
            module, used = _read_module(name, keys, tensors, path)
            if module is not None:
                modules[name] = module
            unread.extend(key for suffix, key in keys.items() if suffix not in used)
        return LoraFile(tensors.metadata.get(FAMILY_KEY), modules, tensors.metadata, tuple(unread))

    def write(self, lora: LoraFile, path: Path, dtype: str, metadata: Mapping[str, str]) -> None:
        """Write `lora` with its factors in `dtype`; alpha, DoRA scales and factors that absorb a scale stay fp32.

        Raises DataError when a number does not fit the dtype, or a DoRA part lacks the norms of the base weights.
        """
        tensors: dict[str, Array] = {}
        for name, module in lora.modules.items():
            for suffix, array in _write_module(module, dtype).items():
                tensors[f"{PREFIX}{name}{suffix}"] = array
        family = {FAMILY_KEY: lora.family} if lora.family else {}
        write_tensors(path, tensors, {**metadata, **family, "format": "pt"})


def _split(key: str) -> tuple[str, str] | None:
    """(module, suffix) of a key that ComfyUI looks for, else None."""
    if not key.startswith(PREFIX):
        return None
    suffix = next((each for each in _SUFFIXES if key.endswith(each)), None)
    return None if suffix is None else (key[len(PREFIX) : -len(suffix)], suffix)


def _read_module(
    name: str, keys: Mapping[str, str], tensors: Mapping[str, Array], path: Path
) -> tuple[LoraModule | None, set[str]]:
    """One module and the suffixes that made it; no module where there are no factors at all."""
    for suffix in _UNSUPPORTED:
        if suffix in keys:
            raise DataError(f"{path}: {keys[suffix]} is of a kind that LoraPort cannot read.")
    found = _factors(name, keys, tensors, path)
    if found is None:
        return None, set()
    factors, used = found
    module = LoraModule(name, factors, 1.0)
    scale = 1.0
    if _ALPHA in keys:
        used.add(_ALPHA)
        alpha = tensors[keys[_ALPHA]]
        if alpha.size != 1:
            raise DataError(f"{path}: {keys[_ALPHA]} must be one number, not {alpha.shape}.")
        scale = float(alpha.reshape(())) / factors.rank if factors.rank else 1.0
    dora = None
    if _DORA in keys:
        used.add(_DORA)
        stored = tensors[keys[_DORA]]
        rows = factors.shape[0]
        if stored.shape[:1] != (rows,) or stored.size != rows or stored.ndim < 2:
            raise DataError(
                f"{path}: {keys[_DORA]} has shape {stored.shape}; ComfyUI needs ({rows}, 1).",
                hint="Convert the trainer's own file instead: its magnitudes then get the right form.",
            )
        dora = RowScale(stored.reshape(-1), divisor="base")
    return replace(module, scale=scale, dora=dora), used


def _factors(
    name: str, keys: Mapping[str, str], tensors: Mapping[str, Array], path: Path
) -> tuple[Factors, set[str]] | None:
    """The factors ComfyUI would apply: of several kinds under one name, the last it looks for wins."""
    if any(suffix in keys for suffix in _LOKR):
        stored = {field: tensors[keys[suffix]] for suffix, field in _LOKR.items() if suffix in keys}
        return LoKr(**stored), {suffix for suffix in _LOKR if suffix in keys}
    if any(suffix in keys for suffix in _LOHA):
        missing = [name + suffix for suffix in _LOHA if suffix not in keys]
        if missing:
            raise DataError(f"{path}: LoRA module {name} is not whole: {', '.join(missing)} is missing.")
        return LoHa(**{field: tensors[keys[suffix]] for suffix, field in _LOHA.items()}), set(_LOHA)
    for up, down in _LOW_RANK:
        if up in keys and down in keys:
            return LowRank(down=tensors[keys[down]], up=tensors[keys[up]]), {up, down}
        if up in keys or down in keys:
            missing_half = name + (down if up in keys else up)
            raise DataError(f"{path}: LoRA module {name} is not whole: {missing_half} is missing.")
    return None


def _write_module(module: LoraModule, dtype: str) -> dict[str, Array]:
    """The tensors of one module by key suffix."""
    factors = module.factors

    def narrow(name: str, array: Array) -> Array:
        return cast(array, dtype, f"LoRA module {module.name}: {name}")

    stored = factors.map(narrow)
    if isinstance(factors, LowRank):
        tensors = {".lora_up.weight": stored.arrays()["up"], ".lora_down.weight": stored.arrays()["down"]}
    else:
        tensors = {f".{_LETTERS[factors.kind]}_{name}": array for name, array in stored.arrays().items()}
    if factors.rank is not None:
        tensors[_ALPHA] = cast(np.array(module.scale * factors.rank), "fp32", f"LoRA module {module.name}: alpha")
    elif module.scale != 1.0:
        # fp32, so that no scale is rounded twice; the smaller side of a Kronecker product costs little.
        name, smaller = min(factors.arrays().items(), key=lambda item: item[1].size)
        folded = module.scale * smaller.astype(np.float64)
        tensors[f".lokr_{name}"] = cast(folded, "fp32", f"LoRA module {module.name}: {name}")
    if module.dora is not None:
        tensors[_DORA] = _dora_scale(module.dora, module.name)
    return tensors


def _dora_scale(dora: RowScale, name: str) -> Array:
    """(out, 1) in fp32: it multiplies W itself, so its rounding weighs more than that of the factors."""
    if dora.divisor == "base":
        scale = dora.trained.astype(np.float64)
    elif dora.base_norm is None:
        raise DataError(
            f"LoRA module {name}: a DoRA needs the row norms of the base weights to be written for ComfyUI.",
            hint="Give the base model that the LoRA was trained on.",
        )
    else:
        scale = dora.gain() * dora.base_norm.astype(np.float64)
    return cast(scale[:, None], "fp32", f"LoRA module {name}: dora_scale")
