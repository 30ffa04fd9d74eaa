"""Which file goes with which: captions without images, images without captions, names that only look alike."""

from __future__ import annotations

import hashlib
import unicodedata
from collections.abc import Iterator

from loraport.rules import ImageRule, Problem, ScannedImage, SetRule, Setting, StrayFile, StrayRule


class MissingCaption(ImageRule):
    id, severity = "caption-missing", "error"
    explanation = "Every image has a caption file of its name beside it, or the spec a default_caption."
    fix = "Write it; `loraport dataset caption` drafts captions, dataset.default_caption gives all of them one."

    def check(self, image: ScannedImage, setting: Setting) -> Iterator[Problem]:
        if image.caption is None and not image.similar_captions:
            yield Problem(f"There is no {_wanted(image, setting)}.", self.fix)


class CaptionName(ImageRule):
    id, severity = "caption-name", "error"
    explanation = (
        "A caption has the name of its image to the letter, with the extension of dataset.caption_ext: letter case and "
        "Unicode form count, though two names may look the same (macOS writes é as two characters)."
    )
    fix = "Rename the caption to the image's name, or set dataset.caption_ext to its extension."

    def check(self, image: ScannedImage, setting: Setting) -> Iterator[Problem]:
        if not image.similar_captions:
            return
        found = image.similar_captions[0]
        stem, own = found.rpartition(".")[0], image.name.rpartition("/")[2].rpartition(".")[0]
        if stem != own and unicodedata.normalize("NFC", stem) == unicodedata.normalize("NFC", own):
            how = "in another Unicode form of its name"
        elif stem == own and found.lower() != f"{own}.{setting.caption_ext}".lower():
            how = "with another extension"
        else:
            how = "in other letter case"
        fate = "; the default caption is used" if image.caption is not None else ""
        yield Problem(f"There is no {_wanted(image, setting)}, but {found} {how}{fate}.", self.fix)


class DefaultCaption(ImageRule):
    id, severity = "caption-default", "advice"
    explanation = "Images without a caption of their own are trained with dataset.default_caption."
    fix = "Write a caption where the image shows something that the default doesn't say."

    def check(self, image: ScannedImage, setting: Setting) -> Iterator[Problem]:
        if image.caption is not None and not image.caption.name and not image.similar_captions:
            yield Problem("It has no caption of its own; the default caption is used.", self.fix)


class UnusualName(ImageRule):
    id, severity = "file-name", "warning"
    explanation = (
        "A name has no line breaks or other control characters and is valid Unicode: lists of names break at them."
    )
    fix = "Rename the image and its caption."

    def check(self, image: ScannedImage, setting: Setting) -> Iterator[Problem]:
        if any(unicodedata.category(character) in ("Cc", "Cs") for character in image.name):
            yield Problem("The name has control characters, or bytes that are not Unicode.", self.fix)


class OrphanedCaption(StrayRule):
    id, severity = "caption-orphaned", "warning"
    explanation = (
        "Every caption has an image of its name beside it. One without is not trained, and often a misspelt one."
    )
    fix = "Rename it to its image's name, put the image back, or delete it."

    def check(self, stray: StrayFile, setting: Setting) -> Iterator[Problem]:
        if stray.kind == "caption":
            yield Problem("There is no image of this name in its folder.", self.fix)


class OtherFormat(StrayRule):
    id, severity = "image-format", "warning"
    explanation = (
        "Images are JPEG, PNG, WebP, BMP or TIFF. Others (SVG, HEIC, AVIF, GIF, camera raws, …) are passed over: "
        "they are not trained."
    )
    fix = "Save it as PNG or JPEG, or take it out of the folder."

    def check(self, stray: StrayFile, setting: Setting) -> Iterator[Problem]:
        if stray.kind == "image":
            yield Problem(f"{stray.detail.upper()} is not read; this image is not trained.", self.fix)


class UnreadablePlace(StrayRule):
    id, severity = "place-unreadable", "error"
    explanation = "Every folder and link in the dataset can be followed."
    fix = "Give yourself permission to read it, or take it out."

    def check(self, stray: StrayFile, setting: Setting) -> Iterator[Problem]:
        if stray.kind == "unreadable":
            yield Problem(f"It cannot be looked into: {stray.detail}.", self.fix)


class SharedCaption(SetRule):
    id, severity = "caption-shared", "warning"
    explanation = "One caption file is for one image: a.jpg and a.png beside each other share a.json."
    fix = "Rename one of the images and give it a caption of its own."

    def __init__(self) -> None:
        self._folder = ""
        self._images: dict[str, str] = {}  #: of the folder: caption → the first image that has it
        self._found: list[tuple[str, str]] = []

    def see(self, image: ScannedImage, setting: Setting) -> None:
        name = image.caption.name if image.caption is not None else ""
        folder = image.name.rpartition("/")[0]
        if folder != self._folder:
            self._folder, self._images = folder, {}
        first = self._images.setdefault(name, image.name)
        if name and first != image.name:
            self._found.append((image.name, first))

    def problems(self, setting: Setting) -> Iterator[Problem]:
        for name, other in self._found:
            yield Problem(f"It shares its caption with {other}.", self.fix, file=name)


class RepeatedCaption(SetRule):
    id, severity = "caption-repeated", "advice"
    explanation = "Images that differ have captions that differ: what only the image shows, the trigger word soaks up."
    fix = "Say in each what sets it apart, unless that is what the trigger word shall mean."

    def __init__(self) -> None:
        self._first: dict[bytes, str] = {}
        self._found: list[tuple[str, str]] = []

    def see(self, image: ScannedImage, setting: Setting) -> None:
        caption = image.caption
        if caption is None or not caption.name or not caption.text.strip():
            return
        digest = hashlib.blake2b(caption.text.strip().encode("utf-8", "surrogatepass"), digest_size=12).digest()
        first = self._first.setdefault(digest, caption.name)
        if first != caption.name:
            self._found.append((caption.name, first))

    def problems(self, setting: Setting) -> Iterator[Problem]:
        for name, first in self._found:
            yield Problem(f"The same caption as {first}.", self.fix, file=name)


RULES = (
    MissingCaption,
    CaptionName,
    DefaultCaption,
    OrphanedCaption,
    SharedCaption,
    RepeatedCaption,
    OtherFormat,
    UnusualName,
    UnreadablePlace,
)


def _wanted(image: ScannedImage, setting: Setting) -> str:
    """The file name of the caption that an image should have."""
    return f"{image.name.rpartition('/')[2].rpartition('.')[0]}.{setting.caption_ext}"
