"""The contact sheet: small pictures of evenly spaced images, with the boxes of their captions drawn over them."""

from __future__ import annotations

import base64
import contextlib
import io
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from markupsafe import Markup
from PIL import Image

from loraport.images import FileProblem, load_pixels, open_image
from loraport.rules import NO_JSON, ScannedImage
from loraport_dataset.stats import FULL, Box, Stats, as_trained, boxes_in, bucket_of, cover

SIDE = 320  #: of a thumbnail's longer side, px
QUALITY = 72  #: of JPEG
#: All thumbnails together, in bytes of JPEG; those beyond are left out, and the page says how many.
MOST_BYTES = 6_000_000
#: An image with more pixels is not decoded for its thumbnail, unless it is of a kind that is decoded small.
MOST_PIXELS = 64_000_000
MOST_BOXES, MOST_TEXT = 40, 4000
#: Dark enough for white numbers on them, and told apart by people who see few colours by their numbers.
COLOURS = ("#c2185b", "#1565c0", "#2e7d32", "#b34700", "#6a1b9a", "#00707a")


@dataclass(frozen=True)
class Thumbnail:
    """A picture of the contact sheet; `image` is a data URI, or empty with the reason in `problem`."""

    name: str
    image: str
    size: tuple[int, int]  #: of the thumbnail, px
    problem: str
    facts: str  #: size, bucket and caption length
    description: str
    caption: str
    boxes: list[Box]
    overlay: Markup

    @property
    def alt(self) -> str:
        drawn = f", with {len(self.boxes)} boxes of its caption drawn" if self.boxes else ""
        return f"{self.name}{drawn}"


class ContactSheet:
    """Thumbnails, made one image at a time, and what these images' colours are."""

    def __init__(self, most_bytes: int = MOST_BYTES):
        self._room = most_bytes
        self.left_out = 0  #: images for which there was no room

    def pictures(self, stats: Stats) -> Iterator[tuple[Thumbnail, Image.Image | None]]:
        """The sampled images of a set, each with a thumbnail and its pixels (none when it cannot be shown)."""
        for image in stats.sample.items():
            if self._room <= 0:
                self.left_out += 1
                continue
            pixels, problem = _small(image)
            data = b"" if pixels is None else _jpeg(pixels)
            self._room -= len(data)
            yield _thumbnail(image, stats, pixels, data, problem), pixels


def dominant_colours(pictures: Sequence[Image.Image], most: int = 12) -> list[tuple[str, float]]:
    """The main colours of all pictures together, each weighing the same: (#RRGGBB, share), the largest share first."""
    if not pictures:
        return []
    side = 32
    strip = Image.new("RGB", (side, side * len(pictures)))
    for number, picture in enumerate(pictures):
        strip.paste(picture.resize((side, side), Image.Resampling.BOX), (0, side * number))
    reduced = strip.quantize(most, method=Image.Quantize.MEDIANCUT, kmeans=2)
    palette = reduced.getpalette() or []
    counts: list[tuple[int, Any]] = sorted(reduced.getcolors() or [], reverse=True)
    total = sum(count for count, _ in counts)
    return [
        ("#{:02X}{:02X}{:02X}".format(*palette[3 * index : 3 * index + 3]), count / total) for count, index in counts
    ]


def _small(image: ScannedImage) -> tuple[Image.Image | None, str]:
    """The image within `SIDE` px, or why it cannot be shown."""
    if image.unreadable is not None:
        return None, image.unreadable[0]
    try:
        if image.size[0] * image.size[1] > MOST_PIXELS and not _decodes_small(image.path):
            return None, f"Too large to be drawn here: {image.size[0]} × {image.size[1]} px."
        pixels = load_pixels(image.path, at_least=SIDE)
    except (FileProblem, OSError, MemoryError) as problem:
        why = str(problem) or "its pixels take more memory than there is"
        return None, f"{why[0].upper()}{why[1:]}."
    pixels.thumbnail((SIDE, SIDE), Image.Resampling.LANCZOS)
    return pixels, ""


def _decodes_small(path: Path) -> bool:
    """Whether an image is read at a fraction of its size; a progressive JPEG is whole in memory first."""
    with open_image(path) as image:
        return image.format == "JPEG" and not image.info.get("progressive")


def _jpeg(pixels: Image.Image) -> bytes:
    buffer = io.BytesIO()
    pixels.save(buffer, "JPEG", quality=QUALITY, optimize=True)
    return buffer.getvalue()


def _thumbnail(image: ScannedImage, stats: Stats, pixels: Image.Image | None, data: bytes, problem: str) -> Thumbnail:
    caption, text, description, tokens = image.caption, "", "", None
    boxes: list[Box] = []
    if caption is not None and caption.unreadable is None and caption.text.strip():
        tokens = stats.count_tokens(caption)
        text = as_trained(caption, stats.setting)
        if caption.root is NO_JSON:
            description = text
        else:
            boxes = boxes_in(caption.root)[:MOST_BOXES]
            told = caption.root.get("high_level_description") if isinstance(caption.root, dict) else None
            description = told if isinstance(told, str) else ""
            with contextlib.suppress(RecursionError):
                text = json.dumps(caption.root, ensure_ascii=False, indent=1)
    size = pixels.size if pixels is not None else (0, 0)
    bucket = None if image.unreadable else bucket_of(image.size, stats.setting)
    return Thumbnail(
        name=image.name,
        image=f"data:image/jpeg;base64,{base64.b64encode(data).decode()}" if data else "",
        size=size,
        problem=problem,
        facts=_facts(image, bucket, tokens, stats),
        description=_cut(description, 200),
        caption=_cut(text, MOST_TEXT),
        boxes=boxes,
        overlay=_overlay(size, boxes, image.size, bucket) if data else Markup(),
    )


def _facts(image: ScannedImage, bucket: tuple[int, int] | None, tokens: int | None, stats: Stats) -> str:
    facts = []
    if not image.unreadable:
        trained = f" → {bucket[0]} × {bucket[1]}" if bucket else ", in no bucket"
        facts.append(f"{image.size[0]} × {image.size[1]}{trained} px")
    about = "" if stats.setting.count_tokens else "about "
    facts.append("no caption" if tokens is None else f"{about}{tokens:,} tokens")
    return " · ".join(facts)


def _overlay(size: tuple[int, int], boxes: list[Box], whole: tuple[int, int], bucket: tuple[int, int] | None) -> Markup:
    """Boxes over a thumbnail, numbered as in the list below it, and the edge of what the bucket keeps."""
    width, height = size
    parts = [_crop(size, whole, bucket)] if bucket else []
    for number, box in enumerate(boxes, start=1):
        left, top = box.left * width / FULL, box.top * height / FULL
        rect = (
            '<g><title>{n}: {t}</title><rect x="{x:.1f}" y="{y:.1f}" width="{w:.1f}" height="{h:.1f}" fill="none" '
            'stroke="#fff" stroke-width="3.5" stroke-opacity=".7"/><rect x="{x:.1f}" y="{y:.1f}" width="{w:.1f}" '
            'height="{h:.1f}" fill="none" stroke="{c}" stroke-width="1.8"{dash}/>'
            '<rect x="{lx:.1f}" y="{ly:.1f}" width="{lw}" height="14" rx="2" fill="{c}"/>'
            '<text x="{tx:.1f}" y="{ty:.1f}" fill="#fff" font-size="11" font-weight="700" text-anchor="middle">{n}'
            "</text></g>"
        )
        tag = 15 if number < 10 else 20
        x, y = min(max(left, 0), width - tag), min(max(top, 0), height - 14)
        parts.append(
            Markup(rect).format(
                n=number,
                t=_cut(f"{'text “' + box.label + '”' if box.kind == 'text' else box.label}", 120),
                x=left,
                y=top,
                w=max((box.right - box.left) * width / FULL, 1),
                h=max((box.bottom - box.top) * height / FULL, 1),
                c=colour(number),
                dash=Markup(' stroke-dasharray="5 3"') if box.kind == "text" else "",
                lx=x,
                ly=y,
                lw=tag,
                tx=x + tag / 2,
                ty=y + 11,
            )
        )
    if not parts:
        return Markup()
    head = Markup('<svg viewBox="0 0 {w} {h}" aria-hidden="true" class="over">').format(w=width, h=height)
    return head + Markup("").join(parts) + Markup("</svg>")


def _crop(size: tuple[int, int], whole: tuple[int, int], bucket: tuple[int, int]) -> Markup:
    """Shades the margins that are cut off around the centre; nothing for less than half a percent."""
    scale, cropped = cover(whole, bucket)
    if cropped < 0.005:
        return Markup()
    width, height = size
    kept_w, kept_h = width * bucket[0] / (whole[0] * scale), height * bucket[1] / (whole[1] * scale)
    x, y = (width - kept_w) / 2, (height - kept_h) / 2
    path = (
        '<path fill-rule="evenodd" fill="#000" fill-opacity=".45" '
        'd="M0 0H{w}V{h}H0ZM{x:.1f} {y:.1f}h{kw:.1f}v{kh:.1f}h-{kw:.1f}Z"><title>cut off: {p:.0%}</title></path>'
    )
    return Markup(path).format(w=width, h=height, x=x, y=y, kw=kept_w, kh=kept_h, p=cropped)


def colour(number: int) -> str:
    """The colour of a picture's n-th box, from 1."""
    return COLOURS[(number - 1) % len(COLOURS)]


def _cut(text: str, most: int) -> str:
    return text if len(text) <= most else f"{text[: most - 1]}…"
