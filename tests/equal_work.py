"""What a run's outputs say was done: for comparing trainers at a matched spec."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from loraport.lora.storage import read_tensors
from loraport.run.api import train
from loraport.run.events import Step
from loraport.run.record import read_events
from loraport.spec.models import TrainSpec


@dataclass(frozen=True)
class Work:
    """Trained modules with the shape of each factor, trained numbers in all, and optimizer steps."""

    factors: dict[str, tuple[int, ...]]
    parameters: int
    steps: list[int]


def work_of(run_dir: Path) -> Work:
    """Counted from the LoRA for ComfyUI and the events of a finished run."""
    (file,) = run_dir.glob("*.safetensors")
    tensors = read_tensors(file)
    factors = {name: tensors.shapes[name] for name in tensors if ".lora_" in name}
    parameters = sum(rows * columns for rows, columns in factors.values())
    steps = [event.step for event in read_events(run_dir / "events.jsonl") if isinstance(event, Step)]
    return Work(factors, parameters, steps)


def native_work(run_dir: Path, out: Path) -> Work:
    """The same spec, trained by the native trainer."""
    spec = TrainSpec.load(run_dir / "spec.yaml")
    backend = spec.backend.model_copy(update={"name": "native", "python": None, "options": {}})
    return work_of(train(spec.model_copy(update={"backend": backend}), "native", out).folder)
