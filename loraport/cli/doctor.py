"""The smallest real training there is: two steps on one picture and the tiny checkpoint."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path

CAPTION = '{"compositional_deconstruction":{"background":"a grey gradient","elements":[]}}'


def train_two_steps(backend: str, tell: Callable[[str], None]) -> None:
    """Train with a backend in a temporary folder, to the proven ComfyUI file. Raises what training raises.

    A trainer whose sizes are fixed cannot take the tiny checkpoint; then its reason is told instead.
    """
    from PIL import Image

    from loraport.run.api import plan, train
    from loraport.spec.load import build_spec

    with tempfile.TemporaryDirectory(prefix="loraport-doctor-") as folder:
        images = Path(folder) / "images"
        images.mkdir()
        for name in ("one", "two"):
            Image.linear_gradient("L").convert("RGB").save(images / f"{name}.png")
            (images / f"{name}.json").write_text(CAPTION)
        content = {
            "name": "doctor",
            "model": {"checkpoint": "tiny", "dtype": "bf16"},
            "dataset": {"path": str(images), "resolution": 128},
            "lora": {"rank": 4},
            "train": {"steps": 2, "optimizer": "adamw"},
        }
        spec = build_spec(content, base=Path(folder), origin="doctor").spec
        for verdict in plan(spec, backend, Path(folder) / "run").refused():
            if verdict.path == "model.checkpoint":
                tell(f"the two-step training is left out: {verdict.reason}")
                return
        result = train(spec, backend, Path(folder) / "run")
        tell(f"trained {result.steps} steps to a LoRA that is proven for ComfyUI")
