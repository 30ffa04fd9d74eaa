"""Spec → ai-toolkit's YAML. Every value that matters is written out, none is left to ai-toolkit's defaults."""

from __future__ import annotations

import json
import sys
from typing import Any

from loraport.planning import Context, Translation
from loraport.sets import ImageSet, image_sets, subject
from loraport.spec.models import TrainSpec
from loraport.spec.yaml_text import dump_yaml
from loraport_ai_toolkit import layout
from loraport_ai_toolkit.capabilities import INT8_COMPUTE, QTYPES, matching_modules, timestep_type, verdicts

#: The text encoder that ai-toolkit downloads when it is given none.
TEXT_ENCODER = "Qwen/Qwen3-VL-8B-Instruct"
#: A norm that no gradient reaches: ai-toolkit clips always, and 0 would remove every gradient.
NO_CLIPPING = 1e12
#: Key for what ai-toolkit's own cannot hold; it reads no such key, and the launcher leaves it out.
OWN = "loraport"

_ATTENTION, _MODULATION = "attention.", "adaln_modulation"


def translate(spec: TrainSpec, context: Context) -> Translation:
    """A pure function; see `loraport.backend.Backend.translate`."""
    return Translation(
        verdicts=verdicts(spec),
        files={
            layout.CONFIG: dump_yaml(config(spec)),
            layout.LAUNCH: json.dumps(_launch(spec), indent=2, ensure_ascii=False) + "\n",
        },
        command=[sys.executable, "-m", "loraport_ai_toolkit.launch", str(context.run_dir)],
        env={"PYTHONUNBUFFERED": "1"},
    )


def config(spec: TrainSpec) -> dict[str, Any]:
    """ai-toolkit's configuration. Paths are relative to the run folder, where it runs."""
    process: dict[str, Any] = {
        "type": "diffusion_trainer",
        "training_folder": layout.OUTPUT,
        "sqlite_db_path": layout.DATABASE,
        "performance_log_every": 0,
        "training_seed": spec.train.seed,
        "network": _network(spec),
        "save": {
            "dtype": spec.save.dtype,
            # Its own saves come one optimizer step late; the job database asks for them instead.
            "save_every": 0,
            "max_step_saves_to_keep": spec.save.keep,
            "save_format": "safetensors",
            "push_to_hub": False,
        },
        "datasets": _datasets(spec),
        "train": _train(spec),
        "model": _model(spec),
        "sample": _sample(spec),
        "logging": {"log_every": 1, "use_ui_logger": True, "use_wandb": False},
    }
    return {
        "job": "extension",
        "config": {"name": layout.job_name(spec.name), "process": [process]},
        OWN: _own(spec),
    }


def _launch(spec: TrainSpec) -> dict[str, Any]:
    return {
        "python": None if spec.backend.python is None else str(spec.backend.python),
        "device": spec.backend.options.get("device", "auto"),
        "config": layout.CONFIG,
        "job": layout.job_name(spec.name),
    }


def _own(spec: TrainSpec) -> dict[str, Any]:
    """What LoraPort does itself, so that the file says all of it and can be imported again."""
    return {
        "name": spec.name,
        "dataset": spec.dataset.model_dump(mode="json"),
        "save_every": spec.save.every,
        "python": None if spec.backend.python is None else str(spec.backend.python),
        "options": spec.backend.options,
    }


def _network(spec: TrainSpec) -> dict[str, Any]:
    lora = spec.lora
    network: dict[str, Any] = {
        "type": lora.type,
        "linear": lora.rank,
        "linear_alpha": lora.rank,
        "transformer_only": True,
        "network_kwargs": _targets(lora.targets),
    }
    if lora.dropout:
        network["dropout"] = lora.dropout
    if lora.type == "lokr":
        # Its default trains whole factors and leaves the rank aside.
        network |= {"lokr_full_rank": False, "lokr_factor": lora.factor, "old_lokr_format": False}
    return network


def _targets(targets: str | list[str]) -> dict[str, list[str]]:
    """Parts of names that choose the modules. A whole name is in no other: `layers.1.a` is not in `layers.11.a`."""
    if targets == "attention":
        return {"only_if_contains": [_ATTENTION]}
    if targets == "attention+mlp":
        return {"ignore_if_contains": [_MODULATION]}
    if targets == "all":
        return {"ignore_if_contains": []}
    return {"only_if_contains": matching_modules([targets] if isinstance(targets, str) else targets)}


def caption_extension(one: ImageSet) -> str:
    """The extension that a set's staged captions have."""
    return "txt" if one.caption_field else one.caption_ext


def _datasets(spec: TrainSpec) -> list[dict[str, Any]]:
    """Regularisation sets are as any: with `is_reg`, they would be every other step, whatever their repeats."""
    return [
        {
            "folder_path": layout.set_folder(one.label),
            "caption_ext": caption_extension(one),
            "caption_dropout_rate": one.caption_dropout,
            "num_repeats": one.repeats,
            "is_reg": False,
            "loss_multiplier": one.loss_weight,
            "resolution": one.resolution,
            "buckets": True,
            "square_crop": not spec.dataset.aspect_buckets,
            "shuffle_tokens": False,
            "token_dropout_rate": 0.0,
            "cache_latents_to_disk": spec.backend.options.get("cache_latents_to_disk", True),
            "cache_text_embeddings": True,
            "flip_x": one.flip,
            "flip_y": False,
            "num_frames": 1,
        }
        for one in image_sets(spec.dataset)
    ]


def _train(spec: TrainSpec) -> dict[str, Any]:
    train = spec.train
    scheduler, parameters = _schedule(spec)
    return {
        "batch_size": train.batch_size,
        "steps": train.steps,
        "gradient_accumulation": train.gradient_accumulation,
        "train_unet": True,
        "train_text_encoder": False,
        "gradient_checkpointing": spec.memory.gradient_checkpointing != "none",
        "noise_scheduler": "flowmatch",
        "timestep_type": timestep_type(spec),
        "content_or_style": spec.backend.options.get("content_or_style", "balanced"),
        "optimizer": train.optimizer,
        "optimizer_params": {"weight_decay": train.weight_decay},
        "lr": train.learning_rate,
        "lr_scheduler": scheduler,
        "lr_scheduler_params": parameters,
        # Gradients of accumulated passes are summed.
        "max_grad_norm": train.max_grad_norm * train.gradient_accumulation if train.max_grad_norm else NO_CLIPPING,
        "ema_config": {"use_ema": train.ema_decay > 0, "ema_decay": train.ema_decay},
        "loss_type": "mse",
        "dtype": spec.model.dtype,
        "cache_text_embeddings": True,
        "unload_text_encoder": False,
        "disable_sampling": not spec.sample.every,
        "skip_first_sample": True,
        **({"validation_config": _validation(spec)} if spec.validation.every else {}),
    }


def _schedule(spec: TrainSpec) -> tuple[str, dict[str, Any]]:
    train = spec.train
    if train.lr_scheduler == "constant" and train.warmup_steps:
        return "constant_with_warmup", {"num_warmup_steps": train.warmup_steps}
    if train.lr_scheduler == "linear":
        # torch's own end would be the start: a third of the rate, rising.
        return "linear", {"start_factor": 1.0, "end_factor": 0.0}
    return train.lr_scheduler, {}


def _validation(spec: TrainSpec) -> dict[str, Any]:
    """Without its images, which the launcher knows."""
    return {
        "resolution": subject(spec.dataset).resolution,
        "validate_every_n_steps": spec.validation.every,
        "validation_sigmas": [1.0, 0.75, 0.5, 0.25],
        "validation_items": [],
    }


def _model(spec: TrainSpec) -> dict[str, Any]:
    memory, options = spec.memory, spec.backend.options
    quantized = "qtype" in options or memory.storage in QTYPES
    quantized_te = "qtype_te" in options or memory.text_encoder in QTYPES
    offloaded = memory.offload == "group"
    qtype = INT8_COMPUTE if memory.compute == "int8" else QTYPES.get(memory.storage or "none", "qfloat8")
    return {
        "name_or_path": spec.model.checkpoint,
        "arch": options.get("arch", "ideogram4"),
        "quantize": quantized,
        "qtype": options.get("qtype", qtype),
        "quantize_te": quantized_te,
        "qtype_te": options.get("qtype_te", QTYPES.get(memory.text_encoder or "none", "qfloat8")),
        "low_vram": options.get("low_vram", quantized or offloaded),
        "layer_offloading": offloaded,
        "layer_offloading_transformer_percent": options.get("layer_offloading_transformer_percent", 1.0),
        "layer_offloading_text_encoder_percent": options.get("layer_offloading_text_encoder_percent", 1.0),
        "compile": memory.compile != "none",
        "block_compile": memory.compile == "regional",
        "model_kwargs": {
            "text_encoder_path": options.get("text_encoder_path", TEXT_ENCODER),
            "max_text_length": spec.dataset.max_text_tokens,
        },
    }


def _sample(spec: TrainSpec) -> dict[str, Any]:
    sample = spec.sample
    return {
        "sampler": "flowmatch",
        "sample_every": sample.every,
        "width": sample.width,
        "height": sample.height,
        "samples": [{"prompt": prompt} for prompt in sample.prompts],
        "neg": "",
        "seed": sample.seed,
        "walk_seed": False,
        "guidance_scale": sample.guidance,
        "sample_steps": sample.steps,
        "format": "png",
    }
