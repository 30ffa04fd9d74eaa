"""The weights that a LoRA was trained on, for what depends on them: a DoRA's norms, and its change as a whole.

A base is one safetensors file, as ComfyUI or the model's authors have it, or a folder as diffusers has it. Only the
weights of the modules that are asked for are read, one module at a time. Its names are understood by the same tables as
those of LoRAs, so diffusers' split weights are put together where the original model has one.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np

from loraport.errors import DataError
from loraport.lora.canonical import Array, ColumnScale, Float64, LoraFile, LoraModule, RowScale, exact
from loraport.lora.dora import with_norms
from loraport.lora.lazy import LazyModules
from loraport.lora.stacked import Full
from loraport.lora.storage import Tensors, read_tensors
from loraport_convert.codec import keys
from loraport_convert.families import ENCODERS, FAMILIES, ModuleMap
from loraport_convert.families.rules import cuts

#: `rescale` keeps a DoRA and its factors; `diff` writes its change as a whole.
DoraAs = Literal["rescale", "diff"]

_WEIGHT = ".weight"
_SCALES = (".weight_scale", ".scale_weight")  # of weights in fp8, for the whole or by row
_FLOATS = ("F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2")
_MODEL_FOLDERS = ("transformer", "unet")
_ENCODER_FOLDER = re.compile(r"text_encoder(?:_([23]))?")
#: Where one-file checkpoints keep the model and their text encoders.
_PREFIXES = {
    "model.diffusion_model.": keys.MODEL,
    "diffusion_model.": keys.MODEL,
    "cond_stage_model.transformer.": "te1",
    "conditioner.embedders.0.transformer.": "te1",
    "text_encoders.": keys.NAMED,
    "": keys.MODEL,
}
_BLOCK_NUMBERS = 4_000_000


@dataclass(frozen=True)
class _Rows:
    """Rows of a native weight: `start` to `stop` of a tensor become those from `to` on."""

    tensors: Tensors
    name: str
    start: int
    stop: int
    to: int
    total: int


class BaseModel:
    """The weights of a base model by the canonical names of modules.

    Raises DataError when there is no safetensors file at `path`, or `family` is not known.
    """

    def __init__(self, path: Path, family: str | None):
        if family not in FAMILIES:
            raise DataError(
                f"The base model's names are known only for a known family, not for {family or 'this LoRA'}.",
                hint=f"Say which it is with --family: {', '.join(FAMILIES)}.",
            )
        self.path = path
        self._rows: dict[str, list[_Rows]] = {}
        for file, part in _files(path):
            tensors = read_tensors(file)
            for key in tensors:
                if key.endswith(_WEIGHT) and len(tensors.shapes[key]) > 1:
                    self._add(tensors, key, part, FAMILIES[family])

    def weight(self, module: str) -> Array:
        """The weight (out, in[, kh, kw]) of a module, in its own float dtype or, where it has a scale, in fp32.

        Raises DataError when the base has no such weight, only some of its rows, or not as floats.
        """
        rows = sorted(self._rows.get(module, []), key=lambda each: each.to)
        if not rows or sum(each.stop - each.start for each in rows) != rows[0].total:
            raise DataError(
                f"{self.path} holds no whole weight for the LoRA's module {module}.",
                hint="Give the base model that the LoRA was trained on, with its text encoders where it changes them.",
            )
        parts = [_float(each)[each.start : each.stop] for each in rows]
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def _add(self, tensors: Tensors, key: str, part: str | None, family: ModuleMap) -> None:
        prefix = next(each for each in _PREFIXES if key.startswith(each)) if part is None else ""
        name, shape = key[len(prefix) : -len(_WEIGHT)], tensors.shapes[key]
        place = part or _PREFIXES[prefix]
        if place == keys.NAMED:
            self._rows.setdefault(keys.TEXT_ENCODERS + name, [_Rows(tensors, key, 0, shape[0], 0, shape[0])])
            return
        if place != keys.MODEL:
            number = int(place.removeprefix("te"))
            if number > len(family.encoders):
                return
            encoder = family.encoders[number - 1]
            known = ENCODERS["t5" if encoder.startswith("t5") else "clip"].native(name)
            if known is not None:
                full = f"{keys.TEXT_ENCODERS}{encoder}.transformer.{known[0].module}"
                self._rows.setdefault(full, [_Rows(tensors, key, 0, shape[0], 0, shape[0])])
            return
        spans = family.native(name, (shape[0], int(np.prod(shape[1:]))))
        ranges = None if spans is None else cuts(spans, shape[0])
        for span, (start, stop) in zip(spans or (), ranges or (), strict=True):
            share = (stop - start) // span.count
            place_of = _Rows(tensors, key, start, stop, share * span.first, share * span.total)
            self._rows.setdefault(span.module, []).append(place_of)


def with_base(lora: LoraFile, path: Path, dora: DoraAs) -> LoraFile:
    """The LoRA with what its DoRA modules need from the base at `path`: the norms, or with `diff` their change as a
    whole, in fp32. Other modules stay as they are; for a DoRA by column nothing is needed but for `diff`.

    Raises DataError as `BaseModel` does, the weights' own faults once a module is asked for.
    """
    base = BaseModel(path, lora.family)
    builders = {name: partial(_completed, lora, name, base, dora) for name in lora.modules}
    return replace(lora, modules=LazyModules(builders))


def _completed(lora: LoraFile, name: str, base: BaseModel, dora: DoraAs) -> LoraModule:
    module = lora.modules[name]
    if module.dora is None or (isinstance(module.dora, ColumnScale) and dora == "rescale"):
        return module
    weight = base.weight(name)
    out, columns = module.factors.shape
    if weight.shape[0] != out or weight.size != out * columns:
        raise DataError(
            f"LoRA module {name} changes a weight of {out} rows and {columns} columns; {base.path} has one of "
            f"{weight.shape}.",
            hint="Give the base model that the LoRA was trained on.",
        )
    module = replace(module, dora=replace(module.dora, axes=weight.ndim))
    if isinstance(module.dora, RowScale):
        module = with_norms(module, weight)
    return module if dora == "rescale" else _whole_change(module, weight)


def _whole_change(module: LoraModule, weight: Array) -> LoraModule:
    """ΔW of a DoRA, (out, in[, kh, kw]) in fp32: the scaled W + P, less W."""
    diff = np.empty(module.factors.shape, np.float32)
    rows = module.dora.gain()[:, None] if isinstance(module.dora, RowScale) else None
    columns = _column_gains(module, weight) if isinstance(module.dora, ColumnScale) else []
    for start, stop, before, after in _blocks(module, weight):
        if rows is not None:
            after *= rows[start:stop]
        for first, last, gain in columns:
            after[max(first - start, 0) : max(last - start, 0)] *= gain
        diff[start:stop] = after - before
    return LoraModule(module.name, Full(diff.reshape(weight.shape)), 1.0)


def _column_gains(module: LoraModule, weight: Array) -> list[tuple[int, int, Float64]]:
    """(first row, row after the last, factors on the columns of the matrix (out, in·kh·kw)) of each part of the module.

    All of an input's kernel has the same factor.
    """
    assert isinstance(module.dora, ColumnScale)
    out, columns = module.factors.shape
    ends = module.dora.ends or (out,)
    edges = list(zip((0, *ends), ends, strict=False))
    squares = np.zeros((len(ends), columns))
    for start, _, _, after in _blocks(module, weight):
        for part, (first, last) in enumerate(edges):
            squares[part] += np.sum(after[max(first - start, 0) : max(last - start, 0)] ** 2, axis=0)
    trained = np.atleast_2d(module.dora.trained.astype(np.float64))
    gains = trained / np.sqrt(squares.reshape(*trained.shape, -1).sum(axis=2))
    wide = np.repeat(gains, columns // trained.shape[1], axis=1)
    return [(first, last, gain) for (first, last), gain in zip(edges, wide, strict=True)]


def _blocks(module: LoraModule, weight: Array) -> Iterator[tuple[int, int, Float64, Float64]]:
    """(start, stop, rows of W, rows of W + P), as matrices in fp64."""
    out, columns = module.factors.shape
    product = module.factors.product()
    block = max(1, _BLOCK_NUMBERS // columns)
    for start in range(0, out, block):
        stop = min(start + block, out)
        before = exact(weight[start:stop])
        yield start, stop, before, before + module.scale * product(start, stop)


def _float(rows: _Rows) -> Array:
    tensors, key = rows.tensors, rows.name
    code = tensors.dtypes[key]
    if code not in _FLOATS:
        raise DataError(
            f"{tensors.path}: {key} is quantised to {code}, from which no weight can be read.",
            hint="Give the base model in bf16, fp16, fp32 or fp8.",
        )
    array = tensors[key]
    module = key.removesuffix(_WEIGHT)
    scale = next((module + end for end in _SCALES if module + end in tensors), None)
    if scale is None:
        return array
    numbers = tensors[scale].astype(np.float32).reshape(-1)
    if numbers.size not in (1, len(array)):
        raise DataError(f"{tensors.path}: {scale} has {numbers.size} scales for the {len(array)} rows of {key}.")
    return array.astype(np.float32) * numbers.reshape(-1, *(1 for _ in array.shape[1:]))


def _files(path: Path) -> list[tuple[Path, str | None]]:
    """(file, which part of the model it holds, None where its keys tell). Raises DataError where there is none."""
    if not path.is_dir():
        return [(path, None)]
    found: list[tuple[Path, str | None]] = []
    for file in sorted(path.glob("*.safetensors")) + sorted(path.glob("*/*.safetensors")):
        encoder = _ENCODER_FOLDER.fullmatch(file.parent.name)
        if encoder:
            found.append((file, f"te{encoder[1] or 1}"))
        elif file.parent == path or file.parent.name in _MODEL_FOLDERS:
            found.append((file, None))
    # Beside the full weights a folder may hold a variant of them, such as `.fp16.`.
    plain = [each for each in found if not re.search(r"\.(fp16|bf16|fp32|fp8|non_ema)[.-]", each[0].name)]
    if not found:
        raise DataError(
            f"{path} holds no .safetensors file of a model.",
            hint="Give a checkpoint's file, or a folder as diffusers has it, with transformer/ or unet/ in it.",
        )
    return plain or found
