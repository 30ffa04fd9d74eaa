"""What a run tells while it goes: one JSON object a line in `events.jsonl`, documented in docs/events.md.

A backend's process can print events itself: a line of `PREFIX` and the event's JSON (see `encode` and `decode_line`).
"""

from __future__ import annotations

import time
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

PREFIX = "@loraport "

Phase = Literal["start", "load", "cache", "compile", "train", "validate", "sample", "save", "convert"]


class _Event(BaseModel):
    model_config = ConfigDict(extra="forbid")

    time: float = Field(default_factory=time.time, description="Seconds since 1970, UTC.")


class Started(_Event):
    """The trainer is about to be started, anew or again."""

    type: Literal["started"] = "started"
    backend: str = Field(description="Name of the backend.")
    spec_hash: str = Field(description="SHA-256 of the resolved spec.")
    resume: bool = Field(description="Whether this goes on from a checkpoint.")


class PhaseStarted(_Event):
    """A phase of the run begins; it lasts until the next one."""

    type: Literal["phase"] = "phase"
    phase: Phase = Field(description="Name of the phase.")
    detail: str = Field("", description="What exactly, for a person.")


class Progress(_Event):
    """How far the current phase is, in its own units (images, captions, …)."""

    type: Literal["progress"] = "progress"
    done: int = Field(ge=0, description="Units done.")
    total: int = Field(ge=0, description="Units in all.")
    peak_memory_gib: float | None = Field(
        None, ge=0, description="Most memory of the phase so far, GiB; on a CPU, of the process so far."
    )


class Step(_Event):
    """One optimizer step was done."""

    type: Literal["step"] = "step"
    step: int = Field(ge=1, description="Optimizer steps done.")
    total: int = Field(ge=1, description="Optimizer steps in all.")
    loss: float | None = Field(description="Mean training loss of the step.")
    lr: float | None = Field(None, description="Learning rate of the step.")
    seconds: float | None = Field(None, ge=0, description="Seconds the step took.")
    images_per_second: float | None = Field(None, ge=0, description="Images trained a second in this step.")
    grad_norm: float | None = Field(None, ge=0, description="Gradient norm before clipping.")
    peak_memory_gib: float | None = Field(
        None, ge=0, description="Most memory so far, GiB: allocated on the device, or resident in host memory on a CPU."
    )
    peak_reserved_gib: float | None = Field(
        None, ge=0, description="Most memory so far that the allocator held of a CUDA card, unused parts included, GiB."
    )


class Validation(_Event):
    """The held-out loss was measured."""

    type: Literal["validation"] = "validation"
    step: int = Field(ge=0, description="Optimizer steps done.")
    loss: float = Field(description="Mean loss over the fixed images, noise and times.")


class Sample(_Event):
    """A sample image was drawn."""

    type: Literal["sample"] = "sample"
    step: int = Field(ge=0, description="Optimizer steps done.")
    path: str = Field(description="Image file, relative to the run folder.")


class Checkpoint(_Event):
    """A whole checkpoint is on disk. A trainer that goes on meanwhile may have told later steps before."""

    type: Literal["checkpoint"] = "checkpoint"
    step: int = Field(ge=0, description="Optimizer steps done.")
    path: str = Field(description="Folder or file, relative to the run folder.")


class Resumed(_Event):
    """Training goes on from a checkpoint; later steps that were told before are told again."""

    type: Literal["resumed"] = "resumed"
    step: int = Field(ge=0, description="Optimizer steps done at the checkpoint.")


class Warn(_Event):
    """Something the user should know that does not stop the run."""

    type: Literal["warning"] = "warning"
    message: str = Field(description="The warning.")


class Stopping(_Event):
    """A stop was asked for; the trainer is writing a checkpoint."""

    type: Literal["stopping"] = "stopping"


class Interrupted(_Event):
    """The run was stopped on request."""

    type: Literal["interrupted"] = "interrupted"
    step: int = Field(ge=0, description="Optimizer steps at the last checkpoint.")


class Failed(_Event):
    """The run ended without a LoRA."""

    type: Literal["failed"] = "failed"
    message: str = Field(description="What failed and what to do.")
    exit_code: int = Field(description="Exit code of the command (docs/exit-codes.md).")


class Finished(_Event):
    """The LoRA is written and proven."""

    type: Literal["finished"] = "finished"
    step: int = Field(ge=0, description="Optimizer steps done.")
    lora: str = Field(description="The ComfyUI file, relative to the run folder.")
    proof: str = Field(description="The proof, relative to the run folder.")
    worst_difference: float = Field(description="Largest relative difference of a module's update to the trained one.")


Event = (
    Started
    | PhaseStarted
    | Progress
    | Step
    | Validation
    | Sample
    | Checkpoint
    | Resumed
    | Warn
    | Stopping
    | Interrupted
    | Failed
    | Finished
)
_adapter: TypeAdapter[Event] = TypeAdapter(Annotated[Event, Field(discriminator="type")])


def encode(event: Event) -> str:
    """The event as a line that a backend's process prints (no newline)."""
    return PREFIX + event.model_dump_json()


def decode(data: str | dict[str, Any]) -> Event:
    """An event from its JSON. Raises ValueError when it is not one."""
    return _adapter.validate_json(data) if isinstance(data, str) else _adapter.validate_python(data)


def decode_line(line: str) -> Event | None:
    """The event a line of output carries, or None when the line is ordinary output."""
    if not line.startswith(PREFIX):
        return None
    try:
        return decode(line[len(PREFIX) :])
    except ValidationError:
        return None


def json_schema() -> dict[str, Any]:
    """JSON schema of a line of events.jsonl."""
    return _adapter.json_schema()
