"""Pixels to the transformer's image tokens and back.

A VAE latent (B, C, H/8, W/8) is cut in 2x2 patches; a token holds its patch as (row, column, channel), the
channel varying fastest, and is normalised by the running statistics of the VAE's batch norm. The maths is
that of `Ideogram4Pipeline`'s decoding and of diffusers' DreamBooth example for this model.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models.autoencoders.autoencoder_kl_flux2 import AutoencoderKLFlux2
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from torch import Tensor

PATCH = 2
ALIVE = 3  # activations at full resolution that an encoder's block needs: the sum, and a convolution's two ends
SPARE = 1.25  # of what they take, that an image wants
PIXELS = 16  # of a token's side: 8 from the VAE, 2 from the patch


@torch.no_grad()
def encode_image(vae: AutoencoderKLFlux2, pixels: Tensor) -> Tensor:
    """Encode images (B, 3, H, W) in [-1, 1] into normalised tokens (B, H/16 · W/16, 4 · C), float32.

    Takes the mode of the posterior: the same image always gives the same tokens. Sides are multiples of 16.
    """
    assert pixels.shape[-2] % PIXELS == 0 == pixels.shape[-1] % PIXELS, f"{tuple(pixels.shape)} has odd sides"
    encoded = _encoded(vae, pixels.to(vae.device, vae.dtype))
    latent = DiagonalGaussianDistribution(encoded).mode().float()
    mean, std = _statistics(vae)
    return (patchify(latent) - mean) / std


def encoding_bytes(vae: AutoencoderKLFlux2, width: int, height: int) -> int:
    """Most memory that encoding an image of that size takes besides the weights, and a quarter more to be safe.

    At full resolution three activations of the first width are alive: of the real model in float32, 1.5 GiB at 1024 px
    and 3.4 GiB at 1536 px (counted by running it on fake tensors; `AutoencoderKLFlux2.encode` holds five). What cuDNN
    takes on top it takes where it can.
    """
    channels: int = vae.config["block_out_channels"][0]
    return int(SPARE * ALIVE * channels * width * height * vae.dtype.itemsize)


def _encoded(vae: AutoencoderKLFlux2, pixels: Tensor) -> Tensor:
    """`vae.encode` without its spare copies: equal bits (a test compares them), three fifths of the memory."""
    encoder: Any = vae.encoder
    hidden = encoder.conv_in(pixels)
    del pixels
    for down in encoder.down_blocks:
        for resnet in down.resnets:
            hidden = _resnet(resnet, hidden)
        for downsampler in down.downsamplers or ():
            hidden = downsampler(hidden)
    hidden = encoder.mid_block(hidden)
    hidden = encoder.conv_out(encoder.conv_act(encoder.conv_norm_out(hidden)))
    return hidden if vae.quant_conv is None else vae.quant_conv(hidden)


def _resnet(block: Any, hidden: Tensor) -> Tensor:
    """diffusers' ResnetBlock2D without time, with its activations in place."""
    assert block.output_scale_factor == 1
    assert block.time_emb_proj is None
    change = F.silu(block.norm1(hidden), inplace=True)
    change = block.conv1(change)
    change = F.silu(block.norm2(change), inplace=True)
    change = block.conv2(change)
    return change.add_(hidden if block.conv_shortcut is None else block.conv_shortcut(hidden))


@torch.no_grad()
def decode_tokens(vae: AutoencoderKLFlux2, tokens: Tensor, grid: tuple[int, int]) -> Tensor:
    """Decode normalised tokens (B, h · w, 4 · C) of a grid (h, w) into images (B, 3, 16h, 16w), float32."""
    mean, std = _statistics(vae)
    latent = unpatchify(tokens.to(vae.device, torch.float32) * std + mean, grid)
    return vae.decode(latent.to(vae.dtype)).sample.float()


def patchify(latent: Tensor) -> Tensor:
    """Cut a latent (B, C, 2h, 2w) into tokens (B, h · w, 4 · C)."""
    patches = latent.unflatten(3, (-1, PATCH)).unflatten(2, (-1, PATCH))  # B, C, h, row, w, column
    return patches.permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)


def unpatchify(tokens: Tensor, grid: tuple[int, int]) -> Tensor:
    """Undo `patchify` for a grid (h, w)."""
    patches = tokens.unflatten(2, (PATCH, PATCH, -1)).unflatten(1, grid)  # B, h, w, row, column, C
    return patches.permute(0, 5, 1, 3, 2, 4).flatten(4).flatten(2, 3)


def _statistics(vae: AutoencoderKLFlux2) -> tuple[Tensor, Tensor]:
    statistics: Any = vae.bn
    return statistics.running_mean.float(), torch.sqrt(statistics.running_var.float() + statistics.eps)
