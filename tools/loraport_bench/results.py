"""The data file: one JSON object a line, the newest of a row counts."""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import os
import platform
import threading
from pathlib import Path
from typing import Any

from loraport.errors import DataError, RunFolderError

_PACKAGES = (
    "loraport",
    "torch",
    "triton",
    "diffusers",
    "transformers",
    "peft",
    "torchao",
    "bitsandbytes",
    "flash-attn-3",
)
Key = tuple[str, int | None]  #: a row's name, and its seed if it measures quality


class DataFile:
    """Rows read from a file, and appended to it whole. Raises DataError naming a line that is no row."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock = threading.Lock()
        self._whole = 0  # bytes of whole lines; what a killed session tore comes after them
        self.lines: list[dict[str, Any]] = []
        self.rows: dict[Key, dict[str, Any]] = {}
        lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
        for number, line in enumerate(lines, start=1):
            if not line.endswith(b"\n"):
                break
            try:
                self._take(json.loads(line))
            except (ValueError, KeyError, TypeError) as error:
                raise DataError(f"{path}, line {number}, is not a row of measurements.") from error
            self._whole += len(line)

    def append(self, row: dict[str, Any]) -> None:
        """Add a row. Raises RunFolderError when the file cannot be written."""
        line = json.dumps(row, ensure_ascii=False).encode() + b"\n"
        with self._lock:
            try:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                with open(self.path, "r+b" if self.path.exists() else "wb") as file:
                    file.seek(self._whole)
                    file.truncate()
                    file.write(line)
                    file.flush()
                    os.fsync(file.fileno())
            except OSError as error:
                raise RunFolderError(f"{self.path} cannot be written: {error.strerror or error}.") from error
            self._whole += len(line)
            self._take(row)

    def good(self, name: str, seed: int | None = None) -> dict[str, Any] | None:
        """The newest line of that row, if it was measured."""
        row = self.rows.get((name, seed))
        return row if row is not None and row["status"] == "ok" else None

    def beside(self, name: str, row: dict[str, Any]) -> dict[str, Any] | None:
        """The line of the row `name` that was measured nearest in time to `row`, and so most likely on the same
        machine and code."""
        found = [line for line in self.lines if line["row"] == name and line["status"] == "ok"]
        return min(found, key=lambda line: abs(_moment(line) - _moment(row)), default=None)

    def _take(self, row: dict[str, Any]) -> None:
        self.lines.append(row)
        self.rows[row["row"], row.get("seed")] = row


def _moment(row: dict[str, Any]) -> datetime.datetime:
    return datetime.datetime.fromisoformat(row["date"])


def versions() -> dict[str, str]:
    """Of Python and of the libraries that a step depends on, as they are installed here."""
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
