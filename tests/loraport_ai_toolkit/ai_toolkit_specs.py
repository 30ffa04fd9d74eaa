"""Specs with a golden configuration each, resolved as the port resolves them."""

from __future__ import annotations

from typing import Any

from loraport.plugins import plugins
from loraport.profiles import resolve_memory
from loraport.spec.models import TrainSpec


def spec(**sections: Any) -> TrainSpec:
    """A resolved spec; sections are merged into one that says little."""
    content: dict[str, Any] = {
        "name": "mp_scifi_buggy",
        "model": {"checkpoint": "ideogram-ai/ideogram-4-fp8"},
        "dataset": {"path": "/data/images"},
        "backend": {"name": "ai-toolkit"},
    }
    for name, section in sections.items():
        content[name] = {**content[name], **section} if isinstance(content.get(name), dict) else section
    return resolve_memory(TrainSpec.model_validate(content), plugins().profiles())


GOLDEN = {
    "12gb": spec(
        dataset={"trigger_word": "mp_scifi_buggy", "resolution": 768, "caption_dropout": 0.05, "caption_ext": "txt"},
        train={"steps": 500, "learning_rate": 1e-4},
        memory={"profile": "12gb", "quantize": "fp8", "text_encoder": "fp8", "offload": "group"},
        backend={
            "options": {"layer_offloading_transformer_percent": 0.95, "layer_offloading_text_encoder_percent": 0.95}
        },
    ),
    "24gb": spec(
        dataset={"resolution": 1024, "repeats": 2},
        lora={"rank": 32, "targets": "all"},
        train={"steps": 2500, "lr_scheduler": "cosine"},
        memory={"profile": "24gb", "quantize": "fp8", "compile": "full"},
    ),
    "style": spec(
        name="baroque_light",
        dataset={"trigger_word": "baroque light", "default_caption": "a painting", "flip": True},
        lora={"targets": "attention"},
        train={"steps": 2000, "ema_decay": 0.99, "optimizer": "prodigy", "learning_rate": 1.0, "weight_decay": 0.0},
        sample={"every": 250, "prompts": ["a lighthouse, baroque light"], "width": 768, "height": 768},
        memory={"storage": "int8", "compute": "int8", "text_encoder": "int8"},
    ),
    "lokr": spec(
        lora={"type": "lokr", "rank": 32, "factor": 8},
        train={"steps": 1200, "optimizer": "adamw", "warmup_steps": 50},
        save={"every": 100, "keep": 3, "dtype": "fp32"},
    ),
    "details": spec(
        name="Ünïcode-1.2",
        model={"checkpoint": "/models/ideogram 4", "dtype": "fp32"},
        dataset={
            "path": "/data/träining set",
            "aspect_buckets": False,
            "max_text_tokens": 512,
            "regularization": {"path": "/data/cars", "repeats": 3, "weight": 0.5, "caption_ext": "txt"},
        },
        lora={"rank": 8, "dropout": 0.1, "targets": [r"layers\.[01]\.attention\.(qkv|o)"]},
        train={
            "steps": 100,
            "batch_size": 2,
            "gradient_accumulation": 4,
            "lr_scheduler": "linear",
            "max_grad_norm": 0.5,
            "seed": 7,
            "optimizer": "lion",
        },
        validation={"every": 50},
        save={"every": 0, "dtype": "fp16"},
    ),
    "multi-resolution": spec(
        name="shapes",
        dataset={
            "resolution": 896,
            "aspect_buckets": True,
            "upscale": True,
            "repeats": 2,
            "regularization": {"path": "/data/regularization"},
        },
        train={"batch_size": 2},
        sample={"every": 100, "prompts": ["a tall ship"], "width": 640, "height": 1152, "seed": 3},
        validation={"every": 100, "path": "/data/held out"},
    ),
    "sets": spec(
        name="several",
        dataset={
            "path": None,
            "resolution": 768,
            "trigger_word": "mp_buggy",
            "caption_dropout": 0.05,
            "sets": [
                {"path": "/data/photographs", "weight": 2},
                {
                    "path": "hub:someone/renders@v1",
                    "caption_field": "text",
                    "resolution": 512,
                    "flip": True,
                    "weight": 1,
                },
                {"path": "/data/cars", "caption_ext": "txt", "regularization": True, "weight": 1, "loss_weight": 0.5},
            ],
        },
        validation={"every": 50},
    ),
    "resume": spec(name="resumed", train={"steps": 750}, save={"every": 250, "keep": 2}),
}
