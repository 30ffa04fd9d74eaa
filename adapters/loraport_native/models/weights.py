"""Reading safetensors with nothing taken on trust, and pouring them into a model one tensor at a time."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from loraport.errors import DataError

FP8 = "F8_E4M3"
SCALE = "_scale"  # `X.weight` in fp8 has its rows' scales in `X.weight_scale`
Sources = Callable[[str], tuple[str, ...]]
_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "F8_E5M2": 1}
_BYTES |= {"I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1}
_LFS_POINTER = b"version https://git-lfs"


def read_header(path: Path) -> tuple[dict[str, dict[str, Any]], bytes]:
    """Read a safetensors header: the tensors (name to dtype, shape and data_offsets) and its raw bytes.

    Raises DataError when the file cannot be read, is no safetensors file, or has another length than the
    header says. Format: 8 bytes of little-endian length, JSON, data.
    """
    try:
        size = path.stat().st_size
        with open(path, "rb") as file:
            prefix = file.read(8)
            length = int.from_bytes(prefix, "little")
            if prefix and _LFS_POINTER.startswith(prefix):
                raise DataError(
                    f"{path} is a Git LFS pointer, not the weights.",
                    hint="Run `git lfs pull` in that folder.",
                )
            if len(prefix) < 8 or length > size - 8:
                raise DataError(f"{path} is not a whole safetensors file: its header is cut off.", hint=_AGAIN)
            raw = file.read(length)
        header = json.loads(raw)
        tensors = {name: entry for name, entry in header.items() if name != "__metadata__"}
        end = max((entry["data_offsets"][1] for entry in tensors.values()), default=0)
        for name, entry in tensors.items():
            entry["shape"] = tuple(entry["shape"])
            start, stop = entry["data_offsets"]
            if stop - start != math.prod(entry["shape"]) * _BYTES[entry["dtype"]]:
                raise DataError(f"{path} is damaged: tensor {name} has other bytes than its shape.", hint=_AGAIN)
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}.") from error
    except (ValueError, TypeError, KeyError, AttributeError, IndexError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"{path} is not a safetensors file: its header is not valid.", hint=_AGAIN) from error
    if end != size - 8 - length:
        raise DataError(
            f"{path} is damaged: its header promises {end:,} bytes of weights, the file holds {size - 8 - length:,}.",
            hint=_AGAIN,
        )
    return tensors, raw


_AGAIN = "Download the file again; an interrupted download or a full disk leaves such files."


class Weights:
    """The tensors of one part of a checkpoint, in one safetensors file or in shards with an index."""

    def __init__(self, folder: Path) -> None:
        """Read the headers. Raises DataError for a folder without weights or with damaged ones."""
        self.folder = folder
        self.files = weight_files(folder)
        self._handles: dict[Path, Any] = {}
        self._file_of: dict[str, Path] = {}
        self._entries: dict[str, dict[str, Any]] = {}
        for file in self.files:
            tensors, _ = read_header(file)
            self._entries.update(tensors)
            self._file_of.update(dict.fromkeys(tensors, file))

    @cached_property
    def names(self) -> frozenset[str]:
        return frozenset(self._entries)

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of `name`. Raises DataError when there is no such tensor."""
        return self._entry(name)["shape"]

    def read(self, name: str, device: torch.device | str) -> Tensor:
        """Read one tensor to `device`, in float32 if it was stored as fp8 rows with scales, else as stored.

        Layout of the official fp8 files (ideogram-ai/ideogram-4-fp8): `X.weight` in float8_e4m3fn and
        `X.weight_scale` in float32, one number per output row; weight = fp8 · scale. A scale of one number or
        of shape (rows, 1) is taken too. Raises DataError when the tensor or its scale is missing or damaged.
        """
        if not self.is_fp8(name):
            return self._get(name).to(device)
        rows, scale = self.read_fp8(name, device)
        return rows.to(torch.float32).mul_(scale.reshape(-1, *(1,) * (rows.dim() - 1)))

    def read_rows(self, name: str, index: Tensor) -> Tensor:
        """The rows of a matrix at `index` (n,), as (n, columns) on the CPU; of the file, only they are read.

        In float32 if they are fp8 rows with scales, else as stored. Raises DataError as `read` does.
        """
        if not self.is_fp8(name):
            return self._get(name)[index]
        rows, scale = self.read_fp8(name, "cpu")
        return rows.view(torch.uint8)[index].view(rows.dtype).float() * scale[index]

    def is_fp8(self, name: str) -> bool:
        """Whether `name` is stored as fp8 rows. Raises DataError when there is no such tensor."""
        return self._entry(name)["dtype"] == FP8

    def read_fp8(self, name: str, device: torch.device | str) -> tuple[Tensor, Tensor]:
        """Read fp8 rows as they are: (weight in float8_e4m3fn, scale of each row (rows, 1) in float32) on `device`.

        Raises DataError when the scale is missing, or its shape is not that of the rows.
        """
        rows = self._get(name)
        scale = self._get(name + SCALE).to(device, torch.float32)
        if scale.numel() not in (1, len(rows)):
            raise DataError(
                f"{self._file_of[name]}: tensor {name + SCALE} has shape {tuple(scale.shape)}; the rows of "
                f"{name} need ({len(rows)},)."
            )
        return rows.to(device), scale.reshape(-1, 1).expand(len(rows), 1)

    def _entry(self, name: str) -> dict[str, Any]:
        try:
            return self._entries[name]
        except KeyError:
            raise DataError(
                f"{self.folder}: tensor {name} is missing.",
                hint="The checkpoint is not whole, or is of another model. " + _AGAIN,
            ) from None

    def _get(self, name: str) -> Tensor:
        self._entry(name)
        path = self._file_of[name]
        try:
            if path not in self._handles:
                self._handles[path] = safe_open(path, framework="pt", device="cpu")
            return self._handles[path].get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise DataError(f"{path} cannot be read at tensor {name}: {error}", hint=_AGAIN) from error


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of one part: the shards that an index names, or the one file there is.

    Raises DataError when there is none, more than one without an index, or a missing shard.
    """
    indices = sorted(folder.glob("*.safetensors.index.json"))
    if indices:
        try:
            shards = sorted(set(json.loads(indices[0].read_text(encoding="utf-8"))["weight_map"].values()))
        except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
            raise DataError(f"{indices[0]} is not a valid index of shards.", hint=_AGAIN) from error
        missing = [shard for shard in shards if not (folder / shard).is_file()]
        if missing:
            raise DataError(f"{folder}: {len(missing)} of {len(shards)} shards are missing, first {missing[0]}.")
        return [folder / shard for shard in shards]
    files = sorted(folder.glob("*.safetensors"))
    if len(files) == 1:
        return files
    if files:
        raise DataError(
            f"{folder} holds {len(files)} safetensors files and no index that says which belong together.",
            hint="Keep one file, or add its *.safetensors.index.json.",
        )
    raise DataError(f"{folder} holds no *.safetensors file.", hint="Other formats (.bin, .gguf) are not read.")


def itself(name: str) -> tuple[str, ...]:
    """The `Sources` of a model that is named as the files are."""
    return (name,)


def fill(
    module: nn.Module,
    weights: Weights,
    dtype: torch.dtype,
    device: torch.device | str,
    sources: Sources = itself,
    ignored: Callable[[str], bool] = lambda name: False,
    filled: Callable[[str], None] = lambda name: None,
    keep_fp8: Callable[[str], bool] = lambda name: False,
) -> None:
    """Check that the files hold `module`, all of it and nothing else, and pour them into it; see both."""
    check(module, weights, sources, ignored)
    pour(module, weights, dtype, device, sources, filled, keep_fp8)


def check(
    module: nn.Module,
    weights: Weights,
    sources: Sources = itself,
    ignored: Callable[[str], bool] = lambda name: False,
) -> None:
    """Raise DataError naming the first tensor that is missing, of another shape, or unexpected. Reads headers only.

    ignored: tensors on disk that the model has no use for.
    """
    used: set[str] = set()
    for name, target in module.state_dict().items():
        parts = sources(name)
        expected = (target.shape[0] // len(parts), *target.shape[1:]) if len(parts) > 1 else tuple(target.shape)
        for part in parts:
            if weights.shape(part) != expected:
                raise DataError(
                    f"{weights.folder}: tensor {part} has shape {weights.shape(part)}, the model needs {expected}.",
                    hint="The weights and the config.json beside them are of different models.",
                )
        used.update(parts, (part + SCALE for part in parts))
    refuse_leftovers(weights, used, ignored)


def pour(
    module: nn.Module,
    weights: Weights,
    dtype: torch.dtype,
    device: torch.device | str,
    sources: Sources = itself,
    filled: Callable[[str], None] = lambda name: None,
    keep_fp8: Callable[[str], bool] = lambda name: False,
) -> None:
    """Give `module`, built on the meta device, its weights: frozen, on `device`, one tensor at a time.

    sources: the tensors on disk whose rows make a parameter of the model. filled: hears each name, in the model's
    order, once it has its value. Parameters become `dtype`; buffers keep their own (running statistics stay float32).
    keep_fp8: weights of a Linear that, where they are fp8 rows on disk, stay so: `weight` (out, in) in float8_e4m3fn
    beside a new buffer `weight_scale` (out, 1) in float32, for a module that can compute with them to take over.
    Raises DataError naming a tensor that holds NaN or infinity.
    """
    parameters = dict(module.named_parameters())
    for name, target in module.state_dict().items():
        parts = sources(name)
        what = f"{weights.folder}: tensor {', '.join(parts)}"
        owner_name, _, leaf = name.rpartition(".")
        owner = module.get_submodule(owner_name)
        if isinstance(owner, nn.Linear) and keep_fp8(name) and all(map(weights.is_fp8, parts)):
            rows, scale = _fp8_rows(weights, parts, device, what)
            owner.register_parameter(leaf, nn.Parameter(rows, requires_grad=False))
            owner.register_buffer(leaf + SCALE, scale)
        else:
            tensor = _joined([weights.read(part, device) for part in parts])
            tensor = _cast(tensor, dtype if name in parameters else target.dtype, what)
            if name in parameters:
                owner.register_parameter(leaf, nn.Parameter(tensor, requires_grad=False))
            else:
                owner.register_buffer(leaf, tensor)
        filled(name)
    left = [name for name, value in (*module.named_parameters(), *module.named_buffers()) if value.is_meta]
    assert not left, f"still without values: {left}"


def refuse_leftovers(weights: Weights, used: Iterable[str], ignored: Callable[[str], bool]) -> None:
    """Raise DataError when the files hold tensors that the model does not have."""
    extra = sorted(name for name in weights.names.difference(used) if not ignored(name))
    if extra:
        shown = ", ".join(extra[:3]) + (f" and {len(extra) - 3} more" if len(extra) > 3 else "")
        raise DataError(
            f"{weights.folder}: unexpected tensor {shown}.",
            hint="The checkpoint is of another model, or its config.json is wrong.",
        )


def _fp8_rows(weights: Weights, parts: tuple[str, ...], device: torch.device | str, what: str) -> tuple[Tensor, Tensor]:
    """The rows of `parts` under one another, as bytes, and their scales; both copies of what is on disk."""
    read = [weights.read_fp8(part, device) for part in parts]
    rows = _own(_joined([rows.view(torch.uint8) for rows, _ in read]))
    scale = _cast(torch.cat([scale for _, scale in read]), torch.float32, f"{what}{SCALE}")
    # e4m3fn has no infinity, and NaN is 0x7f or 0xff: the largest signed and the largest unsigned byte.
    if rows.max() == 0xFF or rows.view(torch.int8).max() == 0x7F:
        raise DataError(f"{what} holds NaN.", hint="The checkpoint is damaged. " + _AGAIN)
    return rows.view(torch.float8_e4m3fn), scale


def _joined(parts: list[Tensor]) -> Tensor:
    return torch.cat(parts) if len(parts) > 1 else parts[0]


def _own(tensor: Tensor) -> Tensor:
    """The tensor apart from the file: on the CPU, what safetensors returns is a view of the mapped file."""
    return tensor.clone() if tensor.device.type == "cpu" else tensor


def _cast(tensor: Tensor, dtype: torch.dtype, what: str) -> Tensor:
    cast = tensor.to(dtype).contiguous()
    cast = _own(cast) if cast.data_ptr() == tensor.data_ptr() else cast
    if not cast.is_floating_point() or not cast.numel() or _is_finite(cast):
        return cast
    if _is_finite(tensor):
        raise DataError(f"{what} has values that {dtype} cannot hold.", hint="Set `model.dtype: bf16`.")
    raise DataError(f"{what} holds NaN or infinity.", hint="The checkpoint is damaged. " + _AGAIN)


def _is_finite(tensor: Tensor) -> bool:
    # The extremes carry any NaN or infinity, without the mask as large as the tensor that isfinite makes.
    return bool(torch.stack(tensor.aminmax()).isfinite().all())
