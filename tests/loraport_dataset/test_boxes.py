"""The convention of a set's boxes is recognised from all of them, and never claimed without a reason."""

from __future__ import annotations

import random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from small_datasets import write_pair

from loraport.ideogram4 import IDEOGRAM4
from loraport.rules import Setting
from loraport_dataset.boxes import CONVENTIONS, OFFICIAL, BoxStatistics, Convention, numbers
from loraport_dataset.checking import check
from loraport_dataset.sources import Source

PIXELS = Convention("xy", "corners", "pixels")
SIZES = [(1024, 768), (768, 1024), (1536, 640), (640, 960), (2048, 2048)]


def caption(boxes: list[list[float]], said: str = "a thing") -> dict[str, Any]:
    elements = [{"type": "obj", "bbox": box, "desc": said} for box in boxes]
    return {"compositional_deconstruction": {"background": "a wall", "elements": elements}}


def written(corners: tuple[float, float, float, float], convention: Convention, size: tuple[int, int]) -> list[float]:
    """The inverse of `Convention.corners`, rounded as people round."""
    y, x, y2, x2 = corners
    if convention.form == "size":
        y2, x2 = y2 - y, x2 - x
    whole = {"thousandths": 1000, "fraction": 1, "percent": 100}.get(convention.unit)
    width, height = size if whole is None else (whole, whole)
    sides = (y * height, x * width, y2 * height, x2 * width)
    sides = sides if convention.order == "yx" else (sides[1], sides[0], sides[3], sides[2])
    if convention.unit == "fraction":
        return [round(side, 4) for side in sides]
    return [round(side, 1) if convention.unit == "percent" else int(side) for side in sides]


def random_corners(source: random.Random) -> tuple[float, float, float, float]:
    y, y2 = sorted(source.uniform(0, 1) for _ in range(2))
    x, x2 = sorted(source.uniform(0, 1) for _ in range(2))
    if source.random() < 0.2:  # people draw many boxes to the edge
        y2 = x2 = 1.0
    return y, x, y2, x2


def statistics(convention: Convention, images: int = 40, said: str = "a thing") -> BoxStatistics:
    source, seen = random.Random(0), BoxStatistics()
    for number in range(images):
        size = SIZES[number % len(SIZES)]
        boxes = [written(random_corners(source), convention, size) for _ in range(3)]
        seen.see(caption(boxes, said), size)
    return seen


def recognisable() -> list[Convention]:
    """All but x first in thousandths, which looks like the official one until captions speak of places."""
    return [one for one in CONVENTIONS if one.unit != "thousandths" or one.form == "size"]


@pytest.mark.parametrize("convention", recognisable(), ids=str)
def test_a_set_in_another_convention_is_recognised(convention: Convention) -> None:
    seen = statistics(convention)
    found = seen.convention()
    assert found is not None
    assert (found.form, found.unit) == (convention.form, convention.unit), seen.evidence(convention)
    assert "120 boxes" in seen.evidence(found)
    # Pictures of several shapes tell the order of pixels; in shares of a picture, both orders always fit.
    assert seen.is_certain(found) == (convention.unit == "pixels")
    assert found.order == (convention.order if convention.unit == "pixels" else "xy")


@pytest.mark.parametrize("convention", recognisable(), ids=str)
def test_what_captions_say_of_places_tells_the_order(convention: Convention) -> None:
    seen = statistics(convention)
    for size in SIZES:
        seen.see(caption([written((0.1, 0.7, 0.3, 1.0), convention, size)], "a lamp at the top"), size)
        seen.see(caption([written((0.3, 0.8, 0.7, 0.9), convention, size)], "a door on the right"), size)
    assert seen.convention() == convention
    assert seen.is_certain(convention)


def test_a_set_in_the_official_convention_is_left_alone() -> None:
    assert statistics(OFFICIAL).convention() is None


def test_pixels_of_small_pictures_are_recognised_though_every_number_is_in_range() -> None:
    source, seen = random.Random(1), BoxStatistics()
    for _ in range(30):
        seen.see(caption([written(random_corners(source), PIXELS, (640, 960))]), (640, 960))
    assert seen.convention() == PIXELS


def test_a_single_box_of_pixels_tells_by_its_numbers() -> None:
    seen = BoxStatistics()
    seen.see(caption([[64, 128, 1216, 700]]), (1280, 720))
    assert seen.convention() == PIXELS


def test_x_first_in_thousandths_is_told_by_what_the_captions_say_of_places() -> None:
    seen = BoxStatistics()
    for shift in range(12):
        left, right = (
            [20 + shift, 300, 280 + shift, 700],
            [700 + shift, 300, 960 + shift, 700],
        )  # xmin, ymin, xmax, ymax
        seen.see(caption([left], "a lamp on the left"), (1024, 1024))
        seen.see(caption([right], "a lamp on the right side"), (1024, 1024))
    assert seen.convention() is None  # y first, these boxes are at the top and the bottom: nothing is contradicted
    for shift in range(12):
        seen.see(caption([[20 + shift, 600, 280 + shift, 960]], "a cup at the bottom"), (1024, 1024))
        seen.see(caption([[600 + shift, 20, 980, 280 + shift]], "a lamp at the top right of the room"), (1024, 1024))
    found = seen.convention()
    assert found == Convention("xy", "corners", "thousandths")
    assert "contradict" in seen.evidence(found)


def test_lettering_that_would_be_higher_than_wide_speaks_for_x_first() -> None:
    seen = BoxStatistics()
    for shift in range(10):
        box = [100, 400 + shift, 900, 500 + shift]  # wide, x first
        sign = {"type": "text", "bbox": box, "text": "GRAND HOTEL", "desc": "white letters"}
        seen.see({"compositional_deconstruction": {"background": "", "elements": [sign]}}, (1024, 1024))
    assert seen.convention() == Convention("xy", "corners", "thousandths")


def test_a_few_wrong_boxes_in_an_official_set_are_no_convention() -> None:
    seen = statistics(OFFICIAL, images=40)
    seen.see(caption([[0, 0, 1200, 700]] * 3), (1280, 720))
    assert seen.convention() is None


def test_some_pixels_in_an_official_set_of_large_pictures_do_not_make_all_of_them_pixels() -> None:
    seen, source = BoxStatistics(), random.Random(4)
    for number in range(40):
        convention = PIXELS if number % 6 == 0 else OFFICIAL
        seen.see(caption([written(random_corners(source), convention, (2048, 2048)) for _ in range(3)]), (2048, 2048))
    assert seen.convention() is None


def test_pixels_of_pictures_just_over_a_thousand_are_recognised_by_the_few_boxes_that_show_it() -> None:
    seen, source = BoxStatistics(), random.Random(5)
    for number in range(60):
        y, x, y2, x2 = random_corners(source)
        corners = (y, x, 1.0, 1.0) if number % 12 == 0 else (y / 1.1, x / 1.1, y2 / 1.1, x2 / 1.1)
        seen.see(caption([written(corners, PIXELS, (1024, 1024))]), (1024, 1024))
    assert seen.convention() == PIXELS


def test_one_wrong_box_does_not_hide_the_convention_of_all_others() -> None:
    seen = statistics(PIXELS)
    seen.see(caption([[9000, 9000, 9500, 9999]]), (1024, 768))
    assert seen.convention() == PIXELS


def test_a_set_of_nonsense_has_no_convention() -> None:
    source, seen = random.Random(2), BoxStatistics()
    for _ in range(50):
        seen.see(caption([[source.randint(-5000, 5000) for _ in range(4)]]), (1024, 768))
    assert seen.convention() is None


def test_without_boxes_there_is_no_convention() -> None:
    seen = BoxStatistics()
    seen.see(caption([]), (64, 64))
    seen.see(None, (64, 64))
    seen.see(caption([["a", None, True, 1]]), (64, 64))  # type: ignore[list-item]
    seen.see(caption([[1, 2, 3, 10**400]]), (64, 64))
    assert (seen.boxes, seen.convention()) == (0, None)


@settings(deadline=None)
@given(st.sampled_from(CONVENTIONS), st.sampled_from(SIZES), st.integers(0, 2**32))
def test_converting_gives_the_box_that_was_meant(convention: Convention, size: tuple[int, int], seed: int) -> None:
    meant = random_corners(random.Random(seed))
    box = convention.to_official(written(meant, convention, size), size)
    assert box is not None
    assert all(isinstance(side, int) and 0 <= side <= 1000 for side in box)
    # The coarsest writing is that of whole pixels, and both corners of a `size` box are rounded.
    allowed = 3 + 2000 / min(size)
    assert all(abs(side - 1000 * share) <= allowed for side, share in zip(box, meant, strict=True))


def test_a_box_that_does_not_fit_its_convention_is_not_converted() -> None:
    assert PIXELS.to_official([0, 0, 2000, 100], (1024, 768)) is None
    assert PIXELS.to_official([500, 0, 400, 100], (1024, 768)) is None
    assert PIXELS.to_official([0, 0, 1024, 768], (1024, 768)) == [0, 0, 1000, 1000]


@settings(deadline=None)
@given(st.recursive(st.none() | st.booleans() | st.floats() | st.integers() | st.text(), st.lists))
def test_no_value_crashes_the_statistics(box: Any) -> None:
    assert numbers(box) is None or len(box) == 4
    seen = BoxStatistics()
    seen.see(caption([box]), (640, 480))
    seen.convention()


def test_the_finding_names_both_conventions_and_the_numbers(tmp_path: Any) -> None:
    source = random.Random(3)
    for number in range(6):
        boxes = [written(random_corners(source), PIXELS, (640, 480)) for _ in range(4)]
        write_pair(tmp_path, f"{number}.png", caption(boxes), (640, 480), seed=number)
    report = check([Source(tmp_path, "dataset", Setting(IDEOGRAM4, resolution=512))])
    (_, finding) = report.rules["bbox-convention"].examples[0]
    assert finding.file == ""
    assert "[xmin, ymin, xmax, ymax] in pixels, not [ymin, xmin, ymax, xmax] in thousandths" in finding.message
    assert "of 24 boxes" in finding.message


@pytest.mark.parametrize("seed", range(60))
def test_official_sets_of_any_size_are_never_taken_for_others(seed: int) -> None:
    source = random.Random(seed)
    sizes = source.sample([(512, 512), (768, 512), (640, 960), (1024, 1024), (4000, 3000)], source.choice([1, 2]))
    seen = BoxStatistics()
    for _ in range(source.choice([4, 20, 60])):
        size = source.choice(sizes)
        seen.see(caption([written(random_corners(source), OFFICIAL, size) for _ in range(2)]), size)
    assert seen.convention() is None
