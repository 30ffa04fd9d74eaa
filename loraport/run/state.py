"""What `state.json` in a run folder says: how the run stands, in one small file that other programs can read."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from typing import Literal

from pydantic import TypeAdapter

from loraport.run import events
from loraport.run.events import Event

Status = Literal["planned", "running", "interrupted", "failed", "finished"]


@dataclass(frozen=True)
class State:
    """How a run stands. `after` gives the state that an event leads to; times are seconds since 1970, UTC."""

    status: Status
    backend: str  #: name of the backend
    name: str  #: name of the run and of its LoRA
    total: int  #: optimizer steps in all
    created: float  #: when the folder was made
    updated: float  #: when this was last true
    step: int = 0  #: optimizer steps done, as far as known
    checkpoint: int | None = None  #: optimizer steps at the last whole checkpoint
    trained: bool = False  #: the trainer's own LoRA is there; only its conversion may be left to do
    pid: int | None = None  #: process that runs it, or ran it last
    message: str | None = None  #: why it failed or stopped
    exit_code: int | None = None  #: exit code of the command (docs/exit-codes.md)
    lora: str | None = None  #: the ComfyUI file, relative to the run folder
    worst_difference: float | None = None  #: largest relative difference between written and trained updates

    def after(self, event: Event) -> State:
        """The state once `event` has happened."""
        now = replace(self, updated=event.time)
        match event:
            case events.Started():
                return replace(now, status="running", pid=os.getpid(), message=None, exit_code=None)
            case events.Step():
                return replace(now, step=event.step, total=event.total)
            case events.Resumed():
                return replace(now, step=event.step)
            case events.Checkpoint():
                return replace(now, checkpoint=event.step)
            case events.Interrupted():
                return replace(now, status="interrupted", message="Stopped on request.", exit_code=130)
            case events.Failed():
                return replace(now, status="failed", message=event.message, exit_code=event.exit_code)
            case events.Finished():
                return replace(
                    now,
                    status="finished",
                    step=event.step,
                    lora=event.lora,
                    worst_difference=event.worst_difference,
                    message=None,
                    exit_code=0,
                )
            case _:
                return now

    def to_json(self) -> str:
        """The content of state.json."""
        return _adapter.dump_json(self, indent=2).decode() + "\n"

    @staticmethod
    def from_json(text: str | bytes) -> State:
        """The state in the content of a state.json. Raises ValueError when it is not one."""
        return _adapter.validate_json(text)


_adapter = TypeAdapter(State)
