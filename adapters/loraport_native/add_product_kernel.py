"""The Triton kernel of `add_product`."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

_ROWS, _COLUMNS, _RANK = 64, 128, 32


def launch(total: Tensor, left: Tensor, right: Tensor, other: Tensor | None = None) -> None:
    """total (M, N) += left (M, K) · right (K, N) + other (M, N), on the current CUDA device and stream."""
    (rows, columns), rank = total.shape, left.shape[1]
    grid = (triton.cdiv(columns, _COLUMNS), triton.cdiv(rows, _ROWS))  # neighbours in a row of memory run together
    strides = (*total.stride(), *left.stride(), *right.stride())
    beside = total if other is None else other  # not read when there is none
    sizes = (rows, columns, rank, *strides, *beside.stride())
    _add_product[grid](total, left, right, beside, *sizes, other is not None, _ROWS, _COLUMNS, _RANK, num_warps=4)


@triton.jit
def _add_product(  # type: ignore[no-untyped-def]
    total,
    left,
    right,
    other,
    rows,
    columns,
    rank,
    total_row,
    total_column,
    left_row,
    left_column,
    right_row,
    right_column,
    other_row,
    other_column,
    HAS_OTHER: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    RANK: tl.constexpr,
):
    row = (tl.program_id(1) * ROWS + tl.arange(0, ROWS)).to(tl.int64)[:, None]
    column = (tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS))[None, :]
    product = tl.zeros((ROWS, COLUMNS), tl.float32)
    for first in range(0, rank, RANK):
        along = first + tl.arange(0, RANK)[None, :]
        down = first + tl.arange(0, RANK)[:, None]
        some = tl.load(left + row * left_row + along * left_column, (row < rows) & (along < rank), 0.0)
        others = tl.load(right + down * right_row + column * right_column, (down < rank) & (column < columns), 0.0)
        product += tl.dot(some, others)
    place = total + row * total_row + column * total_column
    inside = (row < rows) & (column < columns)
    so_far = tl.load(place, inside, 0.0).to(tl.float32)
    if HAS_OTHER:
        so_far += tl.load(other + row * other_row + column * other_column, inside, 0.0).to(tl.float32)
    tl.store(place, (so_far + product).to(total.dtype.element_ty), inside)
