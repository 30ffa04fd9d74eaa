"""Images that cannot be read and captions that would train garbage: found before a run starts, whatever the backend.

Every backend reads the images' headers and the captions as `loraport.sets` does, but only after seconds, in which its
libraries load. Trainers take a broken JSON caption for plain text and train its brackets. The rules that are marked
`stops_training` (docs/dataset-rules.md) are held against every caption of the spec. Other captions that break a rule of
the family are trained, as the family's own tools do, but not in silence: they are counted. Pixels, and what only a
whole set tells, are `loraport check`'s.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from loraport.caption_json import make_caption
from loraport.caption_sources import caption_source
from loraport.dataset import MAX_CAPTION_BYTES, find_images
from loraport.errors import DataError
from loraport.families import check_family
from loraport.plugins import plugins
from loraport.rules import CaptionRule, Setting
from loraport.sets import ImageSet, held_out_items, image_sets, subject, trained_sets

if TYPE_CHECKING:
    from loraport.spec.models import TrainSpec

_TOLD = 10


def check_images(spec: TrainSpec) -> None:
    """Raise the DataError with which any backend's run would end that reads the spec's images and captions. Datasets of
    the hub are passed over: they may not be on this disk yet."""
    paths = [*(one.path for one in image_sets(spec.dataset)), spec.validation.path]
    if not any(str(path).startswith("hub:") for path in paths):
        family = check_family(spec, plugins().families())
        trained_sets(spec, family)  # which reads what is held out of them as well
        if spec.validation.path is not None:
            held_out_items(spec, family)


def check_captions(spec: TrainSpec, strict: bool = False) -> list[str]:
    """Raise DataError that names the captions (ten, then the count) which no trainer may be given, with the fixes.

    Returns a warning on those that break other rules of severity error, if there are any; with `strict` it is a
    DataError too. Datasets that are not on this disk, and files that cannot be read, are passed over: reading them is
    what fails.
    """
    family = check_family(spec, plugins().families())
    rules = [
        rule
        for rule in plugins().rules().values()
        if issubclass(rule, CaptionRule) and rule.severity == "error" and rule.family in (None, family.name)
    ]
    refused, broken = _Told(), _Told()
    for one in _sets(spec):
        setting = Setting(family, caption_ext=one.caption_ext, trigger_word=one.trigger_word)
        chosen = [rule() for rule in sorted(rules, key=lambda rule: not rule.stops_training)]
        for name, text in _texts(one):
            found = _first_problem(chosen, name, text, setting)
            if found is not None:
                rule, problem = found
                (refused if rule.stops_training else broken).add(rule, f"{name}: {problem}")
    if refused.count:
        what = f"{refused.count} captions would" if refused.count > 1 else "A caption would"
        raise DataError(
            refused.text(f"{what} be trained as plain text, brackets and all:"),
            hint="`loraport check SPEC` names them all with every other finding; `loraport dataset fix` repairs many.",
        )
    if not broken.count:
        return []
    counted = ", ".join(f"{rule} {count:,}" for rule, count in broken.by_rule.most_common())
    what = f"{broken.count:,} captions break" if broken.count > 1 else "A caption breaks"
    if strict:
        raise DataError(
            broken.text(f"{what} the rules of {family.title} ({counted}):"),
            hint="Repair them (`loraport dataset fix` does many), or leave out --strict to train them as they are.",
        )
    return [
        f"{what} the rules of {family.title} ({counted}), such as {broken.lines[0]} Trained as they are; "
        "`loraport check SPEC` names them all, --strict refuses them."
    ]


@dataclass
class _Told:
    """Captions with their problem: counted, and the first ten in words."""

    lines: list[str] = field(default_factory=list)
    by_rule: Counter[str] = field(default_factory=Counter)

    @property
    def count(self) -> int:
        return self.by_rule.total()

    def add(self, rule: CaptionRule, line: str) -> None:
        self.by_rule[rule.id] += 1
        self.lines += [line] if self.count <= _TOLD else []

    def text(self, heading: str) -> str:
        more = [f"and {self.count - _TOLD} more"] if self.count > _TOLD else []
        return "\n  ".join([heading, *self.lines, *more])


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
        return  # `check_images` tells it, with everything else that is wrong
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


def _first_problem(rules: list[CaptionRule], name: str, text: str, setting: Setting) -> tuple[CaptionRule, str] | None:
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
            where = f"{problem.json_path}: " if problem.json_path else ""
            return rule, f"{where}{problem.message} {problem.fix}"
    return None
