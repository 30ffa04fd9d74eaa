"""Training from Python: the same calls that the command line makes.

    from loraport import TrainSpec, plan, train
    result = train(TrainSpec.load("spec.yaml"), backend="native")

Everything that a user can cause or must act on is a `loraport.errors.LoraPortError`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from loraport.errors import BackendError, Interrupted, LoraPortError, RunFolderError
from loraport.planning import Plan, make_plan
from loraport.run import events
from loraport.run.events import Event
from loraport.run.folder import DEFAULT_ROOT, RunEntry, RunFolder, free_path, list_runs
from loraport.spec.models import TrainSpec

if TYPE_CHECKING:
    from loraport.backend import Backend
    from loraport.listeners import Listener
    from loraport.run.record import Record

DEFAULT_BACKEND = "native"

OnEvent = Callable[[Event], None]


@dataclass(frozen=True)
class RunResult:
    """A finished run: its folder, the LoRA for ComfyUI, the proof beside it, and the optimizer steps done."""

    folder: Path
    lora: Path
    proof: Path
    steps: int


def plan(spec: TrainSpec, backend: str | None = None, out: Path | None = None) -> Plan:
    """What a backend would do with `spec`. Writes and starts nothing.

    Relative paths in the spec are relative to the current folder. Raises SpecError for names that are not there.
    """
    return _plan(spec, _backend_name(spec, backend), _place(spec, out), resume=False)


def train(
    spec: TrainSpec,
    backend: str | None = None,
    out: Path | None = None,
    strict: bool = False,
    on_event: OnEvent | None = None,
) -> RunResult:
    """Train `spec` in a new run folder and end with a LoRA that ComfyUI loads.

    `backend` overrides the spec's; `out` is the run folder (by default runs/<name>, numbered when that is taken). With
    `strict` every field must be done exactly and every caption keep the family's rules. Images that cannot be read and
    captions that no trainer may be given always stop it before the run has a folder (`loraport.preflight`). `on_event`
    hears each event (`loraport.run.events`).

    Raises SpecError, DataError, BackendError, OutOfMemoryError, RunFolderError or Interrupted; results of earlier runs
    stay as they are.
    """
    made = plan(spec, backend, out)
    made.check(strict)
    made.check_card()
    warnings = _check_dataset(made, strict)
    chosen = _ready_backend(made)
    with RunFolder.create(made.run_dir, made) as folder:
        return _run(made, folder, chosen, on_event, resume=False, warnings=warnings)


def resume(folder: Path, on_event: OnEvent | None = None) -> RunResult:
    """Go on with a run that was stopped, failed or was killed, from its last whole checkpoint.

    A run whose training is done only has its LoRA converted; of a finished one `on_event` hears that nothing was to do.
    Raises what `train` raises.
    """
    opened = RunFolder.open(folder)
    with opened:
        opened.lock()
        state = opened.read_state()
        lora = opened.lora_file(state.name)
        if state.status == "finished" and lora.is_file() and opened.proof_file.is_file():
            if on_event is not None:
                on_event(events.Warn(message=f"{opened.path} has finished already; there is nothing left to do."))
            return RunResult(opened.path, lora, opened.proof_file, state.step)
        made = _plan(opened.read_spec(), state.backend, opened.path, resume=True)
        made.check()
        warnings = [] if state.trained else _check_dataset(made)
        backend = _ready_backend(made)
        opened.write_plan(made)
        return _run(made, opened, backend, on_event, resume=True, warnings=warnings)


def runs(root: Path | None = None) -> list[RunEntry]:
    """The runs in a folder (by default ./runs), newest first. Raises RunFolderError when it cannot be read."""
    return list_runs(DEFAULT_ROOT if root is None else root)


def _check_dataset(made: Plan, strict: bool = False) -> list[str]:
    """Raise DataError for captions and images that no trainer may be given; the warnings on others."""
    from loraport.preflight import check_captions, check_images

    warnings = check_captions(made.spec, strict)
    if made.reads_images:
        check_images(made.spec)
    return warnings


def _run(
    made: Plan, folder: RunFolder, backend: Backend, on_event: OnEvent | None, resume: bool, warnings: list[str]
) -> RunResult:
    from loraport.families import check_family
    from loraport.plugins import plugins
    from loraport.run.finish import finish
    from loraport.run.record import Record
    from loraport.run.supervisor import interrupted, supervise

    listeners, broken = _listeners(made, folder)
    with Record(folder, listeners, on_event) as record:
        for warning in [*warnings, *broken]:
            record.warn_once(warning, warning)
        try:
            source = _collected(made, folder, backend) if record.state.trained else None
            if source is None:
                supervise(made, folder, backend, record, resume)
                source = backend.collect(made.spec, folder.path)
                record.mark_trained()
            finish(made, source, folder, record, plugins().dialects(), check_family(made.spec, plugins().families()))
        except KeyboardInterrupt:
            error = interrupted(record, folder)
            _tell_end(record, error)
            raise error from None
        except Exception as error:
            _tell_end(record, error)
            raise
        assert record.state.lora is not None
        return RunResult(folder.path, folder.path / record.state.lora, folder.proof_file, record.state.step)


def _tell_end(record: Record, error: Exception) -> None:
    if isinstance(error, Interrupted):
        end: Event = events.Interrupted(step=record.state.checkpoint or 0)
    elif isinstance(error, LoraPortError):
        end = events.Failed(message=str(error), exit_code=error.exit_code)
    else:  # a defect, of a plugin or our own; the traceback goes to the caller
        end = events.Failed(message=f"{type(error).__name__}: {error}", exit_code=LoraPortError.exit_code)
    # When the folder cannot be written, that is most likely what the error is about.
    with contextlib.suppress(RunFolderError):
        record.emit(end)


def _collected(made: Plan, folder: RunFolder, backend: Backend) -> Path | None:
    """The trainer's LoRA of an earlier session, or None when it is gone and training must go on."""
    try:
        return backend.collect(made.spec, folder.path)
    except BackendError:
        return None


def _plan(spec: TrainSpec, backend: str, run_dir: Path, resume: bool) -> Plan:
    from loraport.families import check_family
    from loraport.footprint import forecast
    from loraport.gpu import cards_for, lacking
    from loraport.plugins import plugins
    from loraport.profiles import resolve_memory

    chosen, profiles = plugins().backend(backend), plugins().profiles()
    resolved = resolve_memory(_whole(spec, backend), profiles)
    check_family(resolved, plugins().families())
    made = make_plan(resolved, chosen, run_dir, resume)
    used = cards_for(resolved)
    card = min(used, key=lambda card: card.memory_gib, default=None)
    return replace(
        made,
        memory=forecast(resolved, chosen, profiles, card),
        card=None if card is None else card.name,
        lacking=next((lack for one in used if (lack := lacking(made, one))), None),
    )


def _whole(spec: TrainSpec, backend: str) -> TrainSpec:
    """The spec with the backend's name and absolute paths, so that it means the same from any folder."""
    from loraport.spec.load import build_spec

    content = spec.model_dump(mode="json")
    content["backend"]["name"] = backend
    return build_spec(content, base=Path.cwd(), origin=spec.name).spec


def _backend_name(spec: TrainSpec, backend: str | None) -> str:
    return backend or spec.backend.name or DEFAULT_BACKEND


def _place(spec: TrainSpec, out: Path | None) -> Path:
    return free_path(spec.name) if out is None else out.expanduser().absolute()


def _ready_backend(made: Plan) -> Backend:
    from loraport.plugins import plugins

    backend = plugins().backend(made.backend)
    readiness = backend.readiness(made.spec.backend.python)
    if not readiness.ready:
        raise BackendError(f"The backend {made.backend} cannot train here: {readiness.detail}")
    return backend


def _listeners(made: Plan, folder: RunFolder) -> tuple[list[Listener], list[str]]:
    """The listeners that plugins have for this run, and a warning for each one that could not be made."""
    from loraport.plugins import plugins

    found: list[Listener] = []
    broken: list[str] = []
    for factory in plugins().listeners():
        try:
            listener = factory(made.spec, made.backend, folder.path)
        except Exception as error:  # whatever a stranger's code raises, the run must go on
            name = getattr(factory, "__qualname__", type(factory).__name__)
            broken.append(f"The listener {name} could not be started: {type(error).__name__}: {error}")
        else:
            found += [] if listener is None else [listener]
    return found, broken
