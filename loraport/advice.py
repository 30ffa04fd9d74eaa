"""What is worth knowing before a run: how long to train, at which rank, and what it will take of time and disk.

Advice, and told as such: nothing here stops or changes a run.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loraport.disk import Contents, Disk, PredictDisk, size_text
from loraport.families import BYTES_PER_TOKEN
from loraport.pace import Pace, Sample, Unmeasured, pace

if TYPE_CHECKING:
    from loraport.gpu import Card
    from loraport.profiles import Measurement
    from loraport.sets import ImageSet, Listed
    from loraport.spec.models import TrainSpec


@dataclass(frozen=True)
class Steps:
    """A range of steps for one purpose: for each image at batch size 1, which is how often it is trained, or in all."""

    purpose: str
    least: int
    most: int
    each: bool

    def for_images(self, images: int) -> tuple[int, int]:
        """The least and the most steps for that many images."""
        return (self.least * images, self.most * images) if self.each else (self.least, self.most)

    def range_text(self) -> str:
        return f"{self.least} to {self.most} {'an image' if self.each else 'in all'}"

    def __str__(self) -> str:
        return f"{self.range_text()} for {self.purpose}"


#: The ranges seen in public guides to training Ideogram 4 LoRAs, where these agree.
STEPS = (
    Steps("a focused object", 60, 120, each=True),
    Steps("a style", 15, 30, each=True),
    Steps("a quick diagnosis", 50, 250, each=False),
)
#: Ranks of the same guides: rank → what for.
RANKS = {16: "a LoRA used alone", 8: "one stacked with others"}
SOURCE = "public guides"

#: From so many images on, it is told that the ranges were multiplied.
MANY_IMAGES = 200
STEPS_TEXT = f"Advice ({SOURCE}, at batch size 1): {'; '.join(map(str, STEPS))}"
RANKS_RANGE = ", ".join(f"{rank} for {purpose}" for rank, purpose in RANKS.items())
RANKS_TEXT = f"Advice ({SOURCE}): {RANKS_RANGE}"


def many_images(images: int) -> str:
    """What to make of steps for so many images that their number alone makes the steps; empty for fewer."""
    if images < MANY_IMAGES:
        return ""
    return (
        f"For {images:,} images, take these as a bound from above: they are ranges an image, multiplied, and not "
        "measured for so many. Stop by the held-out loss (validation)."
    )


@dataclass(frozen=True)
class DatasetFacts:
    """What advice depends on."""

    images: int  #: that are trained, without regularisation and those held out
    share: float  #: of the samples that are trained, those which are of these images; the others are regularisation
    encoded: int  #: images that are encoded, all sets together
    contents: Contents  #: what there is to encode
    sample_pixels: int  #: of all images at the sizes they are trained at, mirrored ones not counted again
    exact: bool  #: whether sizes and captions were read; else every image counts as large as it can be trained

    @property
    def sample(self) -> Sample | None:
        """The mean sample; None without images."""
        if not self.encoded:
            return None
        return Sample(self.sample_pixels / self.encoded, self.contents.caption_tokens / self.encoded)


@dataclass(frozen=True)
class SetFacts:
    """How much there is in one set. pixels: of all its images at the sizes they are trained at, each counted once."""

    set: ImageSet
    images: int
    pixels: int
    caption_tokens: int


@dataclass(frozen=True)
class Advice:
    """Advice for one spec on one machine."""

    spec: TrainSpec
    facts: DatasetFacts | None  #: None when the dataset could not be looked at
    pace: Pace | Unmeasured
    disk: Disk | None

    @property
    def times_an_image(self) -> float | None:
        """How often the run trains each image on average; None without images."""
        if self.facts is None or not self.facts.images:
            return None
        train = self.spec.train
        samples = train.steps * train.batch_size * train.gradient_accumulation * train.gpus
        return samples * self.facts.share / self.facts.images

    @property
    def seconds(self) -> float | None:
        """The time of all steps; None when nothing like it was measured."""
        return self.pace.step_s * self.spec.train.steps if isinstance(self.pace, Pace) else None

    def lines(self) -> list[tuple[str, str]]:
        """A heading and a sentence for each of steps, rank, time and disk."""
        texts = {"Steps": self.steps_line, "Rank": self.rank_line, "Time": self.time_line, "Disk": self.disk_line}
        return [(heading, text()) for heading, text in texts.items()]

    def steps_line(self) -> str:
        times, facts, steps = self.times_an_image, self.facts, self.spec.train.steps
        here = f"{steps:,} steps"
        if times is not None and facts is not None:
            images = "image" if facts.images == 1 else f"{facts.images:,} images"
            here += f" train {'the' if facts.images == 1 else 'each of'} {images} {_number(times)} times"
        return f"{here}. {STEPS_TEXT}. {many_images(facts.images if facts is not None else 0)}".rstrip()

    def rank_line(self) -> str:
        return f"{self.spec.lora.rank}. {RANKS_TEXT}."

    def time_line(self) -> str:
        from loraport.run.eta import duration

        if isinstance(self.pace, Unmeasured):
            later = ", and plans after it do too" if self.pace.run_helps else ""
            return f"not known: {self.pace.reason}. A run tells it after its first steps{later}."
        assert self.seconds is not None
        of, train = self.pace.measured, self.spec.train
        told = [f"about {duration(self.seconds)} for {train.steps:,} steps on {of.card}"]
        told.append(f"from {of.step_s:.3g} s a step measured there ({_measured(of)})")
        if round(self.pace.scaled, 2) != 1:
            told.append(f"times {self.pace.scaled:.2f} as that many tokens pass here")
        if train.gradient_accumulation > 1:
            told.append(f"times {train.gradient_accumulation} for the passes of a step")
        if self.pace.differs:
            told.append(f"though it had {', '.join(self.pace.differs)}")
        return f"{', '.join(told)}. Loading, caching and compiling come on top."

    def disk_line(self) -> str:
        disk = self.disk
        if disk is None:
            return "not known: the backend does not predict it for this spec."
        parts = f"checkpoints {size_text(disk.checkpoints)}, LoRA {size_text(disk.result)}"
        if disk.weights:
            parts += f", the model's blocks while it trains {size_text(disk.weights)}"
        if self.facts is None:
            return f"{size_text(disk.total - disk.cache)} and the cache: {parts}; the dataset cannot be searched."
        about = "about" if self.facts.exact else "at most about"
        return f"{about} {size_text(disk.total)}: cache {size_text(disk.cache)}, {parts}."

    def to_dict(self) -> dict[str, Any]:
        """The advice as plain data for JSON; sizes in bytes, times in seconds."""
        facts, disk = self.facts, self.disk
        return {
            "source": SOURCE,
            "images": None if facts is None else facts.images,
            "steps": self.spec.train.steps,
            "times_an_image": None if self.times_an_image is None else round(self.times_an_image, 2),
            "steps_advice": [_steps_dict(each, facts.images if facts else None) for each in STEPS],
            "rank": self.spec.lora.rank,
            "rank_advice": {str(rank): purpose for rank, purpose in RANKS.items()},
            "time": {"reason": self.pace.reason, "seconds": None}
            if isinstance(self.pace, Unmeasured)
            else {"seconds": round(self.seconds or 0, 1), **self.pace.to_dict()},
            "disk": None
            if disk is None
            else {
                "cache": disk.cache,
                "checkpoints": disk.checkpoints,
                "result": disk.result,
                "weights": disk.weights,
                "exact": facts is not None and facts.exact,
            },
        }


def advise(
    spec: TrainSpec,
    backend: Any,
    facts: DatasetFacts | None,
    card: Card | None,
    measurements: list[Measurement],
) -> Advice:
    """Advice for a resolved spec with a backend (`loraport.backend.Backend`), on a card, from measured trainings."""
    from loraport.families import check_family
    from loraport.plugins import plugins

    family = check_family(spec, plugins().families())
    predict: PredictDisk | None = getattr(backend, "predict_disk", None)
    contents = facts.contents if facts is not None else Contents(0, 0)
    return Advice(
        spec,
        facts,
        pace(spec, backend.name, family, card, measurements, facts.sample if facts is not None else None),
        None if predict is None else predict(spec, contents),
    )


def advice_for(spec: TrainSpec, backend: str | None = None, facts: DatasetFacts | None = None) -> Advice:
    """Advice for a spec on this machine, from all measurements there are: plugins' and those of the runs in ./runs.

    facts: looked up without opening an image when left out. Raises SpecError for names in the spec that are not known.
    """
    from loraport.gpu import cards_for
    from loraport.plugins import plugins
    from loraport.profiles import resolve_memory
    from loraport.run.api import DEFAULT_BACKEND
    from loraport.run.earlier import measured_runs

    resolved = resolve_memory(spec, plugins().profiles())
    chosen = plugins().backend(backend or spec.backend.name or DEFAULT_BACKEND)
    card = min(cards_for(spec), key=lambda card: card.memory_gib, default=None)
    measured = [*plugins().measurements(), *measured_runs()]
    return advise(resolved, chosen, look_at(resolved) if facts is None else facts, card, measured)


def lines(spec: TrainSpec, backend: str | None = None) -> list[str]:
    """A short line each on steps, rank, time and disk; see `advice_for`."""
    return [f"{heading}: {text}" for heading, text in advice_for(spec, backend).lines()]


def look_at(spec: TrainSpec) -> DatasetFacts | None:
    """The facts of a spec's dataset without opening an image: each counts at the full resolution, and a caption by its
    bytes. None when a folder cannot be searched, or is on the hub still."""
    from loraport.errors import DataError
    from loraport.sets import list_sets

    try:
        sets = [(one, _text_bytes(one, listed)) for one, listed in list_sets(spec.dataset)]
    except (DataError, OSError):  # what is wrong with the dataset is told by those that read it
        return None
    parts = [
        SetFacts(one, len(sizes), len(sizes) * one.resolution**2, sum(-(-size // BYTES_PER_TOKEN) for size in sizes))
        for one, sizes in sets
    ]
    return together(spec, parts, exact=False)


def together(spec: TrainSpec, parts: list[SetFacts], exact: bool) -> DatasetFacts:
    """The facts of a dataset out of those of its sets."""
    held_out = spec.validation.images if spec.validation.every and spec.validation.path is None else 0
    seen = {True: 0.0, False: 0.0}
    for each in parts:
        of = each.set
        seen[of.regularization] += of.weight or each.images * (2 if of.flip else 1) * of.repeats
    return DatasetFacts(
        images=max(0, sum(each.images for each in parts if not each.set.regularization) - held_out),
        share=seen[False] / (sum(seen.values()) or 1.0),
        encoded=sum(each.images for each in parts),
        contents=Contents(
            pixels=sum(each.pixels * (2 if each.set.flip else 1) for each in parts),
            caption_tokens=sum(each.caption_tokens for each in parts),
        ),
        sample_pixels=sum(each.pixels for each in parts),
        exact=exact,
    )


def _text_bytes(one: ImageSet, listed: list[Listed]) -> list[int]:
    """Bytes of each image's caption."""
    default = len((one.default_caption or "").encode())
    sizes = []
    for each in listed:
        try:
            sizes.append(
                each.caption.stat().st_size if isinstance(each.caption, Path) else _size(each.caption, default)
            )
        except OSError:
            sizes.append(default)
    return sizes


def _size(text: str | None, default: int) -> int:
    return default if text is None else len(text.encode("utf-8", "replace"))


def _steps_dict(advice: Steps, images: int | None) -> dict[str, Any]:
    least, most = advice.for_images(images) if images else (None, None)
    return {"purpose": advice.purpose, "each_image": advice.each, "range": [advice.least, advice.most]} | {
        "steps": None if least is None else [least, most]
    }


def _measured(row: Measurement) -> str:
    told = f"in {row.source}, " if row.dataset is not None else ""
    told += f"{row.date}, {row.resolution} px"
    told += f", {row.text_tokens} text tokens" if row.text_tokens else ""
    return told + (f", batch {row.batch_size}" if row.batch_size > 1 else "")


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 10 else f"{value:.2g}"
