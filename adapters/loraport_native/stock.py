"""The yardstick of `loraport bench step`: a training step of Ideogram 4 as diffusers, peft and bitsandbytes give it.

`python -m loraport_native.stock KIND --config FILE` prints one JSON line. It is the recipe of diffusers' example
(examples/dreambooth/train_dreambooth_lora_ideogram4.py, 0.42.1) with nothing of ours: diffusers' own transformer with
split attention, a peft LoRA with bf16 weights, text features projected in each step, the dense mask of the packed
sequence, eager blocks, every block recomputed, fused AdamW. KIND is how the frozen weights are stored: `bf16`, `fp8` by
diffusers' layerwise casting, `nf4` by bitsandbytes. Weights, latents and text are random and lie on the device.
"""

from __future__ import annotations

import argparse
import gc
import json
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models.transformers.transformer_ideogram4 import (
    IMAGE_POSITION_OFFSET,
    LLM_TOKEN_INDICATOR,
    OUTPUT_IMAGE_INDICATOR,
    Ideogram4Transformer2DModel,
)
from peft import LoraConfig
from torch import Tensor, nn

from loraport_native.device import find_device, peak_memory_gib, peak_reserved_gib
from loraport_native.rate import seconds_of

KINDS = ("bf16", "fp8", "nf4")
_TARGETS = ["to_q", "to_k", "to_v", "to_out.0", "w1", "w2", "w3"]
_KEPT = ["lora", "norm", "t_embedding", "adaln_proj", "embed_image_indicator"]  # not stored in fp8


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("kind", choices=KINDS)
    parser.add_argument("--config", type=Path, required=True, help="config.json of the transformer: its dimensions")
    parser.add_argument("--device", default="auto")
    for name, value in {"resolution": 1024, "text": 512, "rank": 32, "batch": 1, "steps": 8, "warm-up": 3}.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    given = parser.parse_args()
    print(json.dumps(measure(given, find_device(given.device, "--device"))), flush=True)


def measure(given: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """Train `warm_up` + `steps` steps; seconds of each of the latter, and the peaks in GiB."""
    torch.manual_seed(0)
    model = _model(json.loads(given.config.read_text(encoding="utf-8")), given.kind, given.rank, device)
    weights = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=1e-4, fused=True)
    batch, target = _batch(model, given, device)
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)

    def step() -> None:
        time_ = torch.rand(given.batch, device=device).to(torch.bfloat16)
        (prediction,) = model(**batch, timestep=time_, return_dict=False)
        F.mse_loss(prediction[:, given.text :].float(), target).backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    seconds = [seconds_of(step, device) for _ in range(given.warm_up + given.steps)]
    return {
        "seconds": [round(value, 5) for value in seconds[given.warm_up :]],
        "peak_allocated_gib": peak_memory_gib(device),
        "peak_reserved_gib": peak_reserved_gib(device),
        "trained_parameters": sum(weight.numel() for weight in weights),
    }


def _model(config: dict[str, Any], kind: str, rank: int, device: torch.device) -> Ideogram4Transformer2DModel:
    config = {name: value for name, value in config.items() if not name.startswith("_")}
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with device:
            model = Ideogram4Transformer2DModel(**config)
    finally:
        torch.set_default_dtype(before)
    # Made under a bf16 default they are too coarse; diffusers computes them in float32.
    exponents = torch.arange(0, model.config.attention_head_dim, 2, dtype=torch.float32, device=device)
    model.rotary_emb.inv_freq = 1.0 / (model.config.rope_theta ** (exponents / model.config.attention_head_dim))
    model.requires_grad_(False)
    if kind == "nf4":
        _to_nf4(model.layers, device)
    adapter = LoraConfig(r=rank, lora_alpha=rank, init_lora_weights="gaussian", target_modules=_TARGETS)
    model.add_adapter(adapter)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(torch.bfloat16)
    if kind == "fp8":
        model.enable_layerwise_casting(
            storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.bfloat16, skip_modules_pattern=_KEPT
        )
    model.enable_gradient_checkpointing()
    return model.train()


def _to_nf4(blocks: nn.Module, device: torch.device) -> None:
    """bitsandbytes' own layer, as transformers and diffusers put it in."""
    from bitsandbytes.nn import Linear4bit, Params4bit

    for parent in list(blocks.modules()):
        for name, linear in list(parent.named_children()):
            if type(linear) is nn.Linear:
                small = Linear4bit(
                    linear.in_features,
                    linear.out_features,
                    bias=linear.bias is not None,
                    compute_dtype=torch.bfloat16,
                    quant_type="nf4",
                    device="cpu",
                )
                weight = linear.weight.data.cpu()
                small.weight = Params4bit(weight, requires_grad=False, quant_type="nf4", module=small)
                small.bias = linear.bias
                setattr(parent, name, small.to(device))


def _batch(
    model: Ideogram4Transformer2DModel, given: argparse.Namespace, device: torch.device
) -> tuple[dict[str, Tensor], Tensor]:
    """The packed sequence of the example, text then image, and a target for the image tokens."""
    side, text, batch = given.resolution // 16, given.text, given.batch
    length = text + side * side
    positions = torch.zeros(batch, length, 3, dtype=torch.long, device=device)
    positions[:, :text] = torch.arange(text, device=device)[None, :, None]
    rows, columns = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    image = torch.stack((torch.zeros_like(rows), rows, columns), dim=-1).reshape(-1, 3)
    positions[:, text:] = image.to(device) + IMAGE_POSITION_OFFSET
    indicator = torch.full((batch, length), OUTPUT_IMAGE_INDICATOR, device=device)
    indicator[:, :text] = LLM_TOKEN_INDICATOR
    config: Any = model.config
    random: dict[str, Any] = {"device": device, "dtype": torch.bfloat16}
    inputs = {
        "hidden_states": torch.randn(batch, length, config.in_channels, **random),
        "encoder_hidden_states": torch.randn(batch, length, config.llm_features_dim, **random),
        "position_ids": positions,
        "segment_ids": torch.ones(batch, length, dtype=torch.long, device=device),
        "indicator": indicator,
    }
    return inputs, torch.randn(batch, side * side, config.in_channels, device=device)


if __name__ == "__main__":
    main()
