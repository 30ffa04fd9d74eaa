"""A whole dataset's captions put right: read twice, first for the convention of its boxes, then to fix them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from loraport.caption_json import make_caption
from loraport.dataset import MAX_CAPTION_BYTES
from loraport.rules import NO_JSON, Caption, Finding, ScannedImage, Setting
from loraport_dataset.boxes import BoxStatistics, Convention
from loraport_dataset.checking import caption_findings
from loraport_dataset.fixing.captions import Fixed, fix_caption, parsed
from loraport_dataset.fixing.changes import Changes
from loraport_dataset.fixing.ideogram4 import Boxes
from loraport_dataset.scanning import scan


@dataclass(frozen=True)
class FixedImage:
    """An image of the set and what became of its caption; `fixed` is None where there is none that can be read, or
    where another image of the same name has it already."""

    image: ScannedImage
    fixed: Fixed | None
    left: tuple[Finding, ...] = ()  #: what is still wrong, or cannot be put right without a guess

    @property
    def changed(self) -> bool:
        return self.fixed is not None and bool(self.fixed.changes)


@dataclass(frozen=True)
class Recognised:
    """The convention that all boxes of a set are in, and why it is taken to be so."""

    convention: Convention
    evidence: str
    #: False where nothing tells whether x or y comes first (then `convention` has x first), and where the set would not
    #: be read as official after it was converted
    is_certain: bool = True


def recognise_boxes(root: Path, setting: Setting) -> Recognised | None:
    """None for the official convention, and where the numbers of all boxes together don't tell."""
    statistics = BoxStatistics()
    for image in scan(root, setting):
        if isinstance(image, ScannedImage) and image.caption is not None:
            caption = _decoded(image.caption, image, setting)
            statistics.see(parsed(caption, Changes())[0], image.size)
    convention = statistics.convention()
    if convention is None:
        return None
    certain = statistics.is_certain(convention) and _settles(root, setting, convention)
    return Recognised(convention, statistics.evidence(convention), certain)


def _settles(root: Path, setting: Setting, convention: Convention) -> bool:
    """Whether the set, once converted, is then read as official: fixing twice is fixing once."""
    statistics = BoxStatistics()
    for one in fix_dataset(root, setting, convention):
        if one.fixed is not None and one.image.caption is not None:
            caption = make_caption(one.image.caption.name, one.fixed.text, setting.family.caption_format)
            statistics.see(caption.root, one.image.size)
    return statistics.convention() is None


def fix_dataset(root: Path, setting: Setting, convention: Convention | None = None) -> Iterator[FixedImage]:
    """Every image under `root` with its caption put right, in order. Nothing is written, nothing raised for one file.

    convention: that of all boxes of the set; None when they are as they should be.
    """
    folder, taken = None, set[str]()
    for image in scan(root, setting):
        if not isinstance(image, ScannedImage):
            continue
        if image.path.parent != folder:
            folder, taken = image.path.parent, set()
        if image.caption is None:
            yield FixedImage(image, None, (missing_caption(image, setting),))
        elif image.caption.name in taken:
            yield FixedImage(image, None)
        else:
            taken.add(image.caption.name)
            yield _fix(image, image.caption, setting, convention)


def _fix(image: ScannedImage, caption: Caption, setting: Setting, convention: Convention | None) -> FixedImage:
    caption = _decoded(caption, image, setting)
    if caption.unreadable is not None:
        message, fix = caption.unreadable
        return FixedImage(image, None, (Finding(caption.name, "", "caption-unreadable", "error", message, fix),))
    fixed = fix_caption(caption, setting, Boxes(convention, image.size))
    left = caption_findings(make_caption(caption.name, fixed.text, setting.family.caption_format), setting)
    return FixedImage(replace(image, caption=caption), fixed, tuple(left))


def missing_caption(image: ScannedImage, setting: Setting) -> Finding:
    """That an image has no caption file."""
    name = f"{image.name.rpartition('.')[0]}.{setting.caption_ext}"
    message, fix = f"There is no {name}.", "Write it, or rename the one that is meant."
    return Finding(image.name, "", "caption-missing", "error", message, fix)


def _decoded(caption: Caption, image: ScannedImage, setting: Setting) -> Caption:
    """A caption in UTF-16 or UTF-32, which its first bytes tell without a doubt, with its text; others as they are."""
    if caption.encoding not in ("utf-16", "utf-32"):
        return caption
    path = image.path.parent / caption.name.rpartition("/")[2]
    try:
        text = path.read_bytes()[:MAX_CAPTION_BYTES].decode(caption.encoding)
    except (OSError, UnicodeDecodeError):
        return caption
    return make_caption(caption.name, text, setting.family.caption_format, caption.encoding)


def is_plain(fixed: FixedImage) -> bool:
    """Whether the caption is plain text, of a family that wants JSON."""
    caption = fixed.image.caption
    return caption is not None and caption.root is NO_JSON and caption.syntax is None and bool(caption.text.strip())
