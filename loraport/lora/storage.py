"""Safetensors files as numpy arrays, bf16 and fp8 included, without torch.

The safetensors library judges the header; bytes are then viewed through ml_dtypes, because the library's
numpy side knows neither bf16 nor fp8 in every release.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from loraport.errors import DataError
from loraport.files import atomic_path
from loraport.lora.canonical import Array

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


class Tensors(Mapping[str, Array]):
    """The tensors of one file, each read from disk when asked for. `metadata` is the header's text part."""

    def __init__(self, path: Path, header: dict[str, Any], start: int):
        self.path = path
        self.metadata: dict[str, str] = header.pop("__metadata__", {})
        self._header = header
        self._start = start

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of every tensor, from the header alone."""
        return {name: tuple(entry["shape"]) for name, entry in self._header.items()}

    def __getitem__(self, name: str) -> Array:
        entry = self._header[name]
        dtype = _DTYPES.get(entry["dtype"])
        if dtype is None:
            raise DataError(
                f"{self.path}: tensor {name} has dtype {entry['dtype']}, which no LoRA uses. "
                f"Known: {', '.join(_DTYPES)}."
            )
        begin, end = entry["data_offsets"]
        with open(self.path, "rb") as file:
            file.seek(self._start + begin)
            raw = bytearray(file.read(end - begin))
        if len(raw) != end - begin:
            raise DataError(f"{self.path}: tensor {name} is cut short; the file changed while it was being read.")
        return np.frombuffer(raw, dtype=dtype).reshape(entry["shape"])

    def __iter__(self) -> Iterator[str]:
        return iter(self._header)

    def __len__(self) -> int:
        return len(self._header)


def read_tensors(path: Path | str) -> Tensors:
    """Open a safetensors file. Raises DataError, with the path, when it is missing, cut short, or its header
    lies."""
    path = Path(path)
    try:
        with safe_open(path, framework="numpy"):
            pass
        with open(path, "rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            header = json.loads(file.read(length))
    except (SafetensorError, OSError, ValueError, struct.error) as error:
        raise DataError(
            f"{path} cannot be read as safetensors: {error}.",
            hint="It is missing, cut short, or not a LoRA file: copy or download it again.",
        ) from error
    return Tensors(path, header, 8 + length)


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
        header[name] = {
            "dtype": _CODES[array.dtype.name],
            "shape": list(array.shape),
            "data_offsets": [offset, offset + array.nbytes],
        }
        offset += array.nbytes
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode("utf-8")
    text += b" " * (-len(text) % 8)
    with atomic_path(path) as temporary, open(temporary, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for _, array in ordered:
            file.write(np.ascontiguousarray(array, dtype=_DTYPES[_CODES[array.dtype.name]]).tobytes())
