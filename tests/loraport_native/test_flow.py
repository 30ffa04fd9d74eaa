"""The maths of training against diffusers': schedule, noise, target and loss, down to the gradients of the LoRA.

The reference step is what diffusers' DreamBooth example for this model does, told again: diffusers' own transformer
from the diffusers layout, the whole sequence padded to a fixed text length and masked, features of full width.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKLFlux2, Ideogram4Pipeline, Ideogram4Transformer2DModel
from diffusers.pipelines.ideogram4.pipeline_ideogram4 import _resolution_aware_mu
from diffusers.training_utils import compute_density_for_timestep_sampling
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor
from transformers import Qwen3VLModel

from loraport_native import flow
from loraport_native.data import Sample
from loraport_native.models.checkpoint import find_checkpoint, load_tokenizer
from loraport_native.trainer import derived_seed

LONGEST = 64  # text tokens that the reference pads every caption to
RANK, ALPHA = 4, 6.0


@pytest.mark.parametrize(("width", "height"), [(512, 512), (1024, 1024), (64, 64), (1536, 640), (16, 2048)])
@pytest.mark.parametrize("mean", [0.0, -1.25])
def test_the_shift_for_resolution_is_the_pipelines(width: int, height: int, mean: float) -> None:
    assert flow.shifted_mean(mean, width, height) == _resolution_aware_mu(height=height, width=width, base_mu=mean)


@pytest.mark.parametrize(("mean", "std"), [(0.0, 1.5), (0.7, 1.0)])
def test_noise_levels_are_distributed_as_diffusers_draws_them(mean: float, std: float) -> None:
    """First four moments of 200,000 draws each; the tolerance is five standard errors."""
    count = 200_000
    ours = flow.sample_sigma(count, mean, std, torch.Generator().manual_seed(0)).double()
    theirs = compute_density_for_timestep_sampling(
        "logit_normal", count, logit_mean=mean, logit_std=std, generator=torch.Generator().manual_seed(1)
    ).double()
    assert 0 < ours.min() < ours.max() < 1
    for power in (1, 2, 3, 4):
        error = 5 * (2 * ours.pow(power).var() / count).sqrt()
        assert abs(ours.pow(power).mean() - theirs.pow(power).mean()) < error
    logit = ours.logit()
    assert abs(logit.mean() - mean) < 5 * std / count**0.5
    assert abs(logit.std() - std) < 5 * std / (2 * count) ** 0.5


def reference_latents(folder: Path, image: Path) -> Tensor:
    """The image as the example's tokens (1, N, 128): VAE mode, 2 × 2 patches with the channel last, batch norm."""
    import numpy as np
    from PIL import Image

    vae = AutoencoderKLFlux2.from_pretrained(folder / "vae").eval()
    pixels = torch.from_numpy(np.array(Image.open(image).convert("RGB"))).permute(2, 0, 1)[None] / 127.5 - 1
    with torch.no_grad():
        latent = vae.encode(pixels).latent_dist.mode()
    tokens = []
    for row in range(0, latent.shape[2], 2):
        for column in range(0, latent.shape[3], 2):
            patch = latent[0, :, row : row + 2, column : column + 2]  # channel, row, column
            tokens.append(torch.cat([patch[:, i, j] for i in (0, 1) for j in (0, 1)]))
    deviation = torch.sqrt(vae.bn.running_var + vae.config.batch_norm_eps)
    return ((torch.stack(tokens) - vae.bn.running_mean) / deviation)[None]


def reference_conditioning(folder: Path, captions: list[str]) -> tuple[Tensor, ...]:
    checkpoint = find_checkpoint(str(folder))
    pipeline = Ideogram4Pipeline(
        scheduler=None,
        vae=None,
        text_encoder=Qwen3VLModel.from_pretrained(checkpoint.text_encoder, dtype=torch.float32),
        tokenizer=load_tokenizer(checkpoint),
        transformer=None,
        unconditional_transformer=None,
    )
    with torch.no_grad():
        return pipeline.encode_prompt(captions, 4, 4, max_sequence_length=LONGEST, device=torch.device("cpu"))


def reference_loss(
    transformer: Any, latents: Tensor, noise: Tensor, sigma: Tensor, conditioning: tuple[Tensor, ...]
) -> Tensor:
    features, positions, segments, indicator = conditioning
    level = sigma[:, None, None]
    mixed = level * noise + (1 - level) * latents
    blank = torch.zeros(len(latents), LONGEST, latents.shape[-1])
    prediction = transformer(
        hidden_states=torch.cat((blank, mixed), dim=1),
        timestep=1 - sigma,
        encoder_hidden_states=features,
        position_ids=positions,
        segment_ids=segments,
        indicator=indicator,
        return_dict=False,
    )[0][:, LONGEST:]
    wanted = latents - noise
    return (prediction - wanted).square().flatten(1).mean(1).mean()


def test_one_step_is_the_dreambooth_examples_step(make_spec, make_trainer, tiny_diffusers, photos) -> None:
    """Same photos, captions, noise and levels: the same latents, loss, and gradient of every adapted weight.

    Ours is fused and theirs is split, so theirs gets our adapter as weights: W + s·B·A cut into q, k and v. From the
    gradient G of the loss in that weight follow those of the factors: ∂A = s·Bᵀ·G and ∂B = s·G·Aᵀ.
    """
    spec = make_spec(
        model={"checkpoint": str(tiny_diffusers)},
        lora={"rank": RANK, "alpha": ALPHA, "targets": "all"},
        train={"batch_size": 4},
    )
    trainer = make_trainer(spec)
    fill_up_factors(trainer)
    batch = trainer._batch(0)
    assert len(batch) == 4
    assert len({len(trainer.data.text(sample.text)) for sample in batch}) > 1, (
        "captions of several lengths: a packed batch"
    )
    trainer.model.train()
    loss = trainer._loss(batch, 0)
    loss.backward()

    latents = torch.cat([reference_latents(tiny_diffusers, photos / sample.name) for sample in batch])
    ours = torch.stack([trainer.data.latents(sample) for sample in batch])
    torch.testing.assert_close(ours, latents, rtol=1e-4, atol=1e-4)
    sigma, noise = drawn(trainer, batch, latents.shape)
    transformer = Ideogram4Transformer2DModel.from_pretrained(tiny_diffusers / "transformer")
    captions = [(photos / sample.name).with_suffix(".txt").read_text() for sample in batch]
    add_adapter(transformer, trainer)
    expected = reference_loss(transformer, latents, noise, sigma, reference_conditioning(tiny_diffusers, captions))
    expected.backward()

    torch.testing.assert_close(loss.detach(), expected.detach(), rtol=1e-5, atol=0)
    factors, scales = trainer.adapter.factors, trainer.adapter.scales
    assert len(scales) == 3 * 6
    for name, scale in scales.items():
        weight_gradient = torch.cat([transformer.get_parameter(part).grad for part in parts(name)])
        down, up = factors[f"{name}.lora_A"], factors[f"{name}.lora_B"]
        close(down.grad, scale * up.detach().T @ weight_gradient)
        close(up.grad, scale * weight_gradient @ down.detach().T)


def test_peft_on_the_split_model_has_the_gradients_of_our_rows(make_spec, make_trainer, tiny_diffusers) -> None:
    """Three adapters of one A, on to_q, to_k and to_v: our B's rows are theirs, our A's gradient is their sum."""
    spec = make_spec(
        model={"checkpoint": str(tiny_diffusers)}, lora={"rank": RANK, "alpha": ALPHA, "targets": [r".*\.qkv"]}
    )
    trainer = make_trainer(spec)
    fill_up_factors(trainer)
    batch = trainer._batch(0)
    trainer._loss(batch, 0).backward()

    transformer = Ideogram4Transformer2DModel.from_pretrained(tiny_diffusers / "transformer")
    transformer.requires_grad_(False)
    inject_adapter_in_model(LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=["to_q", "to_k", "to_v"]), transformer)
    factors = trainer.adapter.factors
    with torch.no_grad():
        for name in trainer.adapter.scales:
            rows = factors[f"{name}.lora_B"].chunk(3)
            for part, row in zip(parts(name), rows, strict=True):
                layer = transformer.get_submodule(part.removesuffix(".weight"))
                layer.lora_A["default"].weight.copy_(factors[f"{name}.lora_A"])
                layer.lora_B["default"].weight.copy_(row)
    latents = torch.stack([trainer.data.latents(sample) for sample in batch])
    sigma, noise = drawn(trainer, batch, latents.shape)
    caption = [sample_caption(spec.dataset.path, sample) for sample in batch]
    reference_loss(transformer, latents, noise, sigma, reference_conditioning(tiny_diffusers, caption)).backward()
    for name in trainer.adapter.scales:
        layers = [transformer.get_submodule(part.removesuffix(".weight")) for part in parts(name)]
        close(factors[f"{name}.lora_B"].grad, torch.cat([layer.lora_B["default"].weight.grad for layer in layers]))
        close(factors[f"{name}.lora_A"].grad, sum(layer.lora_A["default"].weight.grad for layer in layers))


def fill_up_factors(trainer: Any) -> None:
    draw = torch.Generator().manual_seed(9)
    for name, factor in trainer.adapter.factors.items():
        if name.endswith("lora_B"):
            factor.data.normal_(std=0.1, generator=draw)


def drawn(trainer: Any, batch: list[Sample], shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """The noise levels and noise of the first forward pass, drawn again as the trainer draws them."""
    generator = torch.Generator().manual_seed(derived_seed(trainer.spec.train.seed, "train", 0))
    torch.rand(len(batch), generator=generator)  # which captions are dropped
    mean = _resolution_aware_mu(height=64, width=64, base_mu=trainer.spec.train.timestep_mean)
    normal = torch.randn(len(batch), generator=generator)
    sigma = torch.sigmoid(mean + trainer.spec.train.timestep_std * normal)
    return sigma, torch.randn(shape, generator=generator)


def add_adapter(transformer: Any, trainer: Any) -> None:
    factors = trainer.adapter.factors
    with torch.no_grad():
        for name, scale in trainer.adapter.scales.items():
            change = scale * factors[f"{name}.lora_B"] @ factors[f"{name}.lora_A"]
            names = parts(name)
            for part, rows in zip(names, change.chunk(len(names)), strict=True):
                transformer.get_parameter(part).add_(rows)


def parts(module: str) -> list[str]:
    """diffusers' weights that make an official module."""
    block, _, layer = module.rpartition(".")
    split = {"qkv": ["to_q", "to_k", "to_v"], "o": ["to_out.0"]}.get(layer, [layer])
    return [f"{block}.{part}.weight" for part in split]


def sample_caption(folder: Path, sample: Sample) -> str:
    return (folder / sample.name).with_suffix(".txt").read_text()


def close(got: Tensor | None, expected: Any) -> None:
    """Within 1e-4 of the largest number: float32 sums in another order."""
    assert got is not None
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))
    assert expected.abs().max() > 0
