"""Boxes: each one by the official rule, and the convention of the whole set."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar

from loraport.rules import Caption, Problem, ScannedImage, SetRule, Setting
from loraport_dataset.boxes import OFFICIAL, BoxStatistics
from loraport_dataset.rules.ideogram4.parts import Ideogram4Rule, elements
from loraport_dataset.rules.wording import kind, shown

BBOX_ORDER = "[ymin, xmin, ymax, xmax]"
BBOX_MAX = 1000
_UNIT = f"{BBOX_ORDER} in thousandths of the picture's height and width"


class Bbox(Ideogram4Rule):
    id, severity = "bbox", "error"
    explanation = f"A bbox is {BBOX_ORDER}, whole numbers from 0 to {BBOX_MAX}, minimum before maximum."
    fix = f"Write {_UNIT}; `loraport dataset fix` converts a whole set."

    def check(self, caption: Caption, setting: Setting) -> Iterator[Problem]:
        for path, element in elements(caption.root):
            if isinstance(element, dict) and "bbox" in element:
                yield from _problems(element["bbox"], f"{path}.bbox")


def _problems(box: Any, path: str) -> Iterator[Problem]:
    if not isinstance(box, list) or len(box) != 4:
        found = f"a list of {len(box)}" if isinstance(box, list) else kind(box)
        yield Problem(f"This is {found}, not four numbers.", f"Write {_UNIT}.", path)
    elif not all(isinstance(side, int) and not isinstance(side, bool) for side in box):
        yield Problem(f"{shown(box)} is not all whole numbers.", f"Write {_UNIT}, from 0 to {BBOX_MAX}.", path)
    elif not all(0 <= side <= BBOX_MAX for side in box):
        fix = f"These are no pixels: write {_UNIT}."
        yield Problem(f"{shown(box)} leaves the range 0 to {BBOX_MAX}.", fix, path)
    elif box[0] > box[2] or box[1] > box[3]:
        axis = "ymin is over ymax" if box[0] > box[2] else "xmin is over xmax"
        fix = f"The order is {BBOX_ORDER}, y before x, and no width or height."
        yield Problem(f"{shown(box)}: {axis}.", fix, path)


class BboxConvention(SetRule):
    id, severity = "bbox-convention", "error"
    family: ClassVar[str | None] = "ideogram4"
    explanation = (
        f"All boxes are {OFFICIAL}. Another convention (x first, pixels, shares of 1, corner and size) is recognised "
        "from the sizes of the images and the numbers of the whole set, also where each box alone would pass."
    )
    fix = "Convert every box with `loraport dataset fix`; correcting single boxes by hand would mix two conventions."

    def __init__(self) -> None:
        self._statistics = BoxStatistics()

    def see(self, image: ScannedImage, setting: Setting) -> None:
        if image.caption is not None:
            self._statistics.see(image.caption.root, image.size)

    def problems(self, setting: Setting) -> Iterator[Problem]:
        convention = self._statistics.convention()
        if convention is not None:
            evidence = self._statistics.evidence(convention)
            if not self._statistics.is_certain(convention):
                evidence += "; whether x or y comes first, the numbers don't tell, and x is more usual"
            yield Problem(f"The boxes of this set are {convention}, not {OFFICIAL}: {evidence}.", self.fix)


RULES = (Bbox, BboxConvention)
