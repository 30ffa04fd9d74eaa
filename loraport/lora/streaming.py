"""Writing a safetensors file tensor by tensor, when nobody knows beforehand what will come.

The format wants the header first and no gaps, so room is left for it and filled up with spaces, which the format
allows: up to a hundredth of the file. The first tensor of some size decides which element size is written as it comes;
the others (alpha, DoRA scales) are kept until the end, wider ones going before the rest and narrower ones after it. So
every tensor starts at a multiple of its element size, as readers that map the file ask for.
"""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Self

from loraport.files import atomic_path
from loraport.lora.canonical import Array
from loraport.lora.storage import entry_of, header_text, raw_bytes, read_tensors

if TYPE_CHECKING:
    from concurrent.futures import Future

_SMALL = 1 << 16  # bytes
_CHUNK = 1 << 24  # bytes
_SYNCED = 1 << 27  # bytes that wait for the disk at most before it is asked to take them
_PAGE = 4096
_MOST_SPACES = 100  # the least size of the data over that of unused room


def stream_tensors(
    path: Path | str, tensors: Iterable[tuple[str, Array]], metadata: Mapping[str, str], room: int = 1 << 20
) -> None:
    """Write `tensors` as they come, as one step: the old file stays until the new one is whole.

    Memory is that of one tensor and of those of other element sizes together. `room` is a guess, in bytes, at the
    header and the wider tensors; when it is too little, or far too much for the file, what was written is moved once,
    in place. The disk takes what is written while the rest comes. Raises RunFolderError when the place cannot be
    written, and whatever `tensors` raises; then nothing is left behind.
    """
    with atomic_path(path) as draft, open(draft, "w+b") as file, _Syncing(file) as syncing:
        _stream(file, tensors, metadata, room, syncing)


def replace_metadata(path: Path, metadata: Mapping[str, str]) -> None:
    """Give a file that nobody else sees yet another header text, in place. What does not fit moves the data once."""
    tensors = read_tensors(path)
    with open(path, "r+b") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        header = json.loads(file.read(length)) | {"__metadata__": dict(metadata)}
        text = header_text(header)
        if len(text) > length:
            grown = len(text) + -len(text) % 8
            _move(file, 8 + length, tensors.data_bytes, grown - length)
            length = grown
        _write_header(file, text, length)


class _Syncing:
    """Has the disk take, in a thread, what has been written to a file so far: the kernel alone would begin when all is
    there, and the disk would have nothing to do until then."""

    def __init__(self, file: BinaryIO):
        from concurrent.futures import ThreadPoolExecutor  # slow to import, and reading needs none

        self._file = file
        self._thread = ThreadPoolExecutor(1, "sync")
        self._running: Future[None] | None = None
        self._new = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, error: object, *_: object) -> None:
        self._thread.shutdown()
        if self._running and error is None:
            self._running.result()  # the kernel tells only once that the disk has failed

    def written(self, size: int) -> None:
        """To be called when `size` more bytes are in the file. Raises OSError when the disk has failed."""
        self._new += size
        if self._new < _SYNCED or (self._running and not self._running.done()):
            return
        if self._running:
            self._running.result()
        self._new = 0
        self._file.flush()
        self._running = self._thread.submit(os.fsync, self._file.fileno())


def _stream(
    file: BinaryIO,
    tensors: Iterable[tuple[str, Array]],
    metadata: Mapping[str, str],
    room: int,
    syncing: _Syncing,
) -> None:
    body = room + -room % _PAGE
    header: dict[str, Any] = {}
    held: list[tuple[str, Array]] = []
    streamed: int | None = None  # the element size that is written as it comes
    offset = 0

    def write(name: str, array: Array) -> None:
        nonlocal offset
        header[name] = entry_of(array, offset)
        file.write(raw_bytes(array))
        syncing.written(array.nbytes)
        offset += array.nbytes

    file.seek(body)
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
        _move(file, body, offset, needed - body)
        file.truncate(needed + offset)
        body = needed
    _write_header(file, text, body - start - 8)
    for _, array in before:
        file.write(raw_bytes(array))


def _write_header(file: BinaryIO, text: bytes, length: int) -> None:
    file.seek(0)
    file.write(struct.pack("<Q", length) + text.ljust(length))


def _move(file: BinaryIO, start: int, size: int, by: int) -> None:
    """Move `size` bytes from `start` towards the end of the file, or towards its start where `by` is negative, in an
    order in which none is overwritten before it has been moved."""
    begins = range(start, start + size, _CHUNK)
    for begin in reversed(begins) if by > 0 else begins:
        file.seek(begin)
        part = file.read(min(_CHUNK, start + size - begin))
        file.seek(begin + by)
        file.write(part)
