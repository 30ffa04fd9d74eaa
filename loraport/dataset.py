"""Images and their caption files: found, checked and loaded. Everything that is wrong is told at once.

`scan` reads headers and captions only; pixels are read by `load_image`, one image at a time.
"""

from __future__ import annotations

import json
import os
import re
import warnings
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from loraport.errors import DataError

IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp", "bmp", "tif", "tiff")
MAX_CAPTION_BYTES = 1_000_000
#: The size from which Pillow itself refuses to open an image: above every camera's.
MAX_PIXELS = 178_956_970
_PROBLEMS_TOLD = 10

_ORIENTATION_TAG = 0x0112
# EXIF 2.3, tag 274: what turns a stored image of each orientation upright.
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


@dataclass(frozen=True)
class Item:
    """An image with its caption. `size` is (width, height) in pixels, upright (after EXIF rotation)."""

    image: Path
    caption: str
    size: tuple[int, int]


class _Problem(Exception):
    """What is wrong with one file, without its name."""


def scan(path: Path | str, caption_ext: str, default_caption: str | None = None) -> list[Item]:
    """The images under a folder and its subfolders with their captions, sorted by relative path.

    A caption is the file beside the image with the extension `caption_ext`: JSON is returned compact, text
    stripped. Images without one get `default_caption`. Hidden files and folders are skipped, links are
    followed once.
    Raises one DataError that names every unusable file (ten of them, then the count), or the folder.
    """
    root = Path(path)
    images, problems = _walk(root)
    items: list[Item] = []
    for image in images:
        name = image.relative_to(root).as_posix()
        size = caption = None
        try:
            size = _upright_size(image)
        except _Problem as problem:
            problems.append(f"{name}: {problem}")
        caption_file = image.with_suffix(f".{caption_ext}")
        try:
            caption = _read_caption(caption_file, default_caption)
        except _Problem as problem:
            problems.append(f"{caption_file.relative_to(root).as_posix()}: {problem}")
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
        with _opened(item.image) as image:
            orientation = _orientation(image)
            try:
                image.load()
            except Exception as error:  # decoders raise many types over damaged files
                raise _Problem(f"the image is damaged or cut short ({error})") from error
            pixels = _to_rgb(image)
    except _Problem as problem:
        raise DataError(
            f"{item.image}: {problem}.", hint="Save the image anew or take it out of the folder."
        ) from problem
    turn = _TURNS.get(orientation)
    return pixels if turn is None else pixels.transpose(turn)


def _walk(root: Path) -> tuple[list[Path], list[str]]:
    if not root.exists():
        raise DataError(
            f"The dataset folder {root} is not there.",
            hint="Check dataset.path; it is relative to the spec file.",
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


def _opened(path: Path) -> Image.Image:
    try:
        if path.stat().st_size == 0:
            raise _Problem("the file is empty")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow warns from half its limit on
            image = Image.open(path)
    except Image.DecompressionBombError as error:
        count = re.search(r"\d+", str(error))
        pixels = f"{int(count.group()):,}" if count else "too many"
        raise _Problem(f"the image has {pixels} pixels; at most {MAX_PIXELS:,} are read") from error
    except _Problem:
        raise
    except Image.UnidentifiedImageError as error:
        raise _Problem("this is not an image, or its header is damaged") from error
    except OSError as error:
        raise _Problem(f"the image cannot be read: {error.strerror or error}") from error
    except Exception as error:  # decoders raise many types over damaged files
        raise _Problem(f"the image's header is damaged ({error})") from error
    width, height = image.size
    if width * height > MAX_PIXELS:  # Pillow's own limit can be changed by other code in the process
        image.close()
        raise _Problem(f"the image has {width * height:,} pixels; at most {MAX_PIXELS:,} are read")
    if image.mode == "F":
        image.close()
        raise _Problem("the image has floating-point pixels, whose white is not defined; save it with 8 or 16 bits")
    return image


def _upright_size(path: Path) -> tuple[int, int]:
    with _opened(path) as image:
        width, height = image.size
        return (height, width) if _orientation(image) >= 5 else (width, height)


def _orientation(image: Image.Image) -> int:
    """EXIF orientation 1 to 8, from what precedes the pixels."""
    if image.format == "TIFF":
        return 1  # Pillow gives TIFFs upright
    try:
        # The base class's method: PNG's own would decode the pixels to look behind them.
        found = Image.Image.getexif(image).get(_ORIENTATION_TAG, 1)
    except Exception:  # broken EXIF says nothing about the pixels, and viewers ignore it too
        return 1
    return found if found in _TURNS else 1


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):  # 16 bits of grey, which convert() would clip
        image = image.convert("I").point(lambda value: value * (1 / 257) + 0.5).convert("L")
    if image.has_transparency_data:
        layer = image.convert("RGBA")
        white = Image.new("RGBA", layer.size, "white")
        return Image.alpha_composite(white, layer).convert("RGB")
    return image.convert("RGB")


def _read_caption(path: Path, default: str | None) -> str:
    try:
        size = path.stat().st_size
        if size > MAX_CAPTION_BYTES:
            raise _Problem(f"the caption has {size:,} bytes; at most {MAX_CAPTION_BYTES:,} are read")
        data = path.read_bytes()
    except FileNotFoundError as error:
        if default is not None:
            return default
        raise _Problem("no such caption file; write it or set dataset.default_caption") from error
    except OSError as error:
        raise _Problem(f"the caption cannot be read: {error.strerror}") from error
    try:
        text = data.decode("utf-8-sig").strip()
    except UnicodeDecodeError as error:
        raise _Problem(f"the caption is not UTF-8 (byte {error.start})") from error
    if not text:
        raise _Problem("the caption is empty")
    return _compact(text) if path.suffix.lower() == ".json" else text


def _compact(text: str) -> str:
    try:
        content = json.loads(text)
        compact = json.dumps(content, ensure_ascii=False, separators=(",", ":"))
        compact.encode()
    except json.JSONDecodeError as error:
        raise _Problem(
            f"the caption is not valid JSON: {error.msg} at line {error.lineno}, column {error.colno}"
        ) from error
    except UnicodeEncodeError as error:
        raise _Problem("the caption is not valid JSON: half of a \\u surrogate pair") from error
    except (ValueError, RecursionError) as error:
        raise _Problem(f"the caption is not usable JSON: {error}") from error
    if not content:
        raise _Problem("the caption is empty")
    return compact
