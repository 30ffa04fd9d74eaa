"""Complete random Ideogram 4 checkpoints: a few megabytes for trying a trainer where the real one does not fit, or the
real dimensions for measuring one.

Everything has the real thing's structure and names and random weights. It is initialised so that training a LoRA on it
visibly lowers the loss. Weights are made one tensor at a time on the device and written shard by shard.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch
from diffusers.models.autoencoders.autoencoder_kl_flux2 import AutoencoderKLFlux2
from diffusers.models.transformers.transformer_ideogram4 import Ideogram4Transformer2DModel
from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn
from transformers import Qwen3VLConfig, Qwen3VLModel

from loraport.errors import DataError, unknown
from loraport_native.models.ideogram4 import Ideogram4
from loraport_native.models.latents import patchify
from loraport_native.models.layout import split
from loraport_native.shards import SHARD_BYTES, write_shards
from loraport_native.sizes import TINY, VOCABULARY, Size
from loraport_native.trainer import derived_seed

LAYOUTS = ("diffusers", "official")
_FP8_MAX = 448.0  # the largest float8_e4m3fn

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
    """Write a random checkpoint of about 9 MB; see `write_checkpoint`."""
    return write_checkpoint(folder, layout, TINY, seed, fp8)


def write_checkpoint(
    folder: Path | str,
    layout: Literal["diffusers", "official"],
    size: Size,
    seed: int = 0,
    fp8: bool = False,
    device: torch.device | str = "cpu",
    unconditional: bool = True,
    shard_bytes: int = SHARD_BYTES,
) -> Path:
    """Write a random checkpoint to `folder`, which must be new or empty; return the folder.

    layout: how attention is named, 'diffusers' (split) or 'official' (fused); the same seed and kind of device give
    both the same weights, in bfloat16. fp8 (official only): store the linear layers of all blocks as float8_e4m3fn
    rows with scales, as the official release does. device: where the weights are made. unconditional: write the
    second transformer too, which only sampling with guidance uses. shard_bytes: about the most that is held at once.
    Raises DataError for an unknown layout, and for a folder that holds something or cannot be written.
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
    writer = _Writer(size, layout, seed, fp8, torch.device(device), shard_bytes)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        # Written beside and moved as one, so an interrupted run leaves no checkpoint that looks whole.
        temporary = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}."))
        try:
            writer.write(temporary, unconditional)
            temporary.chmod(0o755)
            os.replace(temporary, folder)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    except OSError as error:
        raise DataError(f"{folder} cannot be written: {error.strerror or error}.") from error
    return folder


class _Writer:
    """Writes the parts of one checkpoint, each tensor a function of the seed and its name."""

    def __init__(self, size: Size, layout: str, seed: int, fp8: bool, device: torch.device, shard_bytes: int) -> None:
        self.size, self.layout, self.seed, self.fp8 = size, layout, seed, fp8
        self.device, self.shard_bytes = device, shard_bytes

    def write(self, root: Path, unconditional: bool) -> None:
        transformers = ["transformer", *(["unconditional_transformer"] if unconditional else [])]
        for part in transformers:
            self._transformer(root / part)
        self._text_encoder(root / "text_encoder")
        with torch.random.fork_rng(devices=[self.device] if self.device.type == "cuda" else []):
            torch.manual_seed(self.seed)
            _vae(self.size.vae, self.device).save_pretrained(root / "vae")
        _write_tokenizer(root / "tokenizer")
        FlowMatchEulerDiscreteScheduler().save_pretrained(root / "scheduler")
        transformer = ["diffusers", "Ideogram4Transformer2DModel"]
        _write_json(
            root / "model_index.json",
            {
                "_class_name": "Ideogram4Pipeline",
                "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
                "text_encoder": ["transformers", "Qwen3VLModel"],
                "tokenizer": ["transformers", "PreTrainedTokenizerFast"],
                "transformer": transformer,
                "unconditional_transformer": transformer if unconditional else [None, None],
                "vae": ["diffusers", "AutoencoderKLFlux2"],
            },
        )

    def _transformer(self, folder: Path) -> None:
        with torch.device("meta"):
            shapes = Ideogram4(**self.size.transformer).state_dict()
            Ideogram4Transformer2DModel(**self.size.transformer).save_config(folder)

        def make(name: str) -> dict[str, Tensor]:
            tensor = self._make(folder.name, name, shapes[name].shape, _transformer_value)
            if self.layout == "diffusers":
                return split(name, tensor)
            return self._stored(name, tensor, "layers.")

        self._shards(folder, "diffusion_pytorch_model", shapes, make)

    def _text_encoder(self, folder: Path) -> None:
        config = Qwen3VLConfig.from_dict(self.size.text_encoder())
        with torch.device("meta"):
            shapes = Qwen3VLModel(config).state_dict()
        if self.fp8:
            config.ideogram_fp8_weight_only = True  # the flag by which Ideogram's own loader knows
        config.architectures = ["Qwen3VLModel"]
        config.dtype = "bfloat16"
        config.save_pretrained(folder)

        def make(name: str) -> dict[str, Tensor]:
            tensor = self._make(folder.name, name, shapes[name].shape, _text_encoder_value)
            return self._stored(name, tensor, "language_model.layers.")

        self._shards(folder, "model", shapes, make)

    def _make(self, part: str, name: str, shape: torch.Size, value: Callable[[str, Tensor], None]) -> Tensor:
        """One tensor in bfloat16; `value` fills it from standard normal numbers."""
        generator = torch.Generator(self.device).manual_seed(derived_seed(self.seed, part, name))
        tensor = torch.randn(shape, generator=generator, device=self.device)
        value(name, tensor)
        return tensor.bfloat16()

    def _stored(self, name: str, tensor: Tensor, prefix: str) -> dict[str, Tensor]:
        """The matrices under `prefix` as fp8 rows, each scaled to use the whole range; the rest as it is."""
        if not (self.fp8 and name.startswith(prefix) and tensor.dim() == 2):
            return {name: tensor}
        scale = tensor.float().abs().amax(dim=1).clamp(min=1e-12) / _FP8_MAX
        return {name: (tensor.float() / scale[:, None]).to(torch.float8_e4m3fn), f"{name}_scale": scale}

    def _shards(
        self, folder: Path, stem: str, shapes: dict[str, Tensor], make: Callable[[str], dict[str, Tensor]]
    ) -> None:
        sizes = {name: shape.numel() * torch.bfloat16.itemsize for name, shape in shapes.items()}
        write_shards(folder, stem, sizes, make, self.shard_bytes)


def _transformer_value(name: str, tensor: Tensor) -> None:
    """Blocks speak louder than what they are added to, from small weights: a LoRA of ordinary size steers them.

    Measured over 150 steps of the tiny size on one image: 3.1 to 2.0 at a learning rate of 1e-4, to 1.9 at 1e-3.
    """
    if name.endswith(".adaln_modulation.bias") and name.startswith("layers."):
        _, gate_attention, _, gate_ffn = tensor.zero_().chunk(4)
        gate_attention.fill_(2.0)
        gate_ffn.fill_(2.0)
    elif tensor.dim() == 1:
        tensor.fill_(0.0 if name.endswith(".bias") else 1.0)  # the others are norms
    elif name.startswith("embed_image_indicator."):
        tensor.mul_(0.1)
    else:
        loudness = 0.2 if name.startswith("layers.") else 0.3 if name.startswith("input_proj.") else 1.0
        tensor.mul_(loudness * tensor.shape[1] ** -0.5)


def _text_encoder_value(name: str, tensor: Tensor) -> None:
    """transformers' own initialisation of this model."""
    if tensor.dim() == 1:
        tensor.fill_(0.0 if name.endswith(".bias") else 1.0)
    else:
        tensor.mul_(0.02)


def _vae(dimensions: dict[str, Any], device: torch.device) -> AutoencoderKLFlux2:
    """A VAE whose normalised latents of smooth images have mean 0 and variance 1, as the real one's have."""
    with torch.device(device):
        vae = AutoencoderKLFlux2(**dimensions).eval()
        coarse = torch.rand(32, 3, 6, 6) * 2 - 1
    with torch.no_grad():
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
