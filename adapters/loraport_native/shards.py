"""Writing weights that are made as they are written: safetensors shards, one in memory at a time."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

SHARD_BYTES = 2 * 2**30


def write_shards(
    folder: Path,
    stem: str,
    sizes: Mapping[str, int],
    make: Callable[[str], Mapping[str, Tensor]],
    limit: int = SHARD_BYTES,
) -> None:
    """Write the tensors of each item as `folder/stem.safetensors`, or as numbered shards with an index.

    sizes: an estimate of each item's bytes; a shard takes items up to `limit` of them, and at least one. make: the
    tensors of an item by the names they are stored under; called once for each item, in order. The names are those of
    diffusers and transformers, so that both read the result.
    """
    groups: list[list[str]] = [[]]
    filled = 0
    for item, size in sizes.items():
        if groups[-1] and filled + size > limit:
            groups.append([])
            filled = 0
        groups[-1].append(item)
        filled += size
    folder.mkdir(parents=True, exist_ok=True)
    place: dict[str, str] = {}
    for number, items in enumerate(groups, start=1):
        shard = f"{stem}-{number:05}-of-{len(groups):05}" if len(groups) > 1 else stem
        tensors = {name: tensor for item in items for name, tensor in make(item).items()}
        save_file(tensors, folder / f"{shard}.safetensors", metadata={"format": "pt"})
        place |= dict.fromkeys(tensors, f"{shard}.safetensors")
    if len(groups) > 1:
        total = sum((folder / name).stat().st_size for name in set(place.values()))
        index = {"metadata": {"total_size": total}, "weight_map": place}
        (folder / f"{stem}.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
