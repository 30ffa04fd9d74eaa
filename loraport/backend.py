"""What a backend is: the contract between the port and a trainer."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from loraport.planning import Context, Translation
from loraport.run.events import Event
from loraport.spec.models import TrainSpec


@dataclass(frozen=True)
class Readiness:
    """Whether a backend can train here, and if not, what to do."""

    ready: bool
    detail: str


class Backend(Protocol):
    """A trainer behind the port. Registered through the `register_backends` hook.

    Nothing here imports the trainer: translation and reading are plain functions of text and files, so `loraport plan`
    works for a backend that is not installed.

    A backend may also have `environment` (`loraport.envs.Recipe`), `predict_memory` (`loraport.footprint.Predict`),
    `predict_disk` (`loraport.disk.PredictDisk`) and `token_counter`: (checkpoint, revision) → a function that counts a
    caption's tokens, or None when the checkpoint's tokenizer is not on this machine.
    """

    name: str  #: what --backend takes
    version: str  #: version of the adapter
    description: str  #: one line

    def readiness(self, python: Path | None = None) -> Readiness:
        """Whether the trainer can run on this machine; `python` is the interpreter that the spec names, if it does."""

    def translate(self, spec: TrainSpec, context: Context) -> Translation:
        """A pure function: no disk, no processes. Gives every field of the spec a verdict."""

    def read_line(self, line: str) -> Iterable[Event] | None:
        """Events told by one line of the trainer's output; None when the line is ordinary text for the log."""

    def explain_failure(self, exit_code: int, log_tail: str) -> Exception:
        """The error to show when the trainer ended with a nonzero code: BackendError, OutOfMemoryError, DataError …"""

    def collect(self, spec: TrainSpec, run_dir: Path) -> Path:
        """The final LoRA as the trainer wrote it. Raises BackendError when there is none."""
