"""Profiles fill what a spec leaves out of `memory`, and nothing else."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from loraport.errors import SpecError
from loraport.gpu import Card
from loraport.plugins import plugins
from loraport.profiles import DEFAULTS, QUANTIZED, Profile, read_profiles, resolve_memory
from loraport.spec.models import MemorySection, TrainSpec

BUILT_IN = plugins().profiles()


def resolved(**memory: Any) -> MemorySection:
    spec = TrainSpec.model_validate(
        {"name": "a", "model": {"checkpoint": "tiny"}, "dataset": {"path": "/a"}, "memory": memory}
    )
    found = resolve_memory(spec, BUILT_IN)
    assert found.model_copy(update={"memory": spec.memory}) == spec
    return found.memory


def test_without_a_profile_the_defaults_hold() -> None:
    assert resolved().model_dump() == {"profile": None, **DEFAULTS}


def test_a_profile_fills_what_is_left_out_and_the_spec_wins() -> None:
    assert resolved(profile="12gb").quantize == "nf4"
    memory = resolved(profile="12gb", quantize="fp8", gradient_checkpointing=False)
    assert (memory.profile, memory.quantize, memory.gradient_checkpointing) == ("12gb", "fp8", "none")
    assert memory.compile == BUILT_IN[("hardware", "12gb")].sets["compile"]


@pytest.mark.parametrize(
    ("memory", "expected"),
    [
        ({}, ("none", "none", "model")),
        ({"quantize": "fp8-dynamic"}, ("fp8-dynamic", "fp8", "fp8")),
        ({"storage": "int8", "compute": "int8"}, ("int8-dynamic", "int8", "int8")),
        ({"storage": "fp8"}, ("fp8", "fp8", "model")),
        ({"storage": "fp8", "compute": "fp8"}, ("fp8-dynamic", "fp8", "fp8")),
        ({"storage": "nf4", "compute": "fp8"}, (None, "nf4", "fp8")),
        ({"quantize": "nf4", "storage": "nf4"}, ("nf4", "nf4", "model")),
        ({"profile": "12gb", "compute": "fp8"}, (None, "nf4", "fp8")),
        ({"profile": "12gb", "storage": "int8"}, ("int8", "int8", "model")),
        ({"profile": "12gb", "quantize": "none"}, ("none", "none", "model")),
    ],
)
def test_a_quantisation_fills_storage_and_compute_which_can_be_written_instead(
    memory: dict[str, Any], expected: tuple[str | None, str, str]
) -> None:
    found = resolved(**memory)
    assert (found.quantize, found.storage, found.compute) == expected
    assert resolved(**found.model_dump()) == found


@pytest.mark.parametrize(
    ("memory", "says"),
    [
        ({"quantize": "nf4", "storage": "fp8"}, "memory.quantize: nf4 means storage: nf4, but memory.storage is fp8"),
        ({"quantize": "fp8", "compute": "fp8"}, "memory.quantize: fp8 means compute: model, but memory.compute is fp8"),
        ({"quantize": "none", "storage": "int8"}, "means storage: none, but memory.storage is int8"),
    ],
)
def test_a_quantisation_and_a_storage_that_contradict_each_other_are_an_error(
    memory: dict[str, Any], says: str
) -> None:
    with pytest.raises(SpecError, match=says):
        resolved(**memory)


def test_resolving_twice_changes_nothing() -> None:
    once = resolved(profile="24gb")
    assert resolved(**once.model_dump()) == once


@pytest.mark.parametrize(
    ("memory", "says"),
    [
        ({"profile": "12g"}, "memory.profile: '12g' is not known. Did you mean '12gb'? Choices: 12gb, 16gb"),
        (
            {"quantize": "nf3"},
            "memory.quantize: 'nf3' is not known. Did you mean 'nf4'? "
            "Choices: fp8, fp8-dynamic, int8, int8-dynamic, nf4, none",
        ),
        ({"offload": "floppy"}, "memory.offload: 'floppy' is not known."),
        ({"compile": "region"}, "memory.compile: 'region' is not known. Did you mean 'regional'?"),
    ],
)
def test_an_unknown_name_is_told_with_the_nearest(memory: dict[str, Any], says: str) -> None:
    with pytest.raises(SpecError) as caught:
        resolved(**memory)
    assert says in str(caught.value)


@pytest.mark.parametrize("profile", BUILT_IN.values(), ids=lambda profile: f"{profile.kind}-{profile.name}")
def test_every_built_in_profile_is_whole(profile: Profile) -> None:
    assert profile.description
    if profile.kind == "hardware":
        assert set(profile.sets) == set(DEFAULTS) - set(QUANTIZED)
        assert profile.card_gib
        resolved(profile=profile.name)
    else:
        resolved(**{profile.kind: profile.name})


CARDS = {
    "4090": Card("RTX 4090", 23.99, (8, 9)),
    "3090": Card("RTX 3090", 23.99, (8, 6)),
    "small": Card("GT 1030", 2.0, (6, 1)),
}


@pytest.mark.parametrize(
    ("cards", "gpus", "expected"),
    [
        (["4090"], 1, ("24gb", "fp8-dynamic", "fp8")),
        (["3090"], 1, ("24gb", "int8", "model")),
        (["4090", "3090"], 1, ("24gb", "fp8-dynamic", "fp8")),
        (["4090", "small"], 1, ("24gb", "fp8-dynamic", "fp8")),
    ],
)
def test_auto_takes_the_profile_of_the_card_and_says_which(
    monkeypatch: pytest.MonkeyPatch, cards: list[str], gpus: int, expected: tuple[str, str, str]
) -> None:
    monkeypatch.setattr("loraport.gpu.cards", lambda: [CARDS[name] for name in cards])
    found = resolved(profile="auto")
    assert (found.profile, found.quantize, found.compute) == expected
    monkeypatch.setattr("loraport.gpu.cards", list)
    assert resolved(**found.model_dump()) == found


def test_auto_lets_the_spec_win(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("loraport.gpu.cards", lambda: [CARDS["3090"]])
    found = resolved(profile="auto", quantize="nf4", gradient_checkpointing="none")
    assert (found.quantize, found.compute, found.gradient_checkpointing) == ("nf4", "model", "none")


@pytest.mark.parametrize(
    ("cards", "says"),
    [([], "this machine has no NVIDIA card"), (["small"], r"GT 1030 \(2\.0 GiB\) is smaller than the card of every")],
)
def test_auto_without_a_card_for_it_names_the_choices(
    monkeypatch: pytest.MonkeyPatch, cards: list[str], says: str
) -> None:
    monkeypatch.setattr("loraport.gpu.cards", lambda: [CARDS[name] for name in cards])
    with pytest.raises(SpecError, match=says) as caught:
        resolved(profile="auto")
    assert "Name a profile instead: 12gb, 16gb" in str(caught.value)


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The user's folder of profiles, empty."""
    monkeypatch.setenv("LORAPORT_HOME", str(tmp_path))
    for kind in ("hardware", "quantize", "offload", "compile"):
        (tmp_path / "profiles" / kind).mkdir(parents=True)
    return tmp_path / "profiles"


def test_the_users_own_profiles_are_there_beside_the_built_in_ones(home: Path) -> None:
    text = "description: Mine\ncard_gib: 10\nsets: {quantize: mine, offload: group, gradient_checkpointing: true}\n"
    (home / "hardware" / "laptop.yaml").write_text(text)
    (home / "quantize" / "mine.yml").write_text("description: Mine\nsets: {storage: nf4, compute: fp8}\n")
    (home / "hardware" / "notes.txt").write_text("not a profile")
    found = plugins().profiles()
    assert set(found) - set(BUILT_IN) == {("hardware", "laptop"), ("quantize", "mine")}
    spec = TrainSpec.model_validate(
        {"name": "a", "model": {"checkpoint": "tiny"}, "dataset": {"path": "/a"}, "memory": {"profile": "laptop"}}
    )
    memory = resolve_memory(spec, found).memory
    assert (memory.quantize, memory.compute, memory.offload) == ("mine", "fp8", "group")
    assert memory.gradient_checkpointing == "full"


@pytest.mark.parametrize(
    ("file", "text", "says"),
    [
        ("hardware/a.yaml", "description: [", "a.yaml: line 1, column 15 is not valid YAML"),
        ("hardware/a.yaml", "- 1", "a.yaml: a profile is a mapping"),
        ("hardware/a.yaml", "card_gib: 8", "a.yaml: description: needed"),
        ("hardware/a.yaml", "{description: A, card: 8}", "a.yaml: 'card' is not known. Did you mean 'card_gib'?"),
        ("hardware/a.yaml", "{description: A, card_gib: 0}", "a.yaml: card_gib: a whole number from 1 up"),
        ("hardware/a.yaml", "{description: A, card_gib: 8 GB}", "a.yaml: card_gib: a whole number belongs here"),
        ("hardware/a.yaml", "{description: A, fits: {rang: 16}}", "a.yaml: fits: 'rang' is not known."),
        ("hardware/a.yaml", "{description: A, fits: {rank: 0}}", "a.yaml: fits.rank: a whole number from 1 up"),
        ("offload/a.yaml", "{description: A, fits: {rank: 8}}", "a.yaml: fits is for hardware profiles"),
        ("hardware/a.yaml", "{description: A, sets: {storage: nf5}}", "a.yaml: sets.storage: input should be"),
        ("hardware/a.yaml", "{description: A, sets: {quantise: nf4}}", "Did you mean 'quantize'?"),
        ("hardware/a.yaml", "{description: A, sets: {quantize: nf5}}", "a.yaml: sets.quantize: 'nf5' is not known."),
        ("hardware/a.yaml", "{description: A, sets: {offload: swap}}", "a.yaml: sets.offload: 'swap' is not known."),
        ("hardware/12gb.yaml", "{description: A}", "12gb.yaml: there is a hardware profile 12gb already"),
        ("hardware/auto.yaml", "{description: A}", "auto.yaml: auto is no name for a hardware profile"),
        ("quantize/a.yaml", "{description: A, sets: {storage: nf4}}", "a.yaml: the quantize profile a must set"),
        (
            "offload/a.yaml",
            "{description: A, sets: {storage: nf4}}",
            "a.yaml: the offload profile a sets memory.storage",
        ),
        ("quantization/a.yaml", "{description: A}", "'quantization' is not known. Did you mean 'quantize'?"),
    ],
)
def test_a_broken_profile_of_the_users_is_told_with_its_file_and_key(
    home: Path, file: str, text: str, says: str
) -> None:
    (home / file).parent.mkdir(exist_ok=True)
    (home / file).write_text(text)
    with pytest.raises(SpecError) as caught:
        plugins().profiles()
    assert says in str(caught.value)
    assert str(home) in str(caught.value)


def test_profiles_are_read_from_folders_of_yaml(tmp_path: Path) -> None:
    for kind in ("hardware", "quantize", "offload", "compile"):
        (tmp_path / kind).mkdir()
    (tmp_path / "hardware" / "mine.yaml").write_text(
        "description: My card\ncard_gib: 6\nfits: {rank: 8}\nsets: {quantize: nf4}\n"
    )
    (tmp_path / "quantize" / "fp6.yaml").write_text("description: Six bits\nsets: {storage: fp8, compute: model}\n")
    (tmp_path / "offload" / "disk.yaml").write_text("description: On disk\n")
    assert read_profiles(tmp_path) == [
        Profile("hardware", "mine", "My card", {"quantize": "nf4"}, 6, {"rank": 8}),
        Profile("quantize", "fp6", "Six bits", {"storage": "fp8", "compute": "model"}),
        Profile("offload", "disk", "On disk"),
    ]
