"""Images drawn while training, by diffusers' own Ideogram 4 pipeline with the text already encoded."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from diffusers.pipelines.ideogram4.pipeline_ideogram4 import Ideogram4Pipeline

from loraport.errors import DataError
from loraport.files import atomic_path
from loraport.run.events import Event
from loraport.run.events import Sample as SampleEvent
from loraport.spec.models import TrainSpec
from loraport_native.data import TrainingSet
from loraport_native.features import free_memory
from loraport_native.models.checkpoint import Checkpoint, load_scheduler, load_vae
from loraport_native.models.ideogram4 import Ideogram4
from loraport_native.placement import load_placed


def is_guided(spec: TrainSpec) -> bool:
    """Whether samples are drawn that need the unconditional transformer."""
    return bool(spec.sample.every) and spec.sample.guidance != 1


def check_sampling(spec: TrainSpec, checkpoint: Checkpoint) -> None:
    """Raise DataError, before training, when the checkpoint cannot draw what the spec asks for."""
    if is_guided(spec) and checkpoint.unconditional_transformer is None:
        raise DataError(
            f"{checkpoint.root} has no unconditional_transformer, which drawing with sample.guidance: "
            f"{spec.sample.guidance:g} needs.",
            hint="Set sample.guidance: 1, or sample.every: 0 to draw nothing.",
        )


class _CachedTextPipeline(Ideogram4Pipeline):
    """The pipeline without its text encoder: the prompt's projected features come from the cache."""

    text: torch.Tensor  #: (T, hidden)

    def encode_prompt(
        self, prompt: Any, grid_h: int, grid_w: int, max_sequence_length: int, device: torch.device
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        length = len(self.text)
        image = self.text.new_zeros(grid_h * grid_w, self.text.shape[1])
        features = torch.cat((self.text, image))[None].to(device, torch.float32)
        positions, segments, indicator = self._prepare_ids([length], grid_h, grid_w, length, device)
        return features, positions, segments, indicator


class _NoGuidance(torch.nn.Module):
    """Stands in for the unconditional transformer at guidance 1, where its prediction has weight zero."""

    def __init__(self, dtype: torch.dtype, device: torch.device):
        super().__init__()
        self.dtype, self.device = dtype, device

    def forward(self, hidden_states: torch.Tensor, **_: Any) -> tuple[torch.Tensor]:
        return (torch.zeros_like(hidden_states),)


class Sampler:
    """Draws the spec's prompts into `samples/`. The VAE and the unconditional transformer are loaded for the drawing
    and freed after it, so they cost the training no memory."""

    def __init__(
        self,
        spec: TrainSpec,
        run_dir: Path,
        checkpoint: Checkpoint,
        model: Ideogram4,
        data: TrainingSet,
        emit: Callable[[Event], None],
    ):
        self.spec, self.run_dir, self.checkpoint = spec, run_dir, checkpoint
        self.model, self.data, self.emit = model, data, emit

    def draw(self, step: int) -> None:
        """Write `samples/step-NNNNNN-P.png` for each prompt P and tell it."""
        self._draw(step)
        free_memory()

    @torch.no_grad()
    def _draw(self, step: int) -> None:
        wanted = self.spec.sample
        device = self.model.embed_image_indicator.weight.device
        parts: dict[str, Any] = {
            "scheduler": load_scheduler(self.checkpoint),
            "vae": load_vae(self.checkpoint, self.model.dtype, device),
            "text_encoder": None,
            "tokenizer": None,
            "transformer": self.model,
            "unconditional_transformer": self._unconditional(device),
        }
        pipeline = _CachedTextPipeline(**parts)
        pipeline.set_progress_bar_config(disable=True)
        folder = self.run_dir / "samples"
        folder.mkdir(exist_ok=True)
        for number, prompt in enumerate(wanted.prompts):
            pipeline.text = self.data.text(self.data.extra_texts[prompt])
            image = pipeline(
                prompt=prompt,
                height=wanted.height,
                width=wanted.width,
                num_inference_steps=wanted.steps,
                guidance_scale=wanted.guidance,
                guidance_schedule=None,
                max_sequence_length=len(pipeline.text),
                generator=torch.Generator().manual_seed(wanted.seed),
            ).images[0]
            path = folder / f"step-{step:06d}-{number}.png"
            with atomic_path(path) as temporary:
                image.save(temporary, format="PNG")
            self.emit(SampleEvent(step=step, path=str(path.relative_to(self.run_dir))))

    def _unconditional(self, device: torch.device) -> torch.nn.Module:
        if not is_guided(self.spec):
            return _NoGuidance(self.model.dtype, device)
        part = "unconditional_transformer"
        other, stream = load_placed(self.checkpoint, self.spec.memory, self.model.dtype, device, part, trains=False)
        if stream is not None:
            stream.attach(other)
        return other.requires_grad_(False)
