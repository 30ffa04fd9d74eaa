"""Writing a safetensors file tensor by tensor, when nobody knows beforehand what will come.

The format wants the header first and no gaps, so room is left for it and filled up with spaces, which the format
allows: up to a hundredth of the file. The first tensor of some size decides which element size is written as it comes;
the others (alpha, DoRA scales) are kept until the end, wider ones going before the rest and narrower ones after it. So
every tensor starts at a multiple of its element size, as readers that map the file ask for.
"""

from __future__ import annotations

import errno
import json
import os
import struct
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np

from loraport.files import atomic_path
from loraport.lora.bits import same_bits
from loraport.lora.canonical import Array
from loraport.lora.ondisk import BLOCK, OnDisk
from loraport.lora.storage import entry_of, header_text, raw_bytes, read_tensors
from loraport.lora.witness import witness_present

if TYPE_CHECKING:
    from concurrent.futures import Future

_SMALL = 1 << 16  # bytes
_CHUNK = 1 << 24  # bytes
_WRITERS = 2  # while one writes, the other reads: the kernel lets one write to a file at a time
_PIECE = 1 << 23  # bytes of an array on disk that one of them copies
_MOST_WAITING = 1 << 25  # bytes that wait to be written
_SYNCED = 1 << 29  # bytes that wait for the disk before it is asked to take them; asking more often costs more
_PAGE = 4096
_MOST_SPACES = 100  # the least size of the data over that of unused room


def stream_tensors(
    path: Path | str, tensors: Iterable[tuple[str, Array]], metadata: Mapping[str, str], room: int = 1 << 20
) -> None:
    """Write `tensors` as they come, as one step: the old file stays until the new one is whole.

    Memory is that of some tensors, next to none for those on disk, and of those of other element sizes together. `room`
    is a guess, in bytes, at the header and the wider tensors; when it is too little, or far too much for the file, what
    was written is moved once, in place. The disk takes what is written while the rest comes. Raises RunFolderError when
    the place cannot be written, and whatever `tensors` raises; then nothing is left behind.
    """
    with atomic_path(path) as draft, open(draft, "w+b", buffering=0) as file, _Writing(file.fileno()) as out:
        _stream(out, tensors, metadata, room)
        if out.witness is not None:
            out.witness.saw(out.descriptor, out.copied)


def replace_metadata(path: Path, metadata: Mapping[str, str]) -> None:
    """Give a file that nobody else sees yet another header text, in place. What does not fit moves the data once."""
    tensors = read_tensors(path)
    with open(path, "r+b", buffering=0) as file:
        descriptor = file.fileno()
        (length,) = struct.unpack("<Q", os.pread(descriptor, 8, 0))
        header = json.loads(os.pread(descriptor, length, 8)) | {"__metadata__": dict(metadata)}
        text = header_text(header)
        if len(text) > length:
            grown = len(text) + -len(text) % 8
            _move(descriptor, 8 + length, tensors.data_bytes, grown - length)
            length = grown
        _write_header(descriptor, text, length)


class _Writing:
    """Writes arrays to places of a file in threads. Meanwhile another one has the disk take what is there: the kernel
    alone would begin when all is written, and the disk would have nothing to do until then."""

    def __init__(self, descriptor: int):
        from concurrent.futures import ThreadPoolExecutor  # slow to import, and reading needs none

        self.descriptor = descriptor
        self.witness = witness_present()
        self.copied: dict[int, OnDisk] = {}  # by the byte that it begins at
        self._writers = ThreadPoolExecutor(_WRITERS, "write")
        self._waiting: deque[tuple[Future[None], int]] = deque()
        self._bytes_waiting = 0
        self._sync_thread = ThreadPoolExecutor(1, "sync")
        self._syncing: Future[None] | None = None
        self._unsynced = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, error: object, *_: object) -> None:
        self._writers.shutdown(cancel_futures=True)
        self._sync_thread.shutdown()
        if self._syncing and error is None:
            self._syncing.result()  # the kernel tells only once that the disk has failed

    def put(self, array: Array, offset: int) -> None:
        """Write an array from a byte of the file on, now or soon. Raises what an earlier one has failed with."""
        if isinstance(array, OnDisk):
            self.copied[offset] = array
            step = max(1, _PIECE // array.row_bytes)
            for first in range(0, len(array), step):
                last = min(first + step, len(array))
                start = offset + first * array.row_bytes
                self._soon((last - first) * array.row_bytes, self._copy, array, first, last, start)
        elif array.nbytes < _SMALL:
            _write(self.descriptor, raw_bytes(array), offset)
            self._written(array.nbytes)
        else:
            self._soon(array.nbytes, _write, self.descriptor, raw_bytes(array), offset)

    def finish(self) -> None:
        """Wait until all is written."""
        while self._waiting:
            self._first()

    def _copy(self, array: OnDisk, first: int, last: int, offset: int) -> None:
        """Copy some rows. For a witness, each block is read back while the processor still has it at hand."""
        back = np.empty(BLOCK if self.witness else 0, np.uint8)
        for block in array.blocks(True, first, last):
            _write(self.descriptor, block.data, offset)
            if self.witness:
                back = back if back.size >= block.size else np.empty(block.size, np.uint8)
                read = os.preadv(self.descriptor, [back[: block.size].data], offset)
                if read != block.size or not same_bits(back[:read], block):
                    raise OSError(errno.EIO, "what was read back is not what was written")
            offset += block.size

    def _soon(self, size: int, work: Callable[..., None], *arguments: Any) -> None:
        self._waiting.append((self._writers.submit(work, *arguments), size))
        self._bytes_waiting += size
        while self._waiting and (self._bytes_waiting > _MOST_WAITING or self._waiting[0][0].done()):
            self._first()

    def _first(self) -> None:
        done, size = self._waiting.popleft()
        self._bytes_waiting -= size
        done.result()
        self._written(size)

    def _written(self, size: int) -> None:
        """To be called when `size` more bytes are in the file. Raises OSError when the disk has failed."""
        self._unsynced += size
        if self._unsynced < _SYNCED or (self._syncing and not self._syncing.done()):
            return
        if self._syncing:
            self._syncing.result()
        self._unsynced = 0
        self._syncing = self._sync_thread.submit(os.fsync, self.descriptor)


def _write(descriptor: int, data: memoryview | bytes, offset: int) -> None:
    view = memoryview(data)
    while view:
        count = os.pwrite(descriptor, view, offset)
        view, offset = view[count:], offset + count


def _stream(out: _Writing, tensors: Iterable[tuple[str, Array]], metadata: Mapping[str, str], room: int) -> None:
    body = room + -room % _PAGE
    header: dict[str, Any] = {}
    held: list[tuple[str, Array]] = []
    streamed: int | None = None  # the element size that is written as it comes
    offset = 0

    def write(name: str, array: Array) -> None:
        nonlocal offset
        header[name] = entry_of(array, offset)
        out.put(array, body + offset)
        offset += array.nbytes

    for name, array in tensors:
        if streamed is None and array.nbytes >= _SMALL:
            streamed = array.dtype.itemsize
        if array.dtype.itemsize == streamed:
            write(name, array)
        else:
            held.append((name, array))

    held.sort(key=lambda item: -item[1].dtype.itemsize)
    before = [item for item in held if item[1].dtype.itemsize >= (streamed or 0)]
    for name, array in held[len(before) :]:
        write(name, array)
    out.finish()
    front: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    start = 0
    for name, array in before:
        front[name] = entry_of(array, start)
        start += array.nbytes
    for entry in header.values():
        entry["data_offsets"] = [start + each for each in entry["data_offsets"]]
    text = header_text(front | header)
    needed = 8 + len(text) + -len(text) % 8 + start
    if needed > body or (body - needed) * _MOST_SPACES > offset:
        _move(out.descriptor, body, offset, needed - body)
        out.copied.clear()
        os.truncate(out.descriptor, needed + offset)
        body = needed
    _write_header(out.descriptor, text, body - start - 8)
    place = body - start
    for _, array in before:
        out.put(array, place)
        place += array.nbytes
    out.finish()


def _write_header(descriptor: int, text: bytes, length: int) -> None:
    _write(descriptor, struct.pack("<Q", length) + text.ljust(length), 0)


def _move(descriptor: int, start: int, size: int, by: int) -> None:
    """Move `size` bytes from `start` towards the end of the file, or towards its start where `by` is negative, in an
    order in which none is overwritten before it has been moved."""
    begins = range(start, start + size, _CHUNK)
    for begin in reversed(begins) if by > 0 else begins:
        part = os.pread(descriptor, min(_CHUNK, start + size - begin), begin)
        _write(descriptor, part, begin + by)
