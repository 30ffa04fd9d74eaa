"""The two passes over a dataset: images to VAE latents, captions to projected text features.

Each loads its models, writes what is missing to the store, and lets go of the models before it returns.
"""

from __future__ import annotations

import gc
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from diffusers.models.normalization import RMSNorm
from PIL import Image, ImageOps
from torch import Tensor, nn
from transformers import Qwen3VLModel

from loraport.buckets import Size, fit
from loraport.dataset import Item, load_image
from loraport.errors import DataError
from loraport.run.events import Event, Progress
from loraport_native.cache import Store
from loraport_native.device import free_memory_bytes
from loraport_native.models.checkpoint import Checkpoint, load_text_encoder, load_tokenizer, load_vae
from loraport_native.models.ideogram4 import Ideogram4
from loraport_native.models.latents import encode_image
from loraport_native.models.text import encode
from loraport_native.models.weights import Weights, fill

LATENTS, TEXT = "latents", "text"
MARGIN = 2 * 2**30  #: bytes of a card left for what the text encoder computes
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
    pictures: Mapping[str, Picture], checkpoint: Checkpoint, device: torch.device | str, store: Store, emit: Emit
) -> None:
    """Write the latents (N, channels), float32, of each picture under its key.

    The VAE runs in float32: it is done once, and rounding here would be trained. Raises DataError naming an
    image whose pixels cannot be read.
    """
    if not pictures:
        return
    vae = load_vae(checkpoint, torch.float32, device)
    for done, (key, picture) in enumerate(pictures.items(), start=1):
        latents = encode_image(vae, pixels_of(picture).to(device))[0]
        _refuse_non_finite(latents, f"{picture.item.image}: the VAE's latents")
        store.write(LATENTS, key, {LATENTS: latents})
        emit(Progress(done=done, total=len(pictures)))
    del vae
    free_memory()


@torch.no_grad()
def encode_captions(
    captions: Mapping[str, str],
    checkpoint: Checkpoint,
    max_tokens: int,
    dtype: torch.dtype,
    device: torch.device | str,
    store: Store,
    emit: Emit,
) -> None:
    """Write the projected text features (T, hidden) of each caption (key → caption) in `dtype` under its key."""
    if not captions:
        return
    tokenizer = load_tokenizer(checkpoint)
    text_encoder = _place_text_encoder(checkpoint, dtype, torch.device(device))
    project = load_text_projection(checkpoint, dtype, device)
    for done, (key, caption) in enumerate(captions.items(), start=1):
        (features,) = encode(text_encoder, tokenizer, [caption], max_tokens)
        text = project(features[None])[0]
        _refuse_non_finite(text, f"The text features of the caption {caption[:60]!r}")
        store.write(TEXT, key, {TEXT: text})
        emit(Progress(done=done, total=len(captions)))
    del text_encoder, project
    free_memory()


def _place_text_encoder(checkpoint: Checkpoint, dtype: torch.dtype, device: torch.device) -> Qwen3VLModel:
    """The text encoder on the device, or, on a CUDA card that cannot hold it, in host memory with its blocks visiting
    the card in turn. The numbers are the same; only the time differs."""
    if device.type != "cuda" or _text_encoder_bytes(checkpoint, dtype) < free_memory_bytes(device) - MARGIN:
        return load_text_encoder(checkpoint, dtype, device)
    print("The text encoder does not fit the card; its blocks are streamed from host memory.", flush=True)
    return stream_blocks(load_text_encoder(checkpoint, dtype, "cpu"), device)


def stream_blocks(text_encoder: Qwen3VLModel, device: torch.device) -> Qwen3VLModel:
    """Keep the encoder in host memory and bring one block at a time to the CUDA device (inference only)."""
    from diffusers.hooks import apply_group_offloading

    apply_group_offloading(
        text_encoder.language_model,
        onload_device=device,
        offload_device=torch.device("cpu"),
        offload_type="block_level",
        num_blocks_per_group=1,
        use_stream=True,
    )
    return text_encoder


def _text_encoder_bytes(checkpoint: Checkpoint, dtype: torch.dtype) -> int:
    weights = Weights(checkpoint.text_encoder)
    parameters = sum(math.prod(weights.shape(name)) for name in weights.names if "visual." not in name)
    return parameters * dtype.itemsize


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
    if torch.backends.mps.is_available():
        torch.mps.empty_cache()


def _refuse_non_finite(tensor: Tensor, what: str) -> None:
    if not torch.isfinite(tensor).all():
        raise DataError(f"{what} hold NaN or infinity.", hint="Set model.dtype to bf16 or fp32.")
