"""Specs for the tests of the SimpleTuner adapter."""

from __future__ import annotations

import datetime
import json
import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from loraport.plugins import plugins
from loraport.profiles import resolve_memory
from loraport.spec.models import TrainSpec

HERE = Path(__file__).parent
VERIFIED = HERE.parent.parent / "docs" / "backends-verified" / "simpletuner.json"
_PACKAGES = ("simpletuner", "torch", "transformers", "diffusers", "peft", "lycoris-lora", "accelerate", "bitsandbytes")
_outcomes: dict[str, str] = {}

#: name → (sections of the spec, whether it resumes)
CASES: dict[str, tuple[dict[str, Any], bool]] = {
    "12gb": (
        {
            "name": "buggy",
            "dataset": {"resolution": 768, "trigger_word": "mp_buggy", "caption_dropout": 0.05},
            "memory": {"profile": "12gb"},
        },
        False,
    ),
    "24gb": (
        {
            "name": "portrait",
            "dataset": {"resolution": 1024, "upscale": True, "flip": True},
            "lora": {"rank": 32, "alpha": 16, "dropout": 0.05},
            "train": {"steps": 2000, "lr_scheduler": "cosine", "optimizer": "adamw", "weight_decay": 0.1},
            "memory": {"profile": "24gb"},
        },
        False,
    ),
    "style": (
        {
            "name": "ink-style",
            "dataset": {"caption_ext": "txt", "repeats": 3, "resolution": 512, "aspect_buckets": False},
            "lora": {"rank": 8, "alpha": 8, "targets": "attention", "rslora": True},
            "train": {"steps": 600, "batch_size": 2, "gradient_accumulation": 2, "warmup_steps": 50},
            "sample": {"every": 200, "prompts": ["a ship, in ink", "ein Baum – Tusche"], "width": 768, "height": 512},
        },
        False,
    ),
    "lokr": (
        {
            "name": "lokr",
            "lora": {"type": "lokr", "rank": 16, "alpha": 8, "factor": 8, "targets": "all"},
            "train": {"optimizer": "lion", "lr_scheduler": "linear", "warmup_steps": 10},
            "memory": {"quantize": "none", "compile": "regional"},
        },
        False,
    ),
    "details": (
        {
            "name": "details",
            "model": {"checkpoint": "/models/ideogram 4", "dtype": "fp32"},
            "dataset": {
                "default_caption": "a photograph",
                "regularization": {"path": "/data/regularization", "repeats": 2},
            },
            "lora": {"targets": [r"layers\.[0-3]\.attention\.qkv", r"layers\.\d+\.feed_forward\.w2"]},
            "train": {"timestep_mean": 0.5, "timestep_std": 1.0, "max_grad_norm": 0.5, "seed": 7},
            "save": {"every": 100, "keep": 2},
            "validation": {"every": 50, "images": 2},
            "backend": {
                "python": "/opt/st/bin/python",
                "options": {"version": "4.8.0", "config": {"vae_batch_size": 1}},
            },
            "memory": {"offload": "group", "gradient_checkpointing": False},
        },
        False,
    ),
    "multi-resolution": (
        {
            "name": "shapes",
            "dataset": {
                "resolution": 896,
                "aspect_buckets": True,
                "upscale": True,
                "repeats": 2,
                "regularization": {"path": "/data/regularization"},
            },
            "train": {"batch_size": 2},
            "sample": {"every": 100, "prompts": ["a tall ship"], "width": 640, "height": 1152, "seed": 3},
            "validation": {"every": 100, "path": "/data/held out"},
        },
        False,
    ),
    "sets": (
        {
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
                    {"path": "/data/cars", "caption_ext": "txt", "regularization": True, "weight": 1},
                ],
            },
            "validation": {"every": 50},
        },
        False,
    ),
    "resume": ({"name": "again", "train": {"steps": 4}, "save": {"every": 2}, "memory": {"quantize": "fp8"}}, True),
}

BASE: dict[str, Any] = {
    "name": "test",
    "model": {"checkpoint": "ideogram-ai/ideogram-4-fp8"},
    "dataset": {"path": "/data/images"},
    "backend": {"name": "simpletuner"},
}


def make(**sections: Any) -> TrainSpec:
    """A resolved spec: the base above, changed by what is given."""
    content = dict(BASE)
    for name, values in sections.items():
        content[name] = {**content.get(name, {}), **values} if isinstance(values, dict) else values
    return resolve_memory(TrainSpec.model_validate(content), plugins().profiles())


@pytest.fixture
def make_spec() -> Callable[..., TrainSpec]:
    return make


@pytest.fixture(scope="session")
def golden_cases() -> dict[str, Any]:
    """Name → (sections of the spec, whether it resumes), of the golden files."""
    return dict(CASES)


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Three images of 128 px with JSON captions, in a folder whose name has spaces and letters beyond ASCII."""
    folder = tmp_path / "meine Bilder – ü"
    folder.mkdir()
    for number in range(3):
        Image.linear_gradient("L").convert("RGB").resize((128, 128)).save(folder / f"{number} é.png")
        (folder / f"{number} é.json").write_text(
            '{"compositional_deconstruction": {\n"background": "gräy", "elements": []}}', encoding="utf-8"
        )
    return folder


@pytest.fixture(scope="session")
def simpletuner_versions() -> dict[str, Any]:
    return _versions()


def _versions() -> dict[str, Any]:
    """The versions of what SimpleTuner's interpreter runs."""
    code = (
        "import importlib.metadata as m, json, platform, sys\n"
        "print(json.dumps({'python': platform.python_version(), **{n: m.version(n) for n in sys.argv[1:]}}))"
    )
    python = os.environ["LORAPORT_SIMPLETUNER_PYTHON"]
    done = subprocess.run([python, "-c", code, *_PACKAGES], capture_output=True, text=True, check=True)
    return dict(json.loads(done.stdout.splitlines()[-1]))


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if "loraport_simpletuner/test_real" in report.nodeid and (report.when == "call" or report.failed):
        name = report.nodeid.rsplit("::", 1)[-1]
        _outcomes[name] = "failed" if _outcomes.get(name) == "failed" else report.outcome


def pytest_sessionfinish() -> None:
    """With LORAPORT_RECORD set, what the real SimpleTuner did is written down as data."""
    if not (_outcomes and os.environ.get("LORAPORT_RECORD") and os.environ.get("LORAPORT_SIMPLETUNER_PYTHON")):
        return
    content = {
        "backend": "simpletuner",
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "device": "cpu",
        "versions": _versions(),
        "outcomes": dict(sorted(_outcomes.items())),
    }
    VERIFIED.parent.mkdir(exist_ok=True)
    VERIFIED.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
