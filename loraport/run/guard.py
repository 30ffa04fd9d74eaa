"""The process between a run and its trainer: whatever ends the run, no process of the trainer outlives it.

Started as `python -I -S guard.py CONTROL PARENT GRACE COMMAND...` in a session of its own, standard library only.
CONTROL is the reading end of a pipe that the parent alone can write: a byte `i` sends SIGINT to the trainer's group,
`k` kills everything at once, and end of file means that the parent is gone: SIGTERM, GRACE seconds, SIGKILL. The
trainer writes straight to the guard's own output. Exit code: the trainer's, 128 + n when signal n ended it, 127 when it
cannot be started.

On Linux the guard is a subreaper, so that orphans of the trainer become its children and none is missed, and a guard
that is itself killed takes the trainer along. Elsewhere children are found by parent and process group, which misses
one that changed its session after its parent ended.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable

# <linux/prctl.h>
_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36

_LINUX = sys.platform == "linux"
LEFTOVER_GRACE = 2.0  #: seconds for processes that a trainer left behind when it ended by itself
_GIVE_UP = 10.0  # seconds after SIGKILL; what is left by then hangs in the kernel


class Guard:
    """Runs one trainer."""

    def __init__(self, command: list[str], control: int, parent: int, grace: float):
        self.command = command
        self.control = control
        self.parent = parent
        self.grace = grace
        self.pid = 0
        self.status: int | None = None

    def run(self) -> int:
        """Start the trainer and stay until it and all its descendants are gone; give the exit code."""
        woken = _wake_on_signals()
        before_exec = _linux_ties() if _LINUX else None
        try:
            trainer = subprocess.Popen(
                self.command, stdin=subprocess.DEVNULL, start_new_session=True, preexec_fn=before_exec
            )
        except OSError as error:
            print(f"{self.command[0]} cannot be started: {error.strerror}", file=sys.stderr, flush=True)
            return 127
        self.pid = trainer.pid
        grace = self._wait(woken)
        self._end_all(grace)
        if self.status is None:
            return 128 + signal.SIGKILL
        code = os.waitstatus_to_exitcode(self.status)
        trainer.returncode = code  # it is reaped, and subprocess need not look for it
        return 128 - code if code < 0 else code

    def _wait(self, woken: int) -> float:
        """Until the trainer ends or must end; how many seconds what is left of it still gets."""
        while True:
            ready, _, _ = select.select([self.control, woken], [], [], 1.0)
            if woken in ready:
                os.read(woken, 4096)
            self._reap()
            if self.status is not None:
                return LEFTOVER_GRACE
            orders = os.read(self.control, 64) if self.control in ready else None
            # A forked copy of the parent may keep the pipe open, so its death is looked for as well.
            if orders == b"" or os.getppid() != self.parent:
                return self.grace
            for order in orders or b"":
                if order == ord("k"):
                    return 0.0
                assert order == ord("i"), order
                _send(os.killpg, self.pid, signal.SIGINT)

    def _end_all(self, grace: float) -> None:
        asked: set[int] = set()
        deadline = time.monotonic() + grace
        while alive := self._descendants():
            late = time.monotonic() - deadline
            if late > _GIVE_UP:
                print(f"processes {sorted(alive)} do not end even when killed", file=sys.stderr, flush=True)
                return
            for pid in alive if late >= 0 else alive - asked:
                _send(os.kill, pid, signal.SIGKILL if late >= 0 else signal.SIGTERM)
            asked |= alive
            time.sleep(0.02)
            self._reap()
        self._reap()

    def _reap(self) -> None:
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if pid == 0:
                return
            if pid == self.pid:
                self.status = status

    def _descendants(self) -> set[int]:
        table = _processes()
        children: dict[int, list[int]] = {}
        for pid, (parent, _) in table.items():
            children.setdefault(parent, []).append(pid)
        found: set[int] = set()
        waiting = [os.getpid()]
        while waiting:
            new = set(children.get(waiting.pop(), ())) - found
            found |= new
            waiting += new
        if not _LINUX:
            found |= {pid for pid, (_, group) in table.items() if group == self.pid}
        return found


def _wake_on_signals() -> int:
    """A descriptor that is readable after a signal. What is sent to the guard itself otherwise does nothing: the parent
    decides. (A handler, unlike SIG_IGN, is not inherited by the trainer.)
    """
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
    for number in (signal.SIGCHLD, signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda *_: None)
    return reading


def _linux_ties() -> Callable[[], None]:
    """Adopt orphans from now on; gives what the trainer runs before it starts, so that it dies when the guard does."""
    libc = ctypes.CDLL(None, use_errno=True)
    guard = os.getpid()
    libc.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)

    def before_exec() -> None:
        libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        if os.getppid() != guard:  # it died before the line above
            os._exit(128 + signal.SIGKILL)

    return before_exec


def _processes() -> dict[int, tuple[int, int]]:
    """Every process that has not ended: pid → (parent, group)."""
    table: dict[int, tuple[int, int]] = {}
    if not _LINUX:
        listing = subprocess.Popen(["ps", "-axo", "pid=,ppid=,pgid=,stat="], stdout=subprocess.PIPE, text=True)
        for line in listing.communicate()[0].splitlines():
            pid, parent, group, status = line.split()[:4]
            if not status.startswith("Z") and int(pid) != listing.pid:
                table[int(pid)] = (int(parent), int(group))
        return table
    for name in os.listdir("/proc"):
        if not name.isdigit():
            continue
        try:
            with open(f"/proc/{name}/stat", "rb") as file:
                # The command name, in brackets, may hold anything; the fields after it are state, parent, group.
                state, parent_id, group_id = file.read().rpartition(b")")[2].split()[:3]
        except (FileNotFoundError, ProcessLookupError):
            continue  # it ended meanwhile
        if state not in (b"Z", b"X"):
            table[int(name)] = (int(parent_id), int(group_id))
    return table


def _send(how: Callable[[int, int], None], target: int, number: int) -> None:
    # It may have ended meanwhile; macOS then says "not permitted" of a zombie.
    with contextlib.suppress(ProcessLookupError, PermissionError):
        how(target, number)


if __name__ == "__main__":
    control, parent, grace, *command = sys.argv[1:]
    sys.exit(Guard(command, int(control), int(parent), float(grace)).run())
