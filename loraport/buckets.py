"""Aspect buckets: the size each image is trained at, from its shape and the pixel budget."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from PIL import Image

Size = tuple[int, int]


def bucket_for(
    size: Size, resolution: int, multiple: int = 16, upscale: bool = False, aspect_buckets: bool = True
) -> Size:
    """The (width, height) in pixels at which an image of `size` is trained.

    Both sides are multiples of `multiple` and their area is at most resolution². Of the sizes around the
    image's own shape scaled to the budget, the one whose aspect is closest is taken, then the largest.
    Without `upscale` neither side exceeds the image's. Without `aspect_buckets` it is a square.
    The image's sides (unless `upscale`) and the resolution must be at least `multiple`.
    """
    assert resolution >= multiple
    assert min(size) >= (1 if upscale else multiple)
    if not aspect_buckets:
        side = resolution if upscale else min(resolution, *size)
        return (_down(side, multiple), _down(side, multiple))
    width, height = size
    budget = resolution**2
    across, down = width, height
    if upscale or width * height > budget:  # the image's shape with the budget's area
        across, down = math.isqrt(budget * width // height), math.isqrt(budget * height // width)
    candidates = [
        (wide, high)
        for wide in _around(across, multiple)
        for high in _around(down, multiple)
        if wide * high <= budget and (upscale or (wide <= width and high <= height))
    ]
    if not candidates:  # a strip thinner than one multiple keeps that one; its length takes the rest of the budget
        long = budget // multiple if upscale else min(budget // multiple, max(size))
        candidates = [(_down(long, multiple), multiple) if width > height else (multiple, _down(long, multiple))]
    aspect = math.log(width / height)
    return min(candidates, key=lambda found: (abs(math.log(found[0] / found[1]) - aspect), -found[0] * found[1]))


def fit(image: Image.Image, bucket: Size) -> Image.Image:
    """The image scaled to cover `bucket` (Lanczos) and cropped to it around the centre."""
    from PIL import Image, ImageOps

    return ImageOps.fit(image, bucket, method=Image.Resampling.LANCZOS, centering=(0.5, 0.5))


def _around(side: int, multiple: int) -> tuple[int, int]:
    """The multiples below and above a side, at least one multiple."""
    below = max(_down(side, multiple), multiple)
    return below, below + multiple


def _down(side: int, multiple: int) -> int:
    return side // multiple * multiple
