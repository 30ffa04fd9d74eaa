"""Images and captions out of parquet files, as the `datasets` library of Hugging Face writes them.

An image is a struct of `bytes` (an encoded file) and `path`
(https://huggingface.co/docs/datasets/main/en/package_reference/main_classes#datasets.Image).
"""

from __future__ import annotations

import io
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from PIL import Image

from loraport.caption_sources import FILE_NAME
from loraport.errors import DataError, unknown

_DONE = "metadata.jsonl"
_ROWS = 32  # read at once, so that a file of any size takes little memory
_SUFFIXES = {"JPEG": ".jpg", "PNG": ".png", "WEBP": ".webp", "BMP": ".bmp", "TIFF": ".tif"}


def unpack(files: list[Path], field: str, folder: Path, name: str) -> Path:
    """Write the images of parquet files to `folder`, with their captions (the column `field`) in its metadata.jsonl.

    Does nothing when that was done before; `folder` appears whole or not at all. `name` is the dataset's, for messages.
    Raises DataError without pyarrow, and for files that are damaged or have no such columns.
    """
    if (folder / _DONE).is_file():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    draft = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        with open(draft / _DONE, "w", encoding="utf-8") as metadata:
            for number, (data, path, caption) in enumerate(_rows(files, field, name)):
                file = f"{number:07d}{_suffix(data, path)}"
                (draft / file).write_bytes(data)
                metadata.write(json.dumps({FILE_NAME: file, field: caption}, ensure_ascii=False) + "\n")
        if not (folder / _DONE).is_file():
            draft.replace(folder)
    except OSError as error:
        if not (folder / _DONE).is_file():  # else another run was faster
            raise DataError(f"{folder}: the images of {name} cannot be written: {error.strerror}.") from error
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    return folder


def _rows(files: list[Path], field: str, name: str) -> Iterator[tuple[bytes, str, Any]]:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise DataError(
            f"The images of {name} are in parquet files, which need pyarrow to be read.",
            hint="pip install 'loraport[parquet]', or unpack the dataset and give its folder as the path.",
        ) from error
    for file in files:
        try:
            with parquet.ParquetFile(file) as opened:
                image = _image_column(opened.schema_arrow, name)
                if field not in opened.schema_arrow.names:
                    others = [other for other in opened.schema_arrow.names if other != image]
                    raise DataError(
                        f"{name}: {unknown('The column', field, others)}", hint="Name the column with caption_field."
                    )
                for batch in opened.iter_batches(_ROWS, columns=[image, field]):
                    for row in batch.to_pylist():
                        found = row[image] or {}
                        if not found.get("bytes"):
                            raise DataError(f"{file.name} of {name} has a row without an image in it.")
                        yield found["bytes"], found.get("path") or "", row[field]
        except (pyarrow.ArrowException, OSError) as error:
            raise DataError(f"{file.name} of {name} is damaged or cannot be read: {error}") from error


def _image_column(schema: Any, name: str) -> str:
    import pyarrow

    columns = [
        field.name
        for field in schema
        if pyarrow.types.is_struct(field.type) and "bytes" in {part.name for part in field.type}
    ]
    if "image" in columns or len(columns) == 1:
        return "image" if "image" in columns else str(columns[0])
    raise DataError(
        f"{name} has {'several columns of images: ' + ', '.join(columns) if columns else 'no column of images'}.",
        hint="Unpack the dataset and give its folder as the path.",
    )


def _suffix(data: bytes, path: str) -> str:
    """By what the bytes are; what cannot be told keeps its name's, and is reported when the folder is read."""
    try:
        with Image.open(io.BytesIO(data)) as image:
            return _SUFFIXES.get(image.format or "", ".png")
    except Exception:  # decoders raise many types over damaged files
        return os.path.splitext(path)[1] or ".png"
