"""What an epoch of a spec is made of: the images of each set, how often each comes, and how many epochs a run has."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from loraport.dataset import find_images
from loraport.errors import DataError
from loraport.sets import ImageSet, image_sets, repeats_of, subject
from loraport.spec.models import TrainSpec


@dataclass(frozen=True)
class Part:
    """A set's part of an epoch. `images` are those trained; each is seen `repeats` times, mirrored ones twice that."""

    set: ImageSet
    images: int
    repeats: int

    @property
    def samples(self) -> int:
        return self.images * self.set.sides * self.repeats


@dataclass(frozen=True)
class Epoch:
    """An epoch, or, where a folder cannot be counted yet, why (`unknown`)."""

    parts: list[Part]
    epochs: float  #: of the whole run
    unknown: str = ""

    @property
    def samples(self) -> int:
        return sum(part.samples for part in self.parts)

    def lines(self) -> list[str]:
        """A line for the whole, and one for each set where there are several."""
        if self.unknown:
            return [f"not counted: {self.unknown}"]
        images = sum(part.images for part in self.parts)
        several = len(self.parts) > 1
        whole = f"{images:,} image{'s' if images != 1 else ''}{f' in {len(self.parts)} sets' if several else ''}, "
        whole += f"{self.samples:,} samples an epoch, {self.epochs:.3g} epochs"
        return [whole, *(self._line(part) for part in self.parts if several)]

    def _line(self, part: Part) -> str:
        kind = "regularisation, " if part.set.regularization else ""
        mirrored = ", mirrored too" if part.set.flip else ""
        return (
            f"{part.set.field}: {part.images:,} of {part.set.path}, {kind}{part.repeats:,} times each{mirrored}: "
            f"{100 * part.samples / self.samples:.3g} % of the samples"
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON; null where it is not known."""
        if self.unknown:
            return {"samples": None, "epochs": None, "sets": None}
        sets = [
            {
                "field": part.set.field,
                "path": str(part.set.path),
                "images": part.images,
                "repeats": part.repeats,
                "samples": part.samples,
            }
            for part in self.parts
        ]
        return {"samples": self.samples, "epochs": self.epochs, "sets": sets}


def epoch_of(spec: TrainSpec) -> Epoch:
    """Count the images of a spec's sets by their names alone; nothing is opened or downloaded."""
    sets = image_sets(spec.dataset)
    held_out = spec.validation.images if spec.validation.every and spec.validation.path is None else 0
    first = subject(spec.dataset)
    images = []
    for one in sets:
        if str(one.path).startswith("hub:"):
            return Epoch([], 0.0, f"{one.path} is downloaded when the run starts")
        try:
            count = len(find_images(one.path)) - (held_out if one == first else 0)
        except DataError as error:
            return Epoch([], 0.0, error.message.splitlines()[0].rstrip("."))
        if count < 1:
            return Epoch([], 0.0, "validation.images holds every image out")
        images.append(count)
    try:
        repeats = repeats_of(sets, images)
    except DataError as error:
        return Epoch([], 0.0, error.message.rstrip("."))
    parts = [Part(*each) for each in zip(sets, images, repeats, strict=True)]
    train = spec.train
    trained = train.steps * train.batch_size * train.gradient_accumulation * train.gpus
    return Epoch(parts, trained / sum(part.samples for part in parts))
