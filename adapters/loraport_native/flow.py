"""Flow matching as Ideogram 4 defines it.

Time t runs from 0 (noise) to 1 (data); σ = 1 − t. Sources, in diffusers 0.42.1: the schedule, the shift for resolution
and the sign of the velocity in `pipelines/ideogram4/pipeline_ideogram4.py`, the loss in
`examples/dreambooth/train_dreambooth_lora_ideogram4.py`.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F

#: Resolution at which the schedule's mean is not shifted, in pixels (512 × 512).
BASE_PIXELS = 512 * 512


def shifted_mean(mean: float, width: int, height: int) -> float:
    """Mean of logit(σ) for an image of this size in pixels: mean + ½·ln(pixels / 512²).

    Larger images need more noise to hide the same detail.
    """
    return mean + 0.5 * math.log(width * height / BASE_PIXELS)


def sample_sigma(count: int, mean: float, std: float, generator: torch.Generator) -> torch.Tensor:
    """σ (count,) float32 on the CPU, logit-normal: σ = sigmoid(mean + std·z) with z standard normal."""
    return torch.sigmoid(mean + std * torch.randn(count, generator=generator))


def noisy(data: torch.Tensor, noise: torch.Tensor, sigma: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The model's input and target for data (B, N, C), noise (B, N, C) and σ (B,).

    x = (1 − σ)·data + σ·noise; the target is the velocity towards the data, data − noise.
    """
    level = sigma.view(-1, 1, 1)
    return (1 - level) * data + level * noise, data - noise


def losses(prediction: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Mean squared error of each sample (B,), in float32, over tokens and channels of (B, N, C)."""
    return F.mse_loss(prediction.float(), target.float(), reduction="none").mean(dim=(1, 2))
