"""What the tests of the native trainer share: tiny checkpoints, photographs, specs and trainers made from them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from loraport.plugins import plugins
from loraport.profiles import resolve_memory
from loraport.run.events import Event
from loraport.spec.models import TrainSpec

CAPTIONS = ("a red dot", "two blue lines crossing over a grey field", "a green square", "nothing but sand")


@pytest.fixture(scope="session")
def tiny_diffusers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from loraport_native.tiny import write_tiny

    return write_tiny(tmp_path_factory.mktemp("tiny") / "diffusers", "diffusers")


@pytest.fixture(scope="session")
def tiny_official(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from loraport_native.tiny import write_tiny

    return write_tiny(tmp_path_factory.mktemp("tiny") / "official", "official")


@pytest.fixture(scope="session")
def tiny_fp8(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from loraport_native.tiny import write_tiny

    return write_tiny(tmp_path_factory.mktemp("tiny") / "fp8", "official", fp8=True)


@pytest.fixture(scope="session", autouse=True)
def _feature_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LORAPORT_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four smooth images of 64 px, `0.png` to `3.png`, with captions of different lengths."""
    folder = tmp_path_factory.mktemp("photos")
    for number, caption in enumerate(CAPTIONS):
        coarse = np.random.default_rng(number).integers(0, 255, (6, 6, 3), dtype=np.uint8)
        Image.fromarray(coarse).resize((64, 64), Image.Resampling.BICUBIC).save(folder / f"{number}.png")
        (folder / f"{number}.txt").write_text(caption)
    return folder


@pytest.fixture(scope="session")
def make_spec(photos: Path, tiny_official: Path) -> Callable[..., TrainSpec]:
    """make_spec(train={...}, lora={...}, …): ten steps of a float32 LoRA on the photos, changed by what is given."""

    def make(**sections: dict[str, Any]) -> TrainSpec:
        content: dict[str, Any] = {
            "name": "test",
            "model": {"checkpoint": str(tiny_official), "dtype": "fp32"},
            "dataset": {"path": str(photos), "caption_ext": "txt", "resolution": 64},
            "lora": {"rank": 4},
            "train": {"steps": 10, "optimizer": "adamw", "learning_rate": 1e-3},
            "memory": {"gradient_checkpointing": "none"},
            "save": {"every": 0},
            "backend": {"options": {"device": "cpu"}},
        }
        for name, values in sections.items():
            content[name] = {**content.get(name, {}), **values}
        return resolve_memory(TrainSpec.model_validate(content), plugins().profiles())

    return make


@pytest.fixture
def make_trainer(tmp_path: Path) -> Callable[..., Any]:
    """make_trainer(spec): the trainer of a spec, its events collected in `trainer.events`."""
    from loraport_native.train import make_trainer

    def make(spec: TrainSpec, run_dir: Path | None = None) -> Any:
        events: list[Event] = []
        run_dir = run_dir or tmp_path / "run"
        run_dir.mkdir(exist_ok=True)
        trainer = make_trainer(spec, run_dir, events.append)
        trainer.events = events
        return trainer

    return make
