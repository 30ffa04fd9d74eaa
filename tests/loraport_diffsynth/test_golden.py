"""Specs and exactly what is generated for each. LORAPORT_UPDATE_GOLDEN=1 writes the files anew."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from loraport.planning import Context
from loraport.profiles import resolve_memory
from loraport.spec.models import TrainSpec
from loraport_diffsynth.translate import JOB, translate

GOLDEN = Path(__file__).parent / "golden"

_BASE: dict[str, Any] = {
    "name": "buggy",
    "model": {"checkpoint": "/models/ideogram-4-bf16"},
    "dataset": {"path": "/data/buggy", "trigger_word": "mp_scifi_buggy", "resolution": 768},
    "lora": {"rank": 16},
    "train": {"steps": 1000},
    "backend": {"name": "diffsynth"},
}

CASES: dict[str, dict[str, Any]] = {
    "12gb": {**_BASE, "memory": {"profile": "12gb"}},
    "24gb": {
        **_BASE,
        "model": {"checkpoint": "ideogram-ai/ideogram-4-fp8"},
        "memory": {"profile": "24gb"},
        "lora": {"rank": 32, "alpha": 16, "targets": "all"},
    },
    "style": {
        **_BASE,
        "name": "ink-style",
        "dataset": {"path": "/data/ink", "caption_ext": "txt", "caption_dropout": 0.05, "flip": True},
        "lora": {"rank": 8, "alpha": 4, "rslora": True, "targets": "attention"},
        "train": {"steps": 2000, "gradient_accumulation": 4, "learning_rate": 5e-5, "optimizer": "adamw", "seed": 7},
        "save": {"every": 500, "keep": 2},
        "memory": {"profile": "80gb"},
    },
    "lokr": {**_BASE, "lora": {"type": "lokr", "factor": 8}},
    "details": {
        **_BASE,
        "model": {"checkpoint": "DiffSynth-Studio/ideogram-4-bf16-repackage"},
        "dataset": {
            "path": "/data/buggy",
            "repeats": 3,
            "aspect_buckets": False,
            "max_text_tokens": 512,
            "regularization": {"path": "/data/cars", "repeats": 2, "weight": 0.5},
        },
        "lora": {"targets": [r"layers\.\d{1,2}\.attention\.o", r"layers\.3\.feed_forward\.w1"], "dropout": 0.1},
        "train": {
            "batch_size": 2,
            "optimizer": "prodigy",
            "learning_rate": 1,
            "max_grad_norm": 0,
            "lr_scheduler": "cosine",
            "timestep_mean": 0.5,
        },
        "memory": {"offload": "group", "compile": "regional"},
        "sample": {"every": 100, "prompts": ["a buggy"]},
        "validation": {"every": 50},
        "backend": {"name": "diffsynth", "options": {"arguments": ["--use_gradient_checkpointing_offload"]}},
    },
    "multi-resolution": {
        **_BASE,
        "name": "shapes",
        "dataset": {
            "path": "/data/shapes",
            "resolution": 896,
            "aspect_buckets": True,
            "upscale": True,
            "repeats": 2,
            "regularization": {"path": "/data/regularization"},
        },
        "train": {"batch_size": 2},
        "memory": {"profile": "24gb"},
        "validation": {"every": 100, "path": "/data/held out"},
    },
    "sets": {
        **_BASE,
        "name": "several",
        "dataset": {
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
    },
    "resume": {**_BASE, "memory": {"quantize": "none"}},
}


def resolved(case: str) -> TrainSpec:
    from loraport.plugins import plugins

    return resolve_memory(TrainSpec.model_validate(CASES[case]), plugins().profiles())


@pytest.mark.parametrize("case", CASES)
def test_what_is_generated_is_exactly_what_the_golden_files_say(case: str) -> None:
    made = translate(resolved(case), Context(run_dir=Path("/runs/golden"), resume=case == "resume"))
    told = "".join(f"{v.kind:<13} {v.path} = {v.value!r}: {v.reason}\n" for v in made.verdicts)
    found = {"verdicts.txt": told, **{name.rpartition("/")[2]: text for name, text in made.files.items()}}
    folder = GOLDEN / case
    if os.environ.get("LORAPORT_UPDATE_GOLDEN"):
        folder.mkdir(parents=True, exist_ok=True)
        for name, text in found.items():
            (folder / name).write_text(text, encoding="utf-8")
    assert found == {path.name: path.read_text(encoding="utf-8") for path in folder.iterdir()}
    assert set(made.files) == (set() if case == "lokr" else {JOB})
    assert made.command[1:] == ["-m", "loraport_diffsynth.launch", "/runs/golden"]
