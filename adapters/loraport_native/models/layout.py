"""The two ways an Ideogram 4 transformer is written: official (fused attention) and diffusers (split).

Only attention differs. The official `qkv` holds the rows of diffusers' `to_q`, `to_k` and `to_v` one under
the other, in that order, and `o` is `to_out.0`. Everything here works on one name at a time, so a checkpoint
of any size can be converted while it streams.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping

import torch
from torch import Tensor

_FUSED = re.compile(r"(layers\.\d+\.attention\.)(qkv|o)\.weight")
_PARTS = {"qkv": ("to_q", "to_k", "to_v"), "o": ("to_out.0",)}


def split_names(name: str) -> tuple[str, ...]:
    """The diffusers tensors whose rows, in this order, make the official tensor `name`."""
    match = _FUSED.fullmatch(name)
    if match is None:
        return (name,)
    prefix, projection = match.groups()
    return tuple(f"{prefix}{part}.weight" for part in _PARTS[projection])


def split(name: str, tensor: Tensor) -> dict[str, Tensor]:
    """Write one official tensor as diffusers' tensors, contiguous."""
    names = split_names(name)
    return {part: rows.contiguous() for part, rows in zip(names, tensor.chunk(len(names)), strict=True)}


def fuse_names(names: Iterable[str]) -> Iterator[str]:
    """The official names of diffusers' names, each once, in order of appearance."""
    seen = set()
    for name in names:
        fused = re.sub(r"\.attention\.to_[qkv]\.", ".attention.qkv.", name)
        fused = fused.replace(".attention.to_out.0.", ".attention.o.")
        if fused not in seen:
            seen.add(fused)
            yield fused


def fuse(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Write diffusers' tensors under the official names. KeyError when a part of a `qkv` is not there."""
    fused = {}
    for name in fuse_names(tensors):
        parts = [tensors[part] for part in split_names(name)]
        fused[name] = torch.cat(parts) if len(parts) > 1 else parts[0]
    return fused
