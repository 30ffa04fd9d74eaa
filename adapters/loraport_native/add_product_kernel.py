"""The Triton kernel of `add_product`."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

_ROWS, _COLUMNS = 64, 128
_LEAST = 16  #: numbers that the tensor cores sum over at once


def launch(total: Tensor, left: Tensor, right: Tensor, other: Tensor | None = None, *, adds: bool = True) -> None:
    """total (M, N) += left (M, K) · right (K, N) + other (M, N), on the current CUDA device and stream.

    The whole K is one tile, which its registers bound: K up to 64. Without `adds` what is in `total` is not read.
    """
    (rows, columns), rank = total.shape, left.shape[1]
    grid = (triton.cdiv(columns, _COLUMNS), triton.cdiv(rows, _ROWS))  # neighbours in a row of memory run together
    strides = (*total.stride(), *left.stride(), *right.stride())
    beside = total if other is None else other  # not read when there is none
    sizes = (rows, columns, rank, *strides, *beside.stride())
    tile = (_ROWS, _COLUMNS, max(_LEAST, triton.next_power_of_2(rank)))
    _add_product[grid](total, left, right, beside, *sizes, adds, other is not None, *tile, num_warps=4)


@triton.jit(do_not_specialize=["rows"])  # no compilation more for each kind of caption's length
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
    ADDS: tl.constexpr,
    HAS_OTHER: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    RANK: tl.constexpr,
):
    # A tile may begin beyond 2³¹ numbers; what is inside of it is counted from there.
    first_row, first_column = tl.program_id(1).to(tl.int64) * ROWS, tl.program_id(0).to(tl.int64) * COLUMNS
    left += first_row * left_row
    right += first_column * right_column
    total += first_row * total_row + first_column * total_column
    other += first_row * other_row + first_column * other_column
    row, column = tl.arange(0, ROWS)[:, None], tl.arange(0, COLUMNS)[None, :]
    along, down = tl.arange(0, RANK)[None, :], tl.arange(0, RANK)[:, None]
    in_rows, in_columns = row < (rows - first_row).to(tl.int32), column < (columns - first_column).to(tl.int32)
    inside = in_rows & in_columns
    some = tl.load(left + row * left_row + along * left_column, in_rows & (along < rank), 0.0)
    others = tl.load(right + down * right_row + column * right_column, (down < rank) & in_columns, 0.0)
    place = total + row * total_row + column * total_column
    so_far = tl.zeros((ROWS, COLUMNS), tl.float32)
    if ADDS:
        so_far += tl.load(place, inside, 0.0).to(tl.float32)
    if HAS_OTHER:
        so_far += tl.load(other + row * other_row + column * other_column, inside, 0.0).to(tl.float32)
    tl.store(place, tl.dot(some, others, so_far).to(total.dtype.element_ty), inside)
