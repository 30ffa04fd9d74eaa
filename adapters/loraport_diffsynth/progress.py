"""What DiffSynth's process says, read back: events, and the one error that ended it. No torch."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable

from loraport.errors import BackendError, DataError, LoraPortError, OutOfMemoryError, RunFolderError, SpecError
from loraport.run.errors_line import find_error
from loraport.run.events import Event, decode_line
from loraport.run.log_lines import indented, lines_that_matter

Maker = Callable[[str], LoraPortError]


def read_line(line: str) -> Iterable[Event] | None:
    """The event in a line of output, or None for ordinary text. Progress bars are ordinary: the entry tells more."""
    event = decode_line(line)
    return None if event is None else [event]


def explain_failure(exit_code: int, log_tail: str) -> LoraPortError:
    """The error that the process told, else what DiffSynth's last lines mean."""
    told = find_error(log_tail)
    if told is not None:
        return told
    lines = [line.rstrip() for line in re.split(r"[\r\n]+", log_tail) if _matters(line)]
    for pattern, make in _KNOWN:
        found = next((line for line in reversed(lines) if re.search(pattern, line)), None)
        if found is not None:
            return make(found.strip())
    if exit_code in (-9, 137):
        return OutOfMemoryError(
            "DiffSynth was killed (SIGKILL), which is what the system does when memory runs out.",
            hint="Close other programs and go on with: loraport resume. Or lower dataset.resolution and start again.",
        )
    return BackendError(
        f"DiffSynth failed with exit code {exit_code}. It said:{indented(lines_that_matter(log_tail))}",
        hint="The whole log is log.txt in the run folder.",
    )


def _matters(line: str) -> bool:
    return bool(line.strip()) and not line.startswith("@loraport") and not re.search(r"\d+%\|", line)


def _out_of_memory(line: str) -> LoraPortError:
    return OutOfMemoryError(
        f"DiffSynth ran out of memory: {line}",
        hint="Choose a smaller memory.profile, lower dataset.resolution, or set backend.options.split: true.",
    )


def _gated(line: str) -> LoraPortError:
    return DataError(
        f"The checkpoint may not be downloaded: {line}",
        hint="Accept its licence on its page on Hugging Face and log in with `hf auth login`, or set model.checkpoint "
        "to a folder.",
    )


def _not_found(line: str) -> LoraPortError:
    return DataError(f"A model file was not found: {line}", hint="Check model.checkpoint; it is a folder or a hub id.")


def _package(line: str) -> LoraPortError:
    return BackendError(
        f"DiffSynth's environment lacks a package: {line}",
        hint="Set it up anew with: loraport backends install diffsynth",
    )


def _argument(line: str) -> LoraPortError:
    return SpecError(
        f"DiffSynth does not take an argument: {line}", hint="Look at backend.options.arguments, and at its version."
    )


def _targets(line: str) -> LoraPortError:
    return SpecError(f"lora.targets name no trainable layer: {line}", hint="Choose a preset, or other patterns.")


def _disk(line: str) -> LoraPortError:
    return RunFolderError(
        f"DiffSynth could not write: {line}",
        hint="Free some space, then go on with: loraport resume. Encoding an image takes half a gigabyte at 1024 px; "
        "backend.options.split: false does without.",
    )


def _model(line: str) -> LoraPortError:
    return DataError(
        f"DiffSynth does not know this model file: {line}",
        hint="Use the official files of Ideogram 4, with the config.json beside each.",
    )


#: What a line of DiffSynth's log means, the surest first.
_KNOWN: list[tuple[str, Maker]] = [
    (r"OutOfMemoryError|out of memory|can't allocate memory|ALLOC_FAILED", _out_of_memory),
    (r"No space left on device|PytorchStreamWriter failed", _disk),
    (r"GatedRepo|401 Client Error|403 Client Error|is restricted|must be authenticated", _gated),
    (r"RepositoryNotFound|EntryNotFound|LocalEntryNotFound|404 Client Error", _not_found),
    (r"^(ModuleNotFoundError|ImportError)\b", _package),
    (r"error: (unrecognized arguments|argument |the following arguments|ambiguous option)", _argument),
    (r"Target modules .* not found|is not supported. Currently, only", _targets),
    (r"Cannot detect the model type", _model),
]
