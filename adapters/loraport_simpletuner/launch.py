"""Runs SimpleTuner for one run folder: `python -m loraport_simpletuner.launch RUN_DIR`, the process that is supervised.

Stages the images, lays the checkpoint out, starts SimpleTuner's own interpreter in a session of its own, copies its
output and tells its progress as events. The first SIGINT or SIGTERM asks SimpleTuner for a checkpoint and then ends it,
the second ends it at once. No torch, and nothing of SimpleTuner, is imported.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from pathlib import Path
from types import FrameType
from typing import IO, Any

from loraport.backend import Readiness
from loraport.envs import find_interpreter, package_version, problem_with
from loraport.errors import BackendError, LoraPortError, RunFolderError
from loraport.files import write_atomic
from loraport.hub_datasets import on_disk
from loraport.run import events
from loraport.run.errors_line import encode_error
from loraport.run.events import Event, encode
from loraport.spec.models import TrainSpec
from loraport_simpletuner.collect import checkpoints, unfinished
from loraport_simpletuner.progress import Metrics, Watch, bar_step, explain, phase_of
from loraport_simpletuner.recipe import has_group_offload, recipe
from loraport_simpletuner.staging import stage_images
from loraport_simpletuner.translate import LAUNCH, OUTPUT, WORK

NAME = "simpletuner"
SIGNAL = "signal.json"  #: SimpleTuner looks into this file after each step for requests

STOPPED = 130
TRAINING = ("train", "")
_POLL = 0.2  # seconds between looks at what SimpleTuner wrote
_CHECKPOINT_PATIENCE = 600.0  # seconds that a step and its checkpoint may take after a request to stop
_END_PATIENCE = 10.0  # seconds between SIGINT, SIGTERM and SIGKILL
_BAR_SECONDS = 2.0  # a progress bar's text is copied to the log at most this often
_TAIL = 400  # lines that explain a failure

#: Variables that would change what SimpleTuner or its launcher does, from somebody's shell.
_STRAY = (
    "ENV",
    "CONFIG_PATH",
    "CONFIG_TYPE",
    "PYTHONPATH",
    "PYTHONHOME",
    "VIRTUAL_ENV",
    "LOCAL_RANK",
    "RANK",
    "WORLD_SIZE",
)
_STRAY_PREFIXES = ("SIMPLETUNER_", "ACCELERATE_", "FSDP_", "DEEPSPEED_")


def readiness(given: Path | None = None) -> Readiness:
    """Whether SimpleTuner is installed, for the interpreter given or found, in a version that this adapter knows."""
    try:
        python = find_interpreter(NAME, given)
    except LoraPortError as error:
        return Readiness(False, str(error))
    problem = problem_with(python, recipe())
    if problem:
        return Readiness(False, f"{problem}. Install it with: loraport backends install {NAME}")
    return Readiness(True, f"simpletuner {package_version(python, 'simpletuner')} of {python}")


def main(run_dir: Path) -> int:
    """Train, and return the exit code: 0 only when the final LoRA is there."""
    try:
        return _train(run_dir)
    except LoraPortError as error:
        print(encode_error(error), flush=True)
        return error.exit_code


def _train(run_dir: Path) -> int:
    work = run_dir / WORK
    plan = json.loads((work / LAUNCH).read_text(encoding="utf-8"))
    spec = TrainSpec.load(run_dir / "spec.yaml")
    resume = json.loads((work / "config" / "config.json").read_text(encoding="utf-8"))["resume_from_checkpoint"]
    output = work / OUTPUT
    done = checkpoints(output)
    if done and not resume:
        raise RunFolderError(f"{output} holds checkpoints of another training.", hint="Choose a new folder with --out.")
    _tell(events.PhaseStarted(phase="start", detail="images, checkpoint, environment"))
    for warning in stage_images(on_disk(spec, run_dir), work):
        _tell(events.Warn(message=warning))
    python = _interpreter(plan)
    command = [str(python), *plan["arguments"]]
    environment = _environment(plan, work)
    if done:
        _tell(events.Resumed(step=done[-1][0]))
    # A final file of an earlier session must not pass for this one's.
    for stale in ("pytorch_lora_weights.safetensors", "training_metrics.json"):
        (output / stale).unlink(missing_ok=True)
    write_atomic(work / SIGNAL, "{}")
    with Trainer(command, work, environment) as trainer:
        return _follow(trainer, spec, run_dir)


def _interpreter(plan: dict[str, Any]) -> Path:
    python = find_interpreter(NAME, Path(plan["python"]) if plan["python"] else None)
    problem = problem_with(python, recipe())
    if problem:
        raise BackendError(f"{problem}.", hint=f"Install it with: loraport backends install {NAME}")
    installed = package_version(python, "simpletuner")
    assert installed is not None
    if has_group_offload(installed) != has_group_offload(plan["version"]):
        raise BackendError(
            f"The configuration is for SimpleTuner {plan['version']}; {installed} is installed, which has other keys.",
            hint=f"Set backend.options.version: {installed}",
        )
    return python


def _environment(plan: dict[str, Any], work: Path) -> dict[str, str]:
    from loraport_simpletuner.checkpoint import link_checkpoint

    clean = {
        name: value for name, value in os.environ.items() if name not in _STRAY and not name.startswith(_STRAY_PREFIXES)
    }
    clean |= plan["env"]
    # Nothing in the working folder may be taken for a module.
    clean |= {"SIMPLETUNER_ACCELERATE_SIGNAL_FILE": str(work / SIGNAL), "PYTHONSAFEPATH": "1", "PYTHONUNBUFFERED": "1"}
    if plan["checkpoint"]:
        clean |= link_checkpoint(Path(plan["checkpoint"]), work / "hub")
    return clean


def _follow(trainer: Trainer, spec: TrainSpec, run_dir: Path) -> int:
    output = run_dir / WORK / OUTPUT
    metrics = Metrics(output, spec.train.steps, spec.train.batch_size * spec.train.gradient_accumulation)
    watch = Watch(output, run_dir)
    phase, bar = None, 0
    while True:
        code = trainer.wait(_POLL)
        steps = list(metrics.read())
        for line in trainer.new_lines():
            begun = phase_of(line)
            if begun is not None and (phase is None or (begun.phase, begun.detail) != phase):
                phase = (begun.phase, begun.detail)
                _tell(begun)
            told = bar_step(line)
            if told is not None and not metrics.seen and told.step > max(bar, 1):
                bar = told.step
                steps.append(told)
        for event in [*steps, *watch.read()]:
            _tell(event)
        trainer.go_on_stopping(phase == TRAINING, output)
        if code is not None:
            return _verdict(trainer, code, spec.train.steps, output)


def _verdict(trainer: Trainer, code: int, steps: int, output: Path) -> int:
    """Exit code 0 of SimpleTuner's means nothing by itself: it also ends so when interrupted or without a batch."""
    problem = unfinished(steps, output)
    if problem is None and code == 0:
        return 0
    if trainer.stopping:
        return STOPPED
    tail = trainer.tail()
    if code != 0:
        raise explain(code, tail)
    known = explain(0, tail)
    raise BackendError(f"SimpleTuner ended as if all were well, but {problem}. {known.message}", hint=known.hint)


def _tell(event: Event) -> None:
    print(encode(event), flush=True)


class Trainer:
    """SimpleTuner's process in its own session. As a context manager it leaves nothing of it behind."""

    def __init__(self, command: list[str], folder: Path, environment: dict[str, str]):
        self.stopping = False
        self._kill = False
        self._asked_at: float | None = None
        self._before: int | None = None
        self._sent: list[int] = []
        self._sent_at = 0.0
        self._lines: deque[str] = deque()
        self._tail: deque[str] = deque(maxlen=_TAIL)
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._on_signal)
        self._folder = folder
        self._process = subprocess.Popen(
            command,
            cwd=folder,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        assert self._process.stdout is not None
        self._reader = threading.Thread(target=self._copy, args=(self._process.stdout,), daemon=True)
        self._reader.start()

    def wait(self, seconds: float) -> int | None:
        """The exit code, once all output is read, or None when it still runs."""
        try:
            code = self._process.wait(seconds)
        except subprocess.TimeoutExpired:
            return None
        self._reader.join(2.0)  # a grandchild may hold the pipe open
        return code

    def new_lines(self) -> list[str]:
        """Lines of output since the last call, progress bars' included."""
        return [self._lines.popleft() for _ in range(len(self._lines))]

    def tail(self) -> str:
        """The last lines of output."""
        return "\n".join(self._tail)

    def go_on_stopping(self, training: bool, output: Path) -> None:
        """Take the next step towards the end that was asked for: a checkpoint, then ever harder signals."""
        if not self.stopping:
            return
        now = time.monotonic()
        done = checkpoints(output)
        latest = done[-1][0] if done else 0
        if self._kill:
            self._signal(signal.SIGKILL)
        elif self._asked_at is None:
            self._asked_at, self._before = now, latest
            if training:
                write_atomic(self._folder / SIGNAL, json.dumps({"manual_checkpoint": 1}))
        elif not training or latest != self._before or now - self._asked_at > _CHECKPOINT_PATIENCE or self._sent:
            order = (signal.SIGINT, signal.SIGTERM, signal.SIGKILL)
            if len(self._sent) < len(order) and now - self._sent_at > _END_PATIENCE:
                self._sent_at = now
                self._sent.append(order[len(self._sent)])
                self._signal(self._sent[-1])

    def __enter__(self) -> Trainer:
        return self

    def __exit__(self, *_: object) -> None:
        self._signal(signal.SIGKILL)
        self._process.wait()

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self._kill = self.stopping
        self.stopping = True

    def _signal(self, number: int) -> None:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, number)

    def _copy(self, source: IO[bytes]) -> None:
        """Copy output to our own, line by line; of lines that overwrite each other only one now and then."""
        pending, told = b"", 0.0
        while data := os.read(source.fileno(), 65536):
            *pieces, pending = re.split(rb"([\r\n])", pending + data)
            for text, end in zip(pieces[::2], pieces[1::2], strict=True):
                now = time.monotonic()
                quiet = end == b"\r" and now - told < _BAR_SECONDS
                told = told if quiet else now
                self._line(text, quiet)
        self._line(pending, quiet=False)

    def _line(self, raw: bytes, quiet: bool) -> None:
        text = raw.decode("utf-8", "replace").replace("\x1b[A", "").rstrip()
        if text:
            self._lines.append(text)
            if not quiet:
                self._tail.append(text)
                print(text, flush=True)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
