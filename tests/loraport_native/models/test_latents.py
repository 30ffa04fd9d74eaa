"""Tokens from pixels and back, against the pipeline's decoding written out."""

from __future__ import annotations

import weakref

import pytest
import torch
from diffusers import AutoencoderKLFlux2
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from loraport_native.models.checkpoint import find_checkpoint, load_vae
from loraport_native.models.latents import decode_tokens, encode_image, encoding_bytes, patchify, unpatchify


@pytest.fixture(scope="module")
def vae(tiny_official):
    return load_vae(find_checkpoint(str(tiny_official)), torch.float32, "cpu")


class Peak(TorchDispatchMode):
    """Counts the bytes of all tensors made inside it that are alive together."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.most = 0
        self.alive: dict[int, int] = {}

    def _free(self, storage: int) -> None:
        self.now -= self.alive.pop(storage)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            storage = tensor.untyped_storage() if isinstance(tensor, torch.Tensor) else None
            if storage is not None and storage._cdata not in self.alive:
                self.alive[storage._cdata] = storage.nbytes()
                self.now += storage.nbytes()
                self.most = max(self.most, self.now)
                weakref.finalize(storage, self._free, storage._cdata)
        return result


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


def test_encoding_with_less_memory_gives_the_vaes_own_bits(vae):
    pixels = torch.rand(1, 3, 64, 96) * 2 - 1
    with torch.no_grad():
        own = patchify(vae.encode(pixels).latent_dist.mode())
        deviation = torch.sqrt(vae.bn.running_var + vae.bn.eps)
        assert torch.equal(encode_image(vae, pixels), (own - vae.bn.running_mean) / deviation)


@pytest.mark.parametrize(("width", "height"), [(1024, 1024), (1920, 1072)])
def test_the_memory_that_encoding_takes_is_that_of_the_real_vae(width, height):
    """Counted on fake tensors, which have sizes and no data."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        real = AutoencoderKLFlux2()
        with Peak() as peak:
            encode_image(real, torch.empty(1, 3, height, width))
        assert peak.most < encoding_bytes(real, width, height) < 1.3 * peak.most
        with Peak() as stock, torch.no_grad():
            real.encode(torch.empty(1, 3, height, width))
    assert peak.most < 0.65 * stock.most


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
