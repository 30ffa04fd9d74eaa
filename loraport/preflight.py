"""Captions that would train garbage: found before a run starts, whatever the backend.

Trainers take a broken JSON caption for plain text and train its brackets. The rules that are marked `stops_training`
(docs/dataset-rules.md) are held against every caption of the spec; everything else is `loraport check`'s.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from loraport.caption_json import make_caption
from loraport.caption_sources import caption_source
from loraport.dataset import MAX_CAPTION_BYTES, find_images
from loraport.errors import DataError
from loraport.families import check_family
from loraport.plugins import plugins
from loraport.rules import CaptionRule, Setting
from loraport.sets import ImageSet, image_sets, subject

if TYPE_CHECKING:
    from loraport.spec.models import TrainSpec

_TOLD = 10


def check_captions(spec: TrainSpec) -> None:
    """Raise DataError that names the captions (ten, then the count) which no trainer may be given, with the fixes.

    Datasets that are not on this disk, and files that cannot be read, are passed over: reading them is what fails.
    """
    family = check_family(spec, plugins().families())
    rules = [
        rule
        for rule in plugins().rules().values()
        if issubclass(rule, CaptionRule) and rule.stops_training and rule.family in (None, family.name)
    ]
    found: list[str] = []
    count = 0
    for one in _sets(spec):
        setting = Setting(family, caption_ext=one.caption_ext, trigger_word=one.trigger_word)
        for name, text in _texts(one):
            problem = _first_problem([rule() for rule in rules], name, text, setting)
            if problem is not None:
                count += 1
                found += [f"{name}: {problem}"] if count <= _TOLD else []
    if not count:
        return
    more = [f"and {count - _TOLD} more"] if count > _TOLD else []
    what = f"{count} captions would" if count > 1 else "A caption would"
    raise DataError(
        "\n  ".join([f"{what} be trained as plain text, brackets and all:", *found, *more]),
        hint="`loraport check SPEC` names them all with every other finding; `loraport dataset fix` repairs many.",
    )


def _sets(spec: TrainSpec) -> Iterator[ImageSet]:
    """Every set of images that a run reads and that is a folder on this disk."""
    yield from (one for one in image_sets(spec.dataset) if one.path.is_dir())
    held_out = spec.validation.path if spec.validation.every else None
    if held_out is not None and held_out.is_dir():
        yield replace(subject(spec.dataset), field="validation", path=held_out)


def _texts(one: ImageSet) -> Iterator[tuple[str, str]]:
    """(name, text) of each caption of a set that can be read. A caption that several images share comes once."""
    last: Path | None = None
    try:
        images, source = find_images(one.path), caption_source(one.path, one.caption_ext, one.caption_field)
    except DataError:
        return  # the trainer's reader tells it, with everything else that is wrong
    for image in images:
        place = source.where(image)
        if isinstance(place, str):
            yield str(image), place
        elif place is not None and place != last:
            last = place
            text = _read(place)
            if text is not None:
                yield str(place), text
    if one.default_caption is not None:
        yield f"{one.field}.default_caption", one.default_caption


def _read(file: Path) -> str | None:
    try:
        if not file.is_file() or file.stat().st_size > MAX_CAPTION_BYTES:
            return None
        return file.read_bytes().decode("utf-8-sig")
    except (OSError, UnicodeDecodeError):
        return None


def _first_problem(rules: list[CaptionRule], name: str, text: str, setting: Setting) -> str | None:
    caption = make_caption(name, text, setting.family.caption_format)
    for rule in rules:
        try:
            problem = next(iter(rule.check(caption, setting)), None)
        except Exception as error:  # a defect of the plugin that brought the rule
            raise DataError(
                f"The rule {rule.id} failed over {name}: {type(error).__name__}: {error}",
                hint="Update or remove the plugin that brings it; `loraport plugins` lists those installed.",
            ) from error
        if problem is not None:
            return f"{problem.message} {problem.fix}"
    return None
