"""Peak device memory before a run: what a backend predicts for a spec, and whether the card at hand holds it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from loraport.errors import SpecError

if TYPE_CHECKING:
    from loraport.gpu import Card
    from loraport.profiles import Profile
    from loraport.spec.models import TrainSpec

#: What the CUDA context and its libraries take of a card beside what torch allocates, GiB.
CONTEXT_GIB = 0.5
#: A prediction is trusted to within this share; beyond it a run that cannot fit is refused.
TOLERANCE = 0.1


@dataclass(frozen=True)
class Phase:
    """A part of a run and what it holds on the device at its fullest moment, in GiB by what it is for."""

    name: str
    terms: dict[str, float]
    advice: str  #: what in the spec, `memory` aside, makes it smaller

    @property
    def gib(self) -> float:
        return sum(self.terms.values())


@dataclass(frozen=True)
class Footprint:
    """The allocated memory that a backend predicts, phase by phase, and what it took for granted."""

    phases: list[Phase]
    assumes: dict[str, Any]
    room_gib: float | None = None  #: what may be allocated on the card, when there is one
    binding: bool = True  #: whether a run that does not fit is refused

    @property
    def peak(self) -> Phase:
        """The phase that takes most."""
        return max(self.phases, key=lambda phase: phase.gib)

    @property
    def fits(self) -> bool | None:
        """Whether the card holds it; None when there is no card to tell."""
        return None if self.room_gib is None else self.peak.gib <= self.room_gib


#: A backend's optional `predict_memory`: (resolved spec, GiB that may be allocated or None) → footprint, or None when
#: nothing can be said of this spec.
Predict = Callable[["TrainSpec", float | None], Footprint | None]


@dataclass(frozen=True)
class Forecast:
    """A footprint beside the card it was made for. `profile` is the hardware profile that would fit, if one does."""

    footprint: Footprint
    card: Card | None = None
    profile: str | None = None

    def warning(self) -> str | None:
        """What to know and do when it does not fit; None when it does, or when there is no card."""
        footprint, card = self.footprint, self.card
        if footprint.fits is not False or card is None:
            return None
        return (
            f"{footprint.peak.gib:.1f} GiB are predicted while {footprint.peak.name}, and {card.name} has "
            f"{footprint.room_gib:.1f} GiB to give. {self._advice()}"
        )

    def check(self) -> None:
        """Raise SpecError when the run clearly cannot fit, so that nothing is loaded in vain."""
        footprint = self.footprint
        warning = self.warning()
        if warning is None or not footprint.binding:
            return
        assert footprint.room_gib is not None
        if footprint.peak.gib > (1 + TOLERANCE) * footprint.room_gib:
            raise SpecError(f"This run does not fit the card: {warning}")

    def to_dict(self) -> dict[str, Any]:
        """The forecast as plain data for JSON; sizes in GiB."""
        footprint = self.footprint
        return {
            "peak_gib": round(footprint.peak.gib, 2),
            "peak_phase": footprint.peak.name,
            "phases": [
                {
                    "name": phase.name,
                    "gib": round(phase.gib, 2),
                    "terms": {name: round(gib, 3) for name, gib in phase.terms.items()},
                }
                for phase in footprint.phases
            ],
            "assumes": footprint.assumes,
            "card": None if self.card is None else {"name": self.card.name, "gib": round(self.card.memory_gib, 2)},
            "room_gib": None if footprint.room_gib is None else round(footprint.room_gib, 2),
            "fits": footprint.fits,
            "profile_that_fits": self.profile,
        }

    def _advice(self) -> str:
        advice = self.footprint.peak.advice
        if self.profile is None:
            return f"No hardware profile would do: {advice}."
        profile = f"memory.profile: {self.profile} and no other field of memory"
        return f"The profile {self.profile} would fit: set {profile}. Or {advice}."


def forecast(
    spec: TrainSpec, backend: Any, profiles: Mapping[tuple[str, str], Profile], card: Card | None
) -> Forecast | None:
    """What a backend predicts for a resolved spec on a card; None when it predicts nothing."""
    predict: Predict | None = getattr(backend, "predict_memory", None)
    footprint = predict and predict(spec, None if card is None else card.memory_gib - CONTEXT_GIB)
    if predict is None or footprint is None:
        return None
    if card is None or footprint.fits:
        return Forecast(footprint, card)
    return Forecast(footprint, card, _fitting_profile(spec, predict, profiles, card))


def expected(profile: Profile, backend: Any, profiles: Mapping[tuple[str, str], Profile]) -> Forecast | None:
    """What a backend predicts for a hardware profile on the card and in the training that it is for: the default
    family's official weights, captions of the length that is assumed where none are known."""
    import os

    from loraport.gpu import Card
    from loraport.plugins import plugins
    from loraport.profiles import resolve_memory
    from loraport.spec.models import ModelSection, TrainSpec

    assert profile.card_gib is not None
    family = plugins().families()[ModelSection.model_fields["family"].default]
    content = {
        "name": profile.name,
        "model": {"family": family.name, "checkpoint": family.checkpoint},
        "dataset": {"path": os.devnull, "resolution": profile.shape["resolution"]},  # no captions
        "lora": {"rank": profile.shape["rank"]},
        "train": {"batch_size": profile.shape["batch_size"]},
        "memory": {"profile": profile.name},
    }
    spec = resolve_memory(TrainSpec.model_validate(content), profiles)
    return forecast(spec, backend, profiles, Card(profile.name, profile.card_gib, (0, 0)))


def _fitting_profile(
    spec: TrainSpec, predict: Predict, profiles: Mapping[tuple[str, str], Profile], card: Card
) -> str | None:
    """The hardware profile for the largest card up to this one with which the rest of the spec fits."""
    from loraport.gpu import FP8_CAPABILITY, profiles_up_to
    from loraport.profiles import resolve_memory
    from loraport.spec.models import MemorySection

    for profile in profiles_up_to(card.memory_gib, profiles):
        memory = MemorySection(profile=profile.name)
        candidate = resolve_memory(spec.model_copy(update={"memory": memory}), profiles)
        if candidate.memory.compute == "fp8" and card.compute_capability < FP8_CAPABILITY:
            continue
        footprint = predict(candidate, card.memory_gib - CONTEXT_GIB)
        if footprint is not None and footprint.fits:
            return profile.name
    return None
