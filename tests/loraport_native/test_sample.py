"""Drawing while training: the pipeline's own images, and a training that never notices."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import Ideogram4Pipeline
from PIL import Image

from loraport.errors import DataError
from loraport.run.events import Sample

PROMPT = json.dumps({"compositional_deconstruction": {"background": "fog", "elements": []}}, separators=(",", ":"))
PLAIN = "a red kite, high up"


def sampling(guidance: float, **changes: Any) -> dict[str, Any]:
    return {
        "every": 5,
        "prompts": [PROMPT, PLAIN],
        "steps": 3,
        "guidance": guidance,
        "width": 96,
        "height": 64,
        "seed": 11,
        **changes,
    }


@pytest.mark.parametrize("guidance", [1.0, 7.0])
def test_an_untrained_model_draws_what_diffusers_draws(
    guidance: float, make_spec, make_trainer, tiny_diffusers: Path, tmp_path: Path
) -> None:
    """diffusers' pipeline with its own transformers and text encoder, prompts padded to a fixed length."""
    spec = make_spec(model={"checkpoint": str(tiny_diffusers)}, sample=sampling(guidance))
    trainer = make_trainer(spec)
    trainer.model.eval()
    trainer.draw_samples(0)

    pipeline = Ideogram4Pipeline.from_pretrained(tiny_diffusers, torch_dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    for number, prompt in enumerate((PROMPT, PLAIN)):
        expected = pipeline(
            prompt,
            height=64,
            width=96,
            num_inference_steps=3,
            guidance_scale=guidance,
            guidance_schedule=None,
            max_sequence_length=128,
            generator=torch.Generator().manual_seed(11),
        ).images[0]
        with Image.open(tmp_path / "run" / "samples" / f"step-000000-{number}.png") as image:
            assert (image.format, image.size) == ("PNG", (96, 64))
            difference = np.abs(np.asarray(image, int) - np.asarray(expected, int))
        assert difference.max() <= 1, "a float32 sum in another order may round a pixel differently"
        assert np.asarray(expected).std() > 5, "and there is something to see"


def test_training_is_unaffected_by_drawing(make_spec, make_trainer, tmp_path: Path) -> None:
    changes: dict[str, Any] = {"lora": {"dropout": 0.3}, "train": {"ema_decay": 0.9}}
    drawing = make_trainer(make_spec(**changes, sample=sampling(7.0, prompts=[PLAIN])), tmp_path / "drawing")
    drawing.fit()
    make_trainer(make_spec(**changes), tmp_path / "alone").fit()
    told = [event for event in drawing.events if isinstance(event, Sample)]
    assert [(event.step, event.path) for event in told] == [
        (5, "samples/step-000005-0.png"),
        (10, "samples/step-000010-0.png"),
    ]
    files = [run / "checkpoints/step-000010/adapter.safetensors" for run in (tmp_path / "drawing", tmp_path / "alone")]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_what_is_drawn_follows_the_training(make_spec, make_trainer, tmp_path: Path) -> None:
    spec = make_spec(train={"learning_rate": 1e-2}, sample=sampling(1.0, prompts=[PLAIN]))
    make_trainer(spec).fit()
    first, second = (
        np.asarray(Image.open(tmp_path / "run" / "samples" / f"step-{step:06d}-0.png"), int) for step in (5, 10)
    )
    assert np.abs(first - second).mean() > 1


def test_bf16_draws_too(make_spec, make_trainer, tmp_path: Path) -> None:
    trainer = make_trainer(make_spec(model={"dtype": "bf16"}, sample=sampling(7.0, prompts=[PLAIN])))
    trainer.model.eval()
    trainer.draw_samples(3)
    with Image.open(tmp_path / "run" / "samples" / "step-000003-0.png") as image:
        assert np.asarray(image).std() > 5


def test_guidance_without_the_unconditional_transformer_is_refused_before_training(
    make_spec, make_trainer, tiny_official: Path, tmp_path: Path
) -> None:
    """Not after the first hundreds of steps, when the first sample is due. At guidance 1 it is not needed."""
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    for part in tiny_official.iterdir():
        if part.is_dir() and part.name != "unconditional_transformer":
            (folder / part.name).symlink_to(part)
    with pytest.raises(DataError, match="unconditional_transformer"):
        make_trainer(make_spec(model={"checkpoint": str(folder)}, sample=sampling(7.0)))
    make_trainer(make_spec(model={"checkpoint": str(folder)}, sample=sampling(1.0)))
    make_trainer(make_spec(model={"checkpoint": str(folder)}))
