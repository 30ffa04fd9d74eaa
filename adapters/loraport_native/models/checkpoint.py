"""Finding an Ideogram 4 checkpoint, in a folder or on the Hugging Face hub, and loading its parts."""

from __future__ import annotations

import hashlib
import inspect
import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from diffusers.models.autoencoders.autoencoder_kl_flux2 import AutoencoderKLFlux2
from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler
from torch import nn
from transformers import PreTrainedTokenizerBase, Qwen3VLConfig, Qwen3VLModel

from loraport.errors import DataError
from loraport_native.models.hub import download
from loraport_native.models.ideogram4 import Ideogram4
from loraport_native.models.layout import split_names
from loraport_native.models.text import LAYERS, TAPS, TextEncoder
from loraport_native.models.tokens import read_tokenizer
from loraport_native.models.weights import Weights, check, fill, itself, read_header

Layout = Literal["diffusers", "official"]
_REQUIRED = {
    "transformer": "transformer/*.safetensors (and config.json)",
    "text_encoder": "text_encoder/config.json and *.safetensors",
    "tokenizer": "tokenizer/tokenizer.json and tokenizer_config.json",
    "vae": "vae/*.safetensors (and config.json)",
}
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_SAMPLES, _SAMPLE_BYTES = 16, 1 << 16


@dataclass(frozen=True)
class Checkpoint:
    """Where the parts of a checkpoint are.

    layout says how the transformer names its attention; identity changes when any part that a cache depends
    on does (see `_identity`). A missing scheduler is no fault: the pipeline sets every sigma itself.
    """

    root: Path
    transformer: Path
    unconditional_transformer: Path | None
    text_encoder: Path
    tokenizer: Path
    vae: Path
    scheduler: Path | None
    layout: Layout
    identity: str


def find_checkpoint(checkpoint: str, revision: str | None = None, unconditional: bool = True) -> Checkpoint:
    """Find a checkpoint by folder or hub id, downloading what is needed of the latter.

    revision: a branch, tag or commit of a hub id. unconditional: also fetch the second transformer, which
    only sampling with guidance uses (9 GB at full size). HF_HUB_OFFLINE and the hub's cache folder count.
    Raises DataError when there is no such folder or repository, access is not granted, or a part is missing.
    """
    folder = Path(checkpoint).expanduser()
    if folder.is_dir():
        if revision is not None:
            raise DataError(
                f"model.revision is set to {revision!r}, but the checkpoint {folder} is a folder.",
                hint="A revision belongs to a hub id; remove it.",
            )
        return _in_folder(folder.absolute(), None)
    if folder.exists():
        raise DataError(f"{folder} is a file; a checkpoint is a folder.", hint=_expected())
    if not _HUB_ID.fullmatch(checkpoint) or checkpoint.startswith("."):
        raise DataError(f"There is no checkpoint folder {checkpoint}.", hint=_expected())
    parts = [*_REQUIRED, "scheduler", *(["unconditional_transformer"] if unconditional else [])]
    root, commit = download(checkpoint, revision, parts)
    return _in_folder(root, f"{checkpoint}@{commit}")


def load_transformer(
    checkpoint: Checkpoint,
    dtype: torch.dtype,
    device: torch.device | str,
    part: str = "transformer",
    prepare_block: Callable[[nn.Module], None] = lambda block: None,
    keep_fp8: bool = False,
) -> Ideogram4:
    """Load a transformer, frozen and in evaluation mode, one tensor at a time.

    part: 'transformer' or 'unconditional_transformer'. prepare_block: called with each block as soon as it is
    loaded, so that one that quantises keeps the peak at the quantised model plus one block. Without it the
    peak is the model plus one tensor. keep_fp8: it takes the fp8 rows of the blocks' Linears as they are (see `pour`);
    without it, or elsewhere, they become `dtype`. Raises DataError naming the tensor or file at fault.
    """
    folder = getattr(checkpoint, part)
    if folder is None:
        raise DataError(f"{checkpoint.root} has no {part}.", hint="Sampling with guidance needs it; training does not.")
    weights = Weights(folder)
    _refuse_nf4(weights)
    with torch.device("meta"):
        model = Ideogram4(**_transformer_config(weights))
    fused = "layers.0.attention.qkv.weight" in weights.names
    # The last tensor of each block, in the order in which they are filled.
    ends = {name: name.split(".")[1] for name in model.state_dict() if name.startswith("layers.")}
    last = {number: name for name, number in ends.items()}

    def filled(name: str) -> None:
        if name in ends and last[ends[name]] == name:
            prepare_block(model.layers[int(ends[name])])

    fill(
        model,
        weights,
        dtype,
        device,
        sources=itself if fused else split_names,
        filled=filled,
        keep_fp8=lambda name: keep_fp8 and name in ends,
    )
    return model.eval()


def load_text_encoder(
    checkpoint: Checkpoint,
    dtype: torch.dtype,
    device: torch.device | str,
    storage: str = "none",
    room: Callable[[], int] = lambda: 0,
) -> TextEncoder:
    """Open the text encoder without its vision tower (captions are text); its blocks are read as they are used.

    The files hold a transformers `Qwen3VLModel`; the official fp8 ones add `.weight_scale` rows and the flag
    `ideogram_fp8_weight_only` to config.json, which is why transformers' own loader does not read them
    (`quantized_loading.py` in Ideogram's own repository). A `Qwen3VLForConditionalGeneration`, whose names
    start with `model.`, is read too. Raises DataError naming the tensor or file at fault; a tensor that holds NaN
    is found when its block is read.
    """
    weights = Weights(checkpoint.text_encoder)
    _refuse_nf4(weights)
    config = Qwen3VLConfig.from_dict(_read_json(checkpoint.text_encoder / "config.json"))
    config._attn_implementation = "sdpa"  # the one that is causal without a mask
    _check_text_encoder(checkpoint, config)
    with torch.device("meta"):
        model = Qwen3VLModel(config)
    model.visual = None
    prefix = "model." if "model.language_model.embed_tokens.weight" in weights.names else ""
    check(
        model,
        weights,
        sources=lambda name: (prefix + name,),
        ignored=lambda name: name.startswith((f"{prefix}visual.", "lm_head.")),
    )
    return TextEncoder(
        model.language_model, weights, f"{prefix}language_model.", dtype, torch.device(device), storage, room
    )


def load_tokenizer(checkpoint: Checkpoint) -> PreTrainedTokenizerBase:
    """Load the tokenizer with its chat template. Raises DataError when it cannot be read."""
    return read_tokenizer(checkpoint.tokenizer)


def load_vae(checkpoint: Checkpoint, dtype: torch.dtype, device: torch.device | str) -> AutoencoderKLFlux2:
    """Load the VAE, frozen, in `dtype` on an accelerator and in float32 on the CPU.

    Its latent statistics stay float32. Raises DataError naming the tensor or file at fault.
    """
    weights = Weights(checkpoint.vae)
    config = _read_json(checkpoint.vae / "config.json", optional=True)
    with torch.device("meta"):
        vae = AutoencoderKLFlux2.from_config(config)
    fill(vae, weights, torch.float32 if torch.device(device).type == "cpu" else dtype, device)
    return vae.eval()


def load_scheduler(checkpoint: Checkpoint) -> FlowMatchEulerDiscreteScheduler:
    """Load the sampler's scheduler; without a file its defaults, which are what the pipeline relies on."""
    if checkpoint.scheduler is None:
        return FlowMatchEulerDiscreteScheduler()
    return FlowMatchEulerDiscreteScheduler.from_config(_read_json(checkpoint.scheduler / "scheduler_config.json"))


def _expected() -> str:
    return "A checkpoint folder holds " + "; ".join(_REQUIRED.values()) + "; or give a hub id, owner/name."


def _in_folder(root: Path, commit: str | None) -> Checkpoint:
    missing = [part for part in _REQUIRED if not (root / part).is_dir()]
    if missing:
        raise DataError(f"{root} is not an Ideogram 4 checkpoint: {', '.join(missing)} is missing.", hint=_expected())

    def optional(part: str) -> Path | None:
        return root / part if (root / part).is_dir() else None

    return Checkpoint(
        root=root,
        transformer=root / "transformer",
        unconditional_transformer=optional("unconditional_transformer"),
        text_encoder=root / "text_encoder",
        tokenizer=root / "tokenizer",
        vae=root / "vae",
        scheduler=optional("scheduler"),
        layout=_layout(root / "transformer"),
        identity=commit or _identity(root),
    )


def _layout(folder: Path) -> Layout:
    names = Weights(folder).names
    if "layers.0.attention.qkv.weight" in names:
        return "official"
    if "layers.0.attention.to_q.weight" in names:
        return "diffusers"
    raise DataError(
        f"{folder} does not hold an Ideogram 4 transformer: tensor layers.0.attention.qkv.weight (official) "
        "or layers.0.attention.to_q.weight (diffusers) is missing.",
        hint="Single files made for ComfyUI are not read; use the folder they were made from.",
    )


def _identity(root: Path) -> str:
    """Hash names, sizes, headers, whole small files, and evenly spaced samples of the weights.

    Reading all of a 30 GB checkpoint at each start would cost minutes; a fine-tune that changes no header
    still changes the samples.
    """
    digest = hashlib.sha256()
    for part in (*_REQUIRED, "unconditional_transformer"):
        for path in sorted((root / part).glob("*")):
            if path.suffix == ".safetensors":
                content = read_header(path)[1] + _samples(path)
            elif path.suffix in (".json", ".txt", ".jinja", ".model"):
                content = path.read_bytes()
            else:
                continue
            digest.update(f"{part}/{path.name}\0{path.stat().st_size}\0".encode() + hashlib.sha256(content).digest())
    return digest.hexdigest()


def _samples(path: Path) -> bytes:
    size = path.stat().st_size
    with open(path, "rb") as file:
        if size <= _SAMPLES * _SAMPLE_BYTES:
            return file.read()
        chunks = []
        for index in range(_SAMPLES):
            file.seek((size - _SAMPLE_BYTES) * index // (_SAMPLES - 1))
            chunks.append(file.read(_SAMPLE_BYTES))
        return b"".join(chunks)


def _read_json(path: Path, optional: bool = False) -> dict[str, Any]:
    if optional and not path.exists():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}.") from error
    except ValueError as error:
        raise DataError(f"{path} is not valid JSON: {error}.") from error
    if not isinstance(content, dict):
        raise DataError(f"{path} must hold a JSON object.")
    return content


def _transformer_config(weights: Weights) -> dict[str, Any]:
    """The model's dimensions: what the tensors' shapes say, then config.json's own words over them.

    The official code reads no config.json; shapes say all but the rotary base and sections, whose defaults
    are the released model's.
    """
    blocks = [int(match[1]) for name in weights.names if (match := re.match(r"layers\.(\d+)\.", name))]
    hidden, in_channels = weights.shape("input_proj.weight")
    (head_dim,) = weights.shape("layers.0.attention.norm_q.weight")
    config = {
        "in_channels": in_channels,
        "num_layers": max(blocks) + 1,
        "attention_head_dim": head_dim,
        "num_attention_heads": hidden // head_dim,
        "intermediate_size": weights.shape("layers.0.feed_forward.w1.weight")[0],
        "adaln_dim": weights.shape("adaln_proj.weight")[0],
        "llm_features_dim": weights.shape("llm_cond_norm.weight")[0],
    }
    written = _read_json(weights.folder / "config.json", optional=True)
    known = inspect.signature(Ideogram4.__init__).parameters
    return config | {name: value for name, value in written.items() if name in known}


def _check_text_encoder(checkpoint: Checkpoint, config: Qwen3VLConfig) -> None:
    text: Any = config.text_config
    if text.num_hidden_layers != LAYERS:
        raise DataError(
            f"{checkpoint.text_encoder}: the text encoder has {text.num_hidden_layers} layers; Ideogram 4 "
            f"reads layers {', '.join(map(str, TAPS))} of {LAYERS}.",
            hint="It is made for Qwen3-VL-8B.",
        )
    wanted = Weights(checkpoint.transformer).shape("llm_cond_norm.weight")[0]
    if text.hidden_size * len(TAPS) != wanted:
        raise DataError(
            f"{checkpoint.text_encoder}: {len(TAPS)} layers of width {text.hidden_size} make "
            f"{text.hidden_size * len(TAPS)} features a token; the transformer beside it takes {wanted}."
        )


def _refuse_nf4(weights: Weights) -> None:
    if any(".quant_state." in name for name in weights.names):
        raise DataError(
            f"{weights.folder} holds weights already quantised to 4 bit by bitsandbytes.",
            hint="Use the fp8 or bf16 checkpoint; `memory.quantize: nf4` quantises it while loading.",
        )
