"""The two passes over a dataset: images to VAE latents, captions to projected text features.

Each loads its models, writes what is missing to the store, and lets go of the models before it returns.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from diffusers.models.autoencoders.autoencoder_kl_flux2 import AutoencoderKLFlux2
from diffusers.models.normalization import RMSNorm
from PIL import Image, ImageOps
from torch import Tensor, nn

from loraport.buckets import Size, fit
from loraport.dataset import Item, load_image
from loraport.errors import DataError
from loraport.run.events import Event, Progress
from loraport_native.cache import Store
from loraport_native.device import free_memory_bytes, peak_memory_gib, restart_peak
from loraport_native.models.checkpoint import Checkpoint, load_text_encoder, load_tokenizer, load_vae
from loraport_native.models.ideogram4 import Ideogram4
from loraport_native.models.latents import encode_image, encoding_bytes
from loraport_native.models.text import encode
from loraport_native.models.weights import Weights, fill

LATENTS, TEXT = "latents", "text"
#: Bytes of a card that blocks of the text encoder which stay there leave free: for two more and what they compute.
SPARE = 3 * 2**30
Emit = Callable[[Event], None]


@dataclass(frozen=True)
class Picture:
    """An image in the size (width, height) and orientation it is trained at."""

    item: Item
    bucket: Size
    mirrored: bool = False


class TextProjection(nn.Module):
    """The part of the transformer that takes text features to its width, with the model's own names and maths."""

    def __init__(self, features: int, hidden: int) -> None:
        super().__init__()
        self.llm_cond_norm = RMSNorm(features, eps=1e-6, elementwise_affine=True)
        self.llm_cond_proj = nn.Linear(features, hidden)

    @property
    def dtype(self) -> torch.dtype:
        return self.llm_cond_proj.weight.dtype

    forward = Ideogram4.project_text


def text_widths(checkpoint: Checkpoint) -> tuple[int, int]:
    """(hidden, features): what the text projection gives and takes a token. Reads headers only."""
    hidden, features = Weights(checkpoint.transformer).shape("llm_cond_proj.weight")
    return hidden, features


def load_text_projection(checkpoint: Checkpoint, dtype: torch.dtype, device: torch.device | str) -> TextProjection:
    """Load llm_cond_norm and llm_cond_proj alone, frozen. Raises DataError naming the tensor at fault."""
    hidden, features = text_widths(checkpoint)
    with torch.device("meta"):
        projection = TextProjection(features, hidden)
    others = lambda name: not name.startswith(("llm_cond_norm.", "llm_cond_proj."))  # noqa: E731
    fill(projection, Weights(checkpoint.transformer), dtype, device, ignored=others)
    return projection.eval()


def encode_images(
    pictures: Mapping[str, Picture], checkpoint: Checkpoint, device: torch.device, store: Store, emit: Emit
) -> None:
    """Write the latents (N, channels), float32, of each picture under its key.

    The VAE runs in float32: it is done once, and rounding here would be trained. Raises DataError naming an
    image whose pixels cannot be read.
    """
    if not pictures:
        return
    restart_peak(device)
    vae = load_vae(checkpoint, torch.float32, device)
    for done, (key, picture) in enumerate(pictures.items(), start=1):
        nn.Module.to(vae, _where_it_fits(vae, picture, device))
        latents = encode_image(vae, pixels_of(picture))[0]
        _refuse_non_finite(latents, f"{picture.item.image}: the VAE's latents")
        store.write(LATENTS, key, {LATENTS: latents})
        emit(Progress(done=done, total=len(pictures), peak_memory_gib=peak_memory_gib(device)))
    del vae
    free_memory()


def _where_it_fits(vae: AutoencoderKLFlux2, picture: Picture, device: torch.device) -> torch.device:
    """The device; or the CPU, for a picture that needs more than is free on a CUDA card. It is slow and changes
    nothing else: a smaller tile or a shorter dtype would change the latents."""
    if device.type != "cuda" or encoding_bytes(vae, *picture.bucket) < free_memory_bytes(device):
        return device
    width, height = picture.bucket
    need = encoding_bytes(vae, width, height) / 2**30
    print(f"{picture.item.image}: {width} x {height} px take {need:.1f} GiB: encoded on the CPU.", flush=True)
    return torch.device("cpu")


@torch.no_grad()
def encode_captions(
    captions: Mapping[str, str],
    checkpoint: Checkpoint,
    max_tokens: int,
    dtype: torch.dtype,
    storage: str,
    device: torch.device,
    store: Store,
    emit: Emit,
) -> None:
    """Write the projected text features (T, hidden) of each caption (key → caption) in `dtype` under its key.

    storage: of the text encoder's weights (`memory.text_encoder`); see `TextEncoder`.
    """
    if not captions:
        return
    restart_peak(device)
    tokenizer = load_tokenizer(checkpoint)

    def room() -> int:
        return free_memory_bytes(device) - SPARE if device.type == "cuda" else 0

    text_encoder = load_text_encoder(checkpoint, dtype, device, storage, room)
    project = load_text_projection(checkpoint, dtype, device)
    encoded = encode(text_encoder, tokenizer, list(captions.values()), max_tokens)
    for done, ((key, caption), features) in enumerate(zip(captions.items(), encoded, strict=True), start=1):
        text = project(features[None])[0]
        _refuse_non_finite(text, f"The text features of the caption {caption[:60]!r}")
        store.write(TEXT, key, {TEXT: text})
        emit(Progress(done=done, total=len(captions), peak_memory_gib=peak_memory_gib(device)))
    del text_encoder, project, encoded
    free_memory()


def pixels_of(picture: Picture) -> Tensor:
    """The picture as (1, 3, height, width) in [-1, 1], float32. Raises DataError naming a damaged file."""
    image: Image.Image = fit(load_image(picture.item), picture.bucket)
    if picture.mirrored:
        image = ImageOps.mirror(image)
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None]
    return pixels.float() / 127.5 - 1


def free_memory() -> None:
    """Give back what a model that nobody refers to any more still holds."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch._C._host_emptyCache()  # pinned memory, which torch else keeps
    if torch.backends.mps.is_available():
        torch.mps.empty_cache()


def _refuse_non_finite(tensor: Tensor, what: str) -> None:
    if not torch.isfinite(tensor).all():
        raise DataError(f"{what} hold NaN or infinity.", hint="Set model.dtype to bf16 or fp32.")
