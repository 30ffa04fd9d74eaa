"""Where DiffSynth leaves LoRA weights. No torch."""

from __future__ import annotations

import re
from pathlib import Path

from loraport.errors import BackendError, DataError
from loraport.lora.storage import read_tensors
from loraport.spec.models import TrainSpec

_NAME = re.compile(r"step-(\d{6,})\.safetensors")


def whole_saves(run_dir: Path) -> dict[int, Path]:
    """The LoRA files of a run that are whole, by optimizer step."""
    found = {}
    for path in (run_dir / "backend" / "output").glob("step-*.safetensors"):
        match = _NAME.fullmatch(path.name)
        if match and _is_whole(path):
            found[int(match[1])] = path
    return dict(sorted(found.items()))


def collect(spec: TrainSpec, run_dir: Path) -> Path:
    """The LoRA after the last step. Raises BackendError when DiffSynth did not get there, whatever it claimed."""
    saves = whole_saves(run_dir)
    if spec.train.steps not in saves:
        there = ", ".join(path.name for path in saves.values()) or "none"
        raise BackendError(
            f"DiffSynth ended without the LoRA of step {spec.train.steps}. There: {there}.",
            hint="Look at log.txt in the run folder, then go on with: loraport resume",
        )
    return saves[spec.train.steps]


def _is_whole(path: Path) -> bool:
    try:
        read_tensors(path)
    except DataError:
        return False
    return True
