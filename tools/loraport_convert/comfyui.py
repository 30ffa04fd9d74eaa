"""The ComfyUI dialect: the names of ComfyUI's own model under `diffusion_model.`, which it accepts for every
architecture, and of its text encoders under `text_encoders.`.

Low-rank factors are written as `lora_up`/`lora_down` with `.alpha`. ComfyUI reads `lora_A`/`lora_B` as well, but that
pair comes from PEFT, where the scale is not in the file, and several readers of it never look for `.alpha`; readers of
up/down (ComfyUI, the kohya family, diffusers' converters) all multiply by alpha / rank.

Scale, as ComfyUI computes it: alpha / rank where there is an alpha, else 1. The rank is that of `lora_down`,
`hada_w1_b`, or `lokr_w2_b` (else `lokr_w1_b`). A LoKr with both factors direct has no rank and its alpha is not looked
at, so a scale other than 1 is multiplied into its smaller factor.

DoRA: ComfyUI divides `dora_scale` (out, 1) by the row norms of W, not of W + ΔW, so the trained magnitude is written
multiplied by ‖W‖ / ‖W + ΔW‖. ComfyUI also adds the machine epsilon of the dtype it merges in to ‖W‖; that dtype depends
on the user's device, so it is not compensated: 1.2e-7 / ‖W‖ of each row in fp32, 9.8e-4 / ‖W‖ in fp16.
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterator, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Self

import numpy as np

from loraport.errors import DataError
from loraport.lora.canonical import Array, ColumnScale, LoKr, LoraFile, LoraModule, LowRank, RowScale
from loraport.lora.lazy import LazyModules
from loraport.lora.storage import Tensors, read_tensors
from loraport.lora.streaming import stream_tensors
from loraport_convert.codec import keys
from loraport_convert.codec.decode import FAMILY_KEY
from loraport_convert.codec.encode import dora_shaped, low_rank_tensors, lycoris_tensors, of_one_module, spelled
from loraport_convert.codec.header import check_growth, dora_of, factors_of, fields_of, measure
from loraport_convert.codec.keys import split
from loraport_convert.dialects.base import known
from loraport_convert.dtypes import cast
from loraport_convert.families import FAMILIES
from loraport_convert.families.detect import detect_family
from loraport_convert.families.rules import ModuleMap, Shape, Span

PREFIX = "diffusion_model."
_LEAVES_OUT = 0.85  #: below what other readers of its prefix are sure of
_UNREAD = (*keys.MAGNITUDES, keys.PEFT_BIAS, keys.DIFF_MODULATION, keys.SCALE)


class ComfyUI:
    """Reads and writes files the way ComfyUI interprets them."""

    name = "comfyui"
    family: str | None = None  #: told by somebody; ComfyUI's names mean the same without it

    def for_family(self, family: str) -> Self:
        """The same dialect for files of this family. Raises DataError for one that is not known."""
        told = copy.copy(self)
        told.family = known(family)
        return told

    def detect(
        self, keys: Collection[str], shapes: Mapping[str, tuple[int, ...]], metadata: Mapping[str, str]
    ) -> float:
        """The share of keys that ComfyUI reads: under its prefixes, and not by diffusers' names for a family's
        modules. A file of which it would leave out what others understand is not written for it."""
        mine = [key for key in keys if _split(key) is not None]
        if not mine:
            return 0.0
        share = len(mine) / len(keys)
        if any(key.startswith(PREFIX) and _split(key) is None and split(key) is not None for key in keys):
            share = min(share, _LEAVES_OUT)
        return share if _are_native(mine, shapes, metadata.get(FAMILY_KEY)) else 0.5 * share

    def read(self, path: Path) -> LoraFile:
        """What ComfyUI makes of a file; keys it does not apply are in `unread`.

        Raises DataError when half of a pair is missing, a shape does not fit, or a module uses a kind that is not
        supported (padded weights, replaced ones, trained norms).
        """
        tensors = read_tensors(path)
        mine = [key for key in tensors if _split(key) is not None]
        unread = [key for key in tensors if _split(key) is None]
        builders, sizes = {}, {}
        grouped, _ = keys.grouped(mine)
        for prefixed, endings in grouped.items():
            if keys.NORM_BIAS in endings and keys.NORM not in grouped.get(prefixed.removesuffix(keys.BIAS), {}):
                unread.append(endings[keys.NORM_BIAS])  # it looks for the two together
                continue
            fields, rest = fields_of(prefixed, endings, (keys.DORA_SCALE,), path)
            unread.extend(rest)
            if fields:
                name = prefixed.removeprefix(PREFIX)
                sizes[name] = _measure(name, fields, tensors)
                builders[name] = partial(_module, name, fields, tensors)
        family = tensors.metadata.get(FAMILY_KEY) or self.family or _family(sizes)
        for name in [each for each in builders if _lost(family, each)]:
            del builders[name]
            unread.extend(grouped[PREFIX + name].values())
        for name in builders:
            if reshape := grouped[name if name.startswith(keys.TEXT_ENCODERS) else PREFIX + name].get(keys.RESHAPE):
                check_growth(FAMILIES.get(family or ""), name, sizes[name], tensors[reshape], reshape)
        return LoraFile(family, LazyModules(builders), tensors.metadata, tuple(unread))

    def write(self, lora: LoraFile, path: Path, dtype: str | None, metadata: Mapping[str, str]) -> None:
        """Write `lora` with its factors in `dtype`, or each in its own; alpha, DoRA scales and factors that absorb a
        scale are fp32.

        Raises DataError when a number does not fit the dtype, or a DoRA part lacks the norms of the base weights, and
        NotExact for a module that ComfyUI has no form for.
        """
        family = {FAMILY_KEY: lora.family} if lora.family else {}
        stream_tensors(path, _tensors(lora, dtype), {**metadata, **family, "format": "pt"})


def _split(key: str) -> tuple[str, str] | None:
    """(prefixed module, ending) of a key that ComfyUI looks for under its own names, else None."""
    if not key.startswith((PREFIX, keys.TEXT_ENCODERS)):
        return None
    parts = keys.split(key)
    return None if parts is None or parts[1] in _UNREAD or not key.endswith(parts[1]) else parts


def _lost(family: str | None, name: str) -> bool:
    """Whether a module's change is of a bias that the model does not have."""
    owner = name.removesuffix(keys.BIAS)
    return owner != name and family in FAMILIES and not FAMILIES[family].has_bias(owner)


def _are_native(mine: Collection[str], shapes: Mapping[str, tuple[int, ...]], told: str | None) -> bool:
    """Whether the names are those of the original model, as far as the family is known."""
    columns: dict[str, Shape] = {}
    for key in mine:
        prefixed, ending = keys.split(key) or ("", "")
        name = prefixed.removeprefix(PREFIX)
        shape = shapes.get(key, ())
        down = ending in {down for _, down in keys.LOW_RANK}
        columns.setdefault(name, (0, 0))
        if down and len(shape) > 1:
            columns[name] = (0, int(np.prod(shape[1:])))
    family = told if told in FAMILIES else _family(columns)
    return family is None or all(_native(FAMILIES[family], name) for name in columns)


def _native(family: ModuleMap, name: str) -> bool:
    return name.startswith(keys.TEXT_ENCODERS) or family.native(name) in (None, (Span(name, 0, 1, 1),))


def _family(sizes: Mapping[str, Shape]) -> str | None:
    try:
        family = detect_family({(n, False): s for n, s in sizes.items() if _tells_family(n)})
    except DataError:
        return None  # several fit; ComfyUI's names need no family to be understood
    return family.name if family else None


def _tells_family(name: str) -> bool:
    return not (name.startswith(keys.TEXT_ENCODERS) or name.endswith(keys.BIAS))


def _measure(name: str, fields: Mapping[str, str], tensors: Tensors) -> Shape:
    shapes = {field: tensors.shapes[key] for field, key in fields.items()}
    magnitude = shapes.pop("magnitude", None)
    size, _ = measure(shapes, name, tensors.path)
    rows, columns = size
    numbers = None if magnitude is None else np.broadcast_to(np.float32(0), magnitude)
    if numbers is not None and (numbers.ndim < 2 or dora_of(numbers, keys.DORA_SCALE, rows, columns) is None):
        raise DataError(
            f"{tensors.path}: {fields['magnitude']} has shape {magnitude}; ComfyUI needs ({rows}, 1) "
            f"or (1, {columns}).",
            hint="Convert the trainer's own file instead: its magnitudes then get the right form.",
        )
    return size


def _module(name: str, fields: Mapping[str, str], tensors: Tensors) -> LoraModule:
    arrays = {field: tensors.on_disk(key) for field, key in fields.items()}
    factors = factors_of(arrays)
    scale = float(arrays["alpha"].reshape(())) / factors.rank if "alpha" in arrays and factors.rank else 1.0
    dora = None
    if "magnitude" in arrays:
        dora = dora_of(arrays["magnitude"], keys.DORA_SCALE, *factors.shape)
        dora = replace(dora, divisor="base") if isinstance(dora, RowScale) else dora
    return LoraModule(name, factors, scale, dora)


def _tensors(lora: LoraFile, dtype: str | None) -> Iterator[tuple[str, Array]]:
    grows = FAMILIES[lora.family].grows if lora.family in FAMILIES else {}
    for name, module in lora.modules.items():
        prefixed = name if name.startswith(keys.TEXT_ENCODERS) else PREFIX + name
        module = _without_core(module)
        tensors = low_rank_tensors(module, dtype, ".lora_up.weight", ".lora_down.weight")
        for ending, array in (tensors or lycoris_tensors(module, dtype, "ComfyUI")).items():
            yield spelled(prefixed, ending), array
        rows, columns = module.factors.shape
        if isinstance(module.factors, LowRank) and columns > grows.get(name, columns):
            yield prefixed + keys.RESHAPE, np.array([rows, columns])
        if module.dora is not None:
            yield prefixed + keys.DORA_SCALE, _dora_scale(module.dora, name)


def _without_core(module: LoraModule) -> LoraModule:
    """A LoKr's Tucker core multiplied out in fp32: ComfyUI reads `lokr_t2`, but its product then fails on the layout of
    the memory, and it leaves the module out."""
    factors = module.factors
    if not isinstance(factors, LoKr) or factors.t2 is None:
        return module
    _, side = factors.sides()
    rows = side.shape[0]
    whole = side.astype(np.float32).reshape(rows, -1, *factors.t2.shape[2:])
    return replace(module, factors=LoKr(w1=factors.w1, w1_a=factors.w1_a, w1_b=factors.w1_b, w2=whole))


def _dora_scale(dora: RowScale | ColumnScale, name: str) -> Array:
    """In fp32: it multiplies W itself, so its rounding weighs more than that of the factors."""
    if isinstance(dora, ColumnScale):
        scale = of_one_module(dora, name).trained.astype(np.float64)
    elif dora.divisor == "base":
        scale = dora.trained.astype(np.float64)
    elif dora.base_norm is None:
        raise DataError(
            f"LoRA module {name}: a DoRA needs the row norms of the base weights to be written for ComfyUI.",
            hint="Give the base model that the LoRA was trained on (loraport convert --base MODEL).",
        )
    else:
        scale = dora.gain() * dora.base_norm.astype(np.float64)
    return cast(dora_shaped(scale, dora), "fp32", f"LoRA module {name}: dora_scale")
