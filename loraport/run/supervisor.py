"""Runs a plan's command under a guard, listens to what it prints, and passes on requests to stop."""

from __future__ import annotations

import contextlib
import os
import selectors
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, Self

from loraport.backend import Backend
from loraport.errors import BackendError, Interrupted, LoraPortError, RunFolderError
from loraport.files import write_atomic
from loraport.planning import Plan
from loraport.run import events, guard
from loraport.run.folder import RunFolder
from loraport.run.record import Record

GRACE = 10.0  #: seconds between SIGTERM and SIGKILL for a trainer whose supervisor is gone
SILENCE = 1800.0  #: seconds without any output after which a trainer is taken for hung and stopped
_POLL = 0.2  # seconds after which a request to stop or the trainer's end is noticed at the latest
_LONGEST_LINE = 65536  # bytes; output without a newline is cut there
_LOG_TAIL = 65536  # bytes of the log that explain a failure

#: How a run starts and ends is the supervisor's to say, whatever a trainer prints.
_OWN = (events.Started, events.Stopping, events.Interrupted, events.Failed, events.Finished)


def supervise(plan: Plan, folder: RunFolder, backend: Backend, record: Record, resume: bool = False) -> None:
    """Write the plan's files, run its command to its end, and return when the trainer says it succeeded.

    SIGINT, SIGTERM or SIGHUP once asks the trainer to write a checkpoint and stop; twice kills it. (Only in the main
    thread; the handlers that were there come back.) No process of the trainer is left when this returns or raises.

    Raises Interrupted when it was stopped, what the backend makes of another exit code, BackendError when the command
    cannot be started or prints nothing for SILENCE seconds, and RunFolderError when the folder cannot be written any
    more.
    """
    # Cards are counted as the driver does, which the plan asked about them.
    environment = {"PYTHONUNBUFFERED": "1", "CUDA_DEVICE_ORDER": "PCI_BUS_ID", **os.environ, **plan.env}
    if shutil.which(plan.command[0], path=environment.get("PATH")) is None:
        raise BackendError(
            f"The backend {plan.backend} starts {plan.command[0]}, which is not there or not a program.",
            hint="Set up the backend's environment again, or name its interpreter in backend.python.",
        )
    write_files(plan, folder.path)
    record.emit(events.Started(backend=plan.backend, spec_hash=plan.spec.hash(), resume=resume))
    with _Log(folder.log_file) as log, _Trainer(plan.command, environment, folder) as trainer:
        listener = _Listener(backend, record, log)
        with _stop_on_signals(trainer):
            code = _follow(trainer, listener, record)
        if trainer.stops and not (code == 0 and record.state.step == record.state.total):
            raise interrupted(record, folder)
        if code != 0:
            raise _explain(backend, code, log.tail())


def write_files(plan: Plan, root: Path) -> None:
    """Write the files a backend generated. Raises BackendError for one that would lie outside the run folder."""
    for name, text in plan.files.items():
        path = root / name
        if not path.resolve().is_relative_to(root.resolve()):
            raise BackendError(f"The backend {plan.backend} wants to write {name}, which is outside the run folder.")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise RunFolderError(f"{path.parent} cannot be made: {error.strerror}.") from error
        write_atomic(path, text)


def interrupted(record: Record, folder: RunFolder) -> Interrupted:
    """The error of a run that was stopped, saying how to go on."""
    state = record.state
    if state.trained:
        kept = "the training is done, and only the LoRA's conversion is left"
    elif state.checkpoint is None:
        kept = "there is no checkpoint yet, so it will begin again"
    else:
        kept = f"step {state.checkpoint} is kept"
    return Interrupted(
        f"Stopped at step {state.step} of {state.total}; {kept}.", hint=f"Go on with: loraport resume {folder.path}"
    )


class _Trainer:
    """The guarded process. Leaving the context ends whatever is left of it."""

    def __init__(self, command: list[str], environment: dict[str, str], folder: RunFolder):
        orders, self._orders = os.pipe()
        self.stops = 0
        arguments = [str(orders), str(os.getpid()), str(GRACE), *command]
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-I", "-S", guard.__file__, *arguments],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                bufsize=0,
                cwd=folder.path,
                env=environment,
                pass_fds=(orders, folder.lock_fd),  # with the lock, the folder stays taken until the last child is gone
                start_new_session=True,  # Ctrl-C in a terminal reaches the supervisor alone
            )
        except OSError as error:
            os.close(self._orders)
            raise BackendError(f"The trainer cannot be started: {error.strerror}.") from error
        finally:
            os.close(orders)
        assert self._process.stdout is not None
        self.output = self._process.stdout

    def stop(self) -> None:
        """Ask for a checkpoint and an end; the second time, kill."""
        self.stops += 1
        with contextlib.suppress(OSError):  # it has ended meanwhile
            os.write(self._orders, b"i" if self.stops == 1 else b"k")

    def exit_code(self, timeout: float) -> int | None:
        """The trainer's exit code, or None when it still runs after `timeout` seconds."""
        try:
            code = self._process.wait(timeout)
        except subprocess.TimeoutExpired:
            return None
        return 128 - code if code < 0 else code

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        os.close(self._orders)
        # Nobody reads the output any more; a trainer that still writes must not wait for us.
        self.output.close()
        self._process.wait()


class _Log:
    """log.txt, appended to."""

    def __init__(self, path: Path):
        self.path = path
        try:
            self._file = open(path, "ab", buffering=0)  # noqa: SIM115 - closed by __exit__
        except OSError as error:
            raise self._failure(error) from error
        self._start = self._file.tell()

    def write(self, data: bytes) -> None:
        try:
            view = memoryview(data)
            while view:
                view = view[self._file.write(view) :]
        except OSError as error:
            raise self._failure(error) from error

    def tail(self) -> str:
        """The end of what was logged since this object was made."""
        with open(self.path, "rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(self._start, size - _LOG_TAIL))
            return file.read().decode("utf-8", "replace")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: Any) -> None:
        self._file.close()

    def _failure(self, error: OSError) -> RunFolderError:
        return RunFolderError(
            f"{self.path} cannot be written: {error.strerror or error}.",
            hint=f"Free some space, then go on with: loraport resume {self.path.parent}",
        )


class _Listener:
    """Turns the trainer's output into the log and into events."""

    def __init__(self, backend: Backend, record: Record, log: _Log):
        self._backend = backend
        self._record = record
        self._log = log
        self._rest = b""

    def take(self, data: bytes) -> None:
        """Some output. Lines end at a newline, or at the carriage return of a progress bar."""
        self._log.write(data)
        *lines, self._rest = (self._rest + data).replace(b"\r", b"\n").split(b"\n")
        for line in lines:
            self._read(line)
        while len(self._rest) > _LONGEST_LINE:
            self._read(self._rest[:_LONGEST_LINE])
            self._rest = self._rest[_LONGEST_LINE:]

    def end(self) -> None:
        """No more output: what has no newline is a line too."""
        self._read(self._rest)
        self._rest = b""

    def _read(self, line: bytes) -> None:
        if not line:
            return
        try:
            found = list(self._backend.read_line(line.decode("utf-8", "replace")) or ())
        except Exception as error:  # a line that a backend cannot read must not end the training
            name = self._backend.name
            self._record.warn_once(
                "read_line", f"The backend {name} failed at a line of output: {type(error).__name__}: {error}"
            )
            return
        for event in found:
            if not isinstance(event, _OWN):
                self._record.emit(event)


def _follow(trainer: _Trainer, listener: _Listener, record: Record) -> int:
    """Read the output until the trainer and its output have ended; its exit code. BackendError when it is hung."""
    told = False
    heard = time.monotonic()
    with selectors.DefaultSelector() as selector:
        selector.register(trainer.output, selectors.EVENT_READ)
        code: int | None = None
        while True:
            ready = bool(selector.get_map()) and bool(selector.select(_POLL))
            data = os.read(trainer.output.fileno(), 65536) if ready else b""
            if data:
                heard = time.monotonic()
                listener.take(data)
            elif ready:
                selector.unregister(trainer.output)
            else:
                code = trainer.exit_code(0 if selector.get_map() else _POLL)
            if trainer.stops and not told:
                told = True
                record.emit(events.Stopping())
            if code is not None:
                listener.end()
                return code
            if time.monotonic() - heard > SILENCE:
                raise BackendError(
                    f"The trainer printed nothing for {SILENCE / 60:.0f} minutes; it is taken for hung and stopped.",
                    hint="Look at the end of log.txt in the run folder, then go on with: loraport resume",
                )


@contextlib.contextmanager
def _stop_on_signals(trainer: _Trainer) -> Iterator[None]:
    """Pass signals that ask to stop on to the trainer. One that is ignored (as nohup does) stays ignored."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def handle(number: int, frame: FrameType | None) -> None:
        trainer.stop()

    before: dict[int, Any] = {}
    try:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            if signal.getsignal(number) is not signal.SIG_IGN:
                before[number] = signal.signal(number, handle)
        yield
    finally:
        for caught, handler in before.items():
            signal.signal(caught, handler)


def _explain(backend: Backend, code: int, log_tail: str) -> LoraPortError:
    error = backend.explain_failure(code, log_tail)
    if isinstance(error, LoraPortError):
        return error
    return BackendError(f"The backend {backend.name} failed with exit code {code}: {error}")
