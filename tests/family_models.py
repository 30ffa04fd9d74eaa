"""Every family's diffusers model at its real size and without weights, and the same made small."""

import contextlib
import functools
import logging

import pytest

from loraport_convert.families import FAMILIES
from loraport_convert.families.rules import cuts


def build(name, **sizes):
    """A family's model on the meta device; its published configuration, unless `sizes` say otherwise."""
    torch = pytest.importorskip("torch")
    diffusers = pytest.importorskip("diffusers")
    logging.getLogger("diffusers").setLevel(logging.ERROR)
    kind, config = CONFIGS[name]
    with torch.device("meta"):
        return getattr(diffusers, kind)(**{**config, **sizes})


@functools.cache
def modules(name):
    """(rows, columns) of every Linear and convolution of a model, by its name."""
    import torch

    kinds = (torch.nn.Linear, torch.nn.modules.conv._ConvNd)
    return {
        name: (module.weight.shape[0], module.weight[0].numel())
        for name, module in build(name).named_modules()
        if isinstance(module, kinds)
    }


@functools.cache
def norms(model):
    """{name: whether it has a bias} of every norm of a model that has a weight."""
    return {
        name: getattr(module, "bias", None) is not None
        for name, module in build(model).named_modules()
        if name not in modules(model) and getattr(getattr(module, "weight", None), "ndim", 0) == 1
    }


def layout(model):
    """Native module → its rows as (first, stop, diffusers module, first, stop there, rows of the native one)."""
    family, placed = FAMILIES[family_of(model)], {}
    for name, shape in modules(model).items():
        spans = family.native(name, shape)
        assert spans, f"{model}: {name} has no native name"
        for span, (start, stop) in zip(spans, cuts(spans, shape[0]), strict=True):
            share = (stop - start) // span.count
            rows = (share * span.first, share * span.first + stop - start, name, start, stop, share * span.total)
            placed.setdefault(span.module, []).append(rows)
    return {native: sorted(rows) for native, rows in placed.items()}


def natives(model):
    """(rows, columns) of every native module by its name."""
    return {native: (rows[0][5], modules(model)[rows[0][2]][1]) for native, rows in layout(model).items()}


_SD = {"cross_attention_dim": 768, "attention_head_dim": 8}
_SDXL = {
    "block_out_channels": (320, 640, 1280),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 2, 10),
    "attention_head_dim": (5, 10, 20),
    "cross_attention_dim": 2048,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
_SD35_LARGE = {
    "num_layers": 38,
    "num_attention_heads": 38,
    "caption_projection_dim": 2432,
    "qk_norm": "rms_norm",
    "pos_embed_max_size": 192,
}
_SD35_MEDIUM = {
    "num_layers": 24,
    "num_attention_heads": 24,
    "caption_projection_dim": 1536,
    "qk_norm": "rms_norm",
    "dual_attention_layers": tuple(range(13)),
}
_WAN_I2V = {"image_dim": 1280, "added_kv_proj_dim": 5120, "in_channels": 36}
_WAN_SMALL = {"num_attention_heads": 12, "ffn_dim": 8960, "num_layers": 30}
_WAN_5B = {"num_attention_heads": 24, "ffn_dim": 14336, "num_layers": 30, "in_channels": 48, "out_channels": 48}
_KLEIN_4B = {"num_layers": 5, "num_single_layers": 20, "num_attention_heads": 24, "joint_attention_dim": 7680}
_KLEIN_9B = {"num_layers": 8, "num_single_layers": 24, "num_attention_heads": 32, "joint_attention_dim": 12288}

#: model → (class of diffusers, what differs from its defaults)
CONFIGS = {
    "ideogram4": ("Ideogram4Transformer2DModel", {}),
    "flux1": ("FluxTransformer2DModel", {"guidance_embeds": True}),
    "flux2": ("Flux2Transformer2DModel", {}),
    "flux2-klein-4b": ("Flux2Transformer2DModel", {**_KLEIN_4B, "guidance_embeds": False}),
    "flux2-klein-9b": ("Flux2Transformer2DModel", {**_KLEIN_9B, "guidance_embeds": False}),
    "qwen-image": ("QwenImageTransformer2DModel", {}),
    "z-image": ("ZImageTransformer2DModel", {}),
    "sdxl": ("UNet2DConditionModel", _SDXL),
    "sd15": ("UNet2DConditionModel", _SD),
    "sd3-medium": ("SD3Transformer2DModel", _SD35_MEDIUM | {"dual_attention_layers": (), "qk_norm": None}),
    "sd3-3.5-medium": ("SD3Transformer2DModel", _SD35_MEDIUM),
    "sd3-3.5-large": ("SD3Transformer2DModel", _SD35_LARGE),
    "wan-14b": ("WanTransformer3DModel", {}),
    "wan-14b-image": ("WanTransformer3DModel", _WAN_I2V),
    "wan-1.3b": ("WanTransformer3DModel", _WAN_SMALL),
    "wan-5b": ("WanTransformer3DModel", _WAN_5B),
    "krea2": ("Krea2Transformer2DModel", {}),
}
_VARIANT_OF = ("flux2", "sd3", "wan")


def family_of(model):
    """The family's name of a model here."""
    return next((family for family in _VARIANT_OF if model.startswith(family)), model)


with contextlib.suppress(ImportError):
    from diffusers.utils import logging as _logs

    _logs.set_verbosity_error()
