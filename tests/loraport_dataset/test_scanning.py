"""Folders and files as people really have them: nothing raises, nothing hangs, nothing is written."""

from __future__ import annotations

import os
import struct
import tracemalloc
import unicodedata
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from small_datasets import CAPTION, compact, write_image, write_pair

from loraport.ideogram4 import IDEOGRAM4
from loraport.rules import NO_JSON, ScannedImage, Setting, StrayFile
from loraport_dataset.checking import check
from loraport_dataset.findings import Report
from loraport_dataset.scanning import read_caption, scan
from loraport_dataset.sources import Source
from loraport_dataset.walking import count_files, walk

SETTING = Setting(IDEOGRAM4, resolution=64)


def images(folder: Path, setting: Setting = SETTING) -> dict[str, ScannedImage]:
    return {one.name: one for one in scan(folder, setting) if isinstance(one, ScannedImage)}


def strays(folder: Path) -> dict[str, str]:
    return {one.name: one.kind for one in scan(folder, SETTING) if isinstance(one, StrayFile)}


def report(folder: Path, pixels: bool = False) -> Report:
    return check([Source(folder, "dataset", SETTING)], pixels)


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width: int, height: int, extra: bytes = b"") -> bytes:
    """A PNG that says what its size is and holds next to nothing."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + extra + chunk(b"IDAT", zlib.compress(b"\0" * 100)) + chunk(b"IEND", b"")


def test_images_come_with_their_captions_in_the_order_of_names(tmp_path: Path) -> None:
    for name in ("b.png", "a/z.jpg", "a/b/c.webp", "B.PNG"):
        write_pair(tmp_path, name)
    (tmp_path / ".hidden").mkdir()
    write_image(tmp_path / ".hidden" / "x.png")
    found = images(tmp_path)
    assert list(found) == ["B.PNG", "b.png", "a/z.jpg", "a/b/c.webp"]
    assert found["a/z.jpg"].caption is not None
    assert found["a/z.jpg"].caption.name == "a/z.json"
    assert found["a/z.jpg"].caption.root["high_level_description"] == "Dog a/z.jpg."


def test_a_header_tells_everything_that_rules_ask_for(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    write_image(tmp_path / "a.jpg", (80, 40), mode="L", exif=exif)
    image = images(tmp_path)["a.jpg"]
    assert (image.stored, image.size, image.orientation) == ((80, 40), (40, 80), 6)
    assert (image.format, image.mode, image.transparent, image.frames) == ("JPEG", "L", False, 1)
    assert image.bytes == (tmp_path / "a.jpg").stat().st_size
    assert (image.caption, image.unreadable, image.pixels) == (None, None, None)


def test_loops_end_and_links_are_followed_once(tmp_path: Path) -> None:
    write_pair(tmp_path / "set" / "sub", "a.png")
    write_pair(tmp_path / "elsewhere", "b.png")
    (tmp_path / "set" / "sub" / "up").symlink_to(tmp_path / "set")
    (tmp_path / "set" / "other").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "set" / "again").symlink_to(tmp_path / "elsewhere")
    for number in range(200):
        (tmp_path / "set" / f"loop {number}").symlink_to(tmp_path / "set")
    assert sorted(name.rpartition("/")[2] for name in images(tmp_path / "set")) == ["a.png", "b.png"]


def test_links_that_lead_nowhere_or_to_themselves_are_told(tmp_path: Path) -> None:
    (tmp_path / "self").symlink_to(tmp_path / "self")
    (tmp_path / "gone.jpg").symlink_to(tmp_path / "nowhere.jpg")
    assert strays(tmp_path) == {"self": "unreadable"}
    unreadable = images(tmp_path)["gone.jpg"].unreadable
    assert unreadable is not None
    assert unreadable[0] == "This is a link that leads nowhere."


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_folder_without_permission_is_told_and_the_others_are_read(tmp_path: Path) -> None:
    write_pair(tmp_path, "a.png")
    (tmp_path / "closed").mkdir(mode=0)
    try:
        assert strays(tmp_path) == {"closed": "unreadable"}
        assert list(images(tmp_path)) == ["a.png"]
    finally:
        (tmp_path / "closed").chmod(0o700)


@pytest.mark.timeout(20)
def test_pipes_and_folders_named_like_files_neither_hang_nor_raise(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.jpg")
    write_image(tmp_path / "a.png")
    os.mkfifo(tmp_path / "a.json")
    write_image(tmp_path / "b.png")
    (tmp_path / "b.json").mkdir()
    write_image(tmp_path / "dir.png" / "c.png")
    found = images(tmp_path)
    assert set(found) == {"pipe.jpg", "a.png", "b.png", "dir.png/c.png"}
    assert found["pipe.jpg"].unreadable == (
        "This is no ordinary file.",
        "Save the image anew, or take it out of the folder.",
    )
    assert found["a.png"].caption is not None
    assert found["a.png"].caption.unreadable is not None
    assert found["b.png"].caption is None  # a folder is no caption


BAD_IMAGES: dict[str, tuple[str, Callable[[], bytes], str]] = {
    "bomb": ("a.png", lambda: png(60_000, 60_000), "3,600,000,000 pixels; at most 178,956,970"),
    "empty": ("a.png", lambda: b"", "The file is empty"),
    "text": ("a.jpg", lambda: b"not an image", "not an image"),
    "svg": ("a.png", lambda: b'<svg xmlns="http://www.w3.org/2000/svg"/>', "not an image"),
    "heic": ("a.jpg", lambda: b"\0\0\0\x18ftypheic" + b"\0" * 64, "not an image"),
    "text bomb": (
        "a.png",
        lambda: png(64, 64, chunk(b"zTXt", b"a\0\0" + zlib.compress(b"A" * 3 * 10**7))),
        "ecompress",
    ),
}


@pytest.mark.parametrize("case", BAD_IMAGES)
def test_a_hostile_image_is_refused_in_a_sentence(case: str, tmp_path: Path) -> None:
    name, data, says = BAD_IMAGES[case]
    (tmp_path / name).write_bytes(data())
    unreadable = images(tmp_path)[name].unreadable
    assert unreadable is not None
    assert says in unreadable[0]
    assert unreadable[0].endswith(".")


@pytest.mark.timeout(60)
def test_a_picture_that_unpacks_to_hundreds_of_megabytes_is_decoded_or_told(tmp_path: Path) -> None:
    """Below Pillow's limit; its few bytes end long before its pixels do."""
    (tmp_path / "a.png").write_bytes(png(9_000, 9_000))
    write_pair(tmp_path, "b.png")
    assert "image-damaged" in report(tmp_path, pixels=True).rules
    assert "image-damaged" not in report(tmp_path).rules


def test_a_colour_profile_that_is_a_bomb_does_not_stop_the_scan(tmp_path: Path) -> None:
    profile = chunk(b"iCCP", b"a\0\0" + zlib.compress(b"A" * 3 * 10**7))
    (tmp_path / "a.png").write_bytes(png(64, 64, profile))
    tracemalloc.start()
    assert images(tmp_path)["a.png"].size in ((64, 64), (0, 0))
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert most < 20_000_000


def test_other_formats_are_told_and_not_opened(tmp_path: Path) -> None:
    for name in ("a.svg", "b.HEIC", "c.gif", "d.avif", "e.cr2"):
        (tmp_path / name).write_bytes(b"x")
    (tmp_path / "notes.md").write_text("no matter")
    write_pair(tmp_path, "z.png")
    assert strays(tmp_path) == dict.fromkeys(("a.svg", "b.HEIC", "c.gif", "d.avif", "e.cr2"), "image")


@pytest.mark.parametrize("forms", [("NFC", "NFD"), ("NFD", "NFC")])
def test_a_caption_in_another_unicode_form_is_found_to_be_meant(forms: tuple[str, str], tmp_path: Path) -> None:
    image, caption = (unicodedata.normalize(form, "café déjà") for form in forms)
    write_image(tmp_path / f"{image}.png")
    (tmp_path / f"{caption}.json").write_text(compact(CAPTION))
    if len(list(tmp_path.iterdir())) < 2 or (tmp_path / f"{image}.json").exists():
        pytest.skip("this file system takes both forms for one name")
    found = images(tmp_path)[f"{image}.png"]
    assert (found.caption, found.similar_captions) == (None, (f"{caption}.json",))
    assert strays(tmp_path) == {}  # it is no orphan
    assert list(report(tmp_path).rules) == ["caption-name"]


def test_names_of_any_bytes_are_told_in_unicode(tmp_path: Path) -> None:
    name = os.fsencode(tmp_path) + b"/bad\xff.png"
    try:
        os.close(os.open(name, os.O_CREAT | os.O_WRONLY))
    except OSError:
        pytest.skip("this file system takes Unicode only")
    for counted in report(tmp_path).rules.values():
        for _, finding in counted.examples:
            (finding.file + finding.message).encode("utf-8")
            assert "bad\\udcff" in finding.file


BAD_CAPTIONS: dict[str, tuple[bytes, str]] = {
    "ten megabytes": (b'{"a":"' + b"x" * 10_000_000 + b'"}', "caption-unreadable"),
    "utf-16": ('{"a":"é"}'.encode("utf-16"), "caption-unreadable"),
    "latin-1": ('{"a":"é"}'.encode("latin-1"), "caption-unreadable"),
    "nul bytes": (b"\0" * 100, "json"),
    "deep": (b"[" * 100_000, "json"),
    "empty": (b"", "caption-empty"),
    "blank": (b"\xef\xbb\xbf \n", "caption-empty"),
    "truncated": (compact(CAPTION)[:-2].encode(), "json"),
    "huge number": (b'{"a":' + b"1" * 5000 + b"}", "json"),
}


@pytest.mark.parametrize("case", BAD_CAPTIONS)
def test_a_hostile_caption_is_told_by_its_rule(case: str, tmp_path: Path) -> None:
    data, rule = BAD_CAPTIONS[case]
    write_image(tmp_path / "a.png").with_suffix(".json").write_bytes(data)
    found = report(tmp_path)
    assert rule in found.rules
    assert found.rules[rule].examples[0][1].file == "a.json"
    assert found.broken_rules == {}


def test_of_a_caption_of_ten_megabytes_nothing_is_read(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_bytes(b"x" * 10_000_000)
    tracemalloc.start()
    caption = read_caption(tmp_path / "a.json", "a.json", SETTING)
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert (caption.text, caption.root) == ("", NO_JSON)
    assert most < 100_000


def test_thousands_of_faults_of_one_caption_are_counted_and_few_are_kept(tmp_path: Path) -> None:
    elements: list[Any] = [{"type": "obj"}] * 5_000
    write_pair(tmp_path, "a.png", {"compositional_deconstruction": {"background": "x", "elements": elements}})
    counted = report(tmp_path).rules["element"]
    assert (counted.count, len(counted.examples)) == (5_000, 3)


def test_nothing_is_written_whatever_is_found(tmp_path: Path) -> None:
    write_pair(tmp_path / "set", "a.png")
    (tmp_path / "set" / "b.png").write_bytes(png(60_000, 60_000))
    (tmp_path / "set" / "c.json").write_bytes(b"\xff")

    def state() -> list[tuple[str, int, int]]:
        paths = [tmp_path / "set", *(tmp_path / "set").iterdir()]
        return sorted((str(path), path.stat().st_mtime_ns, path.stat().st_size) for path in paths)

    before = state()
    report(tmp_path / "set", pixels=True)
    assert state() == before


def test_counting_needs_names_alone(tmp_path: Path) -> None:
    for name in ("a.png", "sub/b.JPG"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    for name in ("a.json", "a.txt", "sub/b.txt", "c.txt"):
        (tmp_path / name).touch()
    counts = count_files(tmp_path)
    assert (counts.images, counts.captions) == (2, {"json": 1, "txt": 2})


def test_of_many_folders_one_is_in_memory(tmp_path: Path) -> None:
    for number in range(50):
        (tmp_path / f"{number}").mkdir()
        for image in range(20):
            (tmp_path / f"{number}" / f"{image}.png").touch()
    listings = walk(tmp_path)
    next(listings)
    assert len(next(listings).images) == 20  # before the other folders are looked into
    (tmp_path / "2" / "new.png").touch()
    assert sum(len(listing.images) for listing in listings) == 49 * 20 + 1
