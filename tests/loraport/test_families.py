"""Model families: target presets and the check of a spec against what is installed."""

from __future__ import annotations

from typing import Any

import pytest

from loraport.errors import SpecError
from loraport.families import check_family, matches
from loraport.ideogram4 import IDEOGRAM4
from loraport.spec.models import TrainSpec

FAMILIES = {"ideogram4": IDEOGRAM4}


def spec_of(family: str = "ideogram4", targets: Any = "attention") -> TrainSpec:
    return TrainSpec.model_validate(
        {
            "name": "a",
            "model": {"checkpoint": "tiny", "family": family},
            "dataset": {"path": "/a"},
            "lora": {"targets": targets},
        }
    )


def test_a_preset_gives_its_patterns_and_a_list_stays_as_it_is() -> None:
    assert IDEOGRAM4.target_patterns("attention") == IDEOGRAM4.targets["attention"]
    assert IDEOGRAM4.target_patterns(["layers.0.*"]) == ["layers.0.*"]


def test_an_unknown_preset_names_the_nearest_and_the_other_way() -> None:
    with pytest.raises(SpecError) as caught:
        check_family(spec_of(targets="atention"), FAMILIES)
    assert "lora.targets: 'atention' is not known. Did you mean 'attention'?" in str(caught.value)
    assert "list of regular expressions" in str(caught.value)


def test_an_unknown_family_names_those_installed() -> None:
    with pytest.raises(SpecError, match=r"model\.family: 'ideogram3' is not known\. Did you mean 'ideogram4'\?"):
        check_family(spec_of("ideogram3"), FAMILIES)
    assert check_family(spec_of(), FAMILIES) is IDEOGRAM4


@pytest.mark.parametrize(
    ("module", "preset", "expected"),
    [
        ("layers.0.attention.qkv", "attention", True),
        ("layers.33.attention.o", "attention", True),
        ("layers.0.feed_forward.w1", "attention", False),
        ("layers.0.feed_forward.w3", "attention+mlp", True),
        ("layers.0.adaln_modulation", "attention+mlp", False),
        ("layers.0.adaln_modulation", "all", True),
        ("final_layer.linear", "all", False),
        ("other.layers.0.attention.qkv", "all", False),
        ("layers.0.attention.qkv.extra", "all", False),
        ("layersX0.attention.qkv", "all", False),
    ],
)
def test_patterns_match_whole_module_names(module: str, preset: str, expected: bool) -> None:
    assert matches(IDEOGRAM4.target_patterns(preset), module) is expected
