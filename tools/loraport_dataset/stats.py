"""What a dataset is like: numbers over all its images and captions, and evenly spaced ones to look at.

One pass over the records of a scan, the one that checks them. What is kept does not grow with the number of images, but
for the distinct sizes and four bytes a caption.
"""

from __future__ import annotations

import contextlib
import json
import math
import re
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from loraport.buckets import Size, bucket_for
from loraport.rules import NO_JSON, Caption, Problem, ScannedImage, SetRule
from loraport_dataset.tokens import ESTIMATE

if TYPE_CHECKING:
    from loraport.rules import Setting
    from loraport_dataset.sources import Source

GRID = 40  #: cells of a heat map, in each direction
FULL = 1000  #: a bbox is in thousandths of the picture
MOST_DIFFERENT = 10_000  #: colours, and words for a medium, that are told apart
_COLOUR = re.compile(r"#[0-9A-Fa-f]{6}")


@dataclass(frozen=True, slots=True)
class Box:
    """An element with a usable box: sides in thousandths of the picture, from its upper left corner."""

    kind: str  #: obj or text
    top: float
    left: float
    bottom: float
    right: float
    label: str


@dataclass
class Heat:
    """Where boxes are: how many cover each cell of a grid over the picture."""

    boxes: int = 0
    area: float = 0.0  #: sum of the boxes' shares of their pictures
    _steps: list[list[int]] = field(default_factory=lambda: [[0] * (GRID + 1) for _ in range(GRID + 1)])

    def add(self, box: Box) -> None:
        self.boxes += 1
        self.area += (box.bottom - box.top) * (box.right - box.left) / FULL**2
        # A cell counts when the box covers its middle, and the one in the middle of a box too small for that.
        top, bottom = _cells(box.top, box.bottom)
        left, right = _cells(box.left, box.right)
        for row, column, step in ((top, left, 1), (top, right, -1), (bottom, left, -1), (bottom, right, 1)):
            self._steps[row][column] += step

    def rows(self) -> list[list[int]]:
        """Boxes over each cell, from the top row to the bottom."""
        rows: list[list[int]] = []
        above = [0] * GRID
        for steps in self._steps[:GRID]:
            count, row = 0, []
            for column in range(GRID):
                count += steps[column]
                row.append(count + above[column])
            rows.append(row)
            above = row
        return rows


@dataclass
class Evenly:
    """Evenly spaced items out of a stream of unknown length, at most twice as many in memory as are wanted."""

    wanted: int
    seen: int = 0
    _stride: int = 1
    _kept: list[Any] = field(default_factory=list)

    def add(self, item: Any) -> None:
        if self.wanted and self.seen % self._stride == 0:
            self._kept.append(item)
            if len(self._kept) > 2 * self.wanted:
                self._kept = self._kept[::2]
                self._stride *= 2
        self.seen += 1

    def items(self) -> list[Any]:
        count = len(self._kept)
        if count <= self.wanted:
            return list(self._kept)
        return [self._kept[index * count // self.wanted] for index in range(self.wanted)]


@dataclass
class BucketStats:
    """The images of one bucket. Shares are summed over them."""

    images: int = 0
    cropped: float = 0.0  #: share of the pixels that is cut off
    most_cropped: float = 0.0
    scale: float = 0.0  #: length after scaling over length before


@dataclass
class Stats:
    """The numbers of one set of images; see the module."""

    source: Source
    sample: Evenly
    images: int = 0
    unreadable: int = 0
    too_small: int = 0  #: that fit no bucket, and that training refuses
    uncaptioned: int = 0
    json_captions: int = 0
    bytes: int = 0
    sizes: Counter[Size] = field(default_factory=Counter)
    formats: Counter[str] = field(default_factory=Counter)
    buckets: dict[Size, BucketStats] = field(default_factory=dict)
    tokens: array[int] = field(default_factory=lambda: array("I"))
    style_colours: Counter[str] = field(default_factory=Counter)
    element_colours: Counter[str] = field(default_factory=Counter)
    media: Counter[str] = field(default_factory=Counter)
    elements: Counter[int] = field(default_factory=Counter)  #: captions by their number of elements
    unusable_boxes: int = 0  #: boxes that are not four numbers in order from 0 to 1000
    heat: dict[str, Heat] = field(default_factory=lambda: {"obj": Heat(), "text": Heat()})

    @property
    def setting(self) -> Setting:
        return self.source.setting

    def count_tokens(self, caption: Caption) -> int:
        """The tokens of a caption as it is trained: exact where there is a tokenizer, else `ESTIMATE`."""
        return (self.setting.count_tokens or ESTIMATE.count)(as_trained(caption, self.setting))

    def see(self, image: ScannedImage) -> None:
        """Count an image with its caption."""
        self.images += 1
        self.bytes += image.bytes
        self.sample.add(image)
        if image.unreadable:
            self.unreadable += 1
        else:
            self.sizes[image.size] += 1
            self.formats[image.format] += 1
            self._see_bucket(image.size)
        caption = image.caption
        if caption is None or caption.unreadable or not caption.text.strip():
            self.uncaptioned += 1
            return
        self.tokens.append(self.count_tokens(caption))
        if caption.root is not NO_JSON:
            self._see_json(caption.root)

    def _see_bucket(self, size: Size) -> None:
        bucket = bucket_of(size, self.setting)
        if bucket is None:
            self.too_small += 1
            return
        of = self.buckets.setdefault(bucket, BucketStats())
        scale, cropped = cover(size, bucket)
        of.images += 1
        of.scale += scale
        of.cropped += cropped
        of.most_cropped = max(of.most_cropped, cropped)

    def _see_json(self, root: Any) -> None:
        self.json_captions += 1
        style = _object(_object(root).get("style_description"))
        _add(self.style_colours, colours_in(style))
        medium = style.get("medium")
        if isinstance(medium, str):
            _add(self.media, [medium[:60]])
        found = 0
        for element in _elements(root):
            found += 1
            _add(self.element_colours, colours_in(element))
            box = box_of(element)
            if box is not None:
                self.heat[box.kind].add(box)
            elif "bbox" in element:
                self.unusable_boxes += 1
        self.elements[found] += 1

    @property
    def trainable(self) -> int:
        """Images that training takes."""
        return sum(of.images for of in self.buckets.values())

    @property
    def pixels(self) -> int:
        """Of all images at the sizes they are trained at."""
        return sum(width * height * of.images for (width, height), of in self.buckets.items())


def collector(stats: list[Stats]) -> type[SetRule]:
    """A rule that finds nothing and counts everything: given to `loraport_dataset.checking.check` beside the others, it
    fills the stats, one a source in their order, in the pass that checks them."""
    waiting = iter(stats)

    class Collect(SetRule):
        id, severity = "stats", "advice"
        explanation = fix = "Every image counts."

        def __init__(self) -> None:
            self._stats = next(waiting)

        def see(self, image: ScannedImage, setting: Setting) -> None:
            self._stats.see(image)

        def problems(self, setting: Setting) -> Iterable[Problem]:
            return ()

    return Collect


def bucket_of(size: Size, setting: Setting) -> Size | None:
    """The size that training gives an image; None for one that it refuses, with a side below one patch."""
    multiple = setting.family.side_multiple
    if min(size) < (1 if setting.upscale else multiple):
        return None
    return bucket_for(size, setting.resolution, multiple, setting.upscale, setting.aspect_buckets)


def cover(size: Size, bucket: Size) -> tuple[float, float]:
    """How an image is made to fill its bucket (`loraport.buckets.fit`): its scale, and the share that is cut off."""
    scale = max(bucket[0] / size[0], bucket[1] / size[1])
    return scale, 1 - bucket[0] * bucket[1] / (size[0] * size[1] * scale**2)


def as_trained(caption: Caption, setting: Setting) -> str:
    """A caption's text as it reaches the model: JSON compact, and the trigger word where it was missing."""
    text = caption.text.strip()
    if caption.root is not NO_JSON:
        with contextlib.suppress(RecursionError):  # nested as no caption is; training refuses it
            text = json.dumps(caption.root, ensure_ascii=False, separators=(",", ":"))
    return setting.family.place_trigger(text, setting.trigger_word) if setting.trigger_word else text


def colours_in(owner: Any) -> list[str]:
    """The colours of an object's palette, in capitals; what is no colour is left out."""
    palette = _object(owner).get("color_palette")
    found = palette if isinstance(palette, list) else []
    return [colour.upper() for colour in found if isinstance(colour, str) and _COLOUR.fullmatch(colour)]


def boxes_in(root: Any) -> list[Box]:
    """The usable boxes of a caption, in order."""
    return [box for element in _elements(root) if (box := box_of(element)) is not None]


def box_of(element: dict[str, Any]) -> Box | None:
    """An element's box; None where it has none that the model would understand."""
    box = element.get("bbox")
    if not isinstance(box, list) or len(box) != 4 or not all(map(_is_number, box)):
        return None
    top, left, bottom, right = box
    if not (0 <= top <= bottom <= FULL and 0 <= left <= right <= FULL):
        return None
    kind = "text" if element.get("type") == "text" else "obj"
    told = element.get("text") if kind == "text" else element.get("desc")
    return Box(kind, top, left, bottom, right, told if isinstance(told, str) else "")


def spread(values: Iterable[float]) -> dict[str, float] | None:
    """Least, median and most, with the 10th and 90th percentile (nearest rank); None without values."""
    ordered = sorted(values)
    if not ordered:
        return None
    ranks = {"least": 0.0, "p10": 0.1, "median": 0.5, "p90": 0.9, "most": 1.0}
    return {name: ordered[max(0, math.ceil(rank * len(ordered)) - 1)] for name, rank in ranks.items()}


def areas(sizes: Counter[Size]) -> Counter[int]:
    """Images by their pixels."""
    found: Counter[int] = Counter()
    for (width, height), count in sizes.items():
        found[width * height] += count
    return found


def general_advice(stats: Iterable[Stats]) -> list[tuple[str, str, str]]:
    """Steps for the number of images where no spec says more: (purpose, the range, the steps it comes to)."""
    from loraport.advice import STEPS

    images = sum(each.trainable for each in stats)
    rows = []
    for each in STEPS:
        least, most = each.for_images(images)
        rows.append((each.purpose, each.range_text(), f"{least:,} to {most:,}"))
    return rows


def _add(counter: Counter[str], values: Iterable[str]) -> None:
    """Count values, but no new one beyond `MOST_DIFFERENT`."""
    for value in values:
        if value in counter or len(counter) < MOST_DIFFERENT:
            counter[value] += 1


def _cells(start: float, end: float) -> tuple[int, int]:
    """First cell and the one after the last, of those whose middles lie between two sides."""
    first = math.ceil(start * GRID / FULL - 0.5)
    after = math.floor(end * GRID / FULL - 0.5) + 1
    if after <= first:
        first = min(GRID - 1, int((start + end) / 2 * GRID / FULL))
        after = first + 1
    return first, after


def _elements(root: Any) -> Iterator[dict[str, Any]]:
    elements = _object(_object(root).get("compositional_deconstruction")).get("elements")
    for element in elements if isinstance(elements, list) else []:
        if isinstance(element, dict):
            yield element


def _object(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
