"""Boxes as the model knows them: [ymin, xmin, ymax, xmax] in thousandths, whole numbers."""

from __future__ import annotations

from typing import Any

from loraport.rules import Size
from loraport_dataset.boxes import OFFICIAL, Convention, numbers
from loraport_dataset.fixing.changes import Changes
from loraport_dataset.rules.wording import shown


def fix_box(element: dict[str, Any], path: str, convention: Convention | None, size: Size, changes: Changes) -> None:
    """Put an element's `bbox` right; one that cannot be a box in `convention` stays.

    convention: that of the whole set, None when it is the official one or not known. size: of the upright image in
    pixels, (0, 0) when it is not known; boxes in pixels stay then.
    """
    if "bbox" not in element:
        return
    path, old = f"{path}.bbox", element["bbox"]
    if old is None or old == []:
        del element["bbox"]
        changes.add("bbox", path, "an empty box was taken out")
        return
    box = numbers([_number(side) for side in old]) if isinstance(old, list) else None
    if box is None:
        return
    if convention is not None and convention != OFFICIAL:
        if convention.unit == "pixels" and min(size) <= 0:
            return
        new = convention.to_official(box, size)
        if new is not None:
            element["bbox"] = new
            changes.add("bbox-convention", path, f"{shown(old)}, read as {convention}, became {new}")
        return
    # A share of 1 is no thousandth: rounded, it would be a box of nothing.
    if max(box) <= 1 and not all(side.is_integer() for side in box):
        return
    new = [round(side) for side in box]
    if new != old or any(type(side) is not int for side in old):
        element["bbox"] = new
        changes.add("bbox", path, f"{shown(old)} became {new}")


def _number(side: Any) -> Any:
    """The number that a text holds, or whatever else it is."""
    if isinstance(side, str) and len(side) <= 20:
        try:
            return float(side)
        except ValueError:
            return side
    return side
