"""Buckets: the size an image is trained at."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from loraport.buckets import bucket_for, fit

sides = st.integers(16, 20_000)
resolutions = st.integers(4, 128).map(lambda count: 16 * count)


@given(sides, sides, resolutions, st.booleans(), st.booleans())
def test_sides_are_multiples_within_the_budget_and_the_image(
    width: int, height: int, resolution: int, upscale: bool, aspect_buckets: bool
) -> None:
    across, down = bucket_for((width, height), resolution, 16, upscale, aspect_buckets)
    assert across % 16 == down % 16 == 0
    assert min(across, down) >= 16
    assert across * down <= resolution**2
    assert upscale or (across <= width and down <= height)
    assert aspect_buckets or across == down
    assert (across, down) == bucket_for((width, height), resolution, 16, upscale, aspect_buckets)


@given(sides, sides, resolutions, st.booleans())
def test_a_turned_image_gets_the_turned_bucket(width: int, height: int, resolution: int, upscale: bool) -> None:
    upright = bucket_for((width, height), resolution, upscale=upscale)
    turned = bucket_for((height, width), resolution, upscale=upscale)
    assert math.prod(upright) == math.prod(turned)
    if width != height:
        assert upright == turned[::-1]


@given(st.integers(256, 8000), st.floats(0.25, 4), st.integers(16, 128))
def test_the_aspect_is_off_by_less_than_one_multiple(width: int, aspect: float, count: int) -> None:
    height = max(256, round(width / aspect))
    across, down = bucket_for((width, height), 16 * count)
    error = abs(math.log(across / down) - math.log(width / height))
    shortest = min(across, down)
    assert error <= math.log((shortest + 16) / shortest) + 1e-9


@given(st.integers(512, 8000), st.floats(0.5, 2), st.integers(32, 128))
def test_most_of_the_budget_is_used_by_a_large_image(width: int, aspect: float, count: int) -> None:
    height = round(width / aspect)
    across, down = bucket_for((width, height), 16 * count)
    allowed = min((16 * count) ** 2, width * height)
    assert across * down > allowed * (1 - 16 / 256) ** 2 * 0.9


@pytest.mark.parametrize(
    ("size", "resolution", "expected"),
    [
        ((1024, 1024), 1024, (1024, 1024)),
        ((4000, 3000), 1024, (1168, 880)),
        ((1920, 1080), 1024, (1360, 768)),
        ((640, 427), 768, (640, 416)),
        ((100_000, 16), 1024, (65_536, 16)),
        ((17, 16), 512, (16, 16)),
    ],
)
def test_known_sizes(size: tuple[int, int], resolution: int, expected: tuple[int, int]) -> None:
    assert bucket_for(size, resolution) == expected


def test_upscale_takes_a_small_image_to_the_budget() -> None:
    assert bucket_for((100, 50), 512, upscale=True) == (720, 352)
    assert bucket_for((10, 10), 512, upscale=True) == (512, 512)


def test_without_aspect_buckets_the_square_fits_the_shorter_side() -> None:
    assert bucket_for((3000, 500), 512, aspect_buckets=False) == (496, 496)
    assert bucket_for((3000, 500), 512, upscale=True, aspect_buckets=False) == (512, 512)


def test_fit_covers_the_bucket_and_crops_around_the_centre() -> None:
    image = Image.new("RGB", (300, 100), "black")
    image.paste("white", (100, 0, 200, 100))
    fitted = fit(image, (48, 48))
    assert fitted.size == (48, 48)
    assert fitted.getpixel((24, 24)) == (255, 255, 255)
    assert min(fitted.getpixel((x, 24))[0] for x in (2, 45)) > 250
    wide = fit(image, (96, 32))
    assert wide.getpixel((4, 16)) == (0, 0, 0)
    assert wide.getpixel((91, 16)) == (0, 0, 0)
