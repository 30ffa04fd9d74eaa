"""Datasets of a few small files, for tests of what looks at them."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

from PIL import Image

CAPTION: dict[str, Any] = {
    "high_level_description": "A dog on a beach.",
    "compositional_deconstruction": {"background": "a beach", "elements": []},
}


def compact(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))


def write_image(path: Path, size: tuple[int, int] = (64, 64), mode: str = "RGB", seed: int = 0, **save: Any) -> Path:
    """A picture of coarse noise, another one for each seed; `save` is for Pillow."""
    path.parent.mkdir(parents=True, exist_ok=True)
    few = Image.frombytes("RGB", (8, 8), random.Random(seed).randbytes(8 * 8 * 3))
    few.resize(size, Image.Resampling.NEAREST).convert(mode).save(path, **save)
    return path


def write_pair(folder: Path, name: str, caption: Any = None, size: tuple[int, int] = (64, 64), seed: int = 0) -> Path:
    """An image `name` and its caption, `.json` of a value or `.txt` of a text; returns the image."""
    image = write_image(folder / name, size, seed=seed)
    value = {**CAPTION, "high_level_description": f"Dog {name}."} if caption is None else caption
    if isinstance(value, str):
        image.with_suffix(".txt").write_text(value, encoding="utf-8")
    else:
        image.with_suffix(".json").write_text(compact(value), encoding="utf-8")
    return image
