"""What the header of a published LoRA says of its dataset."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from loraport import plan
from loraport.ideogram4 import IDEOGRAM4
from loraport.run.metadata import lora_metadata
from loraport.spec.models import TrainSpec


def metadata_of(dataset: dict[str, Any]) -> dict[str, str]:
    spec = TrainSpec.model_validate({"name": "s", "model": {"checkpoint": "tiny"}, "dataset": dataset})
    return lora_metadata(plan(spec, "native", Path("/runs/s")), IDEOGRAM4)


def test_of_several_sets_the_header_tells_the_subjects() -> None:
    sets = [
        {"path": "/general", "regularization": True, "resolution": 2048},
        {"path": "/subject", "trigger_word": "zork", "resolution": 512},
        {"path": "/more", "resolution": 768},
    ]
    found = metadata_of({"sets": sets})
    assert (found["modelspec.trigger_phrase"], found["modelspec.resolution"]) == ("zork", "512x512")
    assert not any("/subject" in text for text in found.values())


def test_without_a_trigger_word_none_is_told() -> None:
    found = metadata_of({"path": "/a", "resolution": 640})
    assert found["modelspec.resolution"] == "640x640"
    assert "modelspec.trigger_phrase" not in found
