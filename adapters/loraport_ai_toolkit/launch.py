"""The supervised process: `python -m loraport_ai_toolkit.launch RUN_DIR` prepares the run and watches over ai-toolkit.

SIGINT or SIGTERM once: a save after the current step, then an end (exit code 130). ai-toolkit's own answer to SIGINT is
to end at once with code 0 and nothing saved, so it gets none; it is asked through its job database. Twice: killed.
"""

from __future__ import annotations

import json
import os
import re
import selectors
import signal
import subprocess
import sys
import time
from collections import deque
from pathlib import Path
from types import FrameType
from typing import Any

from loraport.backend import Readiness
from loraport.envs import find_interpreter, problem_with
from loraport.errors import BackendError, Interrupted, LoraPortError, RunFolderError, SpecError
from loraport.hub_datasets import on_disk
from loraport.run.errors_line import encode_error
from loraport.run.events import Event, PhaseStarted, Sample, Warn, encode
from loraport.sets import trained_sets
from loraport.spec.models import TrainSpec
from loraport_ai_toolkit import control, layout
from loraport_ai_toolkit.collect import collect, numbered_saves, read_save
from loraport_ai_toolkit.job import captions_read_otherwise, is_local, stage_images, warning_about_captions, write_job
from loraport_ai_toolkit.lengths import check_lengths
from loraport_ai_toolkit.losses import Steps
from loraport_ai_toolkit.progress import Reader, diagnose, phase_of
from loraport_ai_toolkit.recipe import (
    CHECKOUT_VARIABLE,
    ENVIRONMENT,
    checkout_problem,
    checkout_version,
    default_checkout,
    how_to_get_it,
)
from loraport_ai_toolkit.translate import caption_extension

TINY_RUN = Path(__file__).with_name("tiny_run.py")

#: Variables that would steer ai-toolkit, its accelerate or its Python from outside the spec. With PYTHONSAFEPATH it
#: would not find its own modules, which lie beside run.py.
_STRAY = (
    *("SEED", "DEBUG_TOOLKIT", "MODELS_PATH", "AITK_JOB_ID"),
    *("PYTHONPATH", "PYTHONHOME", "PYTHONSTARTUP", "PYTHONSAFEPATH"),
)
_NAME = "ai-toolkit"
_POLL = 0.3  # seconds between looks at the databases
_GRACE = 10.0  # seconds between SIGTERM and SIGKILL
_MOST_NAN = 10  # steps in a row whose loss is no number
_REMEMBERED = 400  # lines that explain a failure
_BEHIND_BAR = re.compile(r"(?<=loss: \d\.\d{3}e[+-]\d\d\])")


def find_checkout() -> Path:
    """ai-toolkit's folder: the environment variable's, or the one beside its environment."""
    given = os.environ.get(CHECKOUT_VARIABLE)
    return Path(given).expanduser().absolute() if given else default_checkout()


def readiness(given: Path | None = None) -> Readiness:
    """Whether a checkout of a fitting version is there, and an interpreter, the one given or found, to run it."""
    folder = find_checkout()
    if problem := checkout_problem(folder):
        return Readiness(False, f"{problem}. {how_to_get_it()}")
    try:
        python = find_interpreter(_NAME, given)
    except SpecError as error:
        return Readiness(False, error.message)
    if problem := problem_with(python, ENVIRONMENT):
        return Readiness(False, f"{problem}. Install it with: loraport backends install {_NAME}")
    return Readiness(True, f"ai-toolkit {checkout_version(folder)} in {folder}, run by {python}")


def main() -> int:
    run_dir = Path(sys.argv[1])
    try:
        _run(run_dir)
    except LoraPortError as error:
        print(encode_error(error), flush=True)
        return error.exit_code
    except OSError as error:
        print(encode_error(RunFolderError(f"{error.filename or run_dir}: {error.strerror or error}.")), flush=True)
        return RunFolderError.exit_code
    except KeyboardInterrupt:
        print(encode_error(Interrupted("Stopped before training began.")), flush=True)
        return Interrupted.exit_code
    return 0


def _run(run_dir: Path) -> None:
    from loraport.plugins import plugins

    signal.signal(signal.SIGTERM, signal.default_int_handler)
    _emit(PhaseStarted(phase="load", detail="images and captions"))
    spec = TrainSpec.load(run_dir / "spec.yaml")
    launch = json.loads((run_dir / layout.LAUNCH).read_text(encoding="utf-8"))
    python = find_interpreter(_NAME, spec.backend.python)
    checkout = find_checkout()
    if problem := checkout_problem(checkout):
        raise BackendError(f"{problem}.", hint=f"{how_to_get_it()}.")
    family = plugins().families()[spec.model.family]
    on_this_disk = on_disk(spec, run_dir)
    sets = trained_sets(on_this_disk, family)
    captions = stage_images(sets, run_dir)
    if names := captions_read_otherwise(captions, python, checkout):
        _emit(Warn(message=warning_about_captions(names, caption_extension(sets[0].set))))
    model = write_job(on_this_disk, sets, run_dir, family, lambda message: _emit(Warn(message=message)))
    begin = _prepare_saves(run_dir / layout.save_folder(spec.name), launch["job"])
    control.create(run_dir / layout.DATABASE, begin, spec.train.steps, spec.save.every)
    environment = trainer_environment(launch["device"], offline=is_local(model, run_dir))
    items, text_encoder = [item for item, _ in captions], model["model_kwargs"]["text_encoder_path"]
    check_lengths(items, spec.dataset.max_text_tokens, python, text_encoder, run_dir, environment)
    tiny = spec.model.checkpoint == "tiny"
    start = [str(TINY_RUN), str(checkout)] if tiny else [str(checkout / "run.py")]
    _Session(spec, run_dir, begin).run([str(python), *start, str(run_dir / layout.JOB)], environment)


def trainer_environment(device: str, offline: bool) -> dict[str, str]:
    """The environment ai-toolkit runs in, without what would steer it. Raises BackendError for an unknown device."""
    kept = {
        name: value for name, value in os.environ.items() if name not in _STRAY and not name.startswith("ACCELERATE_")
    }
    kept |= {control.ID_VARIABLE: control.ID, "PYTHONUNBUFFERED": "1", "TOKENIZERS_PARALLELISM": "false"}
    kept |= {"HF_HUB_DISABLE_TELEMETRY": "1"}
    if offline:
        kept |= {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}
    if device == "cpu":
        kept |= {"ACCELERATE_USE_CPU": "true", "CUDA_VISIBLE_DEVICES": ""}
    elif device.startswith("cuda:"):
        kept |= {"CUDA_VISIBLE_DEVICES": device.removeprefix("cuda:")}
    elif device not in ("auto", "cuda"):
        raise BackendError(f"backend.options.device: {device!r} is not known. Choices: auto, cpu, cuda, cuda:N.")
    return kept


def _prepare_saves(folder: Path, job: str) -> int:
    """Make sure that ai-toolkit goes on from the best whole save; the optimizer steps it holds, or 0.

    It takes the file with the newest change, whatever its step and even when it was cut off.
    """
    final = read_save(folder / f"{job}.safetensors")
    saves = [*numbered_saves(folder, job), *([final] if final else [])]
    whole = {save.path for save in saves}
    for path in folder.glob(f"{job}*") if folder.is_dir() else ():
        if path.suffix == ".safetensors" and path not in whole:
            path.rename(path.with_name(f"damaged-{path.name}"))
            _emit(Warn(message=f"{path.name} was cut off while it was written and is put aside."))
    if not saves:
        (folder / "optimizer.pt").unlink(missing_ok=True)
        return 0
    best = max(saves, key=lambda save: save.step)
    os.utime(best.path)
    return best.step


class _Session:
    """One run of ai-toolkit's process."""

    def __init__(self, spec: TrainSpec, run_dir: Path, begin: int):
        self._spec = spec
        self._run_dir = run_dir
        self._saves = run_dir / layout.save_folder(spec.name)
        self._database = run_dir / layout.DATABASE
        images = spec.train.batch_size * spec.train.gradient_accumulation
        self._steps = Steps(self._saves / "loss_log.db", spec.train.steps, images, time.time())
        self._steps.begin(begin)
        self._begin = begin
        self._reader = Reader()
        self._lines: deque[str] = deque(maxlen=_REMEMBERED)
        self._doing = ""
        self._samples = set(self._sample_files())
        self._stops = 0
        self._asked_to_end = False
        self._asked_at: float | None = None

    def run(self, command: list[str], environment: dict[str, str]) -> None:
        """Run to the end. Raises Interrupted when it was stopped, and what ended it otherwise."""
        _emit(PhaseStarted(phase="load", detail="ai-toolkit"))
        try:
            # Its own session, so that a signal for us reaches it only through us.
            process: subprocess.Popen[bytes] = subprocess.Popen(
                command,
                cwd=self._run_dir,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                bufsize=0,
                start_new_session=True,
            )
        except OSError as error:
            raise BackendError(f"{command[0]} cannot be started: {error.strerror}.") from error
        signal.signal(signal.SIGINT, self._on_signal)
        signal.signal(signal.SIGTERM, self._on_signal)
        try:
            code = self._follow(process)
        finally:
            _end_group(process, signal.SIGKILL)
        for event in self._steps.new(last=True):
            _emit(event)
        self._tell_samples()
        self._conclude(code)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self._stops += 1

    def _follow(self, process: subprocess.Popen[bytes]) -> int:
        assert process.stdout is not None
        rest = b""
        looked = 0.0
        with selectors.DefaultSelector() as selector:
            selector.register(process.stdout, selectors.EVENT_READ)
            while True:
                ready = bool(selector.get_map()) and bool(selector.select(_POLL))
                data = os.read(process.stdout.fileno(), 65536) if ready else b""
                if data:
                    *lines, rest = (rest + data).replace(b"\r", b"\n").split(b"\n")
                    for line in lines:
                        self._read_all(line)
                elif ready:
                    selector.unregister(process.stdout)
                if time.monotonic() - looked >= _POLL:
                    looked = time.monotonic()
                    self._look(process)
                # Worker processes may hold the output open after their parent has ended.
                if not data and process.poll() is not None:
                    self._read_all(rest)
                    return process.returncode
                if not selector.get_map():
                    time.sleep(_POLL)

    def _read_all(self, data: bytes) -> None:
        """Read a line of output: one, or a progress bar and what was printed right behind it."""
        for line in _BEHIND_BAR.split(data.decode("utf-8", "replace")):
            if line:
                self._read(line)

    def _read(self, line: str) -> None:
        print(line, flush=True)
        self._lines.append(line)
        self._steps.read_bar(line)
        if line.startswith("Saved "):
            self._steps.paused(time.time())
        for event in self._reader.read(line):
            _emit(event)
        if self._stops and line.startswith("Saved checkpoint to") and not self._asked_to_end:
            # From here on its optimizer is still saved before it looks whether to end.
            self._asked_to_end = True
            control.ask_to_stop(self._database)

    def _look(self, process: subprocess.Popen[bytes]) -> None:
        """What the databases say, and what signals ask for."""
        doing = control.what_it_does(self._database)
        if doing != self._doing:
            self._doing = doing
            if phase := phase_of(doing):
                _emit(phase)
        for event in self._steps.new():
            _emit(event)
        self._tell_samples()
        if self._steps.nan_in_a_row() >= _MOST_NAN or self._stops > 1:
            _end_group(process, signal.SIGKILL)
        elif self._stops:
            self._stop(process)

    def _stop(self, process: subprocess.Popen[bytes]) -> None:
        """Ask for a save, once; where this session has trained nothing yet, end it."""
        training = self._steps.done > self._begin or self._doing.startswith("Training")
        if self._asked_at is None:
            self._asked_at = time.monotonic()
            if training:
                control.ask_to_save(self._database)
            else:
                _end_group(process, signal.SIGTERM)
        elif not training and time.monotonic() - self._asked_at > _GRACE:
            _end_group(process, signal.SIGKILL)

    def _tell_samples(self) -> None:
        for path in self._sample_files():
            if path not in self._samples:
                self._samples.add(path)
                self._steps.paused(path.stat().st_mtime)
                parts = path.stem.split("_")
                step = next((int(part) for part in parts[1:] if len(part) >= 9 and part.isdigit()), self._steps.done)
                _emit(Sample(step=step, path=str(path.relative_to(self._run_dir))))

    def _sample_files(self) -> list[Path]:
        return sorted((self._saves / "samples").glob("*.png"))

    def _conclude(self, code: int) -> None:
        """Return when the final file is there; else raise what ended it."""
        lines = list(self._lines)
        if self._steps.nan_in_a_row() >= _MOST_NAN:
            first = self._steps.done - self._steps.nan_in_a_row() + 1
            raise BackendError(
                f"The loss is not a number since step {first}, so nothing is learned any more.",
                hint="Lower train.learning_rate, and start again or resume from an earlier checkpoint.",
            )
        if code == 0:
            try:
                collect(self._spec, self._run_dir)
            except BackendError:
                if self._stops:
                    raise Interrupted(f"Stopped after step {self._steps.done}.") from None
                raise
            return
        if self._stops:
            raise Interrupted(f"Stopped after step {self._steps.done}.")
        raise diagnose(code, lines)


def _end_group(process: subprocess.Popen[Any], number: signal.Signals) -> None:
    """Send a signal to ai-toolkit and the processes it has started."""
    try:
        os.killpg(process.pid, number)
    except (ProcessLookupError, PermissionError):
        return  # they have ended
    if number is signal.SIGKILL:
        process.wait()


def _emit(event: Event) -> None:
    print(encode(event), flush=True)


if __name__ == "__main__":
    sys.exit(main())
