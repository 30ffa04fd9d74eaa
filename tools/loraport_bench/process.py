"""A trainer's command as a process that is watched, bounded in time, and never left behind."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import psutil

from loraport.errors import BackendError, Interrupted
from loraport_bench.sampling import Samples, TreeSampler

_PATIENCE = 20.0  # seconds that a process and its children get to end, each time they are told to
_PR_SET_PDEATHSIG = 1  # <linux/prctl.h>
#: Looked up beforehand: between fork and exec another thread's hold on the loader would last for ever.
_prctl = ctypes.CDLL(None).prctl if sys.platform == "linux" else None


@dataclass(frozen=True)
class Ended:
    """A process that has ended: `code` is its exit code, None when it ran into the limit. Times since 1970."""

    code: int | None
    began: float
    ended: float
    samples: Samples


def run_watched(
    command: Sequence[str],
    environment: Mapping[str, str],
    limit: float,
    interval: float,
    cards: Sequence[str],
    folders: Sequence[Path],
    output: Path | None = None,
    hear: Callable[[str], None] | None = None,
    cwd: Path | None = None,
) -> Ended:
    """Run a command to its end, sampled from outside; at `limit` seconds it and all it started are ended.

    `output` is the file for what it prints, or `hear` gets each line. Raises Interrupted, with nothing left of it, when
    this process is asked to stop (SIGINT, SIGTERM or SIGHUP), and BackendError when it cannot be started.
    """
    with stops_raise(), open(output or "/dev/null", "wb") as file:
        began = time.time()
        try:
            process = subprocess.Popen(
                list(command),
                env=dict(environment),
                cwd=cwd,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE if hear else file,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # Ctrl-C reaches this process alone
                preexec_fn=dies_with_us if sys.platform == "linux" else None,
            )
        except OSError as error:
            raise BackendError(f"{command[0]} cannot be started: {error.strerror}.") from error
        try:
            with TreeSampler(process.pid, interval, cards, folders) as sampler:
                code = _wait(process, limit, hear)
                if code is None:
                    end(process)
                ended = time.time()
        except BaseException:
            end(process)
            raise
        return Ended(code, began, ended, sampler.samples)


def own_environment(folder: Path) -> dict[str, str]:
    """This process's environment, with everything that runs may keep for later ones in `folder`: what a trainer caches
    of its images, and what torch compiles. Cards are numbered as the driver does it, which is asked about them."""
    return {
        **os.environ,
        "LORAPORT_CACHE": str(folder / "cache"),
        "TORCHINDUCTOR_CACHE_DIR": str(folder / "compiled" / "inductor"),
        "TRITON_CACHE_DIR": str(folder / "compiled" / "triton"),
        "CUDA_DEVICE_ORDER": os.environ.get("CUDA_DEVICE_ORDER", "PCI_BUS_ID"),
    }


def end(process: subprocess.Popen[Any]) -> None:
    """End a `loraport train` and everything under it: twice SIGTERM, which kills its trainer, then SIGKILL."""
    family: list[psutil.Process] = []
    with contextlib.suppress(psutil.Error):
        parent = psutil.Process(process.pid)
        family = [parent, *parent.children(recursive=True)]
    for number in (signal.SIGTERM, signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError):
            process.send_signal(number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(1.0 if number == signal.SIGTERM else _PATIENCE)
    _, left = psutil.wait_procs(family, _PATIENCE)
    for one in left:
        with contextlib.suppress(psutil.Error):
            one.kill()
    psutil.wait_procs(left, _PATIENCE)


def run_to_end(command: Sequence[str], environment: Mapping[str, str]) -> tuple[int, str, str]:
    """Run a command that nobody watches; its exit code, output and errors. It ends with this process, and with what
    asks this process to stop, which raises Interrupted."""
    with stops_raise():
        process = _started(command, environment, subprocess.PIPE)
        try:
            output, said = process.communicate()
        except BaseException:
            end(process)
            raise
    return process.returncode, output, said


def _started(command: Sequence[str], environment: Mapping[str, str], stdout: int) -> subprocess.Popen[str]:
    return subprocess.Popen(
        list(command),
        env=dict(environment),
        stdin=subprocess.DEVNULL,
        stdout=stdout,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=dies_with_us if sys.platform == "linux" else None,
    )


class Running:
    """Processes that threads wait for, so that another thread can end them all."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._stopped = False
        self._processes: set[subprocess.Popen[str]] = set()

    def run(self, command: Sequence[str], environment: Mapping[str, str]) -> tuple[int, str]:
        """Run a command; its exit code and what it wrote to its error stream. Raises Interrupted once `stop` was
        called."""
        with self._lock:
            self._go_on()
            process = _started(command, environment, subprocess.DEVNULL)
            self._processes.add(process)
        try:
            _, said = process.communicate()
        except BaseException:
            end(process)
            raise
        finally:
            with self._lock:
                self._processes.discard(process)
        self._go_on()
        return process.returncode, said

    def stop(self) -> None:
        """End every process and start no other."""
        with self._lock:
            self._stopped = True
            processes = list(self._processes)
        for process in processes:  # all are asked before one is waited for
            with contextlib.suppress(ProcessLookupError):
                process.terminate()
        for process in processes:
            end(process)

    def _go_on(self) -> None:
        if self._stopped:
            raise Interrupted("Stopped.", hint="The same command goes on where this was.")


def _wait(process: subprocess.Popen[bytes], limit: float, hear: Callable[[str], None] | None) -> int | None:
    deadline = time.monotonic() + limit
    if hear:
        assert process.stdout is not None
        _listen(process.stdout, hear, deadline)
    try:
        code = process.wait(max(0.0, deadline - time.monotonic()))
    except subprocess.TimeoutExpired:
        return None
    return 128 - code if code < 0 else code


def _listen(stream: IO[bytes], hear: Callable[[str], None], deadline: float) -> None:
    """Pass lines on until the stream ends or the time is up."""
    import selectors

    rest = b""
    with selectors.DefaultSelector() as selector:
        selector.register(stream, selectors.EVENT_READ)
        while (left := deadline - time.monotonic()) > 0:
            if not selector.select(left):
                return
            data = os.read(stream.fileno(), 65536)
            if not data:
                break
            *lines, rest = (rest + data).replace(b"\r", b"\n").split(b"\n")
            for line in lines:
                hear(line.decode("utf-8", "replace"))
    hear(rest.decode("utf-8", "replace"))


@contextlib.contextmanager
def stops_raise() -> Iterator[None]:
    """Turn what asks this process to stop into Interrupted, for as long as the block lasts. Main thread only."""

    def stop(number: int, frame: Any) -> None:
        raise Interrupted("Stopped.", hint="The same command goes on where this was.")

    before: dict[int, Any] = {}
    try:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            with contextlib.suppress(ValueError):  # in another thread, or in a job that handles them itself
                if signal.getsignal(number) is not signal.SIG_IGN:
                    before[number] = signal.signal(number, stop)
        yield
    finally:
        for caught, handler in before.items():
            signal.signal(caught, handler)


def dies_with_us() -> None:
    """Runs in the child: SIGTERM, on which a run stops with a checkpoint, when this process is killed."""
    assert _prctl is not None
    _prctl(_PR_SET_PDEATHSIG, int(signal.SIGTERM), 0, 0, 0)
