"""What the dialects have in common: they differ in how they are told apart and in where the scale is."""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import ClassVar, Self

from loraport.errors import DataError, unknown
from loraport.lora.canonical import LoraFile
from loraport.lora.storage import read_tensors
from loraport_convert.codec.decode import decode
from loraport_convert.codec.scale import Told, first_told, from_adapter_metadata, from_kohya, given, nothing
from loraport_convert.families import FAMILIES


class Reader:
    """Reads a dialect. A subclass says what its keys look like and, with `told`, what scale the lack of alpha means."""

    name: ClassVar[str]
    hint: ClassVar[str | None] = None  #: where the scale may be, for who is asked for it

    family: str | None = None  #: told by somebody, for files whose names do not tell it

    def for_family(self, family: str) -> Self:
        """The same dialect for files of this family. Raises DataError for one that is not known."""
        told = copy.copy(self)
        told.family = known(family)
        return told

    def told(self, path: Path, metadata: Mapping[str, str]) -> Told:
        """The scale of modules without an alpha tensor, beyond the metadata that every dialect knows."""
        return nothing

    def read(self, path: Path) -> LoraFile:
        """Raises DataError when a module is not whole, and UnknownScale when nothing tells the scale."""
        return decode(path, self._told(path), self.hint, self.family)

    def read_with_alpha(self, path: Path, alpha: float | None) -> LoraFile:
        """Read a file with `alpha` for every module that tells none; None stands for the module's own rank."""
        return decode(path, first_told(self._told(path), given(alpha)), None, self.family)

    def _told(self, path: Path) -> Told:
        metadata = read_tensors(path).metadata
        return first_told(self.told(path, metadata), from_adapter_metadata(metadata), from_kohya(metadata))


def known(family: str) -> str:
    """A family's name. Raises DataError, with the nearest one, when there is none of that name."""
    if family not in FAMILIES:
        raise DataError(unknown("The family", family, FAMILIES))
    return family


def share(keys: Collection[str], mine: Callable[[str], bool]) -> float:
    """The share of keys for which `mine` holds."""
    return sum(map(mine, keys)) / len(keys) if keys else 0.0
