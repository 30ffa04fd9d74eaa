"""Several LoRAs as one, exactly: the sum of low-rank changes is a low-rank change whose factors lie side by side."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np

from loraport.errors import DataError
from loraport.lora.canonical import Array, LoraFile, LoraModule, LowRank
from loraport.lora.lazy import LazyModules
from loraport.lora.stacked import Full, Verbatim

_FILE_NAMES = {"float64": "fp32", "float32": "fp32", "float16": "fp16"}


@dataclass(frozen=True)
class Ingredient:
    """A LoRA and how much of it goes in."""

    path: Path
    lora: LoraFile
    strength: float


def parse_ingredient(text: str) -> tuple[Path, float]:
    """`a.safetensors:0.7` → path and strength, 1 where none is given. Raises DataError for one that is no number."""
    head, colon, tail = text.rpartition(":")
    if not colon or Path(text).exists():
        return Path(text), 1.0
    try:
        strength = float(tail)
    except ValueError as error:
        raise DataError(f"{text}: {tail!r} is not a strength.", hint="Write FILE:0.7.") from error
    if not math.isfinite(strength):
        raise DataError(f"{text}: a strength must be a finite number.")
    return Path(head), strength


def merged(ingredients: Sequence[Ingredient]) -> LoraFile:
    """The LoRA whose change of each module is the sum of strength times change.

    The first scale of a module stays its scale and the others go into their factors relative to it, in fp64, so that a
    rounding happens once, when the file is written. A module that only one LoRA has stays as it is, whatever its kind.
    Raises DataError when the families differ, or, once a module is asked for, when it is a DoRA or a module of several
    LoRAs is not low-rank.
    """
    families = {each.lora.family for each in ingredients}
    if len(families) > 1:
        told = ", ".join(f"{each.path} ({each.lora.family or 'unknown'})" for each in ingredients)
        raise DataError(f"LoRAs of different models cannot be merged: {told}.")
    names = dict.fromkeys(name for each in ingredients for name in each.lora.modules)
    builders = {
        name: partial(_module, name, [each for each in ingredients if name in each.lora.modules]) for name in names
    }
    unread = tuple(key for each in ingredients for key in each.lora.unread)
    return LoraFile(families.pop(), LazyModules(builders), {}, unread)


def common_dtype(ingredients: Sequence[Ingredient]) -> str:
    """The dtype that all are stored in, as far as the first module of each tells, else fp32."""
    found = set()
    for each in ingredients:
        first = next(iter(each.lora.modules.values()))
        found |= {_FILE_NAMES.get(array.dtype.name, "bf16") for array in first.factors.arrays().values()}
    return found.pop() if len(found) == 1 else "fp32"


def _module(name: str, ingredients: Sequence[Ingredient]) -> LoraModule:
    modules = [(each.lora.modules[name], each) for each in ingredients]
    for module, each in modules:
        if module.dora is not None:
            raise DataError(
                f"{each.path}: module {name} is a DoRA, whose change depends on the base weights and is no sum.",
                hint="Use the LoRAs one after the other in ComfyUI instead.",
            )
    if len(modules) == 1:
        module, each = modules[0]
        if isinstance(module.factors, Verbatim) and each.strength != 1:
            raise DataError(
                f"{each.path}: module {name} ({module.factors.algorithm}) can be kept at no other strength than 1.",
                hint="Give it the strength 1, or use the LoRAs one after the other in ComfyUI.",
            )
        return replace(module, scale=module.scale * each.strength)
    if all(isinstance(module.factors, Full) for module, _ in modules):
        return _summed(
            name, [(module.factors.arrays()["diff"], module.scale * each.strength) for module, each in modules]
        )
    parts: list[tuple[LowRank, float]] = []
    for module, each in modules:
        if not isinstance(module.factors, LowRank):
            raise DataError(
                f"{each.path}: module {name} is a {module.factors.kind}, which cannot be added to another exactly.",
                hint="Make it a LoRA first with `loraport resize FILE --rank N`, which tells the error.",
            )
        parts.append((module.factors, module.scale * each.strength))
    return LoraModule(name, *_side_by_side(name, parts))


def _summed(name: str, changes: Sequence[tuple[Array, float]]) -> LoraModule:
    """The sum of whole changes, in fp64."""
    if len({change.shape for change, _ in changes}) > 1:
        shapes = ", ".join(str(change.shape) for change, _ in changes)
        raise _of_other_sizes(name, shapes)
    total = np.sum([scale * change.astype(np.float64) for change, scale in changes], axis=0)
    return LoraModule(name, Full(total), 1.0)


def _of_other_sizes(name: str, shapes: str) -> DataError:
    return DataError(f"The module {name} has different sizes: {shapes}.", hint="They were trained on different models.")


def _side_by_side(name: str, parts: Sequence[tuple[LowRank, float]]) -> tuple[LowRank, float]:
    """One LoRA of all ranks together, and its scale."""
    if len({factors.shape for factors, _ in parts}) > 1 or len({factors.down.shape[1:] for factors, _ in parts}) > 1:
        shapes = ", ".join(str(factors.shape) for factors, _ in parts)
        raise _of_other_sizes(name, shapes)
    scale = next((each for _, each in parts if each), 1.0)
    ups = [_times(factors.up, each / scale) for factors, each in parts]
    downs = [factors.down for factors, _ in parts]
    return LowRank(down=_joined(downs, axis=0), up=_joined(ups, axis=1)), scale


def _times(array: Array, ratio: float) -> Array:
    """`ratio` times the array: untouched where that loses nothing, else in fp64."""
    return array if ratio == 1.0 else array.astype(np.float64) * ratio


def _joined(arrays: Sequence[Array], axis: int) -> Array:
    """The arrays side by side, in fp64 where their dtypes differ: numpy has no common one for bf16 and others."""
    if len({array.dtype for array in arrays}) > 1:
        arrays = [array.astype(np.float64) for array in arrays]
    return np.concatenate(arrays, axis=axis)
