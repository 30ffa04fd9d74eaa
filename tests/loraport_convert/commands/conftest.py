"""LoRA files of a tiny Ideogram 4, and the command line in this process."""

import json

import ml_dtypes
import numpy as np
import pytest
from typer.testing import CliRunner

from loraport.cli.main import build_app
from loraport.lora.storage import write_tensors

SHAPES = {
    "layers.0.attention.qkv": (96, 32),
    "layers.0.attention.o": (32, 32),
    "layers.0.feed_forward.w1": (48, 32),
}
NUMPY = {"bf16": ml_dtypes.bfloat16, "fp16": np.float16, "fp32": np.float32}


@pytest.fixture
def run(monkeypatch):
    """Calls `loraport` with arguments; gives the exit code, standard output and standard error."""
    monkeypatch.setenv("COLUMNS", "200")
    app = build_app()

    def call(*arguments):
        done = CliRunner().invoke(app, [str(each) for each in arguments], catch_exceptions=False)
        return done.exit_code, done.stdout, done.stderr

    return call


@pytest.fixture
def factors():
    """Makes the factors (down, up) of every module."""

    def make(seed=0, rank=4, dtype="bf16"):
        rng = np.random.default_rng(seed)
        return {
            name: tuple(
                (0.1 * rng.standard_normal(shape)).astype(NUMPY[dtype]) for shape in ((rank, columns), (out, rank))
            )
            for name, (out, columns) in SHAPES.items()
        }

    return make


@pytest.fixture
def comfy(tmp_path, factors):
    """Writes a LoRA as ComfyUI reads it; `alpha` None leaves the scale out."""

    def make(name="comfy.safetensors", seed=0, rank=4, alpha=2.0, dtype="bf16", metadata=None, **changed):
        tensors = {}
        for module, (down, up) in factors(seed, rank, dtype).items():
            tensors[f"diffusion_model.{module}.lora_down.weight"] = down
            tensors[f"diffusion_model.{module}.lora_up.weight"] = up
            if alpha is not None:
                tensors[f"diffusion_model.{module}.alpha"] = np.array(alpha, np.float32)
        tensors = {key: array for key, array in (tensors | changed).items() if array is not None}
        write_tensors(tmp_path / name, tensors, metadata or {})
        return tmp_path / name

    return make


@pytest.fixture
def peft(tmp_path, factors):
    """Writes the same LoRA as an adapter folder of PEFT's."""

    def make(name="adapter", seed=0, rank=4, alpha=2.0, dtype="bf16"):
        folder = tmp_path / name
        folder.mkdir()
        tensors = {}
        for module, (down, up) in factors(seed, rank, dtype).items():
            tensors[f"base_model.model.{module}.lora_A.weight"] = down
            tensors[f"base_model.model.{module}.lora_B.weight"] = up
        write_tensors(folder / "adapter_model.safetensors", tensors, {})
        (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": rank, "lora_alpha": alpha}))
        return folder

    return make


@pytest.fixture
def bare(tmp_path, factors):
    """Writes the same LoRA as DiffSynth does, without its scale."""

    def make(name="bare.safetensors", seed=0, rank=4, dtype="bf16"):
        tensors = {}
        for module, (down, up) in factors(seed, rank, dtype).items():
            tensors[f"{module}.lora_A.default.weight"] = down
            tensors[f"{module}.lora_B.default.weight"] = up
        write_tensors(tmp_path / name, tensors, {})
        return tmp_path / name

    return make
