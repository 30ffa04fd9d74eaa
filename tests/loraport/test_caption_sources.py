"""Captions in files and in columns of metadata."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from loraport.caption_sources import caption_source, read_column, read_columns
from loraport.errors import DataError


def test_a_caption_file_lies_beside_its_image(tmp_path: Path) -> None:
    assert caption_source(tmp_path, "json", None).where(tmp_path / "a.b.png") == tmp_path / "a.b.json"


def test_metadata_of_each_folder_is_about_its_own_images(tmp_path: Path) -> None:
    for name in ("", "sub"):
        (tmp_path / name).mkdir(exist_ok=True)
        rows = [{"file_name": "a.png", "text": f" of {name or 'the root'} "}, {"file_name": "deep/b.png", "text": "b"}]
        (tmp_path / name / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n\n")
    source = caption_source(tmp_path, "json", "text")
    assert source.where(tmp_path / "a.png") == "of the root"
    assert source.where(tmp_path / "sub" / "a.png") == "of sub"
    assert source.where(tmp_path / "deep" / "b.png") == "b"
    assert source.where(tmp_path / "other.png") is None


def test_a_table_is_read_as_lines_of_json_are(tmp_path: Path) -> None:
    (tmp_path / "metadata.csv").write_text('\ufefffile_name,text,tags\na.png,"one, two",x\nb.png,,y\n')
    assert read_column(tmp_path, "text") == {tmp_path / "a.png": "one, two"}
    assert read_columns(tmp_path) == {"text", "tags"}


def test_structure_is_kept_as_compact_json_and_null_is_no_caption(tmp_path: Path) -> None:
    rows = [{"file_name": "a.png", "text": {"b": "ü"}}, {"file_name": "b.png", "text": None}]
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert read_column(tmp_path, "text") == {tmp_path / "a.png": '{"b":"ü"}'}


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("notes.txt", b"", r"has no metadata\.jsonl or metadata\.csv, which caption_field: text"),
        (
            "metadata.jsonl",
            b'{"file_name": "a.png", "txet": "a"}',
            r"row 1: The column 'text' is not known. Did you .*'txet'",
        ),
        ("metadata.jsonl", b'{"text": "a"}', "row 1: there is no file_name"),
        ("metadata.jsonl", b'{"file_name": 5, "text": "a"}', "row 1: there is no file_name"),
        ("metadata.jsonl", b'{"file_name": "a.png", "text": [1]}', r"text: \[1\] is no text"),
        ("metadata.jsonl", b"[1]", "a row is a JSON object"),
        ("metadata.jsonl", b'{"file_name": "a.png", "text"', "is damaged"),
        ("metadata.jsonl", b"[" * 100_000, "is damaged"),
        ("metadata.jsonl", b"\xff\xfe\x00", "is not UTF-8"),
        ("metadata.csv", b'file_name,text\na.png,"open', "is damaged"),
        ("metadata.csv", b"file_name,other\na.png,b\n", "The column 'text' is not known"),
    ],
)
def test_metadata_that_cannot_be_used_is_told_with_its_row(
    tmp_path: Path, name: str, content: bytes, says: str
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=says):
        read_column(tmp_path, "text")
