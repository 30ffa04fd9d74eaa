"""Datasets: what is found, what is refused, and how pixels come out."""

from __future__ import annotations

import json
import os
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from loraport.dataset import Item, find_images, load_image, scan
from loraport.errors import DataError
from loraport.images import MAX_PIXELS


def make_image(path: Path, size: tuple[int, int] = (32, 24), **save: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(0).integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(noise).save(path, **save)  # type: ignore[arg-type]
    return path


def make_item(folder: Path, name: str, caption: str = "a thing", ext: str = "txt") -> Path:
    image = make_image(folder / name)
    image.with_suffix(f".{ext}").write_text(caption, encoding="utf-8")
    return image


def message(path: Path, ext: str = "txt", default: str | None = None) -> str:
    with pytest.raises(DataError) as caught:
        scan(path, ext, default)
    return str(caught.value)


def test_images_come_sorted_by_relative_path_from_all_subfolders(tmp_path: Path) -> None:
    for name in ["b.PNG", "a/z.jpg", "a/b/c.webp", "c.JPEG", "d.bmp", "e.tif", "f.Tiff"]:
        make_item(tmp_path, name)
    (tmp_path / "notes.md").write_text("no image")
    (tmp_path / "png").write_text("no extension")
    names = [item.image.relative_to(tmp_path).as_posix() for item in scan(tmp_path, "txt")]
    assert names == ["a/b/c.webp", "a/z.jpg", "b.PNG", "c.JPEG", "d.bmp", "e.tif", "f.Tiff"]


def test_hidden_files_and_folders_are_skipped(tmp_path: Path) -> None:
    make_item(tmp_path, "a.png")
    make_image(tmp_path / "._a.png")
    make_image(tmp_path / ".thumbs" / "b.png")
    assert len(scan(tmp_path, "txt")) == 1


def test_a_symlink_loop_ends_and_counts_each_image_once(tmp_path: Path) -> None:
    make_item(tmp_path, "sub/a.png")
    (tmp_path / "sub" / "again").symlink_to(tmp_path, target_is_directory=True)
    assert [item.image.name for item in scan(tmp_path, "txt")] == ["a.png"]


def test_a_linked_folder_is_followed(tmp_path: Path) -> None:
    make_item(tmp_path / "elsewhere", "a.png")
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "link").symlink_to(tmp_path / "elsewhere", target_is_directory=True)
    assert len(scan(tmp_path / "set", "txt")) == 1


def test_text_captions_are_stripped_and_json_captions_compact(tmp_path: Path) -> None:
    make_item(tmp_path, "a.png", "\ufeff  a café \n")
    make_item(tmp_path, "a.png", '{ "b": "café",\n "a": [1, 2] }', "json")
    assert scan(tmp_path, "txt")[0].caption == "a café"
    assert scan(tmp_path, "json")[0].caption == '{"b":"café","a":[1,2]}'


def test_the_default_caption_serves_images_without_one(tmp_path: Path) -> None:
    make_item(tmp_path, "a.png", "own")
    make_image(tmp_path / "b.png")
    assert [item.caption for item in scan(tmp_path, "txt", "default")] == ["own", "default"]


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("extension", ["jpg", "png", "webp", "tif"])
def test_the_size_and_pixels_are_upright(tmp_path: Path, orientation: int, extension: str) -> None:
    pixels = np.zeros((32, 64, 3), dtype=np.uint8)
    pixels[:16, :16] = 255  # white in the stored top left
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(pixels).save(tmp_path / f"a.{extension}", exif=exif)
    (item,) = scan(tmp_path, "txt", "x")
    image = load_image(item)
    assert item.size == image.size == ((64, 32) if orientation < 5 else (32, 64))
    # Where EXIF says the stored top left is seen: first the vertical side, then the horizontal one.
    corner = {1: "tl", 2: "tr", 3: "br", 4: "bl", 5: "tl", 6: "tr", 7: "br", 8: "bl"}[orientation]
    x = 4 if corner[1] == "l" else image.width - 5
    y = 4 if corner[0] == "t" else image.height - 5
    assert min(image.getpixel((x, y))) > 200
    assert np.asarray(image).mean() < 80


@pytest.mark.parametrize(
    ("mode", "colour", "expected"),
    [
        ("RGBA", (255, 0, 0, 0), (255, 255, 255)),
        ("RGBA", (0, 0, 0, 128), (127, 127, 127)),
        ("LA", (0, 0), (255, 255, 255)),
        ("L", 100, (100, 100, 100)),
        ("1", 1, (255, 255, 255)),
        ("P", 3, None),
        ("I;16", 257 * 100, (100, 100, 100)),
        ("I;16", 65_535, (255, 255, 255)),
    ],
)
def test_every_mode_becomes_rgb_on_white(tmp_path: Path, mode: str, colour: object, expected: object) -> None:
    Image.new(mode, (16, 16), colour).save(tmp_path / "a.png")  # type: ignore[arg-type]
    (item,) = scan(tmp_path, "txt", "x")
    image = load_image(item)
    assert image.mode == "RGB"
    if expected is not None:
        assert image.getpixel((8, 8)) == expected


def test_a_transparent_palette_colour_is_white(tmp_path: Path) -> None:
    image = Image.new("P", (16, 16), 1)
    image.putpalette([255, 0, 0, 0, 0, 255])
    image.save(tmp_path / "a.png", transparency=1)
    assert load_image(scan(tmp_path, "txt", "x")[0]).getpixel((0, 0)) == (255, 255, 255)


def test_cmyk_is_converted(tmp_path: Path) -> None:
    Image.new("CMYK", (16, 16), (0, 255, 255, 0)).save(tmp_path / "a.jpg")
    red, green, blue = load_image(scan(tmp_path, "txt", "x")[0]).getpixel((8, 8))
    assert red > 200
    assert max(green, blue) < 60


def test_a_missing_caption_is_named(tmp_path: Path) -> None:
    make_image(tmp_path / "sub" / "a.png")
    assert "sub/a.txt: no such caption file" in message(tmp_path)


def test_an_empty_caption_is_named_even_with_a_default(tmp_path: Path) -> None:
    make_item(tmp_path, "a.png", " \n ")
    assert "a.txt: the caption is empty" in message(tmp_path, default="x")


def test_an_empty_json_object_is_no_caption(tmp_path: Path) -> None:
    make_item(tmp_path, "a.png", "{}", "json")
    assert "a.json: the caption is empty" in message(tmp_path, "json")


def test_a_caption_that_is_not_utf8_is_named_with_its_byte(tmp_path: Path) -> None:
    make_item(tmp_path, "a.png").with_suffix(".txt").write_bytes(b"abc \xff def")
    assert "a.txt: the caption is not UTF-8 (byte 4)" in message(tmp_path)


def test_a_ten_megabyte_caption_is_refused_with_its_size(tmp_path: Path) -> None:
    make_item(tmp_path, "a.png").with_suffix(".txt").write_bytes(b"a" * 10_000_000)
    assert "10,000,000 bytes" in message(tmp_path)


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ('{"a": 1,\n "b" 2}', "line 2, column 6"),
        ("[" * 100_000, "not usable JSON"),
        (r'{"a": "\ud800"}', "surrogate"),
        ("just words", "line 1, column 1"),
    ],
)
def test_broken_json_is_told_with_its_place(tmp_path: Path, content: str, told: str) -> None:
    make_item(tmp_path, "a.png", content, "json")
    assert told in message(tmp_path, "json")


@pytest.mark.parametrize("content", [b"", b"not an image", b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff"])
def test_an_empty_or_unreadable_image_is_named_at_the_scan(tmp_path: Path, content: bytes) -> None:
    make_item(tmp_path, "good.png")
    make_item(tmp_path, "bad.png").write_bytes(content)
    told = message(tmp_path)
    assert "bad.png: " in told
    assert "good.png" not in told


def test_an_image_without_read_permission_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_item(tmp_path, "a.png")

    def refuse(*_: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Image, "open", refuse)
    assert "a.png: the image cannot be read: Permission denied" in message(tmp_path)


def test_a_broken_link_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.png").symlink_to(tmp_path / "gone.png")
    assert "a.png: the image cannot be read: No such file" in message(tmp_path, default="x")


@pytest.mark.parametrize("extension", ["png", "jpg", "webp", "bmp", "tif"])
def test_a_truncated_image_is_named_when_its_pixels_are_loaded(tmp_path: Path, extension: str) -> None:
    image = make_image(tmp_path / f"a.{extension}", (200, 200))
    image.write_bytes(image.read_bytes()[: image.stat().st_size * 6 // 10])
    with pytest.raises(DataError, match=rf"a\.{extension}: "):
        load_image(Item(image, "x", (200, 200)))


def test_a_twenty_thousand_pixel_image_is_refused_before_its_pixels_are_read(tmp_path: Path) -> None:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 20_000, 20_000, 8, 2, 0, 0, 0)
    (tmp_path / "a.png").write_bytes(
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", b"") + chunk(b"IEND", b"")
    )
    assert "a.png: the image has 400,000,000 pixels; at most 178,956,970 are read" in message(tmp_path, default="x")


def test_the_pixel_limit_holds_when_pillows_own_is_switched_off(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    monkeypatch.setattr("loraport.images.MAX_PIXELS", 100)
    make_item(tmp_path, "a.png")
    assert "768 pixels; at most 100" in message(tmp_path)
    assert MAX_PIXELS > 100


def test_floating_point_images_are_refused(tmp_path: Path) -> None:
    Image.new("F", (16, 16), 0.5).save(tmp_path / "a.tif")
    assert "floating-point" in message(tmp_path, default="x")


def test_everything_wrong_is_told_at_once_up_to_ten_lines(tmp_path: Path) -> None:
    for index in range(14):
        make_image(tmp_path / f"{index:02}.png")
    told = message(tmp_path).splitlines()
    assert told[0].endswith("has 14 problems:")
    assert told[1].strip().startswith("00.txt")
    assert len(told) == 12
    assert told[-1].strip() == "and 4 more"


def test_an_image_and_its_caption_can_both_be_wrong(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"")
    told = message(tmp_path)
    assert "a.png: the file is empty" in told
    assert "a.txt: no such caption" in told


def test_an_empty_folder_a_missing_one_and_a_file_are_told_apart(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("")
    assert "has no images" in message(tmp_path / "empty")
    assert "is not there" in message(tmp_path / "gone")
    assert "is a file" in message(tmp_path / "file")


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_folders_without_read_permission_are_named(tmp_path: Path) -> None:
    make_item(tmp_path, "locked/a.png")
    (tmp_path / "locked").chmod(0)
    try:
        assert "no permission" in message(tmp_path / "locked")
        assert "locked: Permission denied" in message(tmp_path)
    finally:
        (tmp_path / "locked").chmod(0o755)


def test_finding_images_needs_no_captions(tmp_path: Path) -> None:
    make_image(tmp_path / "a.png")
    assert find_images(tmp_path) == [tmp_path / "a.png"]


def test_json_captions_keep_their_keys_in_order(tmp_path: Path) -> None:
    caption = {
        "high_level_description": "é",
        "compositional_deconstruction": {"background": "b", "elements": []},
    }
    make_item(tmp_path, "a.png", json.dumps(caption, indent=2), "json")
    assert list(json.loads(scan(tmp_path, "json")[0].caption)) == list(caption)
