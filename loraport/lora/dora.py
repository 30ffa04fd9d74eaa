"""Filling in what a DoRA needs to know about the base weights."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from loraport.errors import DataError
from loraport.lora.canonical import Array, LoraModule, RowScale, exact

_BLOCK_NUMBERS = 4_000_000


def with_norms(module: LoraModule, weight: Array) -> LoraModule:
    """The module with the row norms ‖W‖ and ‖W + ΔW‖ of its base weight, (out, in[, kh, kw]), in its DoRA
    part.

    A module without a DoRA part, or with one by column, comes back as it is. Raises DataError when the weight has
    another shape.
    """
    if not isinstance(module.dora, RowScale):
        return module
    out, columns = module.factors.shape
    if weight.shape[0] != out or weight.size != out * columns:
        raise DataError(
            f"LoRA module {module.name} changes a weight of {out} rows and {columns} columns; the base model's "
            f"is {weight.shape}.",
            hint="Give the base model that the LoRA was trained on.",
        )
    product = module.factors.product()
    base, merged = np.empty(out), np.empty(out)
    block = max(1, _BLOCK_NUMBERS // columns)
    for start in range(0, out, block):
        rows = slice(start, min(start + block, out))
        part = exact(weight[rows])
        base[rows] = np.linalg.norm(part, axis=1)
        merged[rows] = np.linalg.norm(part + module.scale * product(rows.start, rows.stop), axis=1)
    return replace(module, dora=replace(module.dora, base_norm=base, merged_norm=merged))
