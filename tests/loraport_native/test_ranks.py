"""The process that starts one trainer a GPU: one clear cause for every end, and nothing left running.

The trainers here are stand-ins without torch, found by Python before the real one.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from loraport.errors import BackendError, Interrupted, LoraPortError, OutOfMemoryError
from loraport_native.progress import explain_failure

PARENT = (
    "import sys, pathlib; from loraport_native.ranks import run_ranks; sys.exit(run_ranks(pathlib.Path('run'), {}))"
)
TRAINER = """
import os, signal, sys, time
from loraport.errors import BackendError, Interrupted, OutOfMemoryError
from loraport.run.errors_line import encode_error
from loraport_native.ranks import PEER_LOST, PeerLost, end_as_rank

rank = int(sys.argv[2])
meeting_point = sys.argv[3]

def tell(error, code):
    print(encode_error(error), flush=True)
    sys.exit(code)

def others_hang():
    print("waiting", flush=True)
    for _ in range(600):  # a signal that comes just before a sleep is heard after it
        time.sleep(0.1)
"""
Run = Callable[..., tuple[int, str]]


@pytest.fixture
def start(tmp_path: Path) -> Callable[..., subprocess.Popen[str]]:
    """start(body, count): `count` trainers that run `body`, as the process that the supervisor would see."""

    def start(body: str, count: int = 2) -> subprocess.Popen[str]:
        import loraport_native

        package = tmp_path / "loraport_native"
        package.mkdir()
        # What is not in the stand-in comes from the real package.
        (package / "__init__.py").write_text(f"__path__.append({str(Path(loraport_native.__file__).parent)!r})\n")
        (package / "train.py").write_text(TRAINER + body)
        temporary = tmp_path / "temporary"
        temporary.mkdir()
        paths = os.pathsep.join([str(tmp_path), *(path for path in sys.path if path)])
        return subprocess.Popen(
            [sys.executable, "-c", PARENT.format(count)],
            env={**os.environ, "PYTHONPATH": paths, "PYTHONUNBUFFERED": "1", "TMPDIR": str(temporary)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    return start


@pytest.fixture
def run(start, tmp_path: Path) -> Run:
    """run(body, count): the exit code and the output; no process and no file may be left of it."""

    def run(body: str, count: int = 2) -> tuple[int, str]:
        process = start(body, count)
        output, _ = process.communicate(timeout=60)
        assert_nothing_is_left(tmp_path)
        return process.returncode, output

    return run


def assert_nothing_is_left(tmp_path: Path) -> None:
    assert list((tmp_path / "temporary").iterdir()) == []
    mine = [
        one
        for one in psutil.process_iter(["environ"])
        if (one.info["environ"] or {}).get("TMPDIR", "").startswith(str(tmp_path))
    ]
    assert mine == []


def failure(code: int, output: str, kind: type[LoraPortError]) -> str:
    error = explain_failure(code, output)
    assert type(error) is kind
    return str(error)


def test_each_trainer_has_its_place_and_the_first_speaks_for_the_run(run: Run) -> None:
    code, output = run(
        "print('I am', rank, 'of', os.path.dirname(meeting_point) != '', os.path.exists(meeting_point))", 3
    )
    assert code == 0
    assert sorted(output.splitlines()) == [
        "I am 0 of True False",
        "[gpu 1] I am 1 of True False",
        "[gpu 2] I am 2 of True False",
    ]


def test_lines_of_several_trainers_never_mix(run: Run) -> None:
    code, output = run("for _ in range(300): print('a' * 100, end=''); print('b' * 100)", 3)
    assert code == 0
    assert {line.removeprefix("[gpu 1] ").removeprefix("[gpu 2] ") for line in output.splitlines()} == {
        "a" * 100 + "b" * 100
    }
    assert len(output.splitlines()) == 900


@pytest.mark.parametrize("guilty", [0, 1])
def test_the_first_error_ends_the_run_and_is_its_only_error(run: Run, guilty: int) -> None:
    begun = time.monotonic()
    code, output = run(f"tell(OutOfMemoryError('no room', 'take less'), 6) if rank == {guilty} else others_hang()")
    assert time.monotonic() - begun < 20, "the others were not waited for"
    assert code == 6
    assert failure(code, output, OutOfMemoryError) == "no room\n  take less"


def test_the_cause_is_told_though_the_others_noticed_first(run: Run) -> None:
    body = """
def main():
    if rank != 1:
        raise PeerLost("connection reset")
    time.sleep(1)
    tell(OutOfMemoryError("no room"), 6)
end_as_rank(main)
"""
    code, output = run(body, 3)
    assert failure(code, output, OutOfMemoryError) == "no room"
    assert "connection reset" not in output


def test_processes_that_only_lost_each_other_say_so(run: Run) -> None:
    code, output = run("def main(): raise PeerLost('no shared memory')\nend_as_rank(main)")
    assert code == 5
    assert "no shared memory" in failure(code, output, BackendError)


def test_a_defect_is_told_with_its_traceback_and_its_gpu(run: Run) -> None:
    code, output = run(
        "def main(): raise RuntimeError('shapes do not fit')\nend_as_rank(main) if rank else others_hang()"
    )
    assert code == 1
    assert "[gpu 1] RuntimeError: shapes do not fit" in output
    assert "process of GPU 1 ended with exit code 1" in failure(code, output, BackendError)


def test_a_killed_trainer_is_told_as_what_kills_trainers(run: Run) -> None:
    code, output = run("os.kill(os.getpid(), signal.SIGKILL) if rank else others_hang()")
    assert code == 137
    assert "process of GPU 1 ended by SIGKILL" in output
    assert "memory" in failure(code, output, OutOfMemoryError)


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM])
def test_a_request_to_stop_reaches_every_trainer_and_the_first_may_end_last(
    start, sent: signal.Signals, tmp_path: Path
) -> None:
    body = """
def stop(*_):
    time.sleep(0 if rank else 1)
    print("saved", flush=True)
    tell(Interrupted("Stopped after step 3."), 130)
signal.signal(signal.SIGINT, stop)
signal.signal(signal.SIGTERM, stop)
others_hang()
"""
    process = start(body)
    waiting = [process.stdout.readline(), process.stdout.readline()]
    assert sorted(waiting) == ["[gpu 1] waiting\n", "waiting\n"]
    process.send_signal(sent)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 130
    assert output.splitlines()[:-1] == ["[gpu 1] saved", "saved"]
    assert failure(130, output, Interrupted) == "Stopped after step 3."
    assert_nothing_is_left(tmp_path)


@pytest.mark.parametrize("chosen", [None, "5"])
def test_the_cores_are_shared_out_unless_the_person_chose(
    run: Run, monkeypatch: pytest.MonkeyPatch, chosen: str | None
) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if chosen:
        monkeypatch.setenv("OMP_NUM_THREADS", chosen)
    _, output = run("print(os.environ['OMP_NUM_THREADS'])")
    share = chosen or str(max(1, (os.cpu_count() or 1) // 2))
    assert sorted(output.splitlines()) == [share, f"[gpu 1] {share}"]
