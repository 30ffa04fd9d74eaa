"""Profiles fill what a spec leaves out of `memory`, and nothing else."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from loraport.errors import SpecError
from loraport.plugins import plugins
from loraport.profiles import DEFAULTS, Profile, read_profiles, resolve_memory
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
    assert (memory.profile, memory.quantize, memory.gradient_checkpointing) == ("12gb", "fp8", False)
    assert memory.compile == BUILT_IN[("hardware", "12gb")].sets["compile"]


def test_resolving_twice_changes_nothing() -> None:
    once = resolved(profile="24gb")
    assert resolved(**once.model_dump()) == once


@pytest.mark.parametrize(
    ("memory", "says"),
    [
        ({"profile": "12g"}, "memory.profile: '12g' is not known. Did you mean '12gb'? Choices: 12gb, 16gb"),
        ({"quantize": "nf3"}, "memory.quantize: 'nf3' is not known. Did you mean 'nf4'? Choices: fp8, int8, nf4, none"),
        ({"offload": "disk"}, "memory.offload: 'disk' is not known."),
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
        assert set(profile.sets) == set(DEFAULTS)
        assert profile.card_gib
        resolved(profile=profile.name)
    else:
        resolved(**{profile.kind: profile.name})


def test_profiles_are_read_from_folders_of_yaml(tmp_path: Path) -> None:
    for kind in ("hardware", "quantize", "offload", "compile"):
        (tmp_path / kind).mkdir()
    (tmp_path / "hardware" / "mine.yaml").write_text("description: My card\ncard_gib: 6\nsets: {quantize: nf4}\n")
    (tmp_path / "offload" / "disk.yaml").write_text("description: On disk\n")
    assert read_profiles(tmp_path) == [
        Profile("hardware", "mine", "My card", {"quantize": "nf4"}, 6),
        Profile("offload", "disk", "On disk"),
    ]
