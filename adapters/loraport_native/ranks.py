"""Starts one trainer for each GPU of a run, and makes their ends one: one exit code, one error, nothing left behind.

Why not torchrun: it answers signals by killing, so no checkpoint would be written; it may start failed processes anew,
which is the person's to decide here; and it buries the cause of a failure in its own report. No torch is imported.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import NamedTuple, NoReturn

from loraport.errors import BackendError, Interrupted
from loraport.run.errors_line import PREFIX, encode_error

#: Exit code of a process that failed only because another one was gone (EX_TEMPFAIL of <sysexits.h>).
PEER_LOST = 75
#: Seconds that the others get to end by themselves, when one was stopped or has lost the rest.
GRACE = 10.0
_POLL = 0.05  # seconds


class PeerLost(Exception):
    """The other processes of the run cannot be reached any more."""


class Place(NamedTuple):
    """Of one process among those of a run."""

    rank: int
    meeting_point: Path  #: the file by which they find each other

    @classmethod
    def read(cls, arguments: list[str]) -> Place:
        rank, meeting_point = arguments
        return cls(int(rank), Path(meeting_point))


class _Rank:
    """One of the trainers. What it prints is passed on by whole lines, so that no two mix; its error line is kept."""

    _printing = threading.Lock()

    def __init__(self, run_dir: Path, place: Place, count: int):
        self.number = place.rank
        self.told: str | None = None
        # The machine's cores are shared out, or each process would take all of them.
        threads = {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // count))}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "loraport_native.train", str(run_dir), *map(str, place)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env={**threads, **os.environ},
        )
        self._relay = threading.Thread(target=self._pass_on, daemon=True)
        self._relay.start()

    @property
    def code(self) -> int | None:
        """Its exit code, or None while it runs."""
        return self.process.poll()

    def end(self) -> None:
        """Kill it if it still runs, and pass on the last that it said."""
        self.process.kill()
        self.process.wait()
        self._relay.join(GRACE)  # not for ever: a helper process of its own may hold the pipe

    def _pass_on(self) -> None:
        assert self.process.stdout is not None
        prefix = f"[gpu {self.number}] ".encode() if self.number else b""
        for line in self.process.stdout:
            if line.startswith(PREFIX.encode()):
                self.told = line.decode("utf-8", "replace").rstrip("\n")
                continue
            # When nobody reads any more, it must still be able to write its checkpoint.
            with self._printing, contextlib.suppress(OSError):
                sys.stdout.buffer.write(prefix + line)
                sys.stdout.buffer.flush()


def run_ranks(run_dir: Path, count: int) -> int:
    """Train the run in `run_dir` with `count` processes to its end; the exit code, its cause told.

    SIGINT and SIGTERM are passed on; together the processes write one checkpoint and stop.
    """
    ranks: list[_Rank] = []

    def pass_on(number: int, frame: FrameType | None) -> None:
        for rank in ranks:
            rank.process.send_signal(number)

    signal.signal(signal.SIGINT, pass_on)
    signal.signal(signal.SIGTERM, pass_on)
    with tempfile.TemporaryDirectory(prefix="loraport-") as folder:
        for number in range(count):
            ranks.append(_Rank(run_dir, Place(number, Path(folder) / "meeting-point"), count))
        try:
            failed = _follow(ranks)
        finally:
            for rank in ranks:
                rank.end()
    return _explain(failed) if failed else 0


def _follow(ranks: list[_Rank]) -> list[tuple[_Rank, int]]:
    """Until all have ended, or one failed; those that failed by themselves, with their exit codes.

    One that failed ends the run at once, since the others wait for it; one that was stopped or left alone is given the
    time in which the others do the same, or the one at fault ends too.
    """
    deadline: float | None = None
    while True:
        codes = [rank.code for rank in ranks]
        failed = [(rank, code) for rank, code in zip(ranks, codes, strict=True) if code]
        if None not in codes or any(code not in (PEER_LOST, Interrupted.exit_code) for _, code in failed):
            return failed
        if failed:
            deadline = deadline or time.monotonic() + GRACE
            if time.monotonic() > deadline:
                return failed
        time.sleep(_POLL)


def _explain(failed: list[tuple[_Rank, int]]) -> int:
    """Tell the cause among those that failed, and give the exit code of the run."""
    rank, code = min(failed, key=lambda one: (one[1] == PEER_LOST, one[1] == Interrupted.exit_code))
    if rank.told:
        print(rank.told, flush=True)
    else:
        how = f"by {signal.Signals(-code).name}" if code < 0 else f"with exit code {code}"
        print(f"The process of GPU {rank.number} ended {how}.", flush=True)
    if code == PEER_LOST:
        return BackendError.exit_code
    return 128 - code if code < 0 else code


def end_as_rank(main: Callable[[], int]) -> NoReturn:
    """End this process with what `main` returns.

    After a failure it skips the interpreter's shutdown, in which NCCL would wait for processes that may be gone.
    """
    code = 1
    try:
        code = main()
    except PeerLost as error:
        lost = BackendError(f"The processes of the GPUs cannot reach each other any more: {error}")
        print(encode_error(lost))
        code = PEER_LOST
    except Exception:
        traceback.print_exc()
    if code in (0, Interrupted.exit_code):  # they have parted
        sys.exit(code)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
