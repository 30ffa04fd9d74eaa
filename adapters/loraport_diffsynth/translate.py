"""Spec → DiffSynth's own arguments, and what our launch and entry add to them. A pure function, no torch.

Every path in the arguments is relative to the `backend` folder of the run, where DiffSynth runs: it splits several of
them at commas, colons or semicolons, and a user's folder may hold any of these.
"""

from __future__ import annotations

import json
import sys
from typing import Any

from loraport.ideogram4 import IDEOGRAM4
from loraport.planning import Context, Kind, Translation
from loraport.sets import image_sets, largest_resolution
from loraport.spec.models import TrainSpec
from loraport_diffsynth.capabilities import (
    OPTIMIZERS,
    is_local,
    is_split,
    method_of,
    own_script,
    verdicts,
)

JOB = "backend/launch.json"
DATASET, ORDER, CACHE, OUTPUT, CHECKPOINT = "dataset", "order", "cache", "output", "checkpoint"

TRANSFORMER = "transformer/diffusion_pytorch_model.safetensors"
TEXT_ENCODER = "text_encoder/model.safetensors"
VAE = "vae/diffusion_pytorch_model.safetensors"
TOKENIZER = "tokenizer/"


def translate(spec: TrainSpec, context: Context) -> Translation:
    """A pure function; see `loraport.backend.Backend.translate`. A refused spec gets no files."""
    judged = verdicts(spec, context.resume)
    refused = any(verdict.kind is Kind.REFUSED for verdict in judged)
    files = {} if refused else {JOB: json.dumps(job(spec), indent=2, ensure_ascii=False) + "\n"}
    return Translation(
        verdicts=judged,
        files=files,
        command=[sys.executable, "-m", "loraport_diffsynth.launch", str(context.run_dir)],
    )


def job(spec: TrainSpec) -> dict[str, Any]:
    """What `launch` reads: the part of the spec that it carries out itself, the entry's settings, and the phases."""
    plain = spec.model_dump(mode="json")
    return {
        "spec": {
            **{name: plain[name] for name in ("version", "name", "model", "dataset", "save", "validation", "backend")},
            "train": {"steps": spec.train.steps, "seed": spec.train.seed},
        },
        "entry": entry_settings(spec),
        "phases": phases(spec),
        "environment": environment(spec),
    }


def entry_settings(spec: TrainSpec) -> dict[str, Any]:
    """What DiffSynth's arguments have no word for; see `entry.py`."""
    lora = spec.lora
    return {
        "seed": spec.train.seed,
        "steps": spec.train.steps,
        "save_every": spec.save.every,
        "keep": spec.save.keep,
        "alpha": lora.effective_alpha,
        "rslora": lora.rslora,
        "timestep_mean": spec.train.timestep_mean,
        "timestep_std": spec.train.timestep_std,
        "max_text_tokens": spec.dataset.max_text_tokens,
        "script": own_script(spec),
    }


def phases(spec: TrainSpec) -> list[dict[str, Any]]:
    """The runs of DiffSynth, each with its task and its arguments."""
    if is_split(spec):
        return [
            {"task": "sft:data_process", "arguments": _encoding(spec)},
            {"task": "sft:train", "arguments": _training(spec, "sft:train")},
        ]
    return [{"task": "sft", "arguments": _training(spec, "sft")}]


def environment(spec: TrainSpec) -> dict[str, str]:
    """Variables of DiffSynth's process. Hub ids of a spec are Hugging Face's; DiffSynth's default is another hub."""
    offline = {"DIFFSYNTH_SKIP_DOWNLOAD": "True", "HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}
    online = {"DIFFSYNTH_DOWNLOAD_SOURCE": "huggingface", "HF_HUB_DISABLE_TELEMETRY": "1"}
    return {
        "PYTHONUNBUFFERED": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True",
        **(offline if is_local(spec) else online),
    }


def target_expression(spec: TrainSpec) -> str:
    """One regular expression that matches the whole name of every target module and nothing else."""
    patterns = IDEOGRAM4.target_patterns(spec.lora.targets)
    return patterns[0] if len(patterns) == 1 else "|".join(f"(?:{pattern})" for pattern in patterns)


def _encoding(spec: TrainSpec) -> list[str]:
    """Stage one. A checkout's script cannot do without the transformer there, but its weights can stay on disk."""
    script = own_script(spec) is not None
    return [
        *_images(spec, "encode.jsonl"),
        *_models(spec, [TRANSFORMER, TEXT_ENCODER, VAE] if script else [TEXT_ENCODER, VAE]),
        *(["--offload_models", _model(spec, TRANSFORMER)] if script else []),
        *_quantized(spec, [TEXT_ENCODER]),
        *("--task", "sft:data_process"),
        *("--output_path", CACHE),
        *("--lora_base_model", "dit"),
        # What an image is trained with is written down with it, so this counts here already.
        *_checkpointing(spec),
        *_offloading(spec),
        *_extra(spec),
    ]


def _training(spec: TrainSpec, task: str) -> list[str]:
    train = spec.train
    alone = task == "sft:train"
    parts = [TRANSFORMER] if alone else [TRANSFORMER, TEXT_ENCODER, VAE]
    images = ["--dataset_base_path", ORDER] if alone else _images(spec, "metadata.jsonl")
    images_a_step = train.batch_size * train.gradient_accumulation
    return [
        *images,
        *("--dataset_repeat", "1"),
        *_models(spec, parts),
        *_quantized(spec, [part for part in parts if part != VAE]),
        *("--learning_rate", repr(train.learning_rate)),
        *("--weight_decay", repr(train.weight_decay)),
        *("--num_epochs", "1"),
        *("--gradient_accumulation_steps", str(images_a_step)),
        *("--customized_optimizer", OPTIMIZERS[train.optimizer]),
        *("--task", task),
        *("--output_path", OUTPUT),
        *("--remove_prefix_in_ckpt", "pipe.dit."),
        *("--save_steps", str((spec.save.every or train.steps) * images_a_step)),
        *("--lora_base_model", "dit"),
        *("--lora_target_modules", target_expression(spec)),
        *("--lora_rank", str(spec.lora.rank)),
        *_checkpointing(spec),
        *_offloading(spec),
        *_extra(spec),
    ]


def _images(spec: TrainSpec, metadata: str) -> list[str]:
    return [
        *("--dataset_base_path", DATASET),
        *("--dataset_metadata_path", f"{DATASET}/{metadata}"),
        *("--data_file_keys", "image"),
        *("--dataset_num_workers", "0"),
        *("--max_pixels", str(largest_resolution(spec.dataset) ** 2)),
        *(["--extra_inputs", "loss_weight"] if any(one.loss_weight != 1 for one in image_sets(spec.dataset)) else []),
    ]


def _checkpointing(spec: TrainSpec) -> list[str]:
    return ["--use_gradient_checkpointing"] if spec.memory.gradient_checkpointing != "none" else []


def _offloading(spec: TrainSpec) -> list[str]:
    layers = ["--enable_model_cpu_offload"] if spec.memory.offload != "none" else []
    return layers + (["--use_gradient_checkpointing_offload"] if spec.memory.offload == "group+activations" else [])


def _extra(spec: TrainSpec) -> list[str]:
    """The user's own arguments come last, so that they win."""
    given: list[str] = spec.backend.options.get("arguments", [])
    return given


def _model(spec: TrainSpec, part: str) -> str:
    return f"{CHECKPOINT}/{part}" if is_local(spec) else f"{spec.model.checkpoint}:{part}"


def _models(spec: TrainSpec, parts: list[str]) -> list[str]:
    names = [_model(spec, part) for part in parts]
    tokenizer = ["--tokenizer_path", _model(spec, TOKENIZER)]
    if is_local(spec):
        return ["--model_paths", json.dumps(names), *tokenizer]
    return ["--model_id_with_origin_paths", ",".join(names), *tokenizer]


def _quantized(spec: TrainSpec, parts: list[str]) -> list[str]:
    methods = {part: method_of(spec, "transformer" if part == TRANSFORMER else "text_encoder") for part in parts}
    options = [f"{_model(spec, part)}:{method}" for part, method in methods.items() if method]
    return ["--quant_options", ";".join(options)] if options else []
