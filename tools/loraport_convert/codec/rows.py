"""Moving rows between modules without loss: q, k and v into one, one into three, halves that change places."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import accumulate, pairwise
from typing import Any, cast

import numpy as np

from loraport.lora.bits import same_bits
from loraport.lora.canonical import Array, Factors, LoHa, LoKr, LowRank, Tucker
from loraport.lora.ondisk import OnDisk, Placed
from loraport.lora.stacked import Full, Part, Stacked


def cut(part: Part, start: int, stop: int, to: int) -> list[Part]:
    """Rows `start` to `stop` of a part's own, to be added from row `to` on.

    It is one part but for a Kronecker product whose blocks the cut goes through: that one takes up to three.
    """
    factors = part.factors
    if isinstance(factors, LowRank | Tucker):
        return [Part(to, replace(factors, up=factors.up[start:stop]), part.scale)]
    if isinstance(factors, LoHa):
        if factors.t1 is not None:
            w1_a, w2_a = factors.w1_a[:, start:stop], factors.w2_a[:, start:stop]
            return [Part(to, replace(factors, w1_a=w1_a, w2_a=w2_a), part.scale)]
        w1_a, w2_a = factors.w1_a[start:stop], factors.w2_a[start:stop]
        return [Part(to, replace(factors, w1_a=w1_a, w2_a=w2_a), part.scale)]
    if isinstance(factors, Full):
        return [Part(to, Full(factors.diff[start:stop]), part.scale)]
    if isinstance(factors, LoKr):
        pieces = _cut_kronecker(factors, start, stop)
        return [Part(to + first - start, piece, part.scale) for first, piece in pieces]
    assert isinstance(factors, Stacked)
    inner = []
    for each in factors.parts:
        low, high = max(start, each.start), min(stop, each.stop)
        if low < high:
            scaled = replace(each, scale=each.scale * part.scale)
            inner += cut(scaled, low - each.start, high - each.start, to + low - start)
    return inner


def fuse(parts: Sequence[Part], rows: int) -> tuple[Factors, float]:
    """One adapter, with its scale, that does what the parts do together; no two of them share a row.

    LoRA parts give a LoRA whose rank is the sum of theirs, parts with the same `down` sharing it; LoHa alike. LoKr
    parts give a LoKr where they have one factor in common. Anything else is stacked.
    """
    if len(parts) == 1 and parts[0].start == 0 and parts[0].stop == rows:
        return parts[0].factors, parts[0].scale
    scale = next((part.scale for part in parts if part.scale), 0.0)
    # The first scale is the module's; another one goes into the factors, relative to it.
    ratios = [part.scale / scale if scale else 1.0 for part in parts]
    kinds = {type(part.factors) for part in parts}
    assert _disjoint(parts)
    fused: Factors | None = None
    if kinds == {LowRank}:
        fused = _fuse_low_rank(parts, ratios, rows)
    elif kinds == {LoHa} and all(getattr(part.factors, "t1", None) is None for part in parts):
        fused = _fuse_loha(parts, ratios, rows)
    elif kinds == {LoKr} and set(ratios) == {1.0}:
        fused = _fuse_kronecker(parts, rows)
    elif kinds == {Full}:
        fused = Full(
            _place([(part.start, 0, scaled(_diff(part), r)) for part, r in zip(parts, ratios, strict=True)], rows)
        )
    return (fused, scale) if fused is not None else (Stacked(rows, tuple(parts)), 1.0)


def without_idle_rank(factors: Factors) -> Factors:
    """A LoRA without the rank terms that add nothing because their column of `up` is zero; others as they are."""
    if not isinstance(factors, LowRank):
        return factors
    used = np.flatnonzero(np.any(factors.up.reshape(factors.up.shape[0], -1) != 0, axis=0))
    if len(used) in (0, factors.rank):
        return factors
    return LowRank(down=np.ascontiguousarray(factors.down[used]), up=np.ascontiguousarray(factors.up[:, used]))


def _fuse_low_rank(parts: Sequence[Part], ratios: Sequence[float], rows: int) -> LowRank:
    downs: list[tuple[Array, int]] = []  # (down, its first rank term)
    placed, rank = [], 0
    for part, ratio in zip(parts, ratios, strict=True):
        assert isinstance(part.factors, LowRank)
        down, up = part.factors.down, part.factors.up
        first = next((first for shared, first in downs if _same(shared, down)), None)
        if first is None:
            first = rank
            downs.append((down, rank))
            rank += down.shape[0]
        placed.append((part.start, first, scaled(up, ratio)))
    return LowRank(down=_concatenated([down for down, _ in downs]), up=_place(placed, rows, rank))


def _fuse_loha(parts: Sequence[Part], ratios: Sequence[float], rows: int) -> LoHa:
    """The rank terms of one part meet zeros in the rows of the others, so the two products stay apart."""
    factors = [part.factors for part in parts if isinstance(part.factors, LoHa)]
    firsts = np.cumsum([0, *(each.rank for each in factors)])
    seconds = np.cumsum([0, *(each.w2_b.shape[0] for each in factors)])
    starts = [part.start for part in parts]
    w1_a = [(s, int(at), scaled(f.w1_a, r)) for s, at, f, r in zip(starts, firsts, factors, ratios, strict=False)]
    w2_a = [(start, int(at), each.w2_a) for start, at, each in zip(starts, seconds, factors, strict=False)]
    return LoHa(
        w1_a=_place(w1_a, rows, int(firsts[-1])),
        w1_b=_concatenated([each.w1_b for each in factors]),
        w2_a=_place(w2_a, rows, int(seconds[-1])),
        w2_b=_concatenated([each.w2_b for each in factors]),
    )


def _fuse_kronecker(parts: Sequence[Part], rows: int) -> LoKr | None:
    """w1 stacked, where all of w2 is the same and the parts fill the rows without a gap."""
    ordered = sorted(parts, key=lambda part: part.start)
    factors = [part.factors for part in ordered if isinstance(part.factors, LoKr)]
    first = factors[0]
    if sum(each.shape[0] for each in factors) != rows:
        return None
    shared = ("w1_b", "w2", "w2_a", "w2_b", "t2")
    if any(not _same(getattr(first, name), getattr(each, name)) for each in factors[1:] for name in shared):
        return None
    outer = "w1" if first.w1 is not None else "w1_a"
    return replace(first, **{outer: _concatenated([getattr(each, outer) for each in factors])})


def _cut_kronecker(factors: LoKr, start: int, stop: int) -> list[tuple[int, LoKr]]:
    """(first row, piece): whole blocks of rows in one piece, a begun block before and after in one each."""
    block = _block_rows(factors)
    edges = sorted({start, stop, *(edge for edge in (-(-start // block) * block, stop // block * block))})
    edges = [edge for edge in edges if start <= edge <= stop]
    pieces = []
    for low, high in pairwise(edges):
        outer, inner = divmod(low, block)
        if inner == 0 and (high - low) % block == 0:
            pieces.append((low, _outer_rows(factors, outer, high // block)))
        else:
            piece = _outer_rows(factors, outer, outer + 1)
            pieces.append((low, _inner_rows(piece, inner, inner + high - low)))
    return pieces


def _block_rows(factors: LoKr) -> int:
    """The rows of w2."""
    if factors.w2 is not None:
        return int(factors.w2.shape[0])
    assert factors.w2_a is not None
    return int(factors.w2_a.shape[1 if factors.t2 is not None else 0])


def _outer_rows(factors: LoKr, start: int, stop: int) -> LoKr:
    name = "w1" if factors.w1 is not None else "w1_a"
    return replace(factors, **{name: getattr(factors, name)[start:stop]})


def _inner_rows(factors: LoKr, start: int, stop: int) -> LoKr:
    if factors.w2 is not None:
        return replace(factors, w2=factors.w2[start:stop])
    assert factors.w2_a is not None
    return replace(factors, w2_a=factors.w2_a[:, start:stop] if factors.t2 is not None else factors.w2_a[start:stop])


def _diff(part: Part) -> Array:
    assert isinstance(part.factors, Full)
    return part.factors.diff


def _place(pieces: Sequence[tuple[int, int, Array]], rows: int, columns: int | None = None) -> Array:
    """Zeros with arrays in them, each from its (row, column) on; `columns` is left out where they are as wide."""
    dtype = _common_dtype([array for _, _, array in pieces])
    first = pieces[0][2].shape
    if len(first) == 1:  # biases
        return _place([(row, column, array[:, None]) for row, column, array in pieces], rows)[:, 0]
    shape = (rows, first[1] if columns is None else columns, *first[2:])
    on_disk: list[tuple[int, int, OnDisk]] = [piece for piece in pieces if isinstance(piece[2], OnDisk)]  # type: ignore[misc]
    if len(on_disk) == len(pieces) and all(array.dtype == dtype for _, _, array in on_disk):
        return cast(Array, Placed(on_disk, shape))
    placed = np.zeros(shape, dtype)
    for row, column, array in pieces:
        placed[row : row + array.shape[0], column : column + array.shape[1]] = array
    return placed


def _concatenated(arrays: Sequence[Array]) -> Array:
    dtype = _common_dtype(arrays)
    if all(isinstance(array, OnDisk) for array in arrays):
        starts = accumulate((len(array) for array in arrays), initial=0)
        rows = sum(len(array) for array in arrays)
        return _place([(start, 0, array) for start, array in zip(starts, arrays, strict=False)], rows)
    return np.concatenate([array.astype(dtype, copy=False) for array in arrays])


def _common_dtype(arrays: Sequence[Array]) -> np.dtype[Any]:
    """The one dtype, or the float that holds every number of several."""
    dtypes = {array.dtype for array in arrays}
    if len(dtypes) == 1:
        return dtypes.pop()
    return np.dtype(np.float64 if np.dtype(np.float64) in dtypes else np.float32)


def scaled(array: Array, ratio: float) -> Array:
    """The array times a number: in its own dtype where that loses nothing, else in fp32."""
    if ratio == 1.0:
        return array
    scaled = ratio * array.astype(np.float64)
    with np.errstate(over="ignore"):
        narrow = scaled.astype(array.dtype)
    return narrow if np.array_equal(narrow.astype(np.float64), scaled) else scaled.astype(np.float32)


def _same(one: Array | None, other: Array | None) -> bool:
    if one is None or other is None:
        return one is other
    return one is other or same_bits(one, other)


def _disjoint(parts: Sequence[Part]) -> bool:
    ordered = sorted(parts, key=lambda part: part.start)
    return all(one.stop <= other.start for one, other in pairwise(ordered))
