"""Images and captions out of parquet files."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from PIL import Image
from pyarrow import parquet

from loraport.dataset import scan
from loraport.errors import DataError
from loraport.parquet_images import unpack


def encoded(format: str = "PNG") -> bytes:
    data = io.BytesIO()
    Image.new("RGB", (40, 32)).save(data, format=format)
    return data.getvalue()


def write(path: Path, **columns: list[Any]) -> Path:
    parquet.write_table(pyarrow.table(columns), path)
    return path


def test_images_keep_their_bytes_order_and_captions_over_all_files(tmp_path: Path) -> None:
    images = [{"bytes": encoded(kind), "path": "x.bin"} for kind in ("PNG", "JPEG", "WEBP")]
    first = write(tmp_path / "1.parquet", image=images[:2], text=["one", '{"a": 1}'])
    second = write(tmp_path / "2.parquet", image=images[2:], text=["three"])
    folder = unpack([first, second], "text", tmp_path / "out", "hub:me/set")
    items = scan(folder, "json", None, "text")
    assert [(item.image.name, item.caption) for item in items] == [
        ("0000000.png", "one"),
        ("0000001.jpg", '{"a":1}'),
        ("0000002.webp", "three"),
    ]
    assert [item.image.read_bytes() for item in items] == [image["bytes"] for image in images]


def test_it_is_done_once_and_nothing_is_left_beside_it(tmp_path: Path) -> None:
    file = write(tmp_path / "1.parquet", image=[{"bytes": encoded(), "path": None}], text=["one"])
    (tmp_path / "cache").mkdir()
    folder = unpack([file], "text", tmp_path / "cache" / "out", "hub:me/set")
    file.unlink()
    assert unpack([file], "text", folder, "hub:me/set") == folder
    assert [path.name for path in folder.parent.iterdir()] == ["out"]


@pytest.mark.parametrize(
    ("columns", "says"),
    [
        (
            {"image": [{"bytes": b"x", "path": ""}], "txet": ["a"]},
            "The column 'text' is not known. Did you mean 'txet'",
        ),
        ({"image": [{"bytes": None, "path": "a.png"}], "text": ["a"]}, "a row without an image"),
        ({"url": ["http://x"], "text": ["a"]}, "has no column of images"),
        (
            {"one": [{"bytes": b"x", "path": ""}], "two": [{"bytes": b"x", "path": ""}], "text": ["a"]},
            "several columns of images: one, two",
        ),
    ],
)
def test_files_of_another_shape_are_told_and_leave_nothing(tmp_path: Path, columns: dict[str, Any], says: str) -> None:
    file = write(tmp_path / "1.parquet", **columns)
    with pytest.raises(DataError, match=says):
        unpack([file], "text", tmp_path / "cache" / "out", "hub:me/set")
    assert list((tmp_path / "cache").iterdir()) == []


def test_a_damaged_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "1.parquet").write_bytes(b"PAR1 and nothing more")
    with pytest.raises(DataError, match=r"1\.parquet of hub:me/set is damaged"):
        unpack([tmp_path / "1.parquet"], "text", tmp_path / "out", "hub:me/set")


def test_without_pyarrow_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    with pytest.raises(DataError, match=r"need pyarrow(.|\n)*loraport\[parquet\]"):
        unpack([tmp_path / "1.parquet"], "text", tmp_path / "out", "hub:me/set")
