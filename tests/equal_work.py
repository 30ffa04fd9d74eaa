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
    """Trained modules with the shape of each factor, trained numbers in all, optimizer steps, and images seen."""

    factors: dict[str, tuple[int, ...]]
    parameters: int
    steps: list[int]
    images: int


def work_of(run_dir: Path, images: int) -> Work:
    """Counted from the LoRA for ComfyUI and the events of a finished run; `images` from what the trainer left."""
    (file,) = run_dir.glob("*.safetensors")
    tensors = read_tensors(file)
    factors = {name: tensors.shapes[name] for name in tensors if ".lora_" in name}
    parameters = sum(rows * columns for rows, columns in factors.values())
    return Work(factors, parameters, [event.step for event in steps_of(run_dir)], images)


def steps_of(run_dir: Path) -> list[Step]:
    return [event for event in read_events(run_dir / "events.jsonl") if isinstance(event, Step)]


def native_work(run_dir: Path, out: Path) -> Work:
    """The same spec, trained by the native trainer, which measures images a second by the batches it was given."""
    spec = TrainSpec.load(run_dir / "spec.yaml")
    backend = spec.backend.model_copy(update={"name": "native", "python": None, "options": {}})
    folder = train(spec.model_copy(update={"backend": backend}), "native", out).folder
    seen = sum((step.images_per_second or 0) * (step.seconds or 0) for step in steps_of(folder))
    return work_of(folder, round(seen))
