"""Image files: opened without reading their pixels, with errors that say what is wrong with one."""

from __future__ import annotations

import re
import warnings
from pathlib import Path

from PIL import Image

IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp", "bmp", "tif", "tiff")
#: The size from which Pillow itself refuses to open an image: above every camera's.
MAX_PIXELS = 178_956_970

_ORIENTATION_TAG = 0x0112
# EXIF 2.3, tag 274: what turns a stored image of each orientation upright.
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class FileProblem(Exception):
    """What is wrong with one file, without its name and without a full stop."""


def open_image(path: Path) -> Image.Image:
    """The image, its header read and its pixels not. Raises FileProblem for a file that cannot be trained on."""
    try:
        if path.stat().st_size == 0:
            raise FileProblem("the file is empty")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow warns from half its limit on
            image = Image.open(path)
    except Image.DecompressionBombError as error:
        count = re.search(r"\d+", str(error))
        pixels = f"{int(count.group()):,}" if count else "too many"
        raise FileProblem(f"the image has {pixels} pixels; at most {MAX_PIXELS:,} are read") from error
    except FileProblem:
        raise
    except Image.UnidentifiedImageError as error:
        raise FileProblem("this is not an image, or its header is damaged") from error
    except OSError as error:
        raise FileProblem(f"the image cannot be read: {error.strerror or error}") from error
    except Exception as error:  # decoders raise many types over damaged files
        raise FileProblem(f"the image's header is damaged ({error})") from error
    width, height = image.size
    if width * height > MAX_PIXELS:  # Pillow's own limit can be changed by other code in the process
        image.close()
        raise FileProblem(f"the image has {width * height:,} pixels; at most {MAX_PIXELS:,} are read")
    if image.mode == "F":
        image.close()
        raise FileProblem("the image has floating-point pixels, whose white is not defined; save it with 8 or 16 bits")
    return image


def upright_size(path: Path) -> tuple[int, int]:
    """(width, height) in pixels after EXIF rotation. Raises FileProblem."""
    with open_image(path) as image:
        width, height = image.size
        return (height, width) if orientation(image) >= 5 else (width, height)


def orientation(image: Image.Image) -> int:
    """EXIF orientation 1 to 8, from what precedes the pixels."""
    if image.format == "TIFF":
        return 1  # Pillow gives TIFFs upright
    try:
        # The base class's method: PNG's own would decode the pixels to look behind them.
        found = Image.Image.getexif(image).get(_ORIENTATION_TAG, 1)
    except Exception:  # broken EXIF says nothing about the pixels, and viewers ignore it too
        return 1
    return found if found in TURNS else 1


def load_pixels(path: Path, at_least: int | None = None) -> Image.Image:
    """RGB of 8 bits, upright, transparency on white. Raises FileProblem, also for a file that is cut short.

    at_least: a JPEG may be decoded smaller, which is much faster, but neither side below so many pixels.
    """
    with open_image(path) as image:
        turn = TURNS.get(orientation(image))
        try:
            if at_least is not None:
                image.draft(None, (at_least, at_least))
            image.load()
        except Exception as error:  # decoders raise many types over damaged files
            raise FileProblem(f"the image is damaged or cut short ({error})") from error
        pixels = _to_rgb(image)
    return pixels if turn is None else pixels.transpose(turn)


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):  # 16 bits of grey, which convert() would clip
        image = image.convert("I").point(lambda value: value * (1 / 257) + 0.5).convert("L")
    if image.has_transparency_data:
        layer = image.convert("RGBA")
        white = Image.new("RGBA", layer.size, "white")
        return Image.alpha_composite(white, layer).convert("RGB")
    return image.convert("RGB")
