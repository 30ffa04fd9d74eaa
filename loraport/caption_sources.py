"""Where the caption of an image is: a file beside it, or a column of the folder's metadata.

Metadata is that of Hugging Face's image folders: `metadata.jsonl` or `metadata.csv` in a folder, each row with
`file_name` relative to that folder (https://huggingface.co/docs/datasets/image_dataset).
"""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

from loraport.errors import DataError, unknown

METADATA = ("metadata.jsonl", "metadata.csv")
FILE_NAME = "file_name"
MAX_METADATA_BYTES = 2_000_000_000


class Source(Protocol):
    def where(self, image: Path) -> Path | str | None:
        """The file that should hold the image's caption, or the caption itself, or None when there is none."""


@dataclass(frozen=True)
class Files:
    """Captions in files beside the images."""

    extension: str

    def where(self, image: Path) -> Path:
        return image.with_suffix(f".{self.extension}")


@dataclass(frozen=True)
class Column:
    """Captions out of a column of metadata, by image."""

    texts: dict[Path, str]

    def where(self, image: Path) -> str | None:
        return self.texts.get(image)


def caption_source(root: Path, extension: str, field: str | None) -> Source:
    """Where the captions of the images under `root` are; `field` names a column, or is None for caption files.

    Raises DataError for metadata that is not there, cannot be read, or has no such column.
    """
    return Files(extension) if field is None else Column(read_column(root, field))


def read_column(root: Path, field: str) -> dict[Path, str]:
    """The texts of a column in all metadata files under `root`, by image. An empty cell counts as no caption."""
    files = metadata_files(root)
    if not files:
        raise DataError(
            f"{root} has no metadata.jsonl or metadata.csv, which caption_field: {field} is a column of.",
            hint="Leave caption_field out to read a caption file beside each image.",
        )
    texts: dict[Path, str] = {}
    for file in files:
        for number, row in _rows(file):
            name = row.get(FILE_NAME)
            if not isinstance(name, str) or not name:
                raise DataError(f"{file}, row {number}: there is no {FILE_NAME}, which says whose caption it is.")
            if field not in row:
                raise DataError(f"{file}, row {number}: {unknown('The column', field, set(row) - {FILE_NAME})}")
            texts[file.parent / name] = _text(row[field], f"{file}, row {number}: {field}")
    return {image: text for image, text in texts.items() if text}


def read_columns(root: Path) -> set[str]:
    """The columns of the first row of each metadata file under `root`, without the file's name."""
    return {name for file in metadata_files(root) for _, row in islice(_rows(file), 1) for name in row} - {FILE_NAME}


def metadata_files(root: Path) -> list[Path]:
    """The metadata files of an image folder and its subfolders."""
    return sorted(path for name in METADATA for path in root.rglob(name) if path.is_file())


def _rows(file: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    try:
        if file.stat().st_size > MAX_METADATA_BYTES:
            raise DataError(f"{file} has more than {MAX_METADATA_BYTES:,} bytes, which is too much for metadata.")
        with open(file, encoding="utf-8-sig", newline="") as lines:
            if file.suffix == ".csv":
                yield from enumerate(csv.DictReader(lines, strict=True), start=1)
                return
            for number, line in enumerate(lines, start=1):
                if line.strip():
                    row = json.loads(line)
                    if not isinstance(row, dict):
                        raise DataError(f"{file}, row {number}: a row is a JSON object.")
                    yield number, row
    except OSError as error:
        raise DataError(f"{file} cannot be read: {error.strerror}.") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{file} is not UTF-8 text (byte {error.start}).") from error
    except (ValueError, csv.Error, RecursionError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"{file} is damaged: {error}.") from error


def _text(value: Any, where: str) -> str:
    if value is None:
        return ""
    if isinstance(value, dict):
        return json.dumps(value, ensure_ascii=False, separators=(",", ":"))
    if isinstance(value, str):
        return value.strip()
    raise DataError(f"{where}: {value!r} is no text; a caption is text, or a JSON object.")
