"""Scoring LoRAs: one evaluator's loss on held-out images, the same triples of image, noise and time for each of them.

A backend that can, has `score_command(job: Path) -> list[str]`: the command of a process that reads the job (see
`write_job`) and prints, for the model alone and then for each LoRA in order, one line of `PREFIX` and the JSON of a
`Score`. The held-out images are those of the job's spec's `validation.path`. A failure is told by a line of
`loraport.run.errors_line`, and its exit code.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from loraport.files import write_atomic
from loraport.spec.models import TrainSpec

PREFIX = "@loraport-score "


@runtime_checkable
class Scorer(Protocol):
    """A backend that can score."""

    name: str
    version: str

    def score_command(self, job: Path) -> list[str]: ...


@dataclass(frozen=True)
class Score:
    """The loss of each triple, in the same order for all LoRAs. `lora` is None for the model alone; `problem`
    says why a LoRA could not be scored, and then there are no losses."""

    lora: str | None
    losses: list[float]
    problem: str | None = None

    def encode(self) -> str:
        """The line that the process prints."""
        return PREFIX + json.dumps(asdict(self), ensure_ascii=False)


def write_job(path: Path, spec: TrainSpec, loras: Iterable[Path]) -> None:
    """Write what `score_command` reads: a resolved spec, and LoRA files that any installed dialect knows. Raises
    RunFolderError."""
    content = {"spec": spec.model_dump(mode="json"), "loras": [str(lora) for lora in loras]}
    write_atomic(path, json.dumps(content, ensure_ascii=False, indent=1) + "\n")


def read_job(path: Path) -> tuple[TrainSpec, list[Path]]:
    """What `write_job` wrote."""
    content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return TrainSpec.model_validate(content["spec"]), [Path(lora) for lora in content["loras"]]


def read_line(line: str) -> Score | None:
    """The score in a line of output, or None for any other line."""
    return Score(**json.loads(line.removeprefix(PREFIX))) if line.startswith(PREFIX) else None
