"""Importing picks the backend that knows the file, and tells each one's reason when none does."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from loraport.errors import SpecError
from loraport.importing import Imported, import_config


class Known:
    """Stands in for the plugin manager: two backends that import, one that does not."""

    def backends(self) -> dict[str, Any]:
        return {
            "json": SimpleNamespace(import_config=self._json),
            "none": SimpleNamespace(),
            "text": SimpleNamespace(import_config=lambda path: Imported({"name": path.stem}, ["a note"])),
        }

    def backend(self, name: str) -> Any:
        return self.backends()[name]

    @staticmethod
    def _json(path: Path) -> Imported:
        if path.suffix != ".json":
            raise SpecError("not JSON")
        return Imported({"name": "from json"})


def test_the_first_importer_that_knows_the_file_reads_it(tmp_path: Path) -> None:
    for name in ("a.json", "b.txt"):
        (tmp_path / name).touch()
    assert import_config(tmp_path / "a.json", None, Known())[0] == "json"  # type: ignore[arg-type]
    name, imported = import_config(tmp_path / "b.txt", None, Known())  # type: ignore[arg-type]
    assert (name, imported.content, imported.notes) == ("text", {"name": "b"}, ["a note"])


def test_a_named_backend_alone_is_asked_and_its_reason_is_told(tmp_path: Path) -> None:
    (tmp_path / "b.txt").touch()
    with pytest.raises(SpecError, match="json: not JSON"):
        import_config(tmp_path / "b.txt", "json", Known())  # type: ignore[arg-type]
    with pytest.raises(SpecError, match=r"none cannot import.*json, text"):
        import_config(tmp_path / "b.txt", "none", Known())  # type: ignore[arg-type]


def test_a_file_that_is_not_there_is_said_to_be(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match="is not there"):
        import_config(tmp_path / "nothing", None, Known())  # type: ignore[arg-type]
