"""What ai-toolkit's output means: phases, checkpoints, warnings, and the one error that ended it. No torch."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from pathlib import PurePosixPath

from loraport.errors import BackendError, DataError, LoraPortError, OutOfMemoryError, SpecError
from loraport.run.errors_line import find_error
from loraport.run.events import Checkpoint, Event, Phase, PhaseStarted, Progress, Resumed, Warn, decode_line
from loraport.run.log_lines import indented, lines_that_matter

#: What the job database says → phase. The first that it begins with counts.
_PHASES: tuple[tuple[str, Phase], ...] = (
    ("Loading dataset", "cache"),
    ("Caching", "cache"),
    ("Training", "train"),
    ("Saving", "save"),
    ("Generating", "sample"),
    ("Starting", "start"),
)
_CACHING = re.compile(r"^(Caching [^:]*):.*?(\d+)/(\d+) \[")
_RESUMED = re.compile(r"^Found step (\d+) in metadata")
_SAVED = re.compile(r"^Saved checkpoint to (.*?_(\d{9,})\.safetensors)\s*$")
_WARNINGS = (
    (re.compile(r"OOM during training step, skipping batch (\d)/3"), "A step ran out of memory and was skipped"),
    (re.compile(r"^Failed to load optimizer state"), "The optimizer's state could not be read; its moments begin anew"),
    (
        re.compile(r"^Could not save optimizer"),
        "The optimizer's state could not be saved; a resumed run begins without it",
    ),
    (re.compile(r"^Failed to compile model|^WARNING: compile is disabled"), "Compiling failed; it goes on without it"),
    (re.compile(r"^Error processing image: (.*)"), "An image could not be read and is left out"),
    (re.compile(r"^loss is nan"), "A loss is not a number; the step changes nothing"),
)


def read_line(line: str) -> Iterable[Event] | None:
    """The event in a line of the launcher's output, or None for ordinary text."""
    event = decode_line(line)
    return None if event is None else [event]


def phase_of(words: str) -> PhaseStarted | None:
    """The phase that the job database tells, or None when it tells nothing."""
    for beginning, phase in _PHASES:
        if words.startswith(beginning):
            return PhaseStarted(phase=phase, detail=words if phase in ("cache", "sample") else "")
    return PhaseStarted(phase="load", detail=words.strip(" -")) if words else None


class Reader:
    """Reads the trainer's lines. A checkpoint is told when its optimizer is on disk too."""

    def __init__(self) -> None:
        self._saved: Checkpoint | None = None
        self._warned: set[str] = set()

    def read(self, line: str) -> Iterator[Event]:
        """The events that one line tells."""
        if found := _SAVED.match(line):
            self._saved = Checkpoint(step=int(found.group(2)), path=str(PurePosixPath(found.group(1))))
        elif line.startswith("Saved optimizer to") and self._saved is not None:
            yield self._saved
            self._saved = None
        elif found := _RESUMED.match(line):
            yield Resumed(step=int(found.group(1)))
        elif found := _CACHING.match(line):
            yield Progress(done=int(found.group(2)), total=int(found.group(3)))
        else:
            yield from self._warning(line)

    def _warning(self, line: str) -> Iterator[Warn]:
        for pattern, message in _WARNINGS:
            found = pattern.search(line)
            if found is None:
                continue
            skipped = "OOM" in pattern.pattern
            detail = (
                f" ({found.group(1)} in a row; four end the run)"
                if skipped
                else f": {found.group(1)}"
                if found.groups()
                else ""
            )
            if skipped or message + detail not in self._warned:
                self._warned.add(message + detail)
                yield Warn(message=f"{message}{detail}.")
            return


def explain_failure(exit_code: int, log_tail: str) -> LoraPortError:
    """The error the launcher told, or the best account of how it died."""
    return find_error(log_tail) or diagnose(exit_code, log_tail.splitlines())


def diagnose(exit_code: int, lines: list[str]) -> LoraPortError:
    """The error behind the end of ai-toolkit, from its last lines."""
    text = "\n".join(line for line in lines if not line.startswith("@loraport"))
    shown = indented(lines_that_matter(text))
    if re.search(
        r"OOM during training step 3 times|out of memory|not enough memory|OutOfMemoryError", text
    ) or exit_code in (
        -9,
        137,
    ):
        return OutOfMemoryError(
            f"ai-toolkit ran out of memory.{shown}",
            hint="Set memory.quantize: fp8 and memory.offload: group, or lower dataset.resolution or train.batch_size.",
        )
    if re.search(r"GatedRepoError|gated repo|401 Client Error|403 Client Error", text):
        return DataError(
            f"The checkpoint is gated, and this machine has no access to it.{shown}",
            hint="Accept its licence on the hub's page, then log in with `hf auth login` or set HF_TOKEN.",
        )
    if re.search(r"LocalEntryNotFoundError|OfflineModeIsEnabled|couldn't connect to|ConnectionError", text):
        return DataError(
            f"A file of the checkpoint is not on this machine and could not be downloaded.{shown}",
            hint="Download the checkpoint and give its folder as model.checkpoint; the text encoder's is "
            "backend.options.text_encoder_path.",
        )
    if re.search(r"RepositoryNotFoundError|EntryNotFoundError|RevisionNotFoundError", text):
        return DataError(
            f"The hub has no such checkpoint, or not the file that ai-toolkit wants.{shown}",
            hint="It needs the official layout: transformer/, vae/ and their diffusion_pytorch_model.safetensors.",
        )
    if missing := re.search(r"(?:ModuleNotFoundError|ImportError): (.*)", text):
        return BackendError(
            f"ai-toolkit misses a package: {missing.group(1)}.{shown}",
            hint="Install it into ai-toolkit's environment: loraport backends install ai-toolkit",
        )
    if re.search(r"Error\(s\) in loading state_dict|size mismatch", text):
        return DataError(
            f"The checkpoint's weights do not fit ai-toolkit's model.{shown}",
            hint="It needs Ideogram 4 at full size in the official layout, such as ideogram-ai/ideogram-4-fp8.",
        )
    if re.search(r"no images found in|Unknown optimizer type|Unknown process type|config file error|KeyError", text):
        return SpecError(
            f"ai-toolkit does not accept a value of its configuration.{shown}",
            hint="The configuration is backend/config.yaml in the run folder.",
        )
    return BackendError(
        f"ai-toolkit failed with exit code {exit_code}.{shown}", hint="The whole log is log.txt in the run folder."
    )
