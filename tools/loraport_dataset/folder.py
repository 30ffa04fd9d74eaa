"""The caption rules over a whole folder."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from loraport.errors import DataError
from loraport_dataset.captions import Finding, check_caption

TEXT_SUFFIXES = (".txt", ".caption")


@dataclass(frozen=True)
class CheckedCaption:
    """A caption file and its findings; none when the caption keeps every rule."""

    file: Path
    findings: list[Finding]


def check_folder(folder: Path) -> list[CheckedCaption]:
    """Checks each JSON caption that lies in `folder` itself, by file name.

    Captions are the `.json` files, and the `.txt` and `.caption` files that hold JSON: plain sentences have
    no rules. Raises DataError when the folder is not there or has no such file.
    """
    if not folder.is_dir():
        raise DataError(f"{folder} is not a folder.", "Name the folder with the images and captions.")
    checked = [CheckedCaption(file, findings) for file, findings in _findings(folder)]
    if not checked:
        raise DataError(
            f"{folder} has no JSON captions.",
            "Put <image name>.json beside each image. Subfolders are not read.",
        )
    return checked


def _findings(folder: Path) -> Iterator[tuple[Path, list[Finding]]]:
    for file in sorted(folder.iterdir()):
        if not file.is_file() or file.suffix.lower() not in (".json", *TEXT_SUFFIXES):
            continue
        try:
            text = file.read_bytes().decode("utf-8")
        except UnicodeDecodeError as error:
            message = f"Not UTF-8: byte {error.start + 1} does not fit. Save the file as UTF-8."
            yield file, [Finding("json", "error", "", message)]
            continue
        if file.suffix.lower() == ".json" or _holds_json(text):
            yield file, check_caption(text)


def _holds_json(text: str) -> bool:
    """Whether a text file is meant as JSON, also with something in front that must not be there."""
    return "{" in text and text.rstrip().endswith("}")
