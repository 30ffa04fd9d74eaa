from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from loraport.run import guard

linux = pytest.mark.skipif(sys.platform != "linux", reason="uses what only Linux has")

IGNORE = "import signal as s; [s.signal(n, s.SIG_IGN) for n in (s.SIGINT, s.SIGTERM, s.SIGHUP)];"


class Guarded:
    """A guard over `python -c CODE`, with the pipe that commands it."""

    def __init__(self, code: str, grace: float, where: Path):
        reading, self.orders = os.pipe()
        # The working folder is an argument so that processes can be told apart by their command lines.
        command = [sys.executable, "-I", "-S", "-c", code, str(where)]
        self.process = subprocess.Popen(
            [sys.executable, "-I", "-S", guard.__file__, str(reading), str(os.getpid()), str(grace), *command],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            pass_fds=[reading],
            start_new_session=True,
            text=True,
        )
        os.close(reading)

    def line(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()


@pytest.fixture
def guarded(tmp_path: Path, survivors: Callable[[], list[str]]) -> Iterator[Callable[..., Guarded]]:
    started: list[Guarded] = []

    def start(code: str, grace: float = 0.3) -> Guarded:
        started.append(Guarded(code, grace, tmp_path))
        return started[-1]

    yield start
    for each in started:
        each.process.kill()
        each.process.wait()


def wait_gone(survivors: Callable[[], list[str]], seconds: float = 5.0) -> list[str]:
    deadline = time.monotonic() + seconds
    while survivors() and time.monotonic() < deadline:
        time.sleep(0.02)
    return survivors()


@pytest.mark.parametrize(("code", "expected"), [("raise SystemExit(0)", 0), ("raise SystemExit(5)", 5)])
def test_the_exit_code_of_the_trainer_is_passed_on(guarded: Callable[..., Guarded], code: str, expected: int) -> None:
    assert guarded(code).process.wait(5) == expected


def test_a_signal_becomes_128_and_its_number(guarded: Callable[..., Guarded]) -> None:
    assert guarded("import os; os.kill(os.getpid(), 11)").process.wait(5) == 128 + signal.SIGSEGV


def test_output_and_errors_go_straight_through(guarded: Callable[..., Guarded]) -> None:
    guard = guarded("import sys; print('out', flush=True); print('err', file=sys.stderr)")
    assert (guard.line(), guard.line()) == ("out", "err")


def test_a_program_that_is_not_there_is_named(tmp_path: Path) -> None:
    reading, writing = os.pipe()
    command = [sys.executable, "-I", "-S", guard.__file__, str(reading), str(os.getpid()), "1", "/no/such/program"]
    done = subprocess.run(command, pass_fds=[reading], capture_output=True, text=True, timeout=5)
    os.close(reading)
    os.close(writing)
    assert done.returncode == 127
    assert "/no/such/program cannot be started: No such file or directory" in done.stderr


def test_i_interrupts_the_group_and_lets_it_end(guarded: Callable[..., Guarded]) -> None:
    guard = guarded(
        "import time\ntry:\n print('up', flush=True)\n while True: time.sleep(0.01)\n"
        "except KeyboardInterrupt: raise SystemExit(9)"
    )
    assert guard.line() == "up"
    os.write(guard.orders, b"i")
    assert guard.process.wait(5) == 9


def test_an_inherited_deafness_to_ctrl_c_does_not_reach_the_trainer(guarded: Callable[..., Guarded]) -> None:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        guard = guarded("import signal; print(signal.getsignal(signal.SIGINT) is signal.default_int_handler)")
    finally:
        signal.signal(signal.SIGINT, before)
    assert guard.line() == "True"


def test_k_kills_at_once_what_ignores_everything_else(guarded: Callable[..., Guarded]) -> None:
    guard = guarded(IGNORE + "import time; print('up', flush=True); time.sleep(60)", grace=60)
    assert guard.line() == "up"
    os.write(guard.orders, b"k")
    assert guard.process.wait(5) == 128 + signal.SIGKILL


def test_without_a_parent_the_trainer_is_asked_then_killed(
    guarded: Callable[..., Guarded], survivors: Callable[[], list[str]]
) -> None:
    polite = guarded(
        "import signal, sys, time\nsignal.signal(15, lambda *_: sys.exit(7))\nprint('up', flush=True)\n"
        "while True: time.sleep(0.01)  # a signal that comes just before a long sleep is not heard in it",
        60,
    )
    stubborn = guarded(IGNORE + "import time; print('up', flush=True); time.sleep(60)", 0.3)
    for each in (polite, stubborn):
        assert each.line() == "up"
        os.close(each.orders)
    assert polite.process.wait(5) == 7
    assert stubborn.process.wait(5) == 128 + signal.SIGKILL
    assert survivors() == []


GRANDCHILD = (
    "import os, sys, time\n"
    "if os.fork() == 0:\n"
    " {session}\n"
    " if os.fork() == 0:\n"
    "  " + IGNORE + "\n"
    "  print('grandchild', flush=True); time.sleep(60)\n"
    " os._exit(0)\n"
    "{after}"
)


@linux
@pytest.mark.parametrize("session", ["pass", "os.setsid()"])
def test_orphans_end_with_the_trainer_even_in_their_own_session(
    guarded: Callable[..., Guarded], survivors: Callable[[], list[str]], session: str
) -> None:
    guard = guarded(
        GRANDCHILD.format(session=session, after="time.sleep(0.5); print('done', flush=True); raise SystemExit(4)")
    )
    assert [guard.line(), guard.line()] == ["grandchild", "done"]
    assert guard.process.wait(8) == 4
    assert survivors() == []


@linux
@pytest.mark.parametrize("session", ["pass", "os.setsid()"])
def test_orphans_end_when_the_parent_does(
    guarded: Callable[..., Guarded], survivors: Callable[[], list[str]], session: str
) -> None:
    guard = guarded(GRANDCHILD.format(session=session, after="time.sleep(60)"))
    assert guard.line() == "grandchild"
    os.close(guard.orders)
    guard.process.wait(5)
    assert survivors() == []


@linux
def test_the_trainer_dies_with_a_guard_that_is_killed(
    guarded: Callable[..., Guarded], survivors: Callable[[], list[str]]
) -> None:
    guard = guarded(IGNORE + "import time; print('up', flush=True); time.sleep(60)")
    assert guard.line() == "up"
    guard.process.kill()
    guard.process.wait()
    assert wait_gone(survivors) == []


def test_signals_to_the_guard_itself_change_nothing(guarded: Callable[..., Guarded]) -> None:
    guard = guarded("import time; print('up', flush=True); time.sleep(0.5); raise SystemExit(3)")
    assert guard.line() == "up"
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        guard.process.send_signal(number)
    assert guard.process.wait(5) == 3


def test_a_copy_of_the_pipe_in_another_process_does_not_hide_the_parents_death(
    tmp_path: Path, survivors: Callable[[], list[str]]
) -> None:
    # A parent that forked (multiprocessing does) and was then killed: its copy still holds the pipe's writing end.
    code = (
        "import os, subprocess, sys, time\n"
        "r, w = os.pipe()\n"
        "subprocess.Popen([sys.executable, '-I', '-S', sys.argv[1], str(r), str(os.getpid()), '0.3', sys.executable,"
        " '-I', '-S', '-c', 'import time; time.sleep(60)', sys.argv[2]], pass_fds=[r], start_new_session=True)\n"
        "if os.fork() == 0:\n print(os.getpid(), flush=True); time.sleep(60)\n"
        "os.wait()"
    )
    parent = subprocess.Popen(
        [sys.executable, "-I", "-S", "-c", code, guard.__file__, str(tmp_path)], stdout=subprocess.PIPE, text=True
    )
    assert parent.stdout is not None
    copy = psutil.Process(int(parent.stdout.readline()))
    time.sleep(0.3)
    parent.kill()
    parent.wait()
    try:
        deadline = time.monotonic() + 6
        while len(survivors()) > 1 and time.monotonic() < deadline:
            time.sleep(0.05)
        assert len(survivors()) == 1  # the copy itself
    finally:
        copy.kill()
