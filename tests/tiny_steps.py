"""One step of the native trainer's model on the tiny checkpoint, without a trainer: prediction and gradients."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from loraport.spec.models import LoraSection, MemorySection
from loraport_native.lora import Adapter, inject
from loraport_native.models.checkpoint import find_checkpoint
from loraport_native.models.ideogram4 import Ideogram4
from loraport_native.placement import load_placed, set_passes

CPU = torch.device("cpu")
PATTERNS = [r"layers\.\d+\.attention\.(qkv|o)", r"layers\.\d+\.feed_forward\.w[123]"]


def model_with(
    checkpoint: Path,
    kind: str = "lora",
    dropout: float = 0.0,
    dora: bool = False,
    patterns: Sequence[str] = PATTERNS,
    **memory: str,
) -> tuple[Ideogram4, Adapter]:
    """A model in float32 under these settings of `memory`, with an adapter that already does something."""
    section = MemorySection.model_validate(
        {"storage": "fp8", "compute": "model", "offload": "none", "gradient_checkpointing": "full", **memory}
    )
    model, stream = load_placed(find_checkpoint(str(checkpoint)), section, torch.float32, CPU)
    lora = LoraSection.model_validate({"type": kind, "rank": 4, "alpha": 4, "dropout": dropout, "dora": dora})
    adapter = inject(model, lora, list(patterns), seed=0)
    draw = torch.Generator().manual_seed(1)
    for factor in adapter.parameters():
        if not dora or factor.dim() > 1:  # DoRA's magnitudes are those of the weights
            factor.data.normal_(std=0.1, generator=draw)
    set_passes(model, section, stream)
    return model, adapter


def step(
    model: Ideogram4,
    adapter: Adapter,
    lengths: list[int] | None = None,
    batch: int = 2,
    tokens: int = 5,
    grid: tuple[int, int] = (4, 4),
) -> list[torch.Tensor]:
    """The prediction and the adapter's gradients for a batch of `tokens` text tokens and an image of `grid` tokens."""
    draw = torch.Generator().manual_seed(3)
    latents = torch.randn(batch, grid[0] * grid[1], 128, generator=draw)
    text = torch.randn(batch, tokens, 128, generator=draw)
    torch.manual_seed(5)
    result = model.train().velocity(latents, text, lengths, torch.linspace(0.2, 0.7, batch), grid)
    result.square().sum().backward()
    gradients = [factor.grad for factor in adapter.parameters()]
    for factor in adapter.parameters():
        factor.grad = None
    return [result.detach(), *gradients]
