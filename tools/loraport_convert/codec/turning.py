"""OFT adapters put together and taken apart: each block turns some rows of the weight among themselves, so blocks of
q, k and v stand side by side in the fused module as long as none of them crosses an edge.

The rotation of a block B is the Cayley transform (I + Q)(I − Q)⁻¹ of Q = B − Bᵀ (arXiv 2306.07280). A block-diagonal B
has a block-diagonal rotation, so blocks of different sizes fit into ones of a common size.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from loraport.errors import DataError
from loraport.lora.canonical import Array
from loraport.lora.stacked import Verbatim
from loraport_convert.codec import keys

Piece = tuple[int, Array]  # the first row, and blocks (count, size, size) from there on


def is_plain(factors: Verbatim) -> bool:
    """Whether it is one tensor of blocks that turns as it stands, without a bound on the blocks' size."""
    bound = factors.tensors.get(keys.ALPHA)
    return keys.OFT in factors.tensors and (bound is None or float(bound.reshape(())) <= 0)


def pieces_of(factors: Verbatim) -> list[Piece] | None:
    """The blocks of an OFT by their first rows, None for another kind.

    alpha bounds ‖Q‖ of a module by alpha times its rows (for sd-scripts those of each of its parts). Where it does, the
    blocks come scaled down as the bound would, in fp32. Raises DataError where alpha is NaN.
    """
    named = factors.blocks()
    if not named or any(blocks.ndim != 3 for blocks in named):
        return None
    alpha = factors.tensors.get(keys.ALPHA)
    bound = 0.0 if alpha is None else float(alpha.reshape(()))
    if math.isnan(bound):
        raise DataError(f"The {keys.ALPHA} of an OFT is no number.", hint="The file is damaged: copy it again.")
    pieces, first = [], 0
    for blocks in named:
        rows = blocks.shape[0] * blocks.shape[1]
        pieces.append((first, _bounded(blocks, bound * rows)))
        first += rows
    return pieces


def cut(pieces: Sequence[Piece], start: int, stop: int, to: int) -> list[Piece] | None:
    """Rows `start` to `stop`, from row `to` on; None where an edge goes through a block."""
    found = []
    for first, blocks in pieces:
        size = blocks.shape[1]
        low, high = max(start, first), min(stop, first + len(blocks) * size)
        if low >= high:
            continue
        if (low - first) % size or (high - first) % size:
            return None
        found.append((to + low - start, blocks[(low - first) // size : (high - first) // size]))
    return found


def joined(pieces: Sequence[Piece], rows: int) -> Array | None:
    """One tensor of blocks that turns each piece's rows as it does and leaves the others, or None where no size of
    blocks fits all edges."""
    size = math.lcm(*(blocks.shape[1] for _, blocks in pieces))
    edges = [edge for first, blocks in pieces for edge in (first, first + blocks.shape[0] * blocks.shape[1])]
    if any(edge % size for edge in (rows, *edges)):
        return None
    dtypes = {blocks.dtype for _, blocks in pieces}
    whole = np.zeros((rows // size, size, size), dtypes.pop() if len(dtypes) == 1 else np.float32)
    for first, blocks in pieces:
        own = blocks.shape[1]
        for number, block in enumerate(blocks):
            place, inner = divmod(first + number * own, size)
            whole[place, inner : inner + own, inner : inner + own] = block
    return whole


def _bounded(blocks: Array, bound: float) -> Array:
    numbers = blocks.astype(np.float64)
    norm = float(np.linalg.norm(numbers - numbers.transpose(0, 2, 1))) if bound > 0 else 0.0
    return blocks if norm <= bound else (numbers * (bound / norm)).astype(np.float32)
