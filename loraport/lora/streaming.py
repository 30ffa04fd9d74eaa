"""Writing a safetensors file tensor by tensor, when nobody knows beforehand what will come.

The format wants the header first and no gaps, so room is left for it and filled up with spaces, which the format
allows. The first tensor of some size decides which element size is written as it comes; the others (alpha, DoRA scales)
are kept until the end, wider ones going before the rest and narrower ones after it. So every tensor starts at a
multiple of its element size, as readers that map the file ask for.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from loraport.files import atomic_path
from loraport.lora.canonical import Array
from loraport.lora.storage import entry_of, header_text, raw_bytes, read_tensors

_SMALL = 1 << 16  # bytes
_CHUNK = 1 << 24  # bytes
_PAGE = 4096


def stream_tensors(
    path: Path | str, tensors: Iterable[tuple[str, Array]], metadata: Mapping[str, str], room: int = 1 << 16
) -> None:
    """Write `tensors` as they come, as one step: the old file stays until the new one is whole.

    Memory is that of one tensor and of those of other element sizes together. `room` is a guess, in bytes, at the
    header and the wider tensors; when it is too little, what was written is moved once, in place. Raises RunFolderError
    when the place cannot be written, and whatever `tensors` raises; then nothing is left behind.
    """
    with atomic_path(path) as draft, open(draft, "w+b") as file:
        _stream(file, tensors, metadata, room)


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


def _stream(file: BinaryIO, tensors: Iterable[tuple[str, Array]], metadata: Mapping[str, str], room: int) -> None:
    body = room + -room % _PAGE
    header: dict[str, Any] = {}
    held: list[tuple[str, Array]] = []
    streamed: int | None = None  # the element size that is written as it comes
    offset = 0

    def write(name: str, array: Array) -> None:
        nonlocal offset
        header[name] = entry_of(array, offset)
        file.write(raw_bytes(array))
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
    if needed > body:
        _move(file, body, offset, needed - body)
        body = needed
    _write_header(file, text, body - start - 8)
    for _, array in before:
        file.write(raw_bytes(array))


def _write_header(file: BinaryIO, text: bytes, length: int) -> None:
    file.seek(0)
    file.write(struct.pack("<Q", length) + text.ljust(length))


def _move(file: BinaryIO, start: int, size: int, by: int) -> None:
    """Move `size` bytes from `start` towards the end of the file, last ones first, so that none is overwritten."""
    for begin in reversed(range(start, start + size, _CHUNK)):
        file.seek(begin)
        part = file.read(min(_CHUNK, start + size - begin))
        file.seek(begin + by)
        file.write(part)
