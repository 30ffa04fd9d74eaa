"""What the bits of arrays tell without any arithmetic: whether all numbers are finite, and whether two arrays are the
same. bf16 and fp8, which numpy itself does not know, are as fast as other floats this way."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from loraport.lora.ondisk import OnDisk

_BLOCK = 1 << 18  # bytes that stay in the processor's cache; and whatever is found in one ends the search


def all_finite(array: NDArray[Any]) -> bool:
    """Whether no number is NaN or infinite. Numbers of other kinds than floats always are, and those that lie on disk
    count as finite: whoever reads them is told."""
    if array.dtype.kind not in "fV" or isinstance(array, OnDisk):
        return True
    if array.dtype.itemsize == 1:
        finite = np.isfinite(np.arange(256, dtype=np.uint8).view(array.dtype))
        return all(bool(finite[block].all()) for block in _blocks(array, 1))
    # Infinity and NaN are the largest numbers that the bits can be read as: the positive ones with a sign, the negative
    # ones without.
    size = array.dtype.itemsize
    infinity = int(np.array(np.inf, array.dtype).view(f"u{size}"))
    negative = infinity | 1 << (8 * size - 1)
    return all(
        int(block.max()) < negative and int(block.view(f"i{size}").max()) < infinity for block in _blocks(array, size)
    )


def same_bits(a: NDArray[Any], b: NDArray[Any]) -> bool:
    """Whether two arrays agree in dtype, shape and every bit. Zeros of different sign differ, and NaN equals itself."""
    if (a.dtype, a.shape) != (b.dtype, b.shape):
        return False
    if isinstance(a, OnDisk) and isinstance(b, OnDisk):
        return all(np.array_equal(*pair) for pair in zip(_wide(a.blocks(True)), _wide(b.blocks(False)), strict=True))
    size = 8 if a.nbytes % 8 == 0 else 1
    return all(np.array_equal(*pair) for pair in zip(_blocks(a, size), _blocks(b, size), strict=True))


def all_zero(array: NDArray[Any]) -> bool:
    """Whether every bit is zero. Zeros with a sign count as numbers."""
    if isinstance(array, OnDisk):
        return not any(block.any() for block in _wide(array.blocks(True)))
    return not any(block.any() for block in _blocks(array, 8 if array.nbytes % 8 == 0 else 1))


def _wide(blocks: Iterable[NDArray[np.uint8]]) -> Iterator[NDArray[Any]]:
    """Bytes as integers of eight where there are no others, which numpy compares faster."""
    return (block.view(np.uint64) if block.nbytes % 8 == 0 else block for block in blocks)


def _blocks(array: NDArray[Any], size: int) -> Iterator[NDArray[Any]]:
    """The bytes of an array, in order, as unsigned integers of `size` bytes, some at a time."""
    numbers = np.ascontiguousarray(array).reshape(-1).view(np.uint8).view(f"u{size}")
    step = _BLOCK // size
    return (numbers[start : start + step] for start in range(0, numbers.size, step))
