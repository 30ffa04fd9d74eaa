"""DiffSynth's LoRA files, whose scale is told beside them or not at all."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from loraport.errors import DataError
from loraport.lora.storage import write_tensors
from loraport_convert.dialects.diffsynth import DiffSynth

MODULE = "layers.0.attention.qkv"


def lora(folder: Path, arguments: object = None, drop: str = "") -> Path:
    path = folder / "step-000004.safetensors"
    tensors = {
        f"{MODULE}.lora_A.default.weight": np.ones((4, 8), np.float32),
        f"{MODULE}.lora_B.default.weight": np.ones((12, 4), np.float32),
    }
    write_tensors(path, {key: value for key, value in tensors.items() if not drop or drop not in key}, {"format": "pt"})
    if arguments is not None:
        (folder / "training_args.json").write_text(json.dumps(arguments))
    return path


@pytest.mark.parametrize(("arguments", "scale"), [({"lora_rank": 4}, 1.0), ({"lora_rank": 4, "lora_alpha": 8.0}, 2.0)])
def test_the_scale_comes_from_the_arguments_beside_the_file(tmp_path: Path, arguments: object, scale: float) -> None:
    found = DiffSynth().read(lora(tmp_path, arguments))
    assert found.modules[MODULE].scale == scale
    assert found.unread == ()


@pytest.mark.parametrize("arguments", [None, {}, [], {"lora_rank": "many"}])
def test_without_them_the_scale_is_not_guessed(tmp_path: Path, arguments: object) -> None:
    with pytest.raises(DataError, match="does not tell its scale"):
        DiffSynth().read(lora(tmp_path, arguments))


def test_arguments_of_another_training_are_noticed(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="has rank 4, but"):
        DiffSynth().read(lora(tmp_path, {"lora_rank": 8}))


def test_half_a_module_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="not whole"):
        DiffSynth().read(lora(tmp_path, {"lora_rank": 4}, drop="lora_A"))


def test_only_bare_default_keys_are_its_own() -> None:
    def sure(*keys: str) -> float:
        return DiffSynth().detect(keys, {}, {})

    assert sure(f"{MODULE}.lora_A.default.weight", f"{MODULE}.lora_B.default.weight") == 0.97
    assert sure(f"base_model.model.{MODULE}.lora_A.default.weight") == 0
    assert sure(f"{MODULE}.lora_A.weight") == 0
    assert sure() == 0
