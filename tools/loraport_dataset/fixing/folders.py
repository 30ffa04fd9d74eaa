"""A dataset written anew into a folder of its own: complete or not at all, the old one untouched."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

from loraport.errors import DataError, RunFolderError
from loraport.rules import Finding, ScannedImage

Images = Literal["copy", "hardlink", "symlink"]
"""How the images come into the new folder."""


@contextmanager
def new_dataset(source: Path, out: Path) -> Iterator[Path]:
    """A draft folder that becomes `out` on a clean exit and vanishes otherwise.

    Raises DataError when `out` has something in it, is a file, or lies within `source` (whose next reader would take it
    for a part of the set), RunFolderError when it cannot be written.
    """
    place = out.resolve()
    if place == source.resolve() or source.resolve() in place.parents:
        raise DataError(
            f"{out} lies within the dataset {source}.", hint="Give -o a folder beside it, or say --in-place."
        )
    try:
        if place.exists() and (not place.is_dir() or any(place.iterdir())):
            raise DataError(f"{out} is there already and not empty.", hint="Give -o a new folder; nothing was written.")
        place.parent.mkdir(parents=True, exist_ok=True)
        draft = Path(tempfile.mkdtemp(dir=place.parent, prefix=f".{place.name[:40]}.", suffix=".draft"))
    except OSError as error:
        raise _cannot_write(out, error) from error
    try:
        yield draft
        draft.chmod(0o755)
        os.replace(draft, place)
    except OSError as error:
        raise _cannot_write(out, error) from error
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def is_readable(file: Path) -> bool:
    """Whether there is an ordinary file that can be copied, whatever is in it."""
    return file.is_file() and os.access(file, os.R_OK)


def left_out(image: ScannedImage) -> tuple[Finding, ...]:
    """Why an image can't come into a new folder, if it can't: a link that leads nowhere, no permission, a pipe. Those
    that are damaged come along as they are."""
    if image.unreadable is None or is_readable(image.path):
        return ()
    message, fix = image.unreadable
    return (Finding(image.name, "", "image-unreadable", "error", f"{message} It is left out.", fix),)


def place_image(image: Path, target: Path, how: Images) -> None:
    """Put an image at `target`; links that lead to it are followed first. Raises DataError when it can't be."""
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        if how == "copy":
            shutil.copy2(image, target)
        elif how == "hardlink":
            os.link(image.resolve(), target)
        else:
            target.symlink_to(image.resolve())
    except OSError as error:
        other = "copy or symlink" if how == "hardlink" else "copy"
        hint = (
            "Is the image readable?" if how == "copy" else f"This file system may not allow it: use --images {other}."
        )
        raise DataError(f"{image} cannot be taken over ({how}): {error.strerror or error}.", hint=hint) from error


def write_text(target: Path, text: str) -> None:
    """A caption in a draft, as UTF-8."""
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(text, encoding="utf-8", newline="")


def _cannot_write(out: Path, error: OSError) -> RunFolderError:
    return RunFolderError(
        f"{out} cannot be written: {error.strerror or error}.",
        hint="Free some space or give -o a folder you can write to; nothing was changed.",
    )
