"""The HTML page: what is told of each set of images, put into a template that escapes every text."""

from __future__ import annotations

import importlib.metadata
import time
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING

from markupsafe import Markup

from loraport import pages
from loraport.advice import RANKS_RANGE, many_images
from loraport.buckets import Size
from loraport.disk import size_text
from loraport.rules import SEVERITIES
from loraport_dataset.findings import Report, tellable
from loraport_dataset.report import MARK, charts
from loraport_dataset.report.contact import ContactSheet, Thumbnail, colour, dominant_colours
from loraport_dataset.stats import Stats, areas, general_advice, spread

if TYPE_CHECKING:
    from PIL.Image import Image

    from loraport.advice import Advice

MOST_SETS = 30  #: that have a chapter of their own
MOST_COLOURS = 36
#: Pictures that measured colours come from, at most: they wait in memory, each a thumbnail.
MOST_MEASURED = 200


@dataclass(frozen=True)
class Bucket:
    """A row of the table of buckets. Shares are of 1."""

    size: Size
    images: int
    share: float  #: of the largest bucket's images
    cropped: float
    scale: float

    @property
    def shape(self) -> tuple[float, float]:
        """The bucket's shape within a box of 22 units."""
        longest = max(self.size)
        return 22 * self.size[0] / longest, 22 * self.size[1] / longest


@dataclass(frozen=True)
class Chapter:
    """What is told of one set of images."""

    stats: Stats
    tiles: list[tuple[str, str]]
    buckets: list[Bucket]
    sizes_plot: Markup | None
    token_plot: Markup | None
    tokens: dict[str, float] | None
    heat_maps: list[tuple[str, int, float, Markup]]  #: heading, boxes, mean share of the picture, plot
    pictures: list[Thumbnail]
    measured: list[tuple[str, float]]
    measured_pictures: int
    named: list[tuple[str, list[tuple[str, int]], int]]  #: heading, colours with counts, colours in all


def render(stats: list[Stats], report: Report, advice: Advice | None, title: str) -> str:
    """The whole page. Thumbnails are made here, one image at a time."""
    sheet = ContactSheet()
    trainable = sum(each.trainable for each in stats)
    chapters = [chapter(each, sheet) for each in stats[:MOST_SETS]]
    text = pages.render(
        "loraport_dataset.report",
        "page.html.jinja",
        "style.css",
        box_colour=colour,
        title=title,
        mark=Markup(MARK),
        version=importlib.metadata.version("loraport"),
        made=time.strftime("%Y-%m-%d %H:%M"),
        images=sum(each.images for each in stats),
        chapters=chapters,
        all_sets=stats,
        left_out=sheet.left_out,
        report=report,
        counts=[(severity, report.counts[severity]) for severity in SEVERITIES],
        findings=report.ordered(),
        advice=advice,
        general=general_advice(stats),
        trainable=trainable,
        many=many_images(trainable),
        ranks=RANKS_RANGE,
    )
    return tellable(text)


def chapter(stats: Stats, sheet: ContactSheet) -> Chapter:
    """The numbers, plots and pictures of one set."""
    pictures: list[Thumbnail] = []
    pixels: list[Image] = []
    for thumbnail, picture in sheet.pictures(stats):
        pictures.append(thumbnail)
        if picture is not None and len(pixels) < MOST_MEASURED:
            pixels.append(picture)
    tokens = stats.tokens
    limit = stats.setting.max_text_tokens
    named = [("Styles", stats.style_colours), ("Elements", stats.element_colours)]
    heads = {"obj": "Things", "text": "Text"}
    return Chapter(
        stats=stats,
        tiles=_tiles(stats),
        buckets=_buckets(stats),
        sizes_plot=charts.sizes_plot(stats.sizes, stats.setting.resolution) if stats.sizes else None,
        token_plot=charts.histogram(tokens, "tokens", limit) if tokens else None,
        tokens=spread(tokens),
        heat_maps=[
            (heads[kind], heat.boxes, heat.area / heat.boxes, charts.heat_map(heat.rows(), f"boxes of {heads[kind]}"))
            for kind, heat in stats.heat.items()
            if heat.boxes
        ],
        pictures=pictures,
        measured=dominant_colours(pixels),
        measured_pictures=len(pixels),
        named=[(head, _most(colours), len(colours)) for head, colours in named if colours],
    )


def _tiles(stats: Stats) -> list[tuple[str, str]]:
    tiles = [("images", f"{stats.images:,}"), ("on disk", size_text(stats.bytes))]
    if stats.sizes:
        middle = spread(areas(stats.sizes).elements())
        tiles.append(("median megapixels", f"{middle['median'] / 1e6:.2g}" if middle else "–"))
    tiles.append(("buckets" if len(stats.buckets) != 1 else "bucket", f"{len(stats.buckets):,}"))
    tokens = spread(stats.tokens)
    if tokens:
        about = "" if stats.setting.count_tokens else "≈ "
        tiles.append(("median tokens", f"{about}{tokens['median']:,.0f}"))
    boxes = sum(heat.boxes for heat in stats.heat.values())
    if boxes:
        tiles.append(("boxes", f"{boxes:,}"))
    return tiles


def _buckets(stats: Stats) -> list[Bucket]:
    most = max((of.images for of in stats.buckets.values()), default=1)
    rows = [
        Bucket(size, of.images, of.images / most, of.cropped / of.images, of.scale / of.images)
        for size, of in stats.buckets.items()
    ]
    return sorted(rows, key=lambda row: (-row.images, row.size))


def _most(colours: Counter[str]) -> list[tuple[str, int]]:
    return colours.most_common(MOST_COLOURS)
