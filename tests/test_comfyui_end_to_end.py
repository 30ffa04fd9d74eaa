"""From `loraport train` to ComfyUI: with our file, its own model predicts what ours learned to predict.

Needs COMFY_SRC, a ComfyUI checkout.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif("COMFY_SRC" not in os.environ, reason="COMFY_SRC names no ComfyUI checkout"),
]
QUICKSTART = Path(__file__).parents[1] / "examples" / "quickstart" / "spec.yaml"
CHILD = Path(__file__).parent / "loraport_convert" / "comfyui_child.py"
#: Steps enough for an update that is no rounding error, in the format that adds the least of it.
SETTINGS = ["train.steps=40", "save.dtype=fp32", "validation.every=0", "save.every=0"]


@pytest.mark.parametrize(
    "settings",
    [
        ["lora.alpha=8"],
        ["lora.rslora=true"],
        ["lora.dora=true"],
        ["lora.targets=all", "lora.rank=4"],
        ["lora.type=lokr", "lora.factor=8", "lora.rank=4", "lora.alpha=2"],
        ["lora.type=loha", "lora.rank=4", "lora.alpha=8"],
    ],
    ids=lambda settings: ",".join(settings),
)
def test_comfyui_predicts_what_was_trained(settings: list[str], tmp_path: Path) -> None:
    import torch
    from safetensors.torch import load_file, save_file

    from loraport.ideogram4 import IDEOGRAM4
    from loraport.run.api import train
    from loraport.spec.load import load_spec
    from loraport_native.lora import Masters, inject
    from loraport_native.models.checkpoint import find_checkpoint, load_transformer

    spec = load_spec(QUICKSTART, [*SETTINGS, *settings]).spec
    result = train(spec, out=tmp_path / "run")

    checkpoint = find_checkpoint(str(result.folder / "tiny-checkpoint"))
    model = load_transformer(checkpoint, torch.float32, "cpu")
    torch.manual_seed(0)
    grid, time = (6, 8), torch.tensor([0.4])
    tokens, features = torch.randn(1, 48, 128), torch.randn(1, 20, model.config.llm_features_dim)
    text = model.project_text(features)

    def predict() -> torch.Tensor:
        with torch.no_grad():
            return model.eval().velocity(tokens, text, None, time, grid)

    untrained = predict()
    adapter = inject(model, spec.lora, IDEOGRAM4.target_patterns(spec.lora.targets), 0)
    saved = load_file(result.folder / "checkpoints" / "step-000040" / "adapter.safetensors")
    Masters(adapter, torch.float32).load(saved)
    trained = predict()

    comfy = tmp_path / "comfy"
    for name in ("loras", "patched", "velocity"):
        (comfy / name).mkdir(parents=True)
    (comfy / "loras" / "trained.safetensors").write_bytes(result.lora.read_bytes())
    (weights,) = checkpoint.transformer.glob("*.safetensors")
    base = {f"diffusion_model.{name}": tensor.float() for name, tensor in load_file(weights).items()}
    save_file(base, comfy / "base.safetensors")
    sizes = {name: size for name, size in model.config.items() if not name.startswith("_")}
    (comfy / "sizes.json").write_text(json.dumps(sizes))
    inputs = {"tokens": tokens, "features": features, "time": time, "grid": torch.tensor(grid)}
    save_file(inputs, comfy / "inputs.safetensors")
    subprocess.run([sys.executable, str(CHILD), os.environ["COMFY_SRC"], str(comfy)], check=True, capture_output=True)

    assert json.loads((comfy / "report.json").read_text())["trained"] == []
    theirs = load_file(comfy / "velocity" / "trained.safetensors")["velocity"]
    change = (trained - untrained).norm()
    assert change > 0.05 * untrained.norm()
    assert (theirs - trained).norm() < 1e-3 * change
