"""The sets of images that a spec trains: which they are, what is in them, and how often each image comes in an epoch.

Every backend asks here, so all of them train the same images with the same captions.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path

from loraport.caption_sources import caption_source
from loraport.dataset import Item, find_images, scan
from loraport.errors import DataError
from loraport.families import Family
from loraport.spec.models import DatasetSection, TrainSpec

#: Repeats up to which shares are exact; beyond, they may be so far from the weights', relative to these.
MOST_REPEATS = 1000
TOLERANCE = 0.01
#: Samples of an epoch, at most: its order is made anew each time.
MOST_SAMPLES = 2_000_000


@dataclass(frozen=True)
class ImageSet:
    """A set of images with everything that the spec says of it. `field` is where: `dataset` or `dataset.sets[1]`."""

    field: str
    path: Path  #: a folder, or `hub:owner/name` until `loraport.hub_datasets.on_disk` has put its folder there
    caption_ext: str
    caption_field: str | None
    default_caption: str | None
    trigger_word: str | None
    repeats: int
    weight: float | None
    resolution: int
    flip: bool
    caption_dropout: float
    regularization: bool
    loss_weight: float

    @property
    def sides(self) -> int:
        """Samples that one image is each time: two where it is mirrored too."""
        return 2 if self.flip else 1

    @property
    def label(self) -> str:
        """A name of letters for folders and files, one for each set of a spec."""
        known = {"dataset": "images", "dataset.regularization": "regularization"}
        return known.get(self.field) or "set-" + self.field.removeprefix("dataset.sets[").removesuffix("]")


@dataclass(frozen=True)
class TrainedSet:
    """A set with its images, the trigger word in their captions, and how often an epoch holds each (`repeats`)."""

    set: ImageSet
    items: list[Item]
    repeats: int

    @property
    def samples(self) -> int:
        """How many samples of an epoch are of this set."""
        return len(self.items) * self.set.sides * self.repeats


@dataclass(frozen=True)
class Listed:
    """An image and where its caption is: the file that belongs there, a text out of metadata, or None in neither."""

    image: Path
    caption: Path | str | None


def image_sets(dataset: DatasetSection) -> list[ImageSet]:
    """The sets of a dataset section, regularisation included, in order. A pure function."""
    shared = ImageSet(
        field="dataset",
        path=dataset.path or Path(),
        caption_ext=dataset.caption_ext,
        caption_field=dataset.caption_field,
        default_caption=dataset.default_caption,
        trigger_word=dataset.trigger_word or None,
        repeats=dataset.repeats,
        weight=None,
        resolution=dataset.resolution,
        flip=dataset.flip,
        caption_dropout=dataset.caption_dropout,
        regularization=False,
        loss_weight=1.0,
    )
    general = replace(shared, trigger_word=None, default_caption=None, flip=False, regularization=True)
    if not dataset.sets:
        given = dataset.regularization
        if given.path is None:
            return [shared]
        extra = replace(
            general,
            field="dataset.regularization",
            path=given.path,
            caption_ext=given.caption_ext,
            caption_field=None,
            repeats=given.repeats,
            loss_weight=given.weight,
        )
        return [shared, extra]
    sets = []
    for number, one in enumerate(dataset.sets):
        said = {name: value for name, value in one if value is not None}
        base = replace(general if one.regularization else shared, field=f"dataset.sets[{number}]")
        if one.caption_ext and not one.caption_field:
            base = replace(base, caption_field=None)
        sets.append(replace(base, **said | {"trigger_word": said.get("trigger_word", base.trigger_word) or None}))
    return sets


def subject(dataset: DatasetSection) -> ImageSet:
    """The first set that is no regularisation: what images are held out of, and what names the LoRA's trigger word."""
    return next(one for one in image_sets(dataset) if not one.regularization)


def largest_resolution(dataset: DatasetSection) -> int:
    """The largest resolution of any set, in pixels: what memory must be there for."""
    return max(one.resolution for one in image_sets(dataset))


def list_sets(dataset: DatasetSection) -> list[tuple[ImageSet, list[Listed]]]:
    """Every set with its images and where their captions are, without opening either. Reads folders and metadata.

    Raises DataError for a folder that cannot be searched or metadata that cannot be read.
    """
    return [(one, _listed(one)) for one in image_sets(dataset)]


def trained_sets(spec: TrainSpec, family: Family) -> list[TrainedSet]:
    """The images that are trained, by set, each set sorted by name, with the trigger word in each caption.

    Images that the spec holds out for validation are not among them. Raises DataError for what is wrong with images,
    captions or weights, when an image is in two sets, or when none is left.
    """
    held_out = spec.validation.images if spec.validation.every and spec.validation.path is None else 0
    found, sets, first = [], image_sets(spec.dataset), subject(spec.dataset)
    for one in sets:
        items = _items(one, family)
        if held_out and one == first:
            if held_out >= len(items):
                raise DataError(
                    f"validation.images holds {held_out} of {len(items)} images out of {one.path}; "
                    "none is left to train.",
                    hint="Hold out fewer, give a folder with validation.path, or set validation.every to 0.",
                )
            items = items[:-held_out]
        found.append(items)
    repeats = repeats_of(sets, [len(items) for items in found])
    trained = [TrainedSet(*each) for each in zip(sets, found, repeats, strict=True)]
    if spec.dataset.sets:
        _refuse_overlap(trained)
    return trained


def held_out_items(spec: TrainSpec, family: Family) -> list[Item]:
    """The images whose loss is measured and that are not trained, sorted by name, with the trigger word in each
    caption. Raises DataError for what is wrong with images or captions."""
    if not spec.validation.every:
        return []
    first = subject(spec.dataset)
    if spec.validation.path is None:
        return _items(first, family)[-spec.validation.images :]
    return _items(replace(first, field="validation", path=spec.validation.path), family)


def repeats_of(sets: Sequence[ImageSet], images: Sequence[int]) -> list[int]:
    """How often an epoch holds each image of each set of so many images: as the sets say, or as their weights ask.

    Raises DataError where an epoch would have more than `MOST_SAMPLES` samples.
    """
    each_time = [count * one.sides for one, count in zip(sets, images, strict=True)]
    repeats = [one.repeats for one in sets]
    if sets[0].weight is not None:
        repeats = whole_repeats(each_time, [one.weight or 0.0 for one in sets])
    total = sum(count * times for count, times in zip(each_time, repeats, strict=True))
    if total > MOST_SAMPLES:
        told = zip(sets, images, repeats, strict=True)
        each = ", ".join(f"{one.field}: {count} images {times} times" for one, count, times in told)
        raise DataError(
            f"An epoch would have {total:,} samples, more than {MOST_SAMPLES:,} ({each}).",
            hint="Give the sets weights that are nearer to their numbers of images, or fewer repeats.",
        )
    return repeats


def whole_repeats(counts: Sequence[int], weights: Sequence[float]) -> list[int]:
    """The smallest whole repeats under which each set's share of count × repeats is its weight's; where one of them
    would be above `MOST_REPEATS`, those under which each share is within `TOLERANCE` of it.

    counts: images (above 0) of each set; weights: above 0.
    """
    assert min(counts) > 0
    assert min(weights) > 0
    exact = [Fraction(repr(weight)) / count for count, weight in zip(counts, weights, strict=True)]
    whole = [int(each * math.lcm(*(one.denominator for one in exact))) for each in exact]
    times = [each // math.gcd(*whole) for each in whole]
    if max(times) <= MOST_REPEATS:
        return times
    for base in range(1, round(2 / TOLERANCE)):  # rounding is off by 1/(2·base) at most, so that is always enough
        times = [max(1, round(base * each / min(exact))) for each in exact]
        samples = [count * each for count, each in zip(counts, times, strict=True)]
        shares = [
            (each / sum(samples)) / (weight / sum(weights)) for each, weight in zip(samples, weights, strict=True)
        ]
        if all(abs(share - 1) <= TOLERANCE for share in shares):
            break
    return times


def _items(one: ImageSet, family: Family) -> list[Item]:
    items = scan(one.path, one.caption_ext, one.default_caption, one.caption_field)
    word = one.trigger_word
    return [replace(item, caption=family.place_trigger(item.caption, word)) for item in items] if word else items


def _listed(one: ImageSet) -> list[Listed]:
    source = caption_source(one.path, one.caption_ext, one.caption_field)
    return [Listed(image, source.where(image)) for image in find_images(one.path)]


def _refuse_overlap(sets: list[TrainedSet]) -> None:
    """An image twice in the same way is a mistake; at two resolutions, or with two captions, it may be meant."""
    seen: dict[tuple[Path, int, str], ImageSet] = {}
    for each in sets:
        for item in each.items:
            first = seen.setdefault((item.image.resolve(), each.set.resolution, item.caption), each.set)
            if first != each.set:
                raise DataError(
                    f"{item.image} is in {each.set.field} and in {first.field} ({first.path}), with the same caption "
                    "and resolution.",
                    hint="Keep one of them apart from the other; to see images more often, use repeats or weight.",
                )
