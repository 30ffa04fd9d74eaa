"""Arrays that lie in a file and are read some rows at a time, so that what is only passed on is never held whole.

They stand where a numpy array is expected: any computation reads the whole array into memory first, each time anew.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.lib.mixins import NDArrayOperatorsMixin
from numpy.typing import NDArray

Bytes = NDArray[np.uint8]

BLOCK = 1 << 18  # bytes that stay in the processor's cache from one use to the next


class OnDisk(NDArrayOperatorsMixin, ABC):
    """An array of two axes or more, by its rows. Threads may read it at once.

    Rows are handed out as their bytes, in order and little-endian. With `checked`, whoever knows the file raises
    DataError for a number that is NaN or infinite.
    """

    shape: tuple[int, ...]
    dtype: np.dtype[Any]

    @abstractmethod
    def fill(self, first: int, out: Bytes, checked: bool) -> None:
        """Read rows from `first` on into `out` (rows, bytes of a row), whose rows lie one after another."""

    @property
    @abstractmethod
    def place(self) -> Hashable:
        """Where its numbers lie: arrays of one place are the same as long as no file changes."""

    @property
    def ndim(self) -> int:
        return len(self.shape)

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.size * self.dtype.itemsize

    @property
    def row_bytes(self) -> int:
        return math.prod(self.shape[1:]) * self.dtype.itemsize

    @property
    def _at_once(self) -> int:
        return max(1, BLOCK // self.row_bytes)

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, key: Any) -> Any:
        """Rows of it, still on disk, for a slice without steps that is not empty; else what numpy makes of the key."""
        if isinstance(key, slice):
            start, stop, step = key.indices(len(self))
            if step == 1 and start < stop:
                return self if stop - start == len(self) else self.rows(start, stop)
        return np.asarray(self)[key]

    def rows(self, start: int, stop: int) -> Any:
        """Some of the rows, as an array of their own."""
        return np.asarray(self)[start:stop]

    def blocks(self, checked: bool, first: int = 0, last: int | None = None) -> Iterator[Bytes]:
        """The bytes of all rows, or of those from `first` to before `last`, in order and about BLOCK at a time. A block
        is overwritten when the next one is asked for."""
        last = len(self) if last is None else last
        buffer = np.empty((min(self._at_once, last - first), self.row_bytes), np.uint8)
        for start in range(first, last, self._at_once):
            block = buffer[: last - start]
            self.fill(start, block, checked)
            yield block.reshape(-1)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> NDArray[Any]:
        if copy is False:
            raise ValueError("An array on disk cannot be had without a copy.")
        array = np.empty(self.shape, self.dtype)
        raw = array.view(np.uint8).reshape(len(self), self.row_bytes)
        for first in range(0, len(self), self._at_once):
            self.fill(first, raw[first : first + self._at_once], True)
        return array if dtype is None else array.astype(dtype, copy=False)

    def __array_ufunc__(self, ufunc: np.ufunc, method: str, *inputs: Any, **options: Any) -> Any:
        read = (np.asarray(each) if isinstance(each, OnDisk) else each for each in inputs)
        return getattr(ufunc, method)(*read, **options)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        return getattr(np.asarray(self), name)


@dataclass(frozen=True, eq=False)
class Placed(OnDisk):
    """Arrays with one row after another, or as blocks with zeros around them, without forming it.

    `pieces` are (row, column, array) of one dtype, which do not overlap and have the axes after the second in common.
    """

    pieces: Sequence[tuple[int, int, OnDisk]]
    shape: tuple[int, ...]

    @property
    def dtype(self) -> np.dtype[Any]:  # type: ignore[override]  # a field cannot be read from another one
        return self.pieces[0][2].dtype

    @property
    def place(self) -> Hashable:
        return self.shape, tuple((row, column, each.place) for row, column, each in self.pieces)

    def fill(self, first: int, out: Bytes, checked: bool) -> None:
        column_bytes = self.row_bytes // self.shape[1]
        last = first + len(out)
        whole = ((row, row + len(each)) for row, _, each in self.pieces if each.row_bytes == self.row_bytes)
        if not any(start <= first and last <= stop for start, stop in whole):
            out[:] = 0
        for row, column, each in self.pieces:
            low, high = max(first, row), min(last, row + len(each))
            if low >= high:
                continue
            if each.row_bytes == self.row_bytes:
                each.fill(low - row, out[low - first : high - first], checked)
                continue
            start = column * column_bytes
            part = np.empty((high - low, each.row_bytes), np.uint8)
            each.fill(low - row, part, checked)
            out[low - first : high - first, start : start + each.row_bytes] = part
