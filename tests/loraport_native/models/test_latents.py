"""Tokens from pixels and back, against the pipeline's decoding written out."""

from __future__ import annotations

import pytest
import torch

from loraport_native.models.checkpoint import find_checkpoint, load_vae
from loraport_native.models.latents import decode_tokens, encode_image, patchify, unpatchify


@pytest.fixture(scope="module")
def vae(tiny_official):
    return load_vae(find_checkpoint(str(tiny_official)), torch.float32, "cpu")


def pipeline_latent(tokens: torch.Tensor, vae, grid: tuple[int, int]) -> torch.Tensor:
    """`Ideogram4Pipeline.__call__`, step 9."""
    height, width = grid
    z = tokens * torch.sqrt(vae.bn.running_var + vae.config.batch_norm_eps) + vae.bn.running_mean
    z = z.view(len(tokens), height, width, 2, 2, 32).permute(0, 5, 1, 3, 2, 4)
    return z.reshape(len(tokens), 32, height * 2, width * 2)


def test_tokens_are_what_the_pipeline_would_decode_to_the_posterior_mode(vae):
    pixels = torch.rand(2, 3, 48, 80) * 2 - 1
    tokens = encode_image(vae, pixels)
    assert tokens.shape == (2, 15, 128)
    with torch.no_grad():
        mode = vae.encode(pixels).latent_dist.mode()
    torch.testing.assert_close(pipeline_latent(tokens, vae, (3, 5)), mode, rtol=1e-4, atol=1e-4)


def test_decoding_equals_the_pipelines_decoding(vae):
    tokens = torch.randn(1, 6, 128)
    with torch.no_grad():
        expected = vae.decode(pipeline_latent(tokens, vae, (3, 2))).sample
    torch.testing.assert_close(decode_tokens(vae, tokens, (3, 2)), expected, rtol=1e-4, atol=1e-4)


def test_patches_come_back_as_they_were():
    latent = torch.randn(2, 32, 6, 10)
    tokens = patchify(latent)
    assert torch.equal(unpatchify(tokens, (3, 5)), latent)
    assert torch.equal(tokens[0, 1, :32], latent[0, :, 0, 2])  # second column's patch, its upper left
    assert torch.equal(tokens[0, 1, 64:96], latent[0, :, 1, 2])  # the row below it
