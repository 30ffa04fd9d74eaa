"""Safetensors files as numpy arrays, bf16 and fp8 included, without torch.

The safetensors library judges the header; bytes are then viewed through ml_dtypes, because the library's
numpy side knows neither bf16 nor fp8 in every release.
"""

from __future__ import annotations

import json
import math
import os
import struct
import weakref
from collections.abc import Hashable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from threading import Lock
from typing import Any, cast

import ml_dtypes
import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open

from loraport.errors import DataError
from loraport.files import atomic_path
from loraport.lora.bits import all_finite
from loraport.lora.canonical import Array
from loraport.lora.ondisk import Bytes, OnDisk

_DTYPES: dict[str, np.dtype[Any]] = {
    code: np.dtype(kind).newbyteorder("<")
    for code, kind in {
        "F64": np.float64,
        "F32": np.float32,
        "F16": np.float16,
        "BF16": ml_dtypes.bfloat16,
        "F8_E4M3": ml_dtypes.float8_e4m3fn,
        "F8_E5M2": ml_dtypes.float8_e5m2,
        "I64": np.int64,
        "I32": np.int32,
        "I16": np.int16,
        "I8": np.int8,
        "U8": np.uint8,
        "BOOL": np.bool_,
    }.items()
}
_CODES = {dtype.name: code for code, dtype in _DTYPES.items()}
_MOST_AXES, _MOST_NUMBERS = 8, 1 << 48
_LARGE = 1 << 16  # bytes from which a tensor is worth reading by its rows
_LONGEST_ROW = 1 << 20  # bytes
_PICKLES = (".pt", ".pth", ".ckpt", ".pkl", ".pickle")
_PICKLE_STARTS = (b"PK\x03\x04", *(bytes([0x80, protocol]) for protocol in range(2, 6)))


def parse_json(text: str | bytes) -> Any:
    """What JSON from a stranger says. Raises ValueError also where it is nested too deeply to be read."""
    try:
        return json.loads(text)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


class Tensors(Mapping[str, Array]):
    """The tensors of one file, each read from disk when asked for. `metadata` is the header's text part."""

    def __init__(self, path: Path, header: dict[str, Any], start: int):
        self.path = path
        self.metadata: dict[str, str] = header.pop("__metadata__", {})
        self._header = header
        self._start = start
        self._file = _File(path)

    @cached_property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of every tensor, from the header alone."""
        return {name: tuple(entry["shape"]) for name, entry in self._header.items()}

    @cached_property
    def dtypes(self) -> dict[str, str]:
        """The safetensors code of every tensor's dtype, such as BF16, from the header alone."""
        return {name: entry["dtype"] for name, entry in self._header.items()}

    @property
    def data_bytes(self) -> int:
        """The size of all tensors together."""
        return max((entry["data_offsets"][1] for entry in self._header.values()), default=0)

    def __getitem__(self, name: str) -> Array:
        dtype, start, size = self._place(name)
        raw = np.empty(size, np.uint8)
        self._file.read(start, raw, name)
        shape = self._header[name]["shape"]
        try:
            return raw.view(dtype).reshape(shape)
        except (ValueError, OverflowError) as error:
            raise DataError(f"{self.path}: tensor {name} has the shape {shape}, which no array can.") from error

    def on_disk(self, name: str) -> Array:
        """A tensor that is read some rows at a time, as an `OnDisk`, where it is large enough for that to be worth it.

        It stands for an array and is typed as one. Where it is read, DataError tells of NaN and infinity.
        """
        dtype, start, size = self._place(name)
        shape = self.shapes[name]
        if size < _LARGE or len(shape) < 2 or size // shape[0] > _LONGEST_ROW:
            return self[name]
        return cast(Array, Stored(self._file, name, start, shape, dtype))

    def _place(self, name: str) -> tuple[np.dtype[Any], int, int]:
        """(dtype, first byte in the file, number of bytes)."""
        entry = self._header[name]
        dtype = _DTYPES.get(entry["dtype"])
        if dtype is None:
            raise DataError(
                f"{self.path}: tensor {name} has dtype {entry['dtype']}, which no LoRA uses. "
                f"Known: {', '.join(_DTYPES)}."
            )
        begin, end = entry["data_offsets"]
        return dtype, self._start + begin, end - begin

    def __iter__(self) -> Iterator[str]:
        return iter(self._header)

    def __len__(self) -> int:
        return len(self._header)


def read_tensors(path: Path | str) -> Tensors:
    """Open a safetensors file; only its header is read. Raises DataError, with the path, when it is missing, cut short,
    a pickle or not even a file, or its header lies."""
    path = Path(path)
    _refuse_what_is_no_file(path)
    try:
        with safe_open(path, framework="numpy"):
            pass
        with open(path, "rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            header = parse_json(file.read(length))
    except (SafetensorError, OSError, ValueError, struct.error) as error:
        raise DataError(
            f"{path} cannot be read as safetensors: {error}.",
            hint="It is missing, cut short, or not a LoRA file: copy or download it again.",
        ) from error
    tensors = Tensors(path, header, 8 + length)
    for name, shape in tensors.shapes.items():
        # An empty tensor can claim any other side, beyond what an array can have.
        if len(shape) > _MOST_AXES or math.prod(max(side, 1) for side in shape) > _MOST_NUMBERS:
            raise DataError(f"{path}: tensor {name} has an impossible shape: {shape}.")
    return tensors


def _refuse_what_is_no_file(path: Path) -> None:
    """Raise DataError for what must not be opened (a pipe would hang) and for a pickle, which is never unpickled."""
    try:
        if path.exists() and not path.is_file():
            raise DataError(f"{path} is not a file.", hint="Name the .safetensors file.")
        with open(path, "rb") as file:
            start = file.read(9)
    except OSError:
        return  # the library's own message says why
    except ValueError as error:
        raise DataError(f"{str(path)!r} is not a path: {error}.") from error
    looks_so = start.startswith(_PICKLE_STARTS) and start[8:] != b"{"  # the same bytes can begin a safetensors length
    if looks_so or path.suffix.lower() in _PICKLES:
        raise DataError(
            f"{path} is a pickle, which can run any program when it is opened; LoraPort never does.",
            hint="Ask for the .safetensors file, or convert it on a machine that you can throw away.",
        )


class _File:
    """A file that stays open for as long as any of its tensors is used, also when it is replaced meanwhile."""

    def __init__(self, path: Path):
        self.path = path
        self._descriptor: int | None = None
        self._lock = Lock()

    def read(self, start: int, raw: NDArray[np.uint8], name: str) -> None:
        """Fill `raw` with the bytes of the tensor `name` from `start` on. It is not mapped, because a file that is cut
        short, or a disk that fails, would then end the process with a signal."""
        done, view = 0, raw.reshape(-1).data
        try:
            while done < len(view):  # one system call gives 2 GiB at most
                count = os.preadv(self.descriptor, [view[done:]], start + done)
                if not count:
                    raise DataError(
                        f"{self.path}: tensor {name} is cut short; the file changed while it was being read."
                    )
                done += count
        except OSError as error:
            raise DataError(f"{self.path}: tensor {name} cannot be read: {error.strerror or error}.") from error

    @property
    def descriptor(self) -> int:
        """The open file. Raises OSError when it cannot be opened any more."""
        if self._descriptor is None:
            with self._lock:
                if self._descriptor is None:
                    self._descriptor = os.open(self.path, os.O_RDONLY)
                    weakref.finalize(self, os.close, self._descriptor)
        return self._descriptor


@dataclass(frozen=True, eq=False)
class Stored(OnDisk):
    """A tensor of a file, or some rows of one, whose first byte is the file's `start`-th."""

    file: _File
    name: str
    start: int
    shape: tuple[int, ...]
    dtype: np.dtype[Any]

    @property
    def place(self) -> Hashable:
        return self.file, self.start, self.shape, self.dtype

    def rows(self, start: int, stop: int) -> Stored:
        return replace(self, start=self.start + start * self.row_bytes, shape=(stop - start, *self.shape[1:]))

    def fill(self, first: int, out: Bytes, checked: bool) -> None:
        self.file.read(self.start + first * self.row_bytes, out, self.name)
        if checked and not all_finite(out.reshape(-1).view(self.dtype)):
            raise DataError(
                f"{self.file.path}: tensor {self.name} holds NaN or infinity.",
                hint="The file is damaged or the training diverged: use an earlier checkpoint.",
            )


def write_tensors(path: Path | str, tensors: Mapping[str, Array], metadata: Mapping[str, str]) -> None:
    """Write a safetensors file as one step: the old file stays until the new one is whole.

    The header is written here, tensor by tensor, so that no second copy of the data is made.
    Raises RunFolderError when the place cannot be written.
    """
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    # Widest elements first, so that every tensor starts at a multiple of its element size, as the format
    # asks.
    ordered = sorted(tensors.items(), key=lambda item: (-item[1].dtype.itemsize, item[0]))
    offset = 0
    for name, array in ordered:
        header[name] = entry_of(array, offset)
        offset += array.nbytes
    text = header_text(header)
    text += b" " * (-len(text) % 8)
    with atomic_path(path) as temporary, open(temporary, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for _, array in ordered:
            file.write(raw_bytes(array))


def entry_of(array: Array, offset: int) -> dict[str, Any]:
    """What a header says of a tensor whose data starts at `offset`."""
    code = _CODES[array.dtype.name]
    return {"dtype": code, "shape": list(array.shape), "data_offsets": [offset, offset + array.nbytes]}


def header_text(header: Mapping[str, Any]) -> bytes:
    return json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode("utf-8")


def raw_bytes(array: Array) -> memoryview:
    """The numbers of an array as a file holds them: in order, little-endian. No copy where they lie so already."""
    ordered = np.ascontiguousarray(array, dtype=_DTYPES[_CODES[array.dtype.name]])
    return ordered.reshape(-1).view(np.uint8).data
