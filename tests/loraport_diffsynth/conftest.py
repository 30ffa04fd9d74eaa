"""What the tests of the DiffSynth adapter share: specs, pictures, and an interpreter that has DiffSynth."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from diffsynth_at_hand import find_or_install
from PIL import Image

from loraport.lora.storage import write_tensors
from loraport.plugins import plugins
from loraport.profiles import resolve_memory
from loraport.spec.models import TrainSpec

CAPTION = '{"high_level_description":"a grey slope","compositional_deconstruction":{"background":"grey","elements":[]}}'


def spec_of(**sections: Any) -> TrainSpec:
    """A resolved spec, changed by what is given: a section's values, or any other field's."""
    content: dict[str, Any] = {
        "name": "buggy",
        "model": {"checkpoint": "/models/ideogram-4"},
        "dataset": {"path": "/data/buggy"},
        "backend": {"name": "diffsynth"},
    }
    for name, values in sections.items():
        content[name] = {**content.get(name, {}), **values} if isinstance(values, dict) else values
    return resolve_memory(TrainSpec.model_validate(content), plugins().profiles())


@pytest.fixture(scope="session")
def make_spec() -> Callable[..., TrainSpec]:
    return spec_of


@pytest.fixture(scope="session")
def write_checkpoint() -> Callable[..., Path]:
    """write_checkpoint(folder, key, …): the files of a checkpoint, holding nothing but these keys."""

    def write(folder: Path, *keys: str) -> Path:
        for part in ("text_encoder/model", "vae/diffusion_pytorch_model", "transformer/diffusion_pytorch_model"):
            path = folder / f"{part}.safetensors"
            path.parent.mkdir(parents=True)
            write_tensors(path, {key: np.zeros(1, np.float32) for key in keys}, {})
        (folder / "tokenizer").mkdir()
        return folder

    return write


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """A folder with three images of different shapes and their JSON captions."""
    folder = tmp_path / "pictures, ünd more"
    folder.mkdir()
    for number, size in enumerate([(160, 128), (128, 128), (96, 200)]):
        Image.linear_gradient("L").resize(size).convert("RGB").save(folder / f"{number}.png")
        (folder / f"{number}.json").write_text(CAPTION.replace("slope", f"slope {number}"), encoding="utf-8")
    return folder


@pytest.fixture(scope="session")
def diffsynth_python(tmp_path_factory: pytest.TempPathFactory, worker_id: str) -> Path:
    return find_or_install(tmp_path_factory, worker_id)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from loraport_native.tiny import write_tiny

    return write_tiny(tmp_path_factory.mktemp("tiny") / "tiny, official", "official")


@pytest.fixture(scope="session")
def tiny_fp8(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from loraport_native.tiny import write_tiny

    return write_tiny(tmp_path_factory.mktemp("tiny") / "fp8", "official", fp8=True)
