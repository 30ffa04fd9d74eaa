"""Cards and the profile that suits one."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pynvml
import pytest

from loraport.gpu import Card, cards, cards_for, profile_for, settings_for
from loraport.profiles import Profile
from loraport.spec.models import TrainSpec

PROFILES = {
    (kind, name): Profile(kind, name, "", card_gib=gib)
    for kind, name, gib in [
        ("hardware", "12gb", 12),
        ("hardware", "24gb", 24),
        ("hardware", "80gb", 80),
        ("hardware", "cpu", None),
        ("offload", "group", None),
    ]
}


def test_no_driver_means_no_cards(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> None:
        raise pynvml.NVMLError_LibraryNotFound

    monkeypatch.setattr(pynvml, "nvmlInit", fail)
    assert cards() == []


def test_cards_are_told_as_the_driver_tells_them(monkeypatch: pytest.MonkeyPatch) -> None:
    closed = []
    monkeypatch.setattr(pynvml, "nvmlInit", lambda: None)
    monkeypatch.setattr(pynvml, "nvmlShutdown", lambda: closed.append(True))
    monkeypatch.setattr(pynvml, "nvmlDeviceGetCount", lambda: 2)
    monkeypatch.setattr(pynvml, "nvmlDeviceGetHandleByIndex", lambda index: index)
    monkeypatch.setattr(pynvml, "nvmlDeviceGetName", lambda handle: f"Card {handle}")
    monkeypatch.setattr(pynvml, "nvmlDeviceGetCudaComputeCapability", lambda handle: (8, 9))

    def memory(handle: int) -> SimpleNamespace:
        if handle == 1:
            raise pynvml.NVMLError_NotSupported
        return SimpleNamespace(total=24_564 * 2**20)

    monkeypatch.setattr(pynvml, "nvmlDeviceGetMemoryInfo", memory)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert cards() == [Card("Card 0", 24_564 / 1024, (8, 9))]
    assert not closed, "a trainer that is started now would wait until the driver has brought the card up again"


@pytest.fixture
def three_cards(monkeypatch: pytest.MonkeyPatch) -> None:
    def by_uuid(uuid: str) -> int:
        if uuid not in ("GPU-a", "GPU-b", "GPU-c"):
            raise pynvml.NVMLError_NotFound
        return "abc".index(uuid[-1])

    told = {"Init": lambda: None, "Shutdown": lambda: None, "DeviceGetCount": lambda: 3}
    told |= {"DeviceGetHandleByIndex": lambda index: index, "DeviceGetHandleByUUID": by_uuid}
    told |= {"DeviceGetName": lambda handle: "abc"[handle], "DeviceGetCudaComputeCapability": lambda handle: (8, 9)}
    told |= {"DeviceGetMemoryInfo": lambda handle: SimpleNamespace(total=(8 + handle) * 2**30)}
    for name, answer in told.items():
        monkeypatch.setattr(pynvml, f"nvml{name}", answer)


@pytest.mark.usefixtures("three_cards")
@pytest.mark.parametrize(
    ("visible", "expected"),
    [
        (None, "abc"),
        ("2,0", "ca"),
        (" 1 ", "b"),
        ("GPU-c,GPU-a", "ca"),
        ("GPU-unknown,1", "b"),
        ("", ""),
        ("-1", ""),
        ("0,7,1", "a"),  # CUDA stops at the first that is not there
    ],
)
def test_cards_are_those_that_cuda_shows(monkeypatch: pytest.MonkeyPatch, visible: str | None, expected: str) -> None:
    if visible is None:
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    else:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert [card.name for card in cards()] == list(expected)


@pytest.mark.usefixtures("three_cards")
@pytest.mark.parametrize(
    ("device", "gpus", "expected"),
    [("auto", 1, "a"), ("cuda", 2, "ab"), ("cuda:2", 1, "c"), ("cuda:9", 1, ""), ("cpu", 1, "a"), ("auto", 4, "abc")],
)
def test_a_run_is_planned_for_the_cards_that_it_will_use(
    monkeypatch: pytest.MonkeyPatch, device: str, gpus: int, expected: str
) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    content: dict[str, Any] = {
        "name": "a",
        "model": {"checkpoint": "tiny"},
        "dataset": {"path": "images"},
        "train": {"gpus": gpus},
    }
    spec = TrainSpec.model_validate(content | {"backend": {"options": {"device": device}}})
    assert [card.name for card in cards_for(spec)] == list(expected)


@pytest.mark.parametrize(
    ("gib", "expected"),
    # An A10's 24 GB and an H100's 80, less what they keep for error correction and themselves.
    [(11.99, "12gb"), (16, "12gb"), (22.49, "24gb"), (23.99, "24gb"), (70, "24gb"), (79.65, "80gb"), (139.8, "80gb")],
)
def test_the_profile_is_the_largest_that_fits(gib: float, expected: str) -> None:
    profile = profile_for(gib, PROFILES)
    assert profile is not None
    assert profile.name == expected


def test_a_card_smaller_than_every_profile_has_none() -> None:
    assert profile_for(8, PROFILES) is None
    assert profile_for(8, {}) is None


@pytest.mark.parametrize(
    ("capability", "sets"),
    [
        ((9, 0), {"quantize": "fp8-dynamic", "compile": "regional"}),
        ((8, 9), {"quantize": "fp8-dynamic", "compile": "regional"}),
        ((8, 6), {"storage": "int8", "compute": "model", "compile": "regional"}),
    ],
)
def test_a_card_that_computes_in_no_fp8_stores_int8_instead(capability: tuple[int, int], sets: dict[str, str]) -> None:
    profiles: dict[tuple[str, str], Profile] = {
        ("quantize", "fp8-dynamic"): Profile("quantize", "fp8-dynamic", "", {"storage": "fp8", "compute": "fp8"}),
        ("hardware", "24gb"): Profile(
            "hardware", "24gb", "", {"quantize": "fp8-dynamic", "compile": "regional"}, card_gib=24
        ),
    }
    chosen = settings_for(Card("A card", 23.99, capability), profiles)
    assert chosen == (profiles["hardware", "24gb"], sets)
    assert settings_for(Card("A card", 8, capability), profiles) is None


def test_asking_this_machine_does_not_fail() -> None:
    assert all(card.memory_gib > 0 and card.name for card in cards())
