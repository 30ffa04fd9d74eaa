"""A picture as it is sent: upright, RGB, no larger than asked for."""

from __future__ import annotations

import io
from pathlib import Path

from PIL import Image

from loraport.images import load_pixels

_QUALITY = 90


def as_jpeg(path: Path, max_side: int) -> bytes:
    """The picture as JPEG, its longer side at most `max_side` pixels; smaller ones keep their size.

    Transparency becomes white and EXIF rotation is applied, as in training; no metadata goes along. Raises
    FileProblem for a file that is no picture, is damaged, or has more pixels than `loraport.images.MAX_PIXELS`.
    """
    picture = load_pixels(path)
    picture.thumbnail((max_side, max_side), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=_QUALITY)
    return buffer.getvalue()
