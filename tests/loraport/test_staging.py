"""Staging gives a trainer its own folder of images and captions, and leaves the user's alone."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from loraport.dataset import scan
from loraport.staging import stage


@pytest.fixture
def images(tmp_path: Path) -> Path:
    folder = tmp_path / "my imägés"
    folder.mkdir()
    for name in ("a b", "ü", "z"):
        Image.new("RGB", (32, 32)).save(folder / f"{name}.PNG")
        (folder / f"{name}.json").write_text('{\n "high_level_description": "a, wall"\n}')
    return folder


def test_images_are_links_with_plain_names_and_captions_of_one_line(images: Path, tmp_path: Path) -> None:
    before = sorted(path.name for path in images.iterdir())
    staged = stage(scan(images, "json"), tmp_path / "staged", lambda item: item.caption, ".txt")
    assert [image.name for image, _ in staged] == ["00001.png", "00002.png", "00003.png"]
    assert all(image.is_symlink() and image.resolve().parent == images for image, _ in staged)
    assert (tmp_path / "staged" / "00001.txt").read_text() == '{"high_level_description":"a, wall"}'
    assert sorted(path.name for path in images.iterdir()) == before


def test_staging_again_keeps_what_is_right_and_drops_what_is_gone(images: Path, tmp_path: Path) -> None:
    folder = tmp_path / "staged"
    stage(scan(images, "json"), folder, lambda item: item.caption, ".txt")
    kept = (folder / "00001.txt").stat().st_mtime_ns
    (images / "z.PNG").unlink()
    (folder / "cache.db").write_text("the trainer's own")
    stage(scan(images, "json"), folder, lambda item: item.caption, ".txt")
    assert sorted(path.name for path in folder.iterdir()) == [
        "00001.png",
        "00001.txt",
        "00002.png",
        "00002.txt",
        "cache.db",
    ]
    assert (folder / "00001.txt").stat().st_mtime_ns == kept


def test_a_changed_caption_is_written_anew(images: Path, tmp_path: Path) -> None:
    stage(scan(images, "json"), tmp_path / "staged", lambda item: item.caption, ".txt")
    stage(scan(images, "json"), tmp_path / "staged", lambda item: "other", ".txt")
    assert (tmp_path / "staged" / "00002.txt").read_text() == "other"


def test_where_links_cannot_be_made_images_are_copied(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(self: Path, target: Path) -> None:
        raise OSError("no links here")

    monkeypatch.setattr(Path, "symlink_to", refuse)
    ((image, _), *_) = stage(scan(images, "json"), tmp_path / "staged", lambda item: item.caption, ".txt")
    assert not image.is_symlink()
    assert image.read_bytes() == (images / "a b.PNG").read_bytes()
