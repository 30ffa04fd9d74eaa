"""How long a run takes, told from measured trainings alone: where none was measured, that is what is told.

The time of a step is taken to grow with the tokens that pass the model. What changes it otherwise (attention's square,
the rank, the optimizer) is small beside that, and is named as a difference.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from loraport.profiles import STEP_FIELDS

if TYPE_CHECKING:
    from loraport.families import Family
    from loraport.gpu import Card
    from loraport.profiles import Measurement
    from loraport.spec.models import TrainSpec


@dataclass(frozen=True)
class Sample:
    """What one sample of a dataset puts through the model, on average."""

    pixels: float
    text_tokens: float


@dataclass(frozen=True)
class Pace:
    """The time of a spec's optimizer step, and the training that was measured for it."""

    step_s: float
    measured: Measurement
    scaled: float  #: how many times as many tokens pass in this step as in the measured one
    differs: list[str]  #: what else was different when it was measured

    def to_dict(self) -> dict[str, Any]:
        """The pace as plain data for JSON."""
        of = self.measured
        shown = ("card", "date", "step_s", "resolution", "text_tokens", "rank", "batch_size", "optimizer", "source")
        return {
            "step_s": round(self.step_s, 4),
            "scaled": round(self.scaled, 3),
            "measured": {name: getattr(of, name) for name in shown},
            "differs": self.differs,
        }


@dataclass(frozen=True)
class Unmeasured:
    """No time can be told, and why."""

    reason: str
    run_helps: bool = False  #: whether a run of this spec here is a measurement for those after it


def pace(
    spec: TrainSpec,
    backend: str,
    family: Family,
    card: Card | None,
    measurements: Iterable[Measurement],
    sample: Sample | None,
) -> Pace | Unmeasured:
    """The time of a step of a resolved spec on a card.

    Of the trainings measured with this backend, on such a card, with the memory settings and the number of GPUs of the
    spec, the one is taken that had nearest to as many tokens; of equal ones, first the same optimizer, then the nearest
    rank, then the newest. sample: None where the dataset is not known; it is then taken to be like the measured one's.
    """
    unlike = unlike_the_released_model(spec, family)
    if unlike:
        return Unmeasured(unlike)
    rows = [row for row in measurements if (row.family, row.backend) == (family.name, backend)]
    if not rows:
        if card is None:
            return Unmeasured("this machine has no NVIDIA card")
        return Unmeasured(f"no training of {family.title} with {backend} has been measured", run_helps=True)
    memory = {name: getattr(spec.memory, name) for name in STEP_FIELDS}
    rows = [row for row in rows if (row.memory, row.gpus) == (memory, spec.train.gpus)]
    where = f"; with these memory settings it was measured on {', '.join(sorted({row.card for row in rows}))}"
    if card is None:
        return Unmeasured(f"this machine has no NVIDIA card{where if rows else ''}")
    if not rows:
        told = ", ".join(f"{name}: {value}" for name, value in memory.items())
        gpus = f" and {spec.train.gpus} GPUs" if spec.train.gpus > 1 else ""
        return Unmeasured(f"no training with these memory settings{gpus} has been measured ({told})", run_helps=True)
    here = [row for row in rows if row.card == card.name]
    if not here:
        return Unmeasured(f"nothing was measured on {card.name}{where}", run_helps=True)
    scales = [(_scale(spec, family, sample, row), row) for row in here]
    scaled, row = min(scales, key=lambda each: _distance(spec, *each))
    seconds = row.step_s * scaled * spec.train.gradient_accumulation
    return Pace(seconds, row, scaled, _differences(spec, row))


def unlike_the_released_model(spec: TrainSpec, family: Family) -> str | None:
    """Why a spec's checkpoint tells nothing of the times of the family's own; None when it does."""
    from pathlib import Path

    from loraport.errors import DataError

    checkpoint = spec.model.checkpoint
    if checkpoint == "tiny":
        return "the tiny checkpoint is only for trying things out"
    if family.read_dimensions is not None and Path(checkpoint).is_dir():
        try:
            if family.read_dimensions(Path(checkpoint)) != family.dimensions:
                return f"{checkpoint} has other dimensions than {family.checkpoint}, and only its have been measured"
        except DataError:
            return f"{checkpoint} could not be read"
    return None


def dataset_key(spec: TrainSpec) -> str:
    """The same for specs that train the same images with the same captions at the same sizes."""
    return hashlib.sha256(spec.dataset.model_dump_json().encode("utf-8", "surrogatepass")).hexdigest()


def _scale(spec: TrainSpec, family: Family, sample: Sample | None, row: Measurement) -> float:
    """Tokens of a forward pass of the spec, over those of the measured one."""
    batches = spec.train.batch_size / row.batch_size
    if row.dataset is not None:
        if row.dataset == dataset_key(spec):
            return batches
        sample = None  # what the sizes of that run's images were is not known; only its resolution is
    if sample is None:
        from loraport.sets import largest_resolution

        sample = Sample(largest_resolution(spec.dataset) ** 2, row.text_tokens)
    patch = family.side_multiple**2
    return batches * (sample.pixels / patch + sample.text_tokens) / (row.resolution**2 / patch + row.text_tokens)


def _distance(spec: TrainSpec, scaled: float, row: Measurement) -> tuple[Any, ...]:
    newest_first = tuple(-ord(character) for character in row.date)
    return (
        round(abs(math.log(scaled)), 1),
        row.optimizer != spec.train.optimizer,
        abs(row.rank - spec.lora.rank),
        newest_first,
    )


def _differences(spec: TrainSpec, row: Measurement) -> list[str]:
    found = []
    if row.rank != spec.lora.rank:
        found.append(f"rank {row.rank}")
    if row.optimizer != spec.train.optimizer:
        found.append(row.optimizer)
    if spec.lora.type != "lora" or spec.lora.dora:
        found.append("plain LoRA")
    return found
