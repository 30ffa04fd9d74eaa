"""Spec → SimpleTuner's config.json, multidatabackend.json and LyCORIS file. No default is left to it."""

from __future__ import annotations

import json
import sys
from typing import Any

from loraport.ideogram4 import IDEOGRAM4
from loraport.planning import Context, Kind, Translation
from loraport.sets import ImageSet, image_sets, subject
from loraport.spec.models import TrainSpec
from loraport_simpletuner import mapping, memory
from loraport_simpletuner.capabilities import verdicts

#: SimpleTuner's working folder in the run folder; every path in its files is relative to it, so no character of the
#: user's paths can trip it.
WORK = "backend"
CONFIG = "config/config.json"
DATA = "config/multidatabackend.json"
LYCORIS = "config/lycoris_config.json"
LAUNCH = "launch.json"
OUTPUT = "output"
#: The held-out images' name in SimpleTuner's metrics.
HELD_OUT_ID = "held-out"
#: What SimpleTuner's own files have no room for; kept so that the files can be imported again.
CARRIED = ("version", "name", "model", "dataset", "memory", "save", "sample", "validation", "backend")


def translate(spec: TrainSpec, context: Context) -> Translation:
    """A pure function; see `loraport.backend.Backend.translate`."""
    judged = verdicts(spec)
    files: dict[str, str] = {}
    if not any(verdict.kind is Kind.REFUSED for verdict in judged):
        contents: dict[str, Any] = {CONFIG: _config(spec, context.resume), DATA: _data(spec), LAUNCH: _launch(spec)}
        if spec.lora.type != "lora":
            contents[LYCORIS] = _lycoris(spec)
        files = {
            f"{WORK}/{name}": json.dumps(content, indent=2, ensure_ascii=False) + "\n"
            for name, content in contents.items()
        }
    return Translation(
        verdicts=judged,
        files=files,
        command=[sys.executable, "-m", "loraport_simpletuner.launch", str(context.run_dir)],
        env={"PYTHONUNBUFFERED": "1"},
    )


def _launch(spec: TrainSpec) -> dict[str, Any]:
    content = spec.model_dump(mode="json")
    carried = {name: content[name] for name in CARRIED}
    carried["memory"] = {name: content["memory"][name] for name in ("profile", "compute", "text_encoder")}
    carried["train"] = {"gpus": spec.train.gpus}
    carried["save"] = {"dtype": content["save"]["dtype"]}
    del carried["model"]["dtype"]
    return {
        "python": content["backend"]["python"],
        "version": mapping.version_of(spec),
        "arguments": memory.arguments(spec),
        "env": {
            "CONFIG_BACKEND": "json",
            "SIMPLETUNER_LOG_LEVEL": "INFO",
            "SIMPLETUNER_DISABLE_COLORS": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            **memory.environment(spec),
        },
        "checkpoint": content["model"]["checkpoint"] if mapping.is_local(content["model"]["checkpoint"]) else None,
        "carried": carried,
    }


def _config(spec: TrainSpec, resume: bool) -> dict[str, Any]:
    train = spec.train
    schedule = mapping.schedule_of(spec)
    keys: dict[str, Any] = {
        "model_family": "ideogram",
        "model_type": "lora",
        **_base(spec),
        "output_dir": OUTPUT,
        "data_backend_config": DATA,
        "resume_from_checkpoint": "latest" if resume else "",
        "cache_dir": "cache",
        "cache_dir_text": "cache/text",
        "cache_dir_vae": "cache/vae",
        **_lora(spec),
        "max_train_steps": train.steps,
        "num_train_epochs": 0,
        "train_batch_size": train.batch_size,
        "gradient_accumulation_steps": train.gradient_accumulation,
        "learning_rate": train.learning_rate,
        "lr_scheduler": schedule.name,
        "lr_warmup_steps": schedule.warmup,
        "lr_num_cycles": schedule.cycles,
        "lr_end": 0.0,
        "optimizer": mapping.OPTIMIZERS[train.optimizer],
        "optimizer_config": f"weight_decay={mapping.number(train.weight_decay)}",
        "grad_clip_method": "norm",
        "max_grad_norm": train.max_grad_norm,
        "seed": train.seed % 2**32 or mapping.MAX_SEED,
        "use_ema": False,
        "ideogram_schedule_mu": train.timestep_mean,
        "ideogram_schedule_std": train.timestep_std,
        "flow_schedule_shift": 1.0,
        "offset_noise": False,
        "input_perturbation": 0.0,
        "resolution": subject(spec.dataset).resolution,
        "resolution_type": "pixel_area" if spec.dataset.aspect_buckets else "pixel",
        "aspect_bucket_alignment": str(IDEOGRAM4.side_multiple),
        "caption_strategy": "textfile",
        "caption_dropout_probability": mapping.caption_dropout(spec),
        "ideogram_auto_json": False,
        "ideogram_prompt_upsample": False,
        # Projected text features are small, but need a download that exists for the official weights only.
        "text_embed_full_cache": mapping.is_local(spec.model.checkpoint),
        "data_backend_sampling": "auto-weighting" if _sets(spec)[0].weight is None else "uniform",
        "disable_bucket_pruning": False,
        **memory.keys(spec),
        "checkpoint_step_interval": spec.save.every,
        "checkpoints_total_limit": spec.save.keep,
        **_sample(spec),
        **_validation(spec),
        "report_to": "simpletuner",
        "disable_benchmark": True,
        "push_to_hub": False,
        "attention_mechanism": "diffusers",
    }
    return keys | spec.backend.options.get("config", {})


def _base(spec: TrainSpec) -> dict[str, Any]:
    base = mapping.base_of(spec)
    assert isinstance(base, mapping.Base), base
    return {
        "model_flavour": base.flavour,
        "pretrained_model_name_or_path": base.checkpoint,
        "mixed_precision": mapping.MIXED_PRECISION[spec.model.dtype],
        "base_model_default_dtype": spec.model.dtype,
        "base_model_precision": base.precision,
        "ideogram_fp8_base_upcast": base.upcast,
        "quantize_via": "accelerator",
        "vae_dtype": "bf16" if spec.model.dtype == "bf16" else "fp32",
    }


def _lora(spec: TrainSpec) -> dict[str, Any]:
    lora = spec.lora
    keys: dict[str, Any] = {
        "lora_type": "standard" if lora.type == "lora" else "lycoris",
        "lora_rank": lora.rank,
        "lora_alpha": mapping.alpha_of(spec),
        "lora_dropout": lora.dropout,
        "lora_init_type": "default",
        "use_dora": False,
        # The final file has no alpha in either format; ComfyUI's claims that alpha is the rank, this one says nothing.
        "lora_format": "diffusers",
    }
    if lora.type != "lora":
        return keys | {"lycoris_config": LYCORIS}
    return keys | {"peft_lora_target_modules": mapping.peft_targets(IDEOGRAM4.target_patterns(lora.targets))}


def _lycoris(spec: TrainSpec) -> dict[str, Any]:
    lora = spec.lora
    content: dict[str, Any] = {
        "algo": lora.type,
        "multiplier": 1,
        "linear_dim": lora.rank,
        "linear_alpha": int(lora.effective_alpha),
        "apply_preset": {
            "target_module": [],
            "target_name": mapping.lycoris_targets(IDEOGRAM4.target_patterns(lora.targets)),
            "use_fnmatch": False,
        },
    }
    return content | ({"factor": lora.factor} if lora.type == "lokr" else {})


def _sample(spec: TrainSpec) -> dict[str, Any]:
    sample = spec.sample
    shared = {
        "ideogram_validation": bool(sample.every),
        # Without this the held-out loss is not measured either.
        "validation_disable": not (sample.every or spec.validation.every),
        "validation_disable_unconditional": True,
    }
    if not sample.every:
        return shared
    return shared | {
        # Of a library of prompts it looks for text features under other keys than it kept them (4.8 to 4.10).
        "validation_prompt": sample.prompts[0],
        "validation_negative_prompt": mapping.NEGATIVE,
        "validation_step_interval": sample.every,
        "validation_num_inference_steps": sample.steps,
        "validation_guidance": sample.guidance,
        "validation_resolution": f"{sample.width}x{sample.height}",
        "validation_seed": sample.seed % 2**32,
        "num_validation_images": 1,
    }


def _validation(spec: TrainSpec) -> dict[str, Any]:
    if not spec.validation.every:
        return {}
    return {
        "eval_steps_interval": spec.validation.every,
        "eval_timesteps": mapping.VALIDATION_LEVELS,
        # Every image that is held out: this only has to be at least their number.
        "num_eval_images": 10_000,
        "eval_dataset_pooling": False,
    }


def folder_of(label: str) -> str:
    """Where a set's images are staged, by its label."""
    return f"dataset/{label}"


def _sets(spec: TrainSpec) -> list[ImageSet]:
    return image_sets(spec.dataset)


def _data(spec: TrainSpec) -> list[dict[str, Any]]:
    sets = [_images(spec, one.label, one.resolution, one.repeats) | _drawn(spec, one) for one in _sets(spec)]
    if spec.validation.every:
        # Repeats would only measure the same again.
        held_out = _images(spec, HELD_OUT_ID, subject(spec.dataset).resolution, 1)
        sets.append(held_out | {"dataset_type": "eval", "repeats": 0})
    text = {"id": "text", "type": "local", "dataset_type": "text_embeds", "default": True, "cache_dir": "cache/text"}
    return [*sets, text]


def _drawn(spec: TrainSpec, one: ImageSet) -> dict[str, Any]:
    """Of a set with a weight: its probability, and so many repeats that no set is used up, after which only the others
    would be drawn from."""
    if one.weight is None:
        return {}
    train = spec.train
    samples = train.steps * train.batch_size * train.gradient_accumulation * train.gpus
    return {"probability": one.weight / sum(each.weight or 0.0 for each in _sets(spec)), "repeats": samples}


def _images(spec: TrainSpec, label: str, resolution: int, repeats: int) -> dict[str, Any]:
    buckets = spec.dataset.aspect_buckets
    return {
        "id": label,
        "type": "local",
        "dataset_type": "image",
        "instance_data_dir": folder_of(label),
        "caption_strategy": "textfile",
        "metadata_backend": "discovery",
        "crop": True,
        "crop_style": "center",
        "crop_aspect": "preserve" if buckets else "square",
        "resolution": resolution,
        "resolution_type": "pixel_area" if buckets else "pixel",
        "cache_dir_vae": f"cache/vae/{label}",
        # SimpleTuner counts the times after the first.
        "repeats": mapping.repeats_of(spec, repeats) - 1,
    }
