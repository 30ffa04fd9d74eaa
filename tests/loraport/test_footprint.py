"""A predicted footprint against a card: what is said, what is refused, and which profile would do."""

from __future__ import annotations

from typing import Any

import pytest

from loraport.errors import SpecError
from loraport.footprint import CONTEXT_GIB, Footprint, Phase, expected, forecast
from loraport.gpu import Card
from loraport.profiles import Profile, resolve_memory
from loraport.spec.models import TrainSpec

SIZES = {"nf4": 8.0, "fp8": 14.0, "none": 30.0}
PROFILES = {
    ("hardware", name): Profile("hardware", name, "", {"quantize": quantize}, card_gib)
    for name, quantize, card_gib in [("8gb", "nf4", 8), ("12gb", "nf4", 12), ("24gb", "fp8", 24), ("80gb", "none", 80)]
}
PROFILES |= {("quantize", name): Profile("quantize", name, "", {"storage": name, "compute": "model"}) for name in SIZES}
PROFILES |= {(kind, "none"): Profile(kind, "none", "") for kind in ("offload", "compile")}  # type: ignore[misc,arg-type]


class Predicting:
    """A backend that predicts memory from the storage alone."""

    binding = True

    def predict_memory(self, spec: TrainSpec, room_gib: float | None) -> Footprint | None:
        training = Phase("training", {"weights": SIZES[spec.memory.storage or ""] - 1, "work": 1.0}, "lower something")
        return Footprint([Phase("caching", {"encoder": 1.0}, ""), training], {"text": 1}, room_gib, self.binding)


def spec(**memory: Any) -> TrainSpec:
    content = {"name": "a", "model": {"checkpoint": "a/b"}, "dataset": {"path": "/a"}, "memory": memory}
    return resolve_memory(TrainSpec.model_validate(content), PROFILES)


def card(gib: float) -> Card:
    return Card("Some card", gib, (8, 9))


def test_without_a_card_nothing_is_said_to_fit_or_not() -> None:
    found = forecast(spec(), Predicting(), PROFILES, None)
    assert found is not None
    assert (found.footprint.fits, found.warning()) == (None, None)
    found.check()


def test_what_fits_beside_cudas_own_memory_is_neither_warned_of_nor_refused() -> None:
    found = forecast(spec(), Predicting(), PROFILES, card(30 + CONTEXT_GIB))
    assert found is not None
    assert found.footprint.fits is True
    assert found.warning() is None
    found.check()


def test_what_may_just_not_fit_is_warned_of_and_what_clearly_does_not_is_refused() -> None:
    close = forecast(spec(), Predicting(), PROFILES, card(29))
    assert close is not None
    assert "30.0 GiB are predicted while training, and Some card has 28.5 GiB to give." in (close.warning() or "")
    close.check()
    clear = forecast(spec(), Predicting(), PROFILES, card(24))
    assert clear is not None
    with pytest.raises(SpecError, match="does not fit the card") as caught:
        clear.check()
    assert "set memory.profile: 24gb and no other field of memory. Or lower something." in str(caught.value)


def test_the_profile_told_is_that_of_the_largest_card_that_would_do() -> None:
    def would_do(gib: float) -> str | None:
        found = forecast(spec(), Predicting(), PROFILES, card(gib))
        assert found is not None
        return found.profile

    assert would_do(24) == "24gb"
    assert would_do(12) == "12gb"
    assert would_do(8) is None  # nf4 takes all of the 8 GiB here, and CUDA some of them


def test_no_profile_is_told_that_computes_in_what_the_card_cannot() -> None:
    dynamic = Profile("quantize", "fp8", "", {"storage": "fp8", "compute": "fp8"})
    found = forecast(spec(), Predicting(), {**PROFILES, ("quantize", "fp8"): dynamic}, Card("Older", 24, (8, 6)))
    assert found is not None
    assert found.profile == "12gb"


def test_when_no_profile_would_do_what_else_can_be_changed_is_told() -> None:
    found = forecast(spec(profile="8gb"), Predicting(), PROFILES, card(6))
    assert found is not None
    assert "No hardware profile would do: lower something." in (found.warning() or "")


def test_a_prediction_that_is_not_binding_only_warns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Predicting, "binding", False)
    found = forecast(spec(), Predicting(), PROFILES, card(8))
    assert found is not None
    assert found.warning()
    found.check()


def test_nothing_is_guessed_for_a_backend_that_predicts_nothing() -> None:
    assert forecast(spec(), object(), PROFILES, card(8)) is None


def test_the_plain_data_hold_every_term_and_the_card() -> None:
    found = forecast(spec(profile="24gb"), Predicting(), PROFILES, card(8))
    assert found is not None
    assert found.to_dict() == {
        "peak_gib": 14.0,
        "peak_phase": "training",
        "phases": [
            {"name": "caching", "gib": 1.0, "terms": {"encoder": 1.0}},
            {"name": "training", "gib": 14.0, "terms": {"weights": 13.0, "work": 1.0}},
        ],
        "assumes": {"text": 1},
        "card": {"name": "Some card", "gib": 8},
        "room_gib": 7.5,
        "fits": False,
        "profile_that_fits": None,
    }


def test_a_hardware_profile_is_predicted_in_the_training_it_is_for(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[TrainSpec] = []
    backend = Predicting()
    monkeypatch.setattr(backend, "predict_memory", lambda spec, room: asked.append(spec))
    profile = Profile("hardware", "8gb", "", fits={"resolution": 768, "batch_size": 2}, card_gib=6)
    expected(profile, backend, PROFILES)
    assert (asked[0].dataset.resolution, asked[0].train.batch_size, asked[0].lora.rank) == (768, 2, 32)


def test_a_hardware_profile_is_predicted_on_its_own_card() -> None:
    found = expected(PROFILES["hardware", "24gb"], Predicting(), PROFILES)
    assert found is not None
    assert (found.footprint.peak.gib, found.footprint.room_gib) == (14.0, 24 - CONTEXT_GIB)
