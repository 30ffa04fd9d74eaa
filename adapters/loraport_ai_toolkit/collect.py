"""Where ai-toolkit leaves its saves, and which of them are whole. No torch.

A save holds `diffusion_model.….lora_A/B.weight` without alpha, which ComfyUI and its dialect read with a scale of 1:
for Ideogram ai-toolkit's alpha is always the rank, so that is the scale it trained with. A LoKr keeps its alpha.
"""

from __future__ import annotations

import json
import re
import struct
from dataclasses import dataclass
from pathlib import Path

from loraport.errors import BackendError
from loraport.spec.models import TrainSpec
from loraport_ai_toolkit import layout

#: A header of a LoRA is some hundred kilobytes; a damaged length says anything.
_LONGEST_HEADER = 100_000_000


@dataclass(frozen=True)
class Save:
    """A whole save: its file and the optimizer steps it holds."""

    path: Path
    step: int


def collect(spec: TrainSpec, run_dir: Path) -> Path:
    """The LoRA of the last step. Raises BackendError when ai-toolkit did not get there."""
    folder = run_dir / layout.save_folder(spec.name)
    path = folder / f"{layout.job_name(spec.name)}.safetensors"
    found = read_save(path)
    if found is None:
        there = ", ".join(str(save.step) for save in numbered_saves(folder, layout.job_name(spec.name))) or "none"
        raise BackendError(
            f"ai-toolkit ended without its final file, {path}. Saves of steps: {there}.",
            hint="Look at log.txt in the run folder, then go on with: loraport resume",
        )
    if found.step < spec.train.steps:
        raise BackendError(
            f"{path} holds {found.step} of {spec.train.steps} steps.", hint="Go on with: loraport resume"
        )
    return path


def numbered_saves(folder: Path, job: str) -> list[Save]:
    """The whole saves before the final one, by step."""
    pattern = re.compile(re.escape(job) + r"_(\d{9,})\.safetensors")
    paths = folder.iterdir() if folder.is_dir() else ()
    found = [read_save(path) for path in paths if pattern.fullmatch(path.name)]
    return sorted((save for save in found if save is not None), key=lambda save: save.step)


def read_save(path: Path) -> Save | None:
    """A save, or None when the file is not there, was cut off, or does not say its step."""
    try:
        with open(path, "rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            if length > _LONGEST_HEADER:
                return None
            header = json.loads(file.read(length))
        ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
        if path.stat().st_size != 8 + length + max(ends):
            return None
        return Save(path, int(json.loads(header["__metadata__"]["training_info"])["step"]))
    except (OSError, struct.error, ValueError, KeyError, TypeError, IndexError):
        return None
