"""Plain-text captions into the shortest JSON captions that say the same: nothing is invented."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from loraport.caption_json import is_plain_text
from loraport.errors import DataError, SpecError
from loraport.files import write_atomic
from loraport.rules import NO_JSON, Caption, Finding, ScannedImage, Setting
from loraport_dataset.checking import caption_findings
from loraport_dataset.fixing.dataset import missing_caption
from loraport_dataset.fixing.folders import Images, left_out, new_dataset, place_image, write_text
from loraport_dataset.scanning import scan

#: Parts of a caption that a plain text does not tell apart, so that they are left out.
LEFT_OUT = ("style_description", "background", "elements", "bbox", "color_palette")


@dataclass(frozen=True)
class Wrapped:
    """An image and its JSON caption. `text` is None where there is nothing to wrap; `problems` say why."""

    image: ScannedImage
    state: Literal["wrapped", "json", "nothing"]
    text: str | None
    problems: tuple[Finding, ...] = ()

    @property
    def name(self) -> str:
        """The JSON caption's file, within the dataset."""
        return self.image.name.rpartition(".")[0] + ".json"


def wrap_dataset(root: Path, setting: Setting) -> Iterator[Wrapped]:
    """Every image under `root` with its caption of `setting.caption_ext` as JSON, in order. Nothing is written.

    Line breaks and runs of blanks become one blank each; the trigger word of `setting` is placed where it is missing.
    Captions that are JSON already stay as they are. Raises SpecError for a family whose captions are plain text.
    """
    family = setting.family
    if family.wrap_caption is None:
        raise SpecError(
            f"{family.title} has plain-text captions; there is nothing to wrap them in.",
            hint="Name a family whose captions are JSON with --family.",
        )
    for image in scan(root, setting):
        if isinstance(image, ScannedImage):
            yield _wrap(image, setting)


def _wrap(image: ScannedImage, setting: Setting) -> Wrapped:
    caption, family = image.caption, setting.family
    assert family.wrap_caption is not None
    problem = _unusable(image, setting)
    if problem is not None or caption is None:
        return Wrapped(image, "nothing", None, () if problem is None else (problem,))
    if caption.root is not NO_JSON:
        return Wrapped(image, "json", caption.text)
    text = family.wrap_caption(" ".join(caption.text.split()))
    if setting.trigger_word:
        text = family.place_trigger(text, setting.trigger_word)
    name = image.name.rpartition(".")[0] + ".json"
    findings = caption_findings(Caption(name, text, json.loads(text)), setting)
    return Wrapped(image, "wrapped", text, tuple(finding for finding in findings if finding.severity != "advice"))


def _unusable(image: ScannedImage, setting: Setting) -> Finding | None:
    caption = image.caption
    if caption is None:
        return missing_caption(image, setting)
    if caption.unreadable is not None:
        return Finding(caption.name, "", "caption-unreadable", "error", *caption.unreadable)
    if not caption.text.strip():
        return Finding(caption.name, "", "caption-empty", "error", "There is nothing in it.", "Write it.")
    if caption.syntax is not None and not is_plain_text(caption.text):  # else its name alone is that of JSON
        message, fix = caption.syntax[0], "Put it right with `loraport dataset fix` first."
        return Finding(caption.name, "", "json", "error", message, fix)
    return None


def into_new_folder(results: Iterable[Wrapped], source: Path, out: Path, images: Images) -> Iterator[Wrapped]:
    """Write every image with its JSON caption, where it has one, to `out`, which appears when all of them are there.

    Images that cannot be read are left out, with a finding. Raises DataError and RunFolderError; nothing stays then.
    """
    with new_dataset(source, out) as draft:
        for result in results:
            if problems := left_out(result.image):
                yield replace(result, state="nothing", text=None, problems=(*result.problems, *problems))
                continue
            place_image(result.image.path, draft / result.image.name, images)
            if result.text is not None:
                write_text(draft / result.name, result.text)
            yield result


def beside(results: Iterable[Wrapped], folder: Path) -> Iterator[Wrapped]:
    """Write the JSON captions beside the plain ones, which stay; each in one step.

    Raises DataError before anything is written where a file of such a name is there, RunFolderError where it can't be.
    """
    planned = list(results)
    names = {result.name for result in planned if result.state == "wrapped"}
    taken = sorted(name for name in names if (folder / name).exists() or (folder / name).is_symlink())
    if taken:
        more = f" and {len(taken) - 1:,} more are" if len(taken) > 1 else " is"
        raise DataError(
            f"{taken[0]}{more} there already; nothing was written.",
            hint="Give a new folder with -o OUT, or take them away.",
        )
    for result in planned:
        if result.text is not None and result.name in names:
            names.remove(result.name)  # two images of one name share their caption
            write_atomic(folder / result.name, result.text)
        yield result
