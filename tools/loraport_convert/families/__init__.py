"""The model families whose module names the converter knows."""

from __future__ import annotations

from loraport_convert.families import norms, tables
from loraport_convert.families.rules import ModuleMap, Span
from loraport_convert.families.unet import unet_norms, unet_table

__all__ = ["ENCODERS", "FAMILIES", "ModuleMap", "Span"]


def _sizes(*sizes: int) -> frozenset[int]:
    return frozenset(sizes)


#: The rules of text encoders, by the start of ComfyUI's name for them.
ENCODERS = {
    "clip": ModuleMap("clip", tables.CLIP, _sizes(), {}, parameters=norms.CLIP, unbiased=norms.UNBIASED["clip"]),
    "t5": ModuleMap("t5", tables.T5, _sizes(), {}, parameters=norms.T5, unbiased=norms.UNBIASED["t5"]),
}

FAMILIES = {
    family.name: family
    for family in (
        ModuleMap(
            "ideogram4",
            tables.IDEOGRAM4,
            parameters=norms.IDEOGRAM4,
            unbiased=norms.UNBIASED["ideogram4"],
            columns=_sizes(128, 512, 4608, 12288, 53248),
            depths={"layers": _sizes(34)},
        ),
        ModuleMap(
            "flux1",
            tables.FLUX1,
            parameters=norms.FLUX,
            unbiased=norms.UNBIASED["flux1"],
            columns=_sizes(64, 256, 768, 3072, 4096, 12288, 15360),
            depths={"double_blocks": _sizes(19), "single_blocks": _sizes(38)},
            grows={"img_in": 64},
            encoders=("clip_l", "t5xxl"),
        ),
        ModuleMap(
            "flux2",
            tables.FLUX2,
            parameters=norms.FLUX,
            unbiased=norms.UNBIASED["flux2"],
            # dev, klein 9B, klein 4B
            columns=_sizes(128, 256, 6144, 15360, 18432, 24576, 4096, 12288, 16384, 3072, 7680, 9216),
            depths={"double_blocks": _sizes(5, 8), "single_blocks": _sizes(20, 24, 48)},
        ),
        ModuleMap(
            "qwen-image",
            tables.QWEN_IMAGE,
            parameters=norms.QWEN_IMAGE,
            unbiased=norms.UNBIASED["qwen-image"],
            columns=_sizes(64, 256, 3072, 3584, 12288),
            depths={"transformer_blocks": _sizes(60)},
        ),
        ModuleMap(
            "z-image",
            tables.Z_IMAGE,
            parameters=norms.Z_IMAGE,
            unbiased=norms.UNBIASED["z-image"],
            columns=_sizes(64, 256, 1024, 2560, 3840, 10240),
            depths={"layers": _sizes(30), "noise_refiner": _sizes(2), "context_refiner": _sizes(2)},
        ),
        ModuleMap(
            "sdxl",
            unet_table((False, True, True), added=True),
            parameters=unet_norms((False, True, True)),
            unbiased=norms.UNBIASED["sdxl"],
            columns=_sizes(320, 640, 960, 1280, 1920, 2048, 2560, 2816, 5120)
            | _sizes(*(9 * n for n in (4, 320, 640, 960, 1280, 1920, 2560))),
            depths={},
            root="unet",
            encoders=("clip_l", "clip_g"),
        ),
        ModuleMap(
            "sd15",
            unet_table((True, True, True, False), added=False),
            parameters=unet_norms((True, True, True, False)),
            unbiased=norms.UNBIASED["sd15"],
            columns=_sizes(320, 640, 768, 960, 1280, 1920, 2560, 5120)
            | _sizes(*(9 * n for n in (4, 320, 640, 960, 1280, 1920, 2560))),
            depths={},
            root="unet",
            encoders=("clip_l",),
        ),
        ModuleMap(
            "sd3",
            tables.SD3,
            parameters=norms.SD3,
            unbiased=norms.UNBIASED["sd3"],
            # 3 and 3.5 medium, 3.5 large
            columns=_sizes(64, 256, 1536, 2048, 2432, 4096, 6144, 9728),
            depths={"joint_blocks": _sizes(24, 38)},
            encoders=("clip_l", "clip_g", "t5xxl"),
        ),
        ModuleMap(
            "wan",
            tables.WAN,
            parameters=norms.WAN,
            unbiased=norms.UNBIASED["wan"],
            # 14B, 1.3B, 5B, with and without an image
            columns=_sizes(256, 1280, 1536, 3072, 4096, 5120, 8960, 13824, 14336, 64, 144, 192),
            depths={"blocks": _sizes(30, 40)},
        ),
        ModuleMap(
            "krea2",
            tables.KREA2,
            parameters=norms.KREA2,
            unbiased=norms.UNBIASED["krea2"],
            columns=_sizes(12, 64, 256, 2560, 6144, 6912, 16384),
            depths={
                "blocks": _sizes(28),
                "txtfusion.layerwise_blocks": _sizes(2),
                "txtfusion.refiner_blocks": _sizes(2),
            },
        ),
    )
}
