"""A complete Ideogram 4 checkpoint of a few megabytes, for trying a trainer where the real one does not fit.

Everything has the real thing's structure and names, random weights, and sizes divisible by 64 so that every
quantisation works. It is initialised so that training a LoRA on it visibly lowers the loss.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any, Literal

import torch
from diffusers.models.autoencoders.autoencoder_kl_flux2 import AutoencoderKLFlux2
from diffusers.models.transformers.transformer_ideogram4 import Ideogram4Transformer2DModel
from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn
from transformers import Qwen3VLConfig, Qwen3VLModel

from loraport.errors import DataError, unknown
from loraport_native.models.ideogram4 import Ideogram4
from loraport_native.models.latents import patchify
from loraport_native.models.layout import split
from loraport_native.models.text import LAYERS, TAPS

LAYOUTS = ("diffusers", "official")
VOCABULARY = 1024
_TEXT_WIDTH = 64
_FP8_MAX = 448.0  # the largest float8_e4m3fn

_TRANSFORMER = {
    "in_channels": 128,
    "num_layers": 3,
    "attention_head_dim": 64,
    "num_attention_heads": 2,
    "intermediate_size": 256,
    "adaln_dim": 64,
    "llm_features_dim": _TEXT_WIDTH * len(TAPS),
    "mrope_section": (12, 10, 10),
}
_TEXT_ENCODER = {
    "text_config": {
        "vocab_size": VOCABULARY,
        "hidden_size": _TEXT_WIDTH,
        "intermediate_size": 128,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 1,
        "num_key_value_heads": 1,
        "head_dim": 64,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 5_000_000,
            "mrope_section": [12, 10, 10],
            "mrope_interleaved": True,
        },
    },
    "vision_config": {
        "depth": 1,
        "hidden_size": 64,
        "intermediate_size": 64,
        "num_heads": 1,
        "out_hidden_size": _TEXT_WIDTH,
        "deepstack_visual_indexes": [0],
        "num_position_embeddings": 16,
    },
}
_VAE = {
    "block_out_channels": (32, 32, 32, 32),
    "layers_per_block": 1,
    "latent_channels": 32,
    "sample_size": 256,
}
_SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
_CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n"
    "{% if message.content is string %}{{ message.content }}{% else %}"
    "{% for part in message.content %}{% if part.type == 'text' %}{{ part.text }}{% endif %}{% endfor %}"
    "{% endif %}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# What the tokenizer learns its merges from: enough to shorten captions like Ideogram's to a third.
_SENTENCES = (
    '{"high_level_description":"A photograph of a small red house beside a lake in the morning.",'
    '"style_description":{"aesthetics":"calm, natural","lighting":"soft daylight from the left",'
    '"photo":"50mm lens, shallow focus","medium":"photograph","color_palette":["#A0B4C8","#FFFFFF"]},'
    '"compositional_deconstruction":{"background":"a blue sky with white clouds over green hills",'
    '"elements":[{"type":"obj","bbox":[120,80,640,720],"desc":"a wooden door, painted dark green"},'
    '{"type":"text","bbox":[40,100,160,900],"text":"OPEN","desc":"large bold letters at the top"}]}}',
    '{"style_description":{"aesthetics":"bright, playful","lighting":"even studio lighting","medium":'
    '"illustration","art_style":"flat vector art with thick outlines"},"compositional_deconstruction":'
    '{"background":"plain light yellow","elements":[]}}',
    "the quick brown fox jumps over the lazy dog while a woman with a yellow umbrella walks through the rain",
    "an oil painting of an old ship on a stormy sea, dramatic light, brush strokes, a far lighthouse",
    "a close view of a cup of coffee on a table near the window, with a book, a pair of glasses and a plant",
    "a futuristic car on a desert road at sunset, seen from behind, with long shadows and dust",
    "two children play with a black and white cat on the floor of a bright room, like a film still",
    "a poster with the words in the center, surrounded by flowers, leaves and small birds in pastel colors",
)


def write_tiny(folder: Path | str, layout: Literal["diffusers", "official"], seed: int = 0, fp8: bool = False) -> Path:
    """Write a random checkpoint of about 9 MB to `folder`, which must be new or empty; return the folder.

    layout: how attention is named, 'diffusers' (split) or 'official' (fused); the same seed gives both the
    same weights, in bfloat16. fp8 (official only): store the linear layers of all blocks as
    float8_e4m3fn rows with scales, as the official release does. Raises DataError for an unknown layout, and
    for a folder that holds something or cannot be written.
    """
    if layout not in LAYOUTS:
        raise DataError(unknown("Layout", layout, LAYOUTS))
    if fp8 and layout != "official":
        raise DataError("fp8 rows exist in the official layout only.", hint="Use the official layout.")
    folder = Path(folder).expanduser().absolute()
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise DataError(
            f"{folder} already holds something; a checkpoint is written to a new or empty folder.",
            hint="Choose another folder, or remove this one first.",
        )
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        # Written beside and moved as one, so an interrupted run leaves no checkpoint that looks whole.
        temporary = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}."))
        try:
            with torch.random.fork_rng(devices=[]):
                _write(temporary, layout, seed, fp8)
            temporary.chmod(0o755)
            os.replace(temporary, folder)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    except OSError as error:
        raise DataError(f"{folder} cannot be written: {error.strerror or error}.") from error
    return folder


def _write(root: Path, layout: str, seed: int, fp8: bool) -> None:
    for offset, part in enumerate(("transformer", "unconditional_transformer")):
        torch.manual_seed(seed + offset)
        _write_transformer(root / part, layout, fp8)
    torch.manual_seed(seed)
    _write_text_encoder(root / "text_encoder", fp8)
    _vae().save_pretrained(root / "vae")
    _write_tokenizer(root / "tokenizer")
    FlowMatchEulerDiscreteScheduler().save_pretrained(root / "scheduler")
    _write_json(
        root / "model_index.json",
        {
            "_class_name": "Ideogram4Pipeline",
            "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
            "text_encoder": ["transformers", "Qwen3VLModel"],
            "tokenizer": ["transformers", "PreTrainedTokenizerFast"],
            "transformer": ["diffusers", "Ideogram4Transformer2DModel"],
            "unconditional_transformer": ["diffusers", "Ideogram4Transformer2DModel"],
            "vae": ["diffusers", "AutoencoderKLFlux2"],
        },
    )


def _write_transformer(folder: Path, layout: str, fp8: bool) -> None:
    model = Ideogram4(**_TRANSFORMER)
    # Blocks speak louder than what they are added to, from small weights: a LoRA of ordinary size steers them.
    # Measured over 150 steps on one image: 3.1 to 2.0 at a learning rate of 1e-4, to 1.9 at 1e-3.
    with torch.no_grad():
        for name, module in model.named_modules():
            if isinstance(module, nn.Linear):
                module.weight.normal_(std=(0.2 if name.startswith("layers.") else 1.0) * module.in_features**-0.5)
                if module.bias is not None:
                    module.bias.zero_()
        for block in model.layers:
            _, gate_attention, _, gate_ffn = block.adaln_modulation.bias.chunk(4)
            gate_attention.fill_(2.0)
            gate_ffn.fill_(2.0)
        model.input_proj.weight.mul_(0.3)
        model.embed_image_indicator.weight.mul_(0.1)
    tensors = {name: value.to(torch.bfloat16) for name, value in model.state_dict().items()}
    if layout == "diffusers":
        tensors = {part: value for name in tensors for part, value in split(name, tensors[name]).items()}
    if fp8:
        tensors = _fp8_rows(tensors, "layers.")
    with torch.device("meta"):
        Ideogram4Transformer2DModel(**_TRANSFORMER).save_config(folder)
    save_file(tensors, folder / "diffusion_pytorch_model.safetensors", metadata={"format": "pt"})


def _write_text_encoder(folder: Path, fp8: bool) -> None:
    config = Qwen3VLConfig.from_dict(_TEXT_ENCODER)
    tensors = Qwen3VLModel(config).bfloat16().state_dict()
    if fp8:
        tensors = _fp8_rows(tensors, "language_model.layers.")
        config.ideogram_fp8_weight_only = True  # the flag by which Ideogram's own loader knows
    config.architectures = ["Qwen3VLModel"]
    config.dtype = "bfloat16"
    config.save_pretrained(folder)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def _fp8_rows(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Store the matrices under `prefix` as fp8 rows, each scaled to use the whole range."""
    rows = {}
    for name, tensor in tensors.items():
        if name.startswith(prefix) and tensor.dim() == 2:
            scale = tensor.float().abs().amax(dim=1).clamp(min=1e-12) / _FP8_MAX
            rows[name] = (tensor.float() / scale[:, None]).to(torch.float8_e4m3fn)
            rows[f"{name}_scale"] = scale
        else:
            rows[name] = tensor
    return rows


def _vae() -> AutoencoderKLFlux2:
    """A VAE whose normalised latents of smooth images have mean 0 and variance 1, as the real one's have."""
    vae = AutoencoderKLFlux2(**_VAE).eval()
    with torch.no_grad():
        coarse = torch.rand(32, 3, 6, 6) * 2 - 1
        images = nn.functional.interpolate(coarse, size=(96, 96), mode="bicubic").clamp(-1, 1)
        latents = vae.encode(images).latent_dist.mode()
        vae.quant_conv.weight.div_(latents.std())
        vae.quant_conv.bias.div_(latents.std())
        tokens = patchify(vae.encode(images).latent_dist.mode()).flatten(0, 1)
        vae.bn.running_mean.copy_(tokens.mean(0))
        vae.bn.running_var.copy_(tokens.var(0))
    return vae


def _write_tokenizer(folder: Path) -> None:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=list(_SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_SENTENCES, trainer)
    folder.mkdir()
    tokenizer.save(str(folder / "tokenizer.json"))
    # Written by hand: the class name that transformers 5 would write is unknown to transformers 4.
    _write_json(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "pad_token": "<|endoftext|>",
            "eos_token": "<|im_end|>",
            "chat_template": _CHAT_TEMPLATE,
            "clean_up_tokenization_spaces": False,
        },
    )


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
