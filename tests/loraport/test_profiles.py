"""Profiles fill what a spec leaves out of `memory`, and nothing else."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from loraport.errors import SpecError
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
            "memory.quantize: 'nf3' is not known. Did you mean 'nf4'? Choices: fp8, fp8-dynamic, int8, nf4, none",
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


def test_profiles_are_read_from_folders_of_yaml(tmp_path: Path) -> None:
    for kind in ("hardware", "quantize", "offload", "compile"):
        (tmp_path / kind).mkdir()
    (tmp_path / "hardware" / "mine.yaml").write_text("description: My card\ncard_gib: 6\nsets: {quantize: nf4}\n")
    (tmp_path / "quantize" / "fp6.yaml").write_text("description: Six bits\nsets: {storage: fp8, compute: model}\n")
    (tmp_path / "offload" / "disk.yaml").write_text("description: On disk\n")
    assert read_profiles(tmp_path) == [
        Profile("hardware", "mine", "My card", {"quantize": "nf4"}, 6),
        Profile("quantize", "fp6", "Six bits", {"storage": "fp8", "compute": "model"}),
        Profile("offload", "disk", "On disk"),
    ]
