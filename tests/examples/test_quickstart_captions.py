from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

from loraport_dataset.captions import check_caption

QUICKSTART = Path(__file__).parents[2] / "examples" / "quickstart"
IMAGES = sorted((QUICKSTART / "images").glob("*.jpg"))
LICENCES = ("Public domain", "CC0 1.0", "CC BY 2.0", "CC BY 4.0")
over_images = pytest.mark.parametrize("image", IMAGES, ids=lambda image: image.stem)


@over_images
def test_each_image_is_a_small_photograph_without_metadata(image: Path) -> None:
    with Image.open(image) as picture:
        picture.load()
        assert picture.format == "JPEG"
        assert picture.mode in ("RGB", "L")
        assert 256 <= min(picture.size) <= max(picture.size) <= 640
        assert not picture.getexif()
        # Drawings and charts have few grey levels; photographs have many.
        assert sum(count > 0 for count in picture.convert("L").histogram()) > 150


@over_images
def test_each_caption_keeps_every_rule_and_describes_the_picture_fully(image: Path) -> None:
    text = image.with_suffix(".json").read_bytes().decode("utf-8")
    assert check_caption(text) == []
    assert "\n" not in text
    assert 350 <= len(text) <= 700
    caption = json.loads(text)
    assert caption.keys() == {
        "high_level_description",
        "style_description",
        "compositional_deconstruction",
    }
    assert caption["style_description"]["medium"] == "photograph"
    elements = caption["compositional_deconstruction"]["elements"]
    assert len(elements) >= 3
    assert all("bbox" in element for element in elements)


@over_images
def test_each_image_has_a_line_with_licence_author_and_source(image: Path) -> None:
    lines = (QUICKSTART / "LICENSES.md").read_text(encoding="utf-8").splitlines()
    row = next(line for line in lines if line.startswith(f"| `{image.name}` |"))
    _, _, licence, author, source, _ = (cell.strip() for cell in row.split("|"))
    assert any(name in licence for name in LICENCES)
    assert author
    assert any(character.isdigit() for character in source)


def test_the_folder_has_ten_pairs_of_several_shapes_and_nothing_else() -> None:
    assert len(IMAGES) == 10
    names = {path.name for path in (QUICKSTART / "images").iterdir()}
    assert names == {image.name for image in IMAGES} | {f"{image.stem}.json" for image in IMAGES}
    assert sum(path.stat().st_size for path in (QUICKSTART / "images").iterdir()) < 1_000_000
    shapes = set()
    for image in IMAGES:
        with Image.open(image) as picture:
            width, height = picture.size
        shapes.add("square" if width == height else "landscape" if width > height else "portrait")
    assert shapes == {"square", "landscape", "portrait"}
