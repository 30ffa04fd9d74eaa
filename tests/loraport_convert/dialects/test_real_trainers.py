"""Files that other trainers' own code writes, against what their own modules compute.

Each trainer needs a checkout that an environment variable names: MUSUBI_SRC, SD_SCRIPTS_SRC, AI_TOOLKIT_SRC. Nothing of
them is imported here; they write in a process of their own.
"""

import datetime
import importlib.metadata
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import family_models as models
import numpy as np
import pytest
import small_loras

from loraport.lora.stacked import NotExact
from loraport.lora.storage import read_tensors
from loraport.plugins import plugins
from loraport_convert.families import ENCODERS, FAMILIES
from loraport_convert.reading import read_lora

CHECKOUTS = {"musubi": "MUSUBI_SRC", "sd-scripts": "SD_SCRIPTS_SRC", "ai-toolkit": "AI_TOOLKIT_SRC"}
HERE = Path(__file__).parents[1]
RECORD = HERE.parents[1] / "docs" / "lora-writers-verified.json"
pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("torch") is None or importlib.util.find_spec("diffusers") is None,
    reason="torch or diffusers is not installed",
)

#: The classes of containers by which a trainer finds the modules of a family.
CLASSES = {
    "ideogram4": {r"layers\.\d+": "Ideogram4TransformerBlock"},
    "flux1": {r"double_blocks\.\d+": "DoubleStreamBlock", r"single_blocks\.\d+": "SingleStreamBlock"},
    "qwen-image": {r"transformer_blocks\.\d+": "QwenImageTransformerBlock"},
    "z-image": {r"layers\.\d+": "ZImageTransformerBlock"},
    "wan": {r"blocks\.\d+": "WanAttentionBlock"},
    "krea2": {},
    "sd3": {r"joint_blocks\.\d+\.(x|context)_block": "SingleDiTBlock"},
    "sdxl": {
        r"(input|output)_blocks\.\d+\.1|middle_block\.1": "Transformer2DModel",
        r"(input|output)_blocks\.\d+\.0|middle_block\.[02]": "ResnetBlock2D",
        r"output_blocks\.\d+\.2": "Upsample2D",
    },
    "sd15": {
        r".*attentions\.\d": "Transformer2DModel",
        r".*resnets\.\d": "ResnetBlock2D",
        r".*downsamplers\.0": "Downsample2D",
        r".*upsamplers\.0": "Upsample2D",
    },
}
CLASSES["flux2"] = CLASSES["flux1"]


def native_shapes(model):
    """(rows, columns[, kernel]) of the small model's native modules."""
    small, found = small_loras.shapes(model), {}
    for native, rows in models.layout(model).items():
        if all(row[2] in small for row in rows):
            columns = small[rows[0][2]][1]
            found[native] = shaped(native, rows[0][5] // small_loras.SMALLER, columns)
    return found


def diffusers_shapes(model):
    return {name: shaped(name, *shape) for name, shape in small_loras.shapes(model).items()}


def shaped(name, rows, columns):
    """With the kernel of a convolution, which Stable Diffusion's names tell."""
    parts = name.split(".")
    three = any(each.startswith("conv") and each != "conv_shortcut" for each in parts) or (
        parts[-2:] in (["in_layers", "2"], ["out_layers", "3"]) or parts[-1] == "op"
    )
    return [rows, columns // 9, 3, 3] if three and columns % 9 == 0 else [rows, columns]


def case(model, network, *, names=native_shapes, **more):
    return {"model": model, "names": names, "network": network, **more}


CASES = {
    "musubi": {
        "ideogram4": case("ideogram4", "lora_ideogram4"),
        "krea2": case("krea2", "lora_krea2"),
        "z-image": case("z-image", "lora_zimage", names=diffusers_shapes),
        "qwen-image": case("qwen-image", "lora_qwen_image"),
        "wan": case("wan-14b", "lora_wan"),
        "flux1": case("flux1", "lora_flux"),
        "flux2": case("flux2", "lora_flux_2"),
        **{
            f"{kind} {family}": case(model, kind)
            for kind in ("loha", "lokr")
            for family, model in (("wan", "wan-14b"), ("qwen-image", "qwen-image"), ("flux1", "flux1"))
        },
    },
    "sd-scripts": {
        "sd15": case("sd15", "lora", names=diffusers_shapes, encoders=["clip"]),
        "sd15 C3Lier": case("sd15", "lora", names=diffusers_shapes, options={"conv_dim": 2, "conv_alpha": 1}),
        "sdxl": case("sdxl", "lora", encoders=["clip", "clip"]),
        "sdxl C3Lier": case("sdxl", "lora", options={"conv_dim": 2, "conv_alpha": 1}),
        "flux1": case("flux1", "lora_flux", encoders=["clip", "t5"], options={"train_t5xxl": "True"}),
        "sd3": case("sd3-3.5-medium", "lora_sd3", encoders=["clip", "clip", "t5"], options={"train_t5xxl": "True"}),
    },
    "ai-toolkit": {
        f"{kind} {family}": case(model, None, names=names, type=kind, prefix=prefix)
        for kind in ("lora", "lokr")
        for family, model, names, prefix in (
            ("ideogram4", "ideogram4", native_shapes, "diffusion_model."),
            ("flux1", "flux1", diffusers_shapes, "transformer."),
            ("qwen-image", "qwen-image", native_shapes, "diffusion_model."),
            ("wan", "wan-14b", native_shapes, "diffusion_model."),
            ("krea2", "krea2", native_shapes, "diffusion_model."),
        )
    },
}
ALL = [(trainer, name) for trainer, cases in CASES.items() for name in cases]
_RUN: dict[str, tuple[Path, str]] = {}


@pytest.fixture
def written(tmp_path_factory):
    """written(trainer): the folder that one process of the trainer's code filled."""

    def run(trainer):
        if CHECKOUTS[trainer] not in os.environ:
            pytest.skip(f"{CHECKOUTS[trainer]} names no checkout of {trainer}")
        if trainer not in _RUN:
            folder = tmp_path_factory.mktemp(trainer)
            told = {}
            for name, each in CASES[trainer].items():
                family = models.family_of(each["model"])
                rest = {key: value for key, value in each.items() if key != "names"}
                told[name] = rest | {"modules": each["names"](each["model"]), "classes": CLASSES[family]}
            (folder / "cases.json").write_text(json.dumps(told))
            child = HERE / "trainers_child.py"
            command = [sys.executable, str(child), trainer, os.environ[CHECKOUTS[trainer]], str(folder)]
            done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
            _RUN[trainer] = folder, done.stderr[-3000:] if done.returncode else ""
        folder, failure = _RUN[trainer]
        assert not failure, failure
        return folder

    return run


def expected_changes(path, family):
    """ΔW by canonical module, from those by the trainer's."""
    placed = {}
    for name, change in read_tensors(path).items():
        matrix = change.reshape(len(change), -1).astype(np.float64)
        number, colon, inner = name.rpartition(":")
        if colon:
            encoder = FAMILIES[family].encoders[int(number)]
            (span,) = ENCODERS["t5" if encoder.startswith("t5") else "clip"].native(inner)
            placed[f"text_encoders.{encoder}.transformer.{span.module}"] = matrix
            continue
        spans = FAMILIES[family].native(name, matrix.shape)
        start = 0
        for span in spans:
            rows = len(matrix) * span.count // sum(each.count for each in spans)
            whole = rows // span.count * span.total
            target = placed.setdefault(span.module, np.zeros((whole, matrix.shape[1])))
            first = rows // span.count * span.first
            target[first : first + rows] = matrix[start : start + rows]
            start += rows
    return placed


@pytest.mark.parametrize(("trainer", "name"), ALL)
def test_what_a_trainer_saves_is_what_its_modules_compute(written, tmp_path, trainer, name):
    folder = written(trainer)
    family = models.family_of(CASES[trainer][name]["model"])
    dialects = plugins().dialects()
    path = folder / f"{name}.safetensors"
    lora = read_lora(path, dialects, None, family).lora
    expected = expected_changes(folder / f"{name}.expected", family)
    assert len(expected) > 3
    small_loras.assert_same_changes(lora, expected, 2e-5)


@pytest.mark.parametrize(("trainer", "name"), ALL)
def test_it_becomes_a_file_for_comfyui_that_means_the_same(written, tmp_path, trainer, name):
    folder = written(trainer)
    family = models.family_of(CASES[trainer][name]["model"])
    dialects = plugins().dialects()
    lora = read_lora(folder / f"{name}.safetensors", dialects, None, family).lora
    if (trainer, name) == ("ai-toolkit", "lokr flux1"):  # on split attention: three LoKr are not one, see the reports
        with pytest.raises(NotExact, match="--approximate"):
            dialects["comfyui"].write(lora, tmp_path / "comfy.safetensors", None, {})
        return
    dialects["comfyui"].write(lora, tmp_path / "comfy.safetensors", None, {})
    found = dialects["comfyui"].read(tmp_path / "comfy.safetensors")
    small_loras.assert_same_changes(found, expected_changes(folder / f"{name}.expected", family), 2e-5)


def test_the_outcome_is_recorded(written):
    if "LORAPORT_RECORD" not in os.environ:
        pytest.skip("LORAPORT_RECORD is not set")
    outcome = {}
    for trainer, cases in CASES.items():
        checkout = os.environ[CHECKOUTS[trainer]]
        commit = subprocess.run(
            ["git", "-C", checkout, "rev-parse", "HEAD"], capture_output=True, text=True, check=True
        ).stdout.strip()
        outcome[trainer] = {
            "commit": commit,
            "files": {name: compared(written(trainer), trainer, name) for name in cases},
        }
    versions = {package: importlib.metadata.version(package) for package in ("torch", "diffusers", "transformers")}
    content = {**versions, "date": datetime.date.today().isoformat(), "trainers": outcome}
    RECORD.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def compared(folder, trainer, name):
    """How many modules a trainer's file has, and how far ΔW is off at most."""
    family = models.family_of(CASES[trainer][name]["model"])
    lora = read_lora(folder / f"{name}.safetensors", plugins().dialects(), None, family).lora
    expected = expected_changes(folder / f"{name}.expected", family)
    apart = [
        np.linalg.norm(small_loras.dense(lora.modules[each]) - change) / np.linalg.norm(change)
        for each, change in expected.items()
    ]
    return {"modules": len(expected), "keys not read": len(lora.unread), "largest relative difference": max(apart)}
