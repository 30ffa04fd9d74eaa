"""What a dataset is checked by: rules, the files they look at, and what they find.

Rules come in through the `register_rules` hook. They only look: a rule writes nothing and keeps no image or caption
that it was shown, so that a million files fit into memory. Sizes are (width, height) in pixels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple

if TYPE_CHECKING:
    import PIL.Image

    from loraport.families import Family

Severity = Literal["error", "warning", "advice"]
SEVERITIES: tuple[Severity, ...] = ("error", "warning", "advice")
Size = tuple[int, int]


class Problem(NamedTuple):
    """What a rule yields. Both texts are whole sentences; `file` is for rules of the whole set alone."""

    message: str  #: what is wrong here, with the numbers or words that are there
    fix: str  #: what to do about it
    json_path: str = ""  #: such as `compositional_deconstruction.elements[2].bbox`; empty for the whole file
    file: str = ""  #: a name within the dataset; empty for the dataset as a whole


@dataclass(frozen=True, slots=True)
class Finding:
    """A problem with its rule and its file: one thing to change."""

    file: str  #: relative to the dataset, with `/`; empty for the dataset as a whole
    json_path: str
    rule: str
    severity: Severity
    message: str
    fix: str


class NoJson:
    """The type of `NO_JSON`."""

    def __repr__(self) -> str:
        return "NO_JSON"


#: The `root` of a caption that holds no JSON: plain text, or JSON that is broken.
NO_JSON = NoJson()


@dataclass(frozen=True, slots=True)
class Caption:
    """A caption as it is written, and what the JSON in it says."""

    name: str  #: the file's name within the dataset; empty for the spec's default caption
    text: str  #: decoded, without a byte order mark; empty when `unreadable`
    root: Any = NO_JSON  #: the JSON value, its objects `JsonObject`; `NO_JSON` for plain text and broken JSON
    syntax: tuple[str, str] | None = None  #: what is wrong with a text that is meant as JSON, and the fix
    encoding: str = "utf-8"  #: utf-8, utf-8-sig (with a byte order mark), or the name of what it seems to be
    unreadable: tuple[str, str] | None = None  #: why there is no text, and the fix


@dataclass(frozen=True, slots=True)
class ScannedImage:
    """An image file with its header read, and its caption."""

    path: Path
    name: str  #: relative to the dataset, with `/`
    bytes: int
    size: Size = (0, 0)  #: upright, after EXIF rotation; (0, 0) when `unreadable`
    stored: Size = (0, 0)  #: as the pixels are stored
    format: str = ""  #: Pillow's name, such as JPEG
    mode: str = ""  #: Pillow's name, such as RGB, RGBA, P, L, CMYK, I;16
    orientation: int = 1  #: of EXIF, 1 to 8; 1 is upright
    transparent: bool = False  #: it has an alpha channel or a transparent colour
    frames: int = 1  #: 2 means several, uncounted
    unreadable: tuple[str, str] | None = None  #: why it does not open, and the fix
    caption: Caption | None = None  #: None when there is neither a file nor a default
    similar_captions: tuple[str, ...] = ()  #: without a file: those whose names are almost right
    #: RGB, upright, perhaps scaled down, to no less than 256 px a side; only where pixels were asked for
    pixels: PIL.Image.Image | None = field(default=None, repr=False)
    damage: str = ""  #: why they were asked for in vain, as a sentence


@dataclass(frozen=True, slots=True)
class StrayFile:
    """Something in the folder that no image goes with."""

    path: Path
    name: str
    kind: Literal["caption", "image", "unreadable"]  #: of no image; of a format that is not read; cannot be looked at
    detail: str = ""  #: for `unreadable`: why; for `image`: its extension


@dataclass(frozen=True)
class Setting:
    """What the dataset is to be used for: the parts of a spec that rules depend on, under the names they have there."""

    family: Family
    caption_ext: str = "json"
    resolution: int = 1024
    upscale: bool = False
    aspect_buckets: bool = True
    trigger_word: str | None = None
    default_caption: str | None = None
    max_text_tokens: int = 2048
    count_tokens: Callable[[str], int] | None = field(default=None, compare=False)  #: exact; None when it isn't known
    foreign_words: tuple[str, ...] = ()  #: of a regularisation set: the trigger words of the other sets


class Rule:
    """A rule of any kind; subclass one of the four below, not this.

    A rule tells only its own matter and passes over whatever another rule reports. A new object of the class is made
    for each dataset that is checked.
    """

    id: ClassVar[str]  #: unique, in lower case with dashes, such as `image-small`
    severity: ClassVar[Severity]
    explanation: ClassVar[str]  #: the rule and why it is one
    fix: ClassVar[str]  #: what to do in general
    family: ClassVar[str | None] = None  #: the family whose captions it is for; None for every dataset
    stops_training: ClassVar[bool] = False  #: `loraport train` refuses to start (caption rules alone)


class CaptionRule(Rule):
    """Looks at one caption. Only called for captions that could be read."""

    def check(self, caption: Caption, setting: Setting) -> Iterable[Problem]:
        raise NotImplementedError


class ImageRule(Rule):
    """Looks at one image; `image.caption` is checked by caption rules already."""

    needs_pixels: ClassVar[bool] = False  #: only checked when pixels were asked for

    def check(self, image: ScannedImage, setting: Setting) -> Iterable[Problem]:
        raise NotImplementedError


class StrayRule(Rule):
    """Looks at a file that is no image with its caption."""

    def check(self, stray: StrayFile, setting: Setting) -> Iterable[Problem]:
        raise NotImplementedError


class SetRule(Rule):
    """Looks at every image in turn, then tells what is wrong with the whole. Keep numbers, not images."""

    needs_pixels: ClassVar[bool] = False

    def see(self, image: ScannedImage, setting: Setting) -> None:
        raise NotImplementedError

    def problems(self, setting: Setting) -> Iterable[Problem]:
        raise NotImplementedError


KINDS: tuple[type[Rule], ...] = (CaptionRule, ImageRule, StrayRule, SetRule)


def rule_id(rule: Any) -> str:
    """The id of a rule class. Raises TypeError or ValueError for what is not a whole one, naming what it lacks."""
    if not (isinstance(rule, type) and issubclass(rule, KINDS)):
        names = ", ".join(kind.__name__ for kind in KINDS)
        raise TypeError(f"{rule!r} is not a class derived from one of {names}")
    for name in ("id", "severity", "explanation", "fix"):
        if not isinstance(getattr(rule, name, None), str) or not getattr(rule, name):
            raise TypeError(f"the rule {rule.__name__} has no {name}")
    if rule.severity not in SEVERITIES:
        raise ValueError(f"the rule {rule.id} has the severity {rule.severity!r}; choices: {', '.join(SEVERITIES)}")
    return rule.id
