"""Configurations of other trainers become a spec, with a list of what could not be carried."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loraport.errors import SpecError

if TYPE_CHECKING:
    from loraport.plugins import Plugins


@dataclass(frozen=True)
class Imported:
    """A raw spec (see docs/spec.md) and, a line each, what the other configuration said that it does not carry."""

    content: dict[str, Any]
    notes: list[str] = field(default_factory=list)


def import_config(path: Path, backend: str | None, installed: Plugins) -> tuple[str, Imported]:
    """Read a trainer's configuration; without `backend`, by the first importer that knows it.

    A backend's optional member `import_config(path) -> Imported` raises SpecError for a file that is not its own.
    Returns the backend's name too. Raises SpecError when none knows the file, with each one's reason.
    """
    if not path.exists():
        raise SpecError(f"{path} is not there.")
    importers = {
        name: importer
        for name, each in installed.backends().items()
        if (importer := getattr(each, "import_config", None)) is not None
    }
    if backend is not None:
        installed.backend(backend)
        if backend not in importers:
            raise SpecError(f"{backend} cannot import configurations. Can: {', '.join(sorted(importers)) or 'none'}.")
        importers = {backend: importers[backend]}
    reasons = []
    for name, importer in importers.items():
        try:
            return name, importer(path)
        except SpecError as error:
            reasons.append(f"  {name}: {error.message}")
    raise SpecError("\n".join([f"{path} is no configuration that can be imported:", *reasons]))
