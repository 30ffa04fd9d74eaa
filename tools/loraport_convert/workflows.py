"""ComfyUI workflows, in the format of its API, that show what a LoRA does: the same picture without it and with it at
several strengths, from the same seed and prompt.

A workflow is a dict of nodes by id; an input is a value, or [id, output number] of another node. Which nodes a family
needs, and the names of its files, are those of ComfyUI's own templates.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from loraport.errors import DataError, unknown

#: Strengths of the branches; None is without a LoRA.
STRENGTHS = (None, 0.7, 1.0, 1.5)

Link = list[Any]  # [node id, output number]


@dataclass(frozen=True)
class Recipe:
    """How ComfyUI makes a picture with a family of models.

    `shift` is the node, and its value, that sets the noise schedule of the model; `guidance` goes into the prompt.
    """

    model: str
    text_encoders: tuple[str, ...]  #: none where the checkpoint holds them
    vae: str | None
    encoder_type: str = ""
    latent: str = "EmptySD3LatentImage"
    steps: int = 20
    cfg: float = 1.0
    sampler: str = "euler"
    scheduler: str = "simple"
    shift: tuple[str, float] | None = None
    guidance: float | None = None
    empty_negative: bool = False  #: an empty prompt as the negative, instead of zeros
    side: int = 1024


RECIPES = {
    "ideogram4": Recipe(
        "ideogram4_fp8_scaled.safetensors",
        ("qwen3vl_8b_fp8_scaled.safetensors",),
        "flux2-vae.safetensors",
        "ideogram4",
        latent="EmptyFlux2LatentImage",
        cfg=7.0,
    ),
    "flux1": Recipe(
        "flux1-dev.safetensors",
        ("clip_l.safetensors", "t5xxl_fp16.safetensors"),
        "ae.safetensors",
        "flux",
        guidance=3.5,
    ),
    "flux2": Recipe(
        "flux2_dev_fp8mixed.safetensors",
        ("mistral_3_small_flux2_bf16.safetensors",),
        "flux2-vae.safetensors",
        "flux2",
        latent="EmptyFlux2LatentImage",
        guidance=4.0,
    ),
    "qwen-image": Recipe(
        "qwen_image_fp8_e4m3fn.safetensors",
        ("qwen_2.5_vl_7b_fp8_scaled.safetensors",),
        "qwen_image_vae.safetensors",
        "qwen_image",
        cfg=4.0,
        shift=("ModelSamplingAuraFlow", 3.1),
        empty_negative=True,
        side=1328,
    ),
    "z-image": Recipe(
        "z_image_turbo_bf16.safetensors",
        ("qwen_3_4b.safetensors",),
        "ae.safetensors",
        "lumina2",
        steps=8,
        sampler="res_multistep",
        shift=("ModelSamplingAuraFlow", 3.0),
    ),
    "wan": Recipe(
        "wan2.2_t2v_low_noise_14B_fp8_scaled.safetensors",
        ("umt5_xxl_fp8_e4m3fn_scaled.safetensors",),
        "wan_2.1_vae.safetensors",
        "wan",
        latent="EmptyHunyuanLatentVideo",
        cfg=3.5,
        shift=("ModelSamplingSD3", 5.0),
        empty_negative=True,
        side=768,
    ),
    "krea2": Recipe(
        "krea2.safetensors",
        ("qwen3vl_4b.safetensors",),
        "qwen_image_vae.safetensors",
        "krea2",
        steps=28,
        cfg=4.5,
        empty_negative=True,
    ),
    "sd3": Recipe("sd3.5_large_fp8_scaled.safetensors", (), None, cfg=4.5, steps=28, empty_negative=True),
    "sdxl": Recipe(
        "sd_xl_base_1.0.safetensors",
        (),
        None,
        latent="EmptyLatentImage",
        steps=30,
        cfg=7.0,
        sampler="dpmpp_2m",
        scheduler="karras",
        empty_negative=True,
    ),
    "sd15": Recipe(
        "v1-5-pruned-emaonly-fp16.safetensors",
        (),
        None,
        latent="EmptyLatentImage",
        steps=30,
        cfg=7.0,
        sampler="dpmpp_2m",
        scheduler="karras",
        empty_negative=True,
        side=512,
    ),
}
_UNCONDITIONAL = "ideogram4_unconditional_fp8_scaled.safetensors"


@dataclass(frozen=True)
class Ingredient:
    """A LoRA file by its name in ComfyUI's `models/loras`, its strength, and whether it changes text encoders too."""

    name: str
    strength: float = 1.0
    text_encoders: bool = False


@dataclass(frozen=True)
class Picture:
    """What every branch draws. `model` None is the name in ComfyUI's templates."""

    prompt: str
    seed: int = 42
    side: int | None = None
    model: str | None = None


@dataclass
class _Graph:
    nodes: dict[str, dict[str, Any]] = field(default_factory=dict)

    def add(self, kind: str, title: str | None = None, /, **inputs: Any) -> str:
        number = str(len(self.nodes) + 1)
        self.nodes[number] = {"class_type": kind, "inputs": inputs, "_meta": {"title": title or kind}}
        return number


def workflow(family: str | None, loras: Sequence[Ingredient], picture: Picture) -> dict[str, dict[str, Any]]:
    """The nodes of a workflow with a branch for each of `STRENGTHS`, which multiply the strengths of the LoRAs.

    Raises DataError for a family without a recipe.
    """
    if family not in RECIPES:
        raise DataError(unknown("The family", str(family), RECIPES), hint="Name it with --family.")
    recipe, graph = RECIPES[family], _Graph()
    model, clip, vae = _loaders(graph, recipe, picture)
    unconditional: Link | None = None
    if family == "ideogram4":
        node = graph.add("UNETLoader", "Unconditional model", unet_name=_UNCONDITIONAL, weight_dtype="default")
        unconditional = [node, 0]
    side = picture.side or recipe.side
    sizes = {"width": side, "height": side, "batch_size": 1}
    if recipe.latent == "EmptyHunyuanLatentVideo":
        sizes["length"] = 1
    latent: Link = [graph.add(recipe.latent, **sizes), 0]
    prompts = _prompts(graph, recipe, clip, picture.prompt)
    for strength in STRENGTHS:
        branch = [] if strength is None else [(lora, lora.strength * strength) for lora in loras]
        changed, changed_clip = _with_loras(graph, model, clip, branch)
        texts = prompts if changed_clip == clip else _prompts(graph, recipe, changed_clip, picture.prompt)
        if family in ("ideogram4", "flux2"):
            samples = _guided(graph, recipe, changed, unconditional, texts, latent, picture.seed, side)
        else:
            samples = _sampled(graph, recipe, changed, texts, latent, picture.seed)
        image = graph.add("VAEDecode", samples=samples, vae=vae)
        name = "no LoRA" if strength is None else f"strength {strength}"
        stem = Path(loras[0].name).stem
        graph.add("SaveImage", name, images=[image, 0], filename_prefix=f"{stem}/{name.replace(' ', '-')}")
    return graph.nodes


def _loaders(graph: _Graph, recipe: Recipe, picture: Picture) -> tuple[Link, Link, Link]:
    name = picture.model or recipe.model
    if recipe.vae is None:
        node = graph.add("CheckpointLoaderSimple", ckpt_name=name)
        return [node, 0], [node, 1], [node, 2]
    model = graph.add("UNETLoader", "Model", unet_name=name, weight_dtype="default")
    if len(recipe.text_encoders) == 2:
        first, second = recipe.text_encoders
        clip = graph.add("DualCLIPLoader", clip_name1=first, clip_name2=second, type=recipe.encoder_type)
    else:
        clip = graph.add("CLIPLoader", clip_name=recipe.text_encoders[0], type=recipe.encoder_type)
    return [model, 0], [clip, 0], [graph.add("VAELoader", vae_name=recipe.vae), 0]


def _prompts(graph: _Graph, recipe: Recipe, clip: Link, prompt: str) -> tuple[Link, Link]:
    """The positive and the negative."""
    positive: Link = [graph.add("CLIPTextEncode", "Prompt", clip=clip, text=prompt), 0]
    if recipe.empty_negative:
        negative: Link = [graph.add("CLIPTextEncode", "Negative prompt", clip=clip, text=""), 0]
    else:
        negative = [graph.add("ConditioningZeroOut", conditioning=positive), 0]
    if recipe.guidance is not None:
        positive = [graph.add("FluxGuidance", conditioning=positive, guidance=recipe.guidance), 0]
    return positive, negative


def _with_loras(graph: _Graph, model: Link, clip: Link, loras: Sequence[tuple[Ingredient, float]]) -> tuple[Link, Link]:
    for lora, strength in loras:
        rounded = round(strength, 4)
        if lora.text_encoders:
            both = {"strength_model": rounded, "strength_clip": rounded}
            node = graph.add("LoraLoader", model=model, clip=clip, lora_name=lora.name, **both)
            model, clip = [node, 0], [node, 1]
        else:
            model = [graph.add("LoraLoaderModelOnly", model=model, lora_name=lora.name, strength_model=rounded), 0]
    return model, clip


def _sampled(graph: _Graph, recipe: Recipe, model: Link, texts: tuple[Link, Link], latent: Link, seed: int) -> Link:
    if recipe.shift is not None:
        kind, shift = recipe.shift
        model = [graph.add(kind, model=model, shift=shift), 0]
    settings = {"steps": recipe.steps, "cfg": recipe.cfg, "sampler_name": recipe.sampler, "scheduler": recipe.scheduler}
    positive, negative = texts
    links = {"model": model, "positive": positive, "negative": negative, "latent_image": latent}
    return [graph.add("KSampler", seed=seed, denoise=1.0, **settings, **links), 0]


def _guided(
    graph: _Graph,
    recipe: Recipe,
    model: Link,
    unconditional: Link | None,
    texts: tuple[Link, Link],
    latent: Link,
    seed: int,
    side: int,
) -> Link:
    """Ideogram 4 guides with a second model, which no LoRA changes; FLUX.2 is guided through its prompt."""
    sizes = {"steps": recipe.steps, "width": side, "height": side}
    positive, negative = texts
    if unconditional is None:
        guider = graph.add("BasicGuider", model=model, conditioning=positive)
        sigmas = graph.add("Flux2Scheduler", **sizes)
    else:
        # The last steps are guided less, as in ComfyUI's template.
        model = [graph.add("CFGOverride", model=model, cfg=3.0, start_percent=0.7, end_percent=1.0), 0]
        models = {"model": model, "model_negative": unconditional}
        guider = graph.add("DualModelGuider", **models, positive=positive, negative=negative, cfg=recipe.cfg)
        sigmas = graph.add("Ideogram4Scheduler", **sizes, mu=0.0, std=1.75)
    noise, sampler = graph.add("RandomNoise", noise_seed=seed), graph.add("KSamplerSelect", sampler_name=recipe.sampler)
    parts = {"noise": [noise, 0], "guider": [guider, 0], "sampler": [sampler, 0], "sigmas": [sigmas, 0]}
    return [graph.add("SamplerCustomAdvanced", **parts, latent_image=latent), 0]
