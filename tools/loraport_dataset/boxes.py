"""Which convention the boxes of a dataset are written in, told from all of them and the sizes of their images.

One box rarely tells: [100, 200, 700, 900] is possible in thousandths and in pixels, y first and x first. Over a whole
set the wrong readings contradict themselves: a box ends before it begins or leaves its picture. Where several readings
stay possible, boxes that end exactly at a picture's edge and what the captions say of places (`on the left`) decide;
where nothing decides, nothing is claimed. Tutorials teach pixels as [x1, y1, x2, y2], detectors write corner and size
or shares of 1, and Ideogram 4 wants [ymin, xmin, ymax, xmax] in thousandths of the picture.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from dataclasses import dataclass
from itertools import product
from typing import Any, Literal

from loraport.rules import Size
from loraport_dataset.rules.ideogram4.parts import as_object, elements

Order = Literal["yx", "xy"]
Form = Literal["corners", "size"]
Unit = Literal["thousandths", "pixels", "fraction", "percent"]
Corners = tuple[float, float, float, float]  #: ymin, xmin, ymax, xmax in shares of the picture

#: Shares of a picture that a box may leave it by: half a pixel of rounding, and a pixel counted too much.
_SLACK = 0.004
_AT_EDGE = 1e-9
#: Boxes from which on a set can be judged, unless one of them alone rules the official reading out.
_FEWEST = 4
#: A reading is possible when at most this share of the boxes contradicts it. From that share on,
#: the official one is out.
_ACCEPTED, _REJECTED = 0.02, 0.1
#: Boxes of a whole set come further than this into their pictures.
_SPREAD = 0.3
_FEWEST_TO_FILL, _FILLED = 20, 0.97
_FEWEST_VOTES, _CLEAR_VOTES = 8, 0.8

_UNIT_WORDS = {
    "thousandths": "thousandths of the picture",
    "pixels": "pixels",
    "fraction": "shares from 0 to 1",
    "percent": "percent of the picture",
}
_SIDE = r"\b(?:on|at|to|in) the (?:far |upper |lower |top |bottom )?"
_LEFT, _RIGHT = re.compile(rf"{_SIDE}left\b", re.I), re.compile(rf"{_SIDE}right\b", re.I)
_TOP = re.compile(r"\b(?:at|in|on|along) the (?:very )?(?:top|upper)\b", re.I)
_BOTTOM = re.compile(r"\b(?:at|in|on|along) the (?:very )?(?:bottom|lower)\b", re.I)


@dataclass(frozen=True)
class Convention:
    """How four numbers say a box."""

    order: Order
    form: Form
    unit: Unit

    def __str__(self) -> str:
        first, second = ("y", "x") if self.order == "yx" else ("x", "y")
        if self.form == "corners":
            names = [f"{first}min", f"{second}min", f"{first}max", f"{second}max"]
        else:
            names = [first, second, *(("height", "width") if self.order == "yx" else ("width", "height"))]
        return f"[{', '.join(names)}] in {_UNIT_WORDS[self.unit]}"

    def corners(self, box: list[float], size: Size) -> Corners:
        """The box as (ymin, xmin, ymax, xmax) in shares of a picture of `size` (width, height), unchecked."""
        a, b, c, d = box
        y, x, y2, x2 = (a, b, c, d) if self.order == "yx" else (b, a, d, c)
        if self.form == "size":
            y2, x2 = y + y2, x + x2
        width, height = size if self.unit == "pixels" else (_WHOLE[self.unit],) * 2
        return y / height, x / width, y2 / height, x2 / width

    def to_official(self, box: list[float], size: Size) -> list[int] | None:
        """The box as Ideogram 4 wants it; None when it does not fit this convention. `size`: of the upright image."""
        corners = self.corners(box, size)
        if _contradicts(corners):
            return None
        return [min(max(round(side * 1000), 0), 1000) for side in corners]


_UNITS: tuple[Unit, ...] = ("pixels", "fraction", "thousandths", "percent")
_FORMS: tuple[Form, ...] = ("corners", "size")
_ORDERS: tuple[Order, ...] = ("xy", "yx")
_WHOLE = {"thousandths": 1000.0, "fraction": 1.0, "percent": 100.0}
OFFICIAL = Convention("yx", "corners", "thousandths")
#: From the most to the least usual: of readings that are equally possible, the first is taken.
CONVENTIONS = [
    OFFICIAL,
    *(
        Convention(order, form, unit)
        for unit, form, order in product(_UNITS, _FORMS, _ORDERS)
        if Convention(order, form, unit) != OFFICIAL
    ),
]


def numbers(box: Any) -> list[float] | None:
    """The four finite numbers of a box, or None for anything else."""
    if not isinstance(box, list) or len(box) != 4:
        return None
    if not all(isinstance(side, int | float) and not isinstance(side, bool) for side in box):
        return None
    try:
        sides = [float(side) for side in box]
    except OverflowError:
        return None
    return sides if all(map(math.isfinite, sides)) else None


class BoxStatistics:
    """What all boxes of a set say of their convention. Holds counts alone, however many boxes it sees."""

    def __init__(self) -> None:
        self.boxes = 0
        self._contradictions: Counter[Convention] = Counter()
        self._at_edge: Counter[Convention] = Counter()
        self._votes: Counter[tuple[Convention, bool]] = Counter()
        self._reach = dict.fromkeys(CONVENTIONS, 0.0)  #: the furthest that a box comes, in shares of its picture

    def see(self, root: Any, size: Size) -> None:
        """Count the boxes of one caption of an image of `size` (upright); what is no box is passed over."""
        if min(size) <= 0:
            return
        for _, element in elements(root):
            content = as_object(element)
            box = numbers(content.get("bbox"))
            if box is not None:
                self._count(box, size, content)

    def _count(self, box: list[float], size: Size, element: dict[str, Any]) -> None:
        self.boxes += 1
        whole = all(side.is_integer() for side in box)
        for convention in CONVENTIONS:
            corners = convention.corners(box, size)
            # Thousandths and pixels are whole numbers; a set of 0s and 1s alone is a share of the picture.
            unlikely = (convention.unit in ("thousandths", "pixels") and max(box) <= 1) or (
                convention.unit == "thousandths" and not whole
            )
            if unlikely or _contradicts(corners):
                self._contradictions[convention] += 1
                continue
            self._reach[convention] = max(self._reach[convention], corners[2], corners[3])
            self._at_edge[convention] += any(abs(side - 1) <= _AT_EDGE for side in corners[2:])
            for agrees in _votes(corners, element):
                self._votes[convention, agrees] += 1

    def convention(self) -> Convention | None:
        """The convention that the set is in, where it is not the official one and the numbers tell; else None."""
        if not self.boxes:
            return None
        return self._best() or self._better_than_official()

    def _best(self) -> Convention | None:
        """A reading for a set that the official one fails in, be it in the few boxes that show it."""
        wrong = self._contradictions[OFFICIAL]
        fitting = [
            one
            for one in CONVENTIONS
            if one != OFFICIAL and self._share(one) <= _ACCEPTED and self._ends_better(one)
            if self._share(OFFICIAL) > _REJECTED
            or (wrong >= _FEWEST and wrong >= 10 * self._contradictions[one] and self._at_edge[one] >= _FEWEST)
        ]
        return min(fitting, key=self._merit, default=None)

    def _ends_better(self, convention: Convention) -> bool:
        """Whether no more boxes end at their picture's edge in the official reading: people draw many that do."""
        return self._at_edge[OFFICIAL] <= max(self._at_edge[convention], _ACCEPTED * self.boxes)

    def _better_than_official(self) -> Convention | None:
        """A reading for a set that the official one is possible for too: only with a clear reason."""
        if self.boxes < _FEWEST:
            return None
        if not self._at_edge[OFFICIAL]:
            fitting = [one for one in CONVENTIONS if one.unit == "pixels" and self._share(one) <= _ACCEPTED]
            tight = [one for one in fitting if self._at_edge[one] >= _FEWEST or self._fills(one)]
            if tight:
                return min(tight, key=self._merit)
        swapped = Convention("xy", "corners", "thousandths")
        against, votes = self._votes[OFFICIAL, False], self._votes[OFFICIAL, True] + self._votes[OFFICIAL, False]
        if votes >= _FEWEST_VOTES and against / votes >= _CLEAR_VOTES:
            agreeing = self._votes[swapped, True]
            if agreeing >= _CLEAR_VOTES * (agreeing + self._votes[swapped, False]):
                return swapped
        return None

    def _fills(self, convention: Convention) -> bool:
        """Whether the boxes keep within their pictures' own pixels, which are fewer than 1000, and use them all."""
        return self.boxes >= _FEWEST_TO_FILL and self._reach[OFFICIAL] < _FILLED <= self._reach[convention]

    def _merit(self, convention: Convention) -> tuple[float, ...]:
        """Smaller for a reading that explains the set better."""
        return (
            self._contradictions[convention],
            self._reach[convention] < _SPREAD,  # boxes in a small unit read in a large one crowd into a corner
            -self._at_edge[convention],
            self._votes[convention, False] - self._votes[convention, True],
        )

    def is_certain(self, convention: Convention) -> bool:
        """Whether the set also tells if x or y comes first; else `convention` has the more usual x."""
        order: Order = "yx" if convention.order == "xy" else "xy"
        return self._merit(convention) != self._merit(Convention(order, convention.form, convention.unit))

    def evidence(self, convention: Convention) -> str:
        """Why the set is taken to be in `convention`, in numbers."""
        if self._contradictions[OFFICIAL] > self._contradictions[convention]:
            fits = self.boxes - self._contradictions[OFFICIAL]
            other = self.boxes - self._contradictions[convention]
            return f"read as {OFFICIAL}, {fits:,} of {self.boxes:,} boxes fit their picture; read so, {other:,} do"
        if convention.unit == "pixels":
            edge = f"{self._at_edge[convention]:,} of {self.boxes:,} boxes end exactly at its edge"
            return f"all keep within their picture's own pixels, {edge}, and none ends at 1000"
        votes = self._votes[OFFICIAL, True] + self._votes[OFFICIAL, False]
        return (
            f"read y first, {self._votes[OFFICIAL, False]:,} of {votes:,} boxes contradict their own description "
            "(left, right, top, bottom, or lettering that would be higher than wide)"
        )

    def _share(self, convention: Convention) -> float:
        return self._contradictions[convention] / self.boxes


def _contradicts(corners: Corners) -> bool:
    y, x, y2, x2 = corners
    return y > y2 or x > x2 or min(y, x) < -_SLACK or max(y2, x2) > 1 + _SLACK


def _votes(corners: Corners, element: dict[str, Any]) -> list[bool]:
    """Whether each thing that an element's description says of its place is so in this reading."""
    y, x, y2, x2 = corners
    across, down = (x + x2) / 2, (y + y2) / 2
    said = element.get("desc")
    votes: list[bool] = []
    if isinstance(said, str):
        for before, after, centre in ((_LEFT, _RIGHT, across), (_TOP, _BOTTOM, down)):
            low, high = bool(before.search(said)), bool(after.search(said))
            if low != high and abs(centre - 0.5) > 0.1:
                votes.append((centre < 0.5) == low)
    text = element.get("text")
    if element.get("type") == "text" and isinstance(text, str) and _is_a_long_line(text):
        tall, wide = y2 - y, x2 - x
        if max(tall, wide) > 2 * min(tall, wide):
            votes.append(wide > tall)
    return votes


def _is_a_long_line(text: str) -> bool:
    """Whether lettering is wider than high, if it is not set upright: some Latin letters and no line break."""
    return len(text) >= 8 and text.isascii() and "\n" not in text
