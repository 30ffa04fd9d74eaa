"""What SimpleTuner says, as events and as the one error that ended it. No torch.

Its metrics file (`report_to: simpletuner`) is the source; the text of its progress bar only stands in while there is no
such file.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loraport.errors import BackendError, DataError, LoraPortError, OutOfMemoryError
from loraport.run import events
from loraport.run.errors_line import find_error
from loraport.run.events import Event, decode_line
from loraport.run.log_lines import indented, lines_that_matter
from loraport_simpletuner.collect import checkpoints
from loraport_simpletuner.translate import HELD_OUT_ID

METRICS = "training_metrics.jsonl"
HELD_OUT_LOSS = f"loss/val/{HELD_OUT_ID}"
LOG_HINT = "The whole log is log.txt in the run folder."

_BAR = re.compile(r"Steps:\s+\d+%\|.*?\|\s*(\d+)/(\d+) \[.*?lr=([\d.e+-]+).*?step_loss=([\d.e+-]+|nan)")
_PHASES: tuple[tuple[str, events.Phase, str], ...] = (
    ("Configuring text embed backend", "cache", "captions"),
    ("Creating VAE latent cache", "cache", "latents"),
    ("Loading weights:", "load", "text encoder"),
    # The text encoder is let go right before the transformer is loaded, of which SimpleTuner's log says nothing.
    ("successfully moved to meta device", "load", "transformer"),
    ("Processing validation prompts:", "sample", ""),
    ("Calculate validation loss", "validate", ""),
    (" Steps: ", "train", ""),
)


def read_line(line: str) -> Iterable[Event] | None:
    """The event in a line of output, or None for ordinary text."""
    event = decode_line(line)
    return None if event is None else [event]


def phase_of(line: str) -> events.PhaseStarted | None:
    """The phase that a line of SimpleTuner's log begins."""
    for text, phase, detail in _PHASES:
        if text in line:
            return events.PhaseStarted(phase=phase, detail=detail)
    return None


def bar_step(line: str) -> events.Step | None:
    """The step that a progress bar's text tells. Its loss and rate are rounded."""
    found = _BAR.search(line)
    if found is None or found[1] == "0":
        return None
    loss = float(found[4])
    return events.Step(step=int(found[1]), total=int(found[2]), loss=loss if loss == loss else None, lr=float(found[3]))


def not_a_number(step: int) -> BackendError:
    """The loss became NaN or infinite."""
    return BackendError(
        f"The loss is not a number at step {step}: the training diverged.",
        hint="Lower train.learning_rate, then start again; resuming from an earlier checkpoint may diverge again.",
    )


@dataclass
class Metrics:
    """New steps in SimpleTuner's metrics file. It tells a step several times; each comes out once.

    Starts at the end of what is there, so that a resumed run tells only what is new.
    """

    output: Path
    steps: int
    images: int  #: trained in a step

    def __post_init__(self) -> None:
        self.path = self.output / METRICS
        self._offset = self.path.stat().st_size if self.path.is_file() else 0
        self._last = 0
        self.seen = False

    def read(self) -> Iterator[events.Step | events.Validation]:
        """The steps and held-out losses since the last call. Raises BackendError at a step whose loss is no number."""
        if not self.path.is_file():
            return
        with open(self.path, "rb") as file:
            file.seek(self._offset)
            for line in file:
                if not line.endswith(b"\n"):
                    return
                self._offset += len(line)
                try:
                    record = json.loads(line)
                    number, metrics = int(record["step"]), dict(record["metrics"])
                except (ValueError, KeyError, TypeError):
                    continue
                step = self._step(number, metrics)
                if step is not None:
                    yield step
                    if HELD_OUT_LOSS in metrics:
                        yield events.Validation(step=number, loss=metrics[HELD_OUT_LOSS])

    def _step(self, number: int, metrics: dict[str, Any]) -> events.Step | None:
        if number <= self._last or "learning_rate" not in metrics:
            return None
        self._last, self.seen = number, True
        if "train_loss" not in metrics:  # it leaves out what is not finite
            raise not_a_number(number)
        seconds = metrics.get("seconds_per_step")
        return events.Step(
            step=number,
            total=max(self.steps, number),
            loss=metrics["train_loss"],
            lr=metrics["learning_rate"],
            seconds=seconds,
            images_per_second=self.images / seconds if seconds else None,
            grad_norm=metrics.get("grad_norm"),
        )


class Watch:
    """New whole checkpoints and drawn samples in the output folder, as events with paths relative to `root`."""

    def __init__(self, output: Path, root: Path):
        self.output, self.root = output, root
        self._told = {path for _, path in checkpoints(output)} | set(self._images())

    def read(self) -> Iterator[Event]:
        for step, path in checkpoints(self.output):
            if path not in self._told:
                self._told.add(path)
                yield events.Checkpoint(step=step, path=path.relative_to(self.root).as_posix())
        for path in self._images():
            if path not in self._told:
                self._told.add(path)
                number = re.search(r"step_(\d+)", path.name)
                step = int(number[1]) if number else 0
                yield events.Sample(step=step, path=path.relative_to(self.root).as_posix())

    def _images(self) -> list[Path]:
        return sorted((self.output / "validation_images").glob("*.png"))


@dataclass(frozen=True)
class _Cause:
    """A failure that is known by some words in the log."""

    words: str
    kind: type[LoraPortError]
    message: str
    hint: str


_CAUSES = (
    _Cause(
        r"OutOfMemoryError|CUDA out of memory|CUDA error: out of memory|DefaultCPUAllocator: can't allocate",
        OutOfMemoryError,
        "SimpleTuner ran out of memory",
        "Lower train.batch_size or dataset.resolution, set memory.gradient_checkpointing: true or memory.offload: "
        "group, then start again.",
    ),
    _Cause(
        r"GatedRepoError|gated repo|401 Client Error|403 Client Error|Access to model .* is restricted",
        BackendError,
        "The checkpoint is gated, and this machine has no access to it",
        "Accept its licence on its page, then log in with: hf auth login",
    ),
    _Cause(
        r"RepositoryNotFoundError|is not a valid model identifier",
        DataError,
        "The checkpoint is not on the hub",
        "Check model.checkpoint.",
    ),
    _Cause(
        r"LocalEntryNotFoundError|OfflineModeIsEnabled|couldn't connect to",
        BackendError,
        "The checkpoint, or a part of it, is neither on this machine nor can it be fetched",
        "Check the connection, or give a whole checkpoint folder as model.checkpoint.",
    ),
    _Cause(
        r"exceeds max_text_tokens",
        DataError,
        "A caption is too long",
        "Shorten it; SimpleTuner's limit is 2048 tokens.",
    ),
    _Cause(
        r"zero usable batches|chronically-underfilled|No images were discovered",
        DataError,
        "SimpleTuner found too few usable images for a batch",
        "Lower train.batch_size or train.gradient_accumulation, or raise dataset.repeats.",
    ),
    _Cause(
        r"ModuleNotFoundError|ImportError|PackageNotFoundError",
        BackendError,
        "A package is missing or broken in SimpleTuner's environment",
        "Make it anew with: loraport backends install simpletuner",
    ),
    _Cause(
        r"unrecognized arguments|invalid choice|Could not parse input|ArgumentError|Optimizer \S+ not found",
        BackendError,
        "SimpleTuner does not take an argument it was given",
        "Check backend.options, and that the version there is the one installed.",
    ),
    _Cause(
        r"Non-finite training loss",
        BackendError,
        "The loss is not a number: the training diverged",
        "Lower train.learning_rate, then start again.",
    ),
    _Cause(
        r"Error while deserializing header|Missing key\(s\) in state_dict|size mismatch for",
        DataError,
        "The checkpoint is damaged or not Ideogram 4's",
        "Copy or download it again; it must have the official layout.",
    ),
    _Cause(
        r"No space left on device",
        BackendError,
        "The disk is full",
        "Free some space, then go on with: loraport resume",
    ),
)


def explain_failure(exit_code: int, log_tail: str) -> LoraPortError:
    """The error that was told, or that the log's words are known for, or the log's last lines."""
    told = find_error(log_tail)
    return told if told is not None else explain(exit_code, log_tail)


def explain(exit_code: int, log_tail: str) -> LoraPortError:
    """What SimpleTuner's own log says about how it ended."""
    lines = [line for line in re.split(r"[\r\n]+", log_tail) if line.strip()]
    # What came before the first traceback may be about something that was got over.
    start = next((number for number, line in enumerate(lines) if line.startswith("Traceback")), 0)
    for cause in _CAUSES:
        found = [line for line in lines[start:] if re.search(cause.words, line)]
        if found:
            return cause.kind(f"{cause.message}:\n    {_short(found[-1])}", hint=f"{cause.hint} {LOG_HINT}")
    if exit_code in (-9, 137):
        return OutOfMemoryError(
            "SimpleTuner was killed (SIGKILL), which is what the system does when memory runs out.",
            hint="Close other programs and go on with: loraport resume. Or lower dataset.resolution or "
            "train.batch_size and start again.",
        )
    told = indented(lines_that_matter(log_tail))
    return BackendError(f"SimpleTuner failed with exit code {exit_code}. It said:{told}", hint=LOG_HINT)


def _short(line: str) -> str:
    line = line.strip()
    return line if len(line) <= 400 else f"{line[:400]} …"
