"""Images and their caption files: found, checked and loaded. Everything that is wrong is told at once.

`scan` reads headers and captions only; pixels are read by `load_image`, one image at a time.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from loraport.caption_sources import caption_source
from loraport.errors import DataError
from loraport.images import IMAGE_EXTENSIONS, FileProblem, load_pixels, upright_size

MAX_CAPTION_BYTES = 1_000_000
_PROBLEMS_TOLD = 10


@dataclass(frozen=True)
class Item:
    """An image with its caption. `size` is (width, height) in pixels, upright (after EXIF rotation)."""

    image: Path
    caption: str
    size: tuple[int, int]


def scan(
    path: Path | str, caption_ext: str, default_caption: str | None = None, caption_field: str | None = None
) -> list[Item]:
    """The images under a folder and its subfolders with their captions, sorted by relative path.

    A caption is the file beside the image with the extension `caption_ext`, or the text in the column `caption_field`
    of the folder's metadata: JSON is returned compact, text stripped. Images without one get `default_caption`. Hidden
    files and folders are skipped, links are followed once.
    Raises one DataError that names every unusable file (ten of them, then the count), or the folder.
    """
    root = Path(path)
    images, problems = _walk(root)
    source = caption_source(root, caption_ext, caption_field)
    items: list[Item] = []
    for image in images:
        name = image.relative_to(root).as_posix()
        size = caption = None
        try:
            size = upright_size(image)
        except FileProblem as problem:
            problems.append(f"{name}: {problem}")
        place = source.where(image)
        try:
            caption = _caption(place, default_caption)
        except FileProblem as problem:
            file = place if isinstance(place, Path) else image
            problems.append(f"{file.relative_to(root).as_posix()}: {problem}")
        if size is not None and caption is not None:
            items.append(Item(image, caption, size))
    if problems:
        count = f"{len(problems)} problem{'s' if len(problems) > 1 else ''}"
        more = len(problems) - _PROBLEMS_TOLD
        told = [*problems[:_PROBLEMS_TOLD], *([f"and {more} more"] if more > 0 else [])]
        raise DataError("\n  ".join([f"The dataset {root} has {count}:", *told]))
    return items


def find_images(path: Path | str) -> list[Path]:
    """The image files `scan` would read, in its order. Raises DataError when a folder is unusable."""
    images, problems = _walk(Path(path))
    if problems:
        raise DataError("\n  ".join([f"The dataset {path} cannot be searched:", *problems[:_PROBLEMS_TOLD]]))
    return images


def load_image(item: Item) -> Image.Image:
    """The pixels of an item: RGB, 8 bit, upright, transparency on white. DataError names a broken file."""
    try:
        return load_pixels(item.image)
    except FileProblem as problem:
        raise DataError(
            f"{item.image}: {problem}.", hint="Save the image anew or take it out of the folder."
        ) from problem


def _walk(root: Path) -> tuple[list[Path], list[str]]:
    if not root.exists():
        raise DataError(
            f"The dataset folder {root} is not there.",
            hint="Check its path in the spec; it is relative to the spec file.",
        )
    if not root.is_dir():
        raise DataError(f"The dataset {root} is a file, not a folder of images.")
    if not os.access(root, os.R_OK | os.X_OK):
        raise DataError(f"The dataset folder {root} cannot be read: no permission.")
    problems: list[str] = []

    def unreadable(error: OSError) -> None:
        problems.append(f"{Path(error.filename).relative_to(root).as_posix()}: {error.strerror}")

    images: list[Path] = []
    visited: set[str] = set()
    for folder, subfolders, files in os.walk(root, onerror=unreadable, followlinks=True):
        real = os.path.realpath(folder)
        if real in visited:
            subfolders.clear()
            continue
        visited.add(real)
        subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
        for name in files:
            if not name.startswith(".") and Path(name).suffix[1:].lower() in IMAGE_EXTENSIONS:
                images.append(Path(folder, name))
    if not images and not problems:
        raise DataError(
            f"The dataset folder {root} has no images.",
            hint=f"Looked for: {', '.join(IMAGE_EXTENSIONS)}, in subfolders too.",
        )
    return sorted(images, key=lambda image: image.relative_to(root).as_posix()), problems


def _caption(place: Path | str | None, default: str | None) -> str:
    """The caption out of its file, or as metadata says it."""
    if isinstance(place, Path):
        return _read_caption(place, default)
    if place is None:
        if default is None:
            raise FileProblem("the metadata has no caption of this image; write it or set default_caption")
        return default
    if len(place.encode()) > MAX_CAPTION_BYTES:
        raise FileProblem(f"the caption has more than {MAX_CAPTION_BYTES:,} bytes")
    return _compact(place) if place.startswith("{") else place


def _read_caption(path: Path, default: str | None) -> str:
    try:
        size = path.stat().st_size
        if size > MAX_CAPTION_BYTES:
            raise FileProblem(f"the caption has {size:,} bytes; at most {MAX_CAPTION_BYTES:,} are read")
        data = path.read_bytes()
    except FileNotFoundError as error:
        if default is not None:
            return default
        raise FileProblem("no such caption file; write it or set dataset.default_caption") from error
    except OSError as error:
        raise FileProblem(f"the caption cannot be read: {error.strerror}") from error
    try:
        text = data.decode("utf-8-sig").strip()
    except UnicodeDecodeError as error:
        raise FileProblem(f"the caption is not UTF-8 (byte {error.start})") from error
    if not text:
        raise FileProblem("the caption is empty")
    return _compact(text) if path.suffix.lower() == ".json" else text


def _compact(text: str) -> str:
    try:
        content = json.loads(text)
        compact = json.dumps(content, ensure_ascii=False, separators=(",", ":"))
        compact.encode()
    except json.JSONDecodeError as error:
        raise FileProblem(
            f"the caption is not valid JSON: {error.msg} at line {error.lineno}, column {error.colno}"
        ) from error
    except UnicodeEncodeError as error:
        raise FileProblem("the caption is not valid JSON: half of a \\u surrogate pair") from error
    except (ValueError, RecursionError) as error:
        raise FileProblem(f"the caption is not usable JSON: {error}") from error
    if not content:
        raise FileProblem("the caption is empty")
    return compact
