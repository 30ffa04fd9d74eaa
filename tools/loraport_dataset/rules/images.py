"""Each image by itself: that it opens, its size against the resolution, and what its pixels are stored as."""

from __future__ import annotations

import math
from collections.abc import Iterator

from loraport.buckets import bucket_for
from loraport.rules import ImageRule, Problem, ScannedImage, Setting, Size
from loraport_dataset.rules.duplicates import ranges

#: Sides below these shares of what the resolution asks for.
_FAR_TOO_SMALL, _TOO_SMALL = 0.5, 0.95
_WIDEST = 3.0
_MOST_CROPPED = 0.2
_PLAIN_MODES = ("RGB", "RGBA", "P", "PA")  # what transparency has a rule for is none of the modes' matter
_TURNED = {
    2: "mirrored",
    3: "turned by 180°",
    4: "upside down and mirrored",
    5: "on its side and mirrored",
    6: "on its side",
    7: "on its side and mirrored",
    8: "on its side",
}
_MODES = {
    "L": "grey",
    "LA": "grey with transparency",
    "1": "black and white without greys",
    "CMYK": "in the colours of print (CMYK)",
    "YCbCr": "YCbCr",
    "LAB": "LAB",
    "HSV": "HSV",
    "I": "grey of 32 bits",
}
_USUAL = {
    "jpg": ("JPEG", "MPO"),
    "jpeg": ("JPEG", "MPO"),
    "png": ("PNG",),
    "webp": ("WEBP",),
    "bmp": ("BMP", "DIB"),
    "tif": ("TIFF",),
    "tiff": ("TIFF",),
}


class Unreadable(ImageRule):
    id, severity = "image-unreadable", "error"
    explanation = (
        "Every image opens: it is an ordinary file of a known format with a sound header, of at most 178,956,970 "
        "pixels (Pillow's limit, against files that unpack to more than the memory)."
    )
    fix = "Save the image anew, or take it out of the folder."

    def check(self, image: ScannedImage, setting: Setting) -> Iterator[Problem]:
        if image.unreadable is not None:
            yield Problem(*image.unreadable)


class Tiny(ImageRule):
    id, severity = "image-tiny", "error"
    explanation = (
        "No side is shorter than the model's smallest step (16 px for Ideogram 4), unless images are upscaled."
    )
    fix = "Take it out, use a larger copy, or set dataset.upscale: true."

    def check(self, image: ScannedImage, setting: Setting) -> Iterator[Problem]:
        if _is_tiny(image, setting):
            width, height = image.size
            smallest = setting.family.side_multiple
            yield Problem(f"{width} x {height} px: a side has less than {smallest} px.", self.fix)


class Small(ImageRule):
    id, severity = "image-small", "warning"
    explanation = (
        "Images have at least half the resolution, as the square root of their area: smaller ones teach blur where "
        "they are enlarged, and at their own size one that nobody asks for later."
    )
    fix = "Use a larger copy, lower dataset.resolution, or take it out."

    def check(self, image: ScannedImage, setting: Setting) -> Iterator[Problem]:
        share = _share(image, setting)
        if share < _FAR_TOO_SMALL:
            yield Problem(_told(image, share, setting), self.fix)


class BelowResolution(ImageRule):
    id, severity = "image-below-resolution", "advice"
    explanation = "Images have the resolution that they are trained at."
    fix = "Use a larger copy, or lower dataset.resolution if most of them are like this."

    def check(self, image: ScannedImage, setting: Setting) -> Iterator[Problem]:
        share = _share(image, setting)
        if _FAR_TOO_SMALL <= share < _TOO_SMALL:
            yield Problem(_told(image, share, setting), self.fix)


class Aspect(ImageRule):
    id, severity = "image-aspect", "warning"
    explanation = f"No side is more than {_WIDEST:g} times as long as the other: few pixels are left for the short one."
    fix = "Crop it to the part that matters."

    def check(self, image: ScannedImage, setting: Setting) -> Iterator[Problem]:
        ratio = max(image.size) / max(min(image.size), 1)
        if ratio > _WIDEST and not _is_tiny(image, setting):
            width, height = bucket_for(
                image.size, setting.resolution, setting.family.side_multiple, setting.upscale, setting.aspect_buckets
            )
            message = (
                f"{image.size[0]} x {image.size[1]} px is {ratio:.1f} to 1; it is trained at {width} x {height} px."
            )
            yield Problem(message, self.fix)


class Cropped(ImageRule):
    id, severity = "image-cropped", "warning"
    explanation = f"Cropping to the trained shape cuts at most {_MOST_CROPPED:.0%} of an image away."
    fix = "Crop it yourself around what matters, or set dataset.aspect_buckets: true."

    def check(self, image: ScannedImage, setting: Setting) -> Iterator[Problem]:
        if min(image.size) == 0 or _is_tiny(image, setting):
            return
        bucket = bucket_for(
            image.size, setting.resolution, setting.family.side_multiple, setting.upscale, setting.aspect_buckets
        )
        lost = _lost(image.size, bucket)
        if lost > _MOST_CROPPED:
            message = f"{image.size[0]} x {image.size[1]} px is cropped to the shape of {bucket[0]} x {bucket[1]} px: "
            yield Problem(f"{message}{lost:.0%} is lost.", self.fix)


class Rotated(ImageRule):
    id, severity = "image-rotated", "warning"
    explanation = (
        "Pixels are stored upright. LoraPort turns them by the EXIF tag; tools that don't see another picture, boxes "
        "drawn with such a tool are wrong, and a tool that drops the tag leaves it on its side."
    )
    fix = "Save it turned: with ImageMagick, `magick IN -auto-orient OUT`; then check its boxes."

    def check(self, image: ScannedImage, setting: Setting) -> Iterator[Problem]:
        if image.orientation != 1:
            how = _TURNED[image.orientation]
            yield Problem(f"Its pixels are {how} (EXIF orientation {image.orientation}).", self.fix)


class Transparent(ImageRule):
    id, severity = "image-transparent", "warning"
    explanation = (
        "Images have no transparency: what is behind it, nobody chose. LoraPort's own trainer lays them on white."
    )
    fix = "Save it on the background that it should be learned with."

    def check(self, image: ScannedImage, setting: Setting) -> Iterator[Problem]:
        if image.transparent:
            yield Problem(f"It has transparency ({image.mode}); it is trained on white.", self.fix)


class Mode(ImageRule):
    id, severity = "image-mode", "warning"
    explanation = "Images are RGB of 8 bits. Others are converted, which changes colours (print) or drops bits."
    fix = "Save it as RGB of 8 bits, converted with its colour profile."

    def check(self, image: ScannedImage, setting: Setting) -> Iterator[Problem]:
        if image.unreadable is None and image.mode not in (*_PLAIN_MODES, "L", "LA"):
            what = "grey of 16 bits" if image.mode.startswith("I;16") else _MODES.get(image.mode, image.mode)
            yield Problem(f"It is {what}, not RGB; it is converted.", self.fix)


class Grey(ImageRule):
    id, severity = "image-grey", "advice"
    explanation = "An image stored without colour teaches that its subject has none, unless the caption says so."
    fix = "Say black-and-white in the caption, or use a colour copy."

    def check(self, image: ScannedImage, setting: Setting) -> Iterator[Problem]:
        if image.mode in ("L", "LA"):
            yield Problem("It is stored without colour.", self.fix)


class Animated(ImageRule):
    id, severity = "image-animated", "warning"
    explanation = "An image is one picture: of an animation the first frame alone is trained."
    fix = "Save the frame that you want as an image of its own."

    def check(self, image: ScannedImage, setting: Setting) -> Iterator[Problem]:
        if image.frames > 1:
            yield Problem("It is an animation; its first frame is trained.", self.fix)


class Extension(ImageRule):
    id, severity = "image-extension", "advice"
    explanation = "A file's extension says what it is: trainers and viewers that go by the name fail on others."
    fix = "Rename it, its caption's name stays."

    def check(self, image: ScannedImage, setting: Setting) -> Iterator[Problem]:
        extension = image.name.rpartition(".")[2].lower()
        if image.format and image.format not in _USUAL.get(extension, (image.format,)):
            yield Problem(f"It is named .{extension} and is {image.format}.", self.fix)


class DamagedPixels(ImageRule):
    id, severity = "image-damaged", "error"
    explanation = "The pixels of every image can be read to the end. Checked with --pixels: headers don't tell."
    fix = "Copy the file again from where it came from, or take it out."
    needs_pixels = True

    def check(self, image: ScannedImage, setting: Setting) -> Iterator[Problem]:
        if image.damage:
            yield Problem(image.damage, self.fix)


class Blank(ImageRule):
    id, severity = "image-blank", "warning"
    explanation = (
        "An image shows something: one of a single colour is most often a failed download. Checked with --pixels."
    )
    fix = "Look at it; take it out if it is empty."
    needs_pixels = True

    def check(self, image: ScannedImage, setting: Setting) -> Iterator[Problem]:
        if image.pixels is None:
            return
        extrema = ranges(image.pixels)
        if all(low == high for low, high in extrema):
            colour = "#" + "".join(f"{low:02X}" for low, _ in extrema)
            yield Problem(f"Every pixel is {colour}.", self.fix)


RULES = (
    Unreadable,
    Tiny,
    Small,
    BelowResolution,
    Aspect,
    Cropped,
    Rotated,
    Transparent,
    Mode,
    Grey,
    Animated,
    Extension,
    DamagedPixels,
    Blank,
)


def _is_tiny(image: ScannedImage, setting: Setting) -> bool:
    return image.unreadable is None and not setting.upscale and min(image.size) < setting.family.side_multiple


def _share(image: ScannedImage, setting: Setting) -> float:
    """The square root of the image's area, as a share of the resolution; 1 for what other rules report."""
    if image.unreadable is not None or _is_tiny(image, setting):
        return 1.0
    return math.sqrt(image.size[0] * image.size[1]) / setting.resolution


def _told(image: ScannedImage, share: float, setting: Setting) -> str:
    width, height = image.size
    fate = f"enlarged {1 / share:.1f} times" if setting.upscale else "trained at its own size"
    return f"{width} x {height} px is {share:.0%} of the resolution {setting.resolution}; it is {fate}."


def _lost(size: Size, bucket: Size) -> float:
    """The share of an image's area that is cut off when it is scaled to cover a bucket."""
    scale = max(bucket[0] / size[0], bucket[1] / size[1])
    return 1 - bucket[0] * bucket[1] / (size[0] * scale * size[1] * scale)
