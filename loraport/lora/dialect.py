"""What a dialect is: one way of writing LoRA keys, with its rule for scale."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Protocol, runtime_checkable

from loraport.errors import DataError
from loraport.lora.canonical import LoraFile
from loraport.lora.storage import read_tensors


class UnknownScale(DataError):
    """A file that does not tell its alpha, and so not how strong it is."""


@runtime_checkable
class Dialect(Protocol):
    """Reads one way of writing LoRA files into the canonical form."""

    @property
    def name(self) -> str: ...

    def detect(
        self, keys: Collection[str], shapes: Mapping[str, tuple[int, ...]], metadata: Mapping[str, str]
    ) -> float:
        """How sure it is, from 0 to 1, that a file with these tensors is written in this dialect."""
        ...

    def read(self, path: Path) -> LoraFile:
        """Read a file. Raises DataError when it is damaged or a module is not whole, and UnknownScale when nothing
        tells its scale."""
        ...


@runtime_checkable
class AskingDialect(Dialect, Protocol):
    """A dialect whose files may lack their scale, and that can be told."""

    def read_with_alpha(self, path: Path, alpha: float | None) -> LoraFile:
        """Read a file with `alpha` for every module that tells none; None stands for the module's own rank."""
        ...


@runtime_checkable
class FamilyDialect(Dialect, Protocol):
    """A dialect that reads a file by the names of one model family, where it can be told which."""

    def for_family(self, family: str) -> Dialect:
        """The same dialect, that takes every file for one of this family. Raises DataError for a name it does not
        know."""
        ...


@runtime_checkable
class WritableDialect(Dialect, Protocol):
    """A dialect that can also be written."""

    def write(self, lora: LoraFile, path: Path, dtype: str | None, metadata: Mapping[str, str]) -> None:
        """Write a file in `dtype` ('bf16', 'fp16' or 'fp32'), or None for each tensor's own. Raises DataError when a
        value does not fit."""
        ...


def detect_dialect(path: Path, dialects: Mapping[str, Dialect], told: Mapping[str, str] | None = None) -> Dialect:
    """The dialect that is surest that `path` is written in it; what somebody `told` counts as its metadata. Raises
    DataError when none knows it."""
    tensors = read_tensors(path)
    metadata = {**tensors.metadata, **(told or {})}
    sure = {name: dialect.detect(tensors.keys(), tensors.shapes, metadata) for name, dialect in dialects.items()}
    best = max(sure, key=lambda name: sure[name], default=None)
    if best is None or sure[best] <= 0:
        some = ", ".join(list(tensors)[:3]) or "none"
        raise DataError(
            f"{path}: no LoRA dialect knows these keys: {some}. Dialects: {', '.join(sorted(dialects)) or 'none'}."
        )
    return dialects[best]
