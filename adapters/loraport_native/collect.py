"""Where the native trainer leaves its LoRA. No torch."""

from __future__ import annotations

import re
from pathlib import Path

from loraport.errors import BackendError
from loraport.spec.models import TrainSpec


def collect(spec: TrainSpec, run_dir: Path) -> Path:
    """The adapter of the last step's checkpoint. Raises BackendError when training did not get there."""
    path = run_dir / "checkpoints" / f"step-{spec.train.steps:06d}" / "adapter.safetensors"
    if not path.is_file():
        folders = (run_dir / "checkpoints").glob("step-*")
        there = sorted(folder.name for folder in folders if re.fullmatch(r"step-\d{6,}", folder.name))
        raise BackendError(
            f"The trainer ended without its last checkpoint, {path}. There: {', '.join(there) or 'none'}.",
            hint="Look at log.txt in the run folder, then go on with: loraport resume",
        )
    return path
