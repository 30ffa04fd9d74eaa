"""The fixed (image, noise, noise level) triples of the held-out loss: the same in every run, whatever its seed."""

from __future__ import annotations

import torch
from torch import Tensor

from loraport.spec.models import TrainSection
from loraport_native import flow
from loraport_native.data import TrainingSet
from loraport_native.seeds import derived_seed

#: The noise levels are the middles of this many equal shares of the training distribution.
LEVELS = 4

Case = tuple[list[Tensor], Tensor, Tensor, list[str], tuple[int, int]]


def case_count(data: TrainingSet) -> int:
    """Each held-out image at each level."""
    return len(data.held_out) * LEVELS


def case(data: TrainingSet, train: TrainSection, number: int) -> Case:
    """On the CPU: latents [(N, channels)], noise (1, N, channels), σ (1,), the text's cache key, and the grid (height,
    width) in tokens."""
    image, level = divmod(number, LEVELS)
    z = torch.special.ndtri(torch.tensor((level + 0.5) / LEVELS, dtype=torch.float64)).float()
    sample = data.held_out[image]
    width, height = sample.bucket
    latents = data.latents(sample)[None]
    generator = torch.Generator().manual_seed(derived_seed(0, "validation", image, level))
    noise = torch.randn(latents.shape, generator=generator)
    sigma = torch.sigmoid(flow.shifted_mean(train.timestep_mean, width, height) + train.timestep_std * z)
    return list(latents), noise, sigma[None], [sample.text], (height // 16, width // 16)
