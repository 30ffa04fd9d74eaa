from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from run_fakes import FakeBackend

from loraport.errors import BackendError, Interrupted, RunFolderError
from loraport.planning import Plan
from loraport.run import events, supervisor
from loraport.run.events import Event
from loraport.run.folder import RunFolder
from loraport.run.record import Record
from loraport.run.supervisor import supervise

NewRun = Callable[..., tuple[Plan, RunFolder]]
Survivors = Callable[[], list[str]]


@pytest.fixture
def go(new_run: NewRun, monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[Event]]:
    """Supervise a fake run and give its events: `go("spam", at=(events.Step, do_this))`."""
    monkeypatch.setattr(supervisor, "GRACE", 0.5)

    def run(mode: str = "train", on_event: Callable[[Event], None] | None = None, **options: object) -> list[Event]:
        plan, folder = new_run(mode, **options)
        heard: list[Event] = []

        def hear(event: Event) -> None:
            heard.append(event)
            if on_event is not None:
                on_event(event)

        with Record(folder, on_event=hear) as record:
            supervise(plan, folder, FakeBackend(), record)
        return heard

    return run


def kinds(heard: list[Event]) -> list[str]:
    return [event.type for event in heard]


def press_ctrl_c(when: type[Event], times: int = 1, number: int = signal.SIGINT) -> Callable[[Event], None]:
    """At the first event of a kind, send signals to this very process."""
    done: list[Event] = []

    def hear(event: Event) -> None:
        if isinstance(event, when) and not done:
            done.append(event)
            for _ in range(times):
                os.kill(os.getpid(), number)
                time.sleep(0.02)

    return hear


def test_a_run_tells_its_start_then_what_the_trainer_says(go: Callable[..., list[Event]], tmp_path: Path) -> None:
    heard = go(steps=4)
    assert kinds(heard) == ["started", "phase", "step", "step", "checkpoint", "step", "step", "checkpoint"]
    lines = (tmp_path / "run" / "events.jsonl").read_text().splitlines()
    assert [events.decode(line) for line in lines] == heard


def test_command_environment_files_and_folder_are_those_of_the_plan(
    go: Callable[..., list[Event]], tmp_path: Path
) -> None:
    go("environment", files={"config/fake.json": '{"rank": 4}'})
    log = (tmp_path / "run" / "log.txt").read_text()
    assert f"seen: by the plan 1 {tmp_path / 'run'}" in log
    assert 'generated: {"rank": 4}' in log
    assert "stdin: ''" in log
    if sys.platform == "linux":  # the fourth is that of the listing itself; neither pipe nor lock reaches the trainer
        assert "descriptors: ['0', '1', '2', '3']" in log


def test_a_generated_file_outside_the_folder_is_refused(go: Callable[..., list[Event]], tmp_path: Path) -> None:
    with pytest.raises(BackendError, match="outside the run folder"):
        go(files={"../escaped.txt": ""})
    assert not (tmp_path / "escaped.txt").exists()


def test_noise_without_newlines_is_logged_as_it_is_and_does_not_hide_events(
    go: Callable[..., list[Event]], tmp_path: Path
) -> None:
    heard = go("spam")
    warnings = [event.message for event in heard if isinstance(event, events.Warn)]
    assert warnings == [
        "The backend fake failed at a line of output: ValueError: cannot read 50%|#####     |",
        "after the noise",
    ]
    assert kinds(heard).count("step") == 4
    log = (tmp_path / "run" / "log.txt").read_bytes()
    assert log.startswith(b"\xff" * 300_000 + b"\r 50%|")


def test_a_trainer_cannot_say_how_the_run_ends(go: Callable[..., list[Event]]) -> None:
    assert not {"finished", "failed"} & set(kinds(go("lies")))


def test_the_backend_explains_a_failure_from_the_code_and_the_log(go: Callable[..., list[Event]]) -> None:
    with pytest.raises(BackendError, match="code 3: RuntimeError: the fake broke"):
        go("crash")


def test_an_explanation_that_is_no_error_of_ours_becomes_one(go: Callable[..., list[Event]]) -> None:
    with pytest.raises(BackendError, match=r"fake failed with exit code 139: not an error of ours"):
        go("segfault")


def test_a_program_that_is_not_there_is_named(go: Callable[..., list[Event]]) -> None:
    with pytest.raises(BackendError, match="/no/python, which is not there"):
        go(program="/no/python")


def test_a_trainer_that_closes_its_output_is_waited_for(go: Callable[..., list[Event]], tmp_path: Path) -> None:
    go("closes-output")
    assert (tmp_path / "run" / "trained.safetensors").exists()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_lets_the_trainer_write_a_checkpoint_and_stop(
    go: Callable[..., list[Event]], tmp_path: Path, survivors: Survivors, number: int
) -> None:
    heard: list[Event] = []
    press = press_ctrl_c(events.Step, number=number)

    def hear(event: Event) -> None:
        heard.append(event)
        press(event)

    before = signal.getsignal(number)
    with pytest.raises(
        Interrupted, match=rf"Stopped at step \d+ of 1000; step \d+ is kept.\n.*loraport resume {tmp_path}"
    ):
        go(steps=1000, seconds=0.02, on_event=hear)
    assert signal.getsignal(number) is before
    assert "stopping" in kinds(heard)
    assert heard[-1].type == "checkpoint"
    assert survivors() == []


def test_ctrl_c_twice_kills_a_trainer_that_does_not_stop(go: Callable[..., list[Event]], survivors: Survivors) -> None:
    started = time.monotonic()
    with pytest.raises(Interrupted, match="there is no checkpoint yet"):
        go("stubborn", on_event=press_ctrl_c(events.PhaseStarted, times=2))
    assert time.monotonic() - started < 5
    assert survivors() == []


@pytest.mark.skipif(sys.platform != "linux", reason="needs a subreaper")
@pytest.mark.parametrize("mode", ["orphan", "setsid"])
def test_ctrl_c_leaves_no_stubborn_grandchild(go: Callable[..., list[Event]], survivors: Survivors, mode: str) -> None:
    with pytest.raises(Interrupted):
        go(mode, on_event=press_ctrl_c(events.PhaseStarted))
    assert survivors() == []


@pytest.mark.skipif(sys.platform != "linux", reason="needs a subreaper")
def test_what_a_trainer_leaves_behind_ends_with_the_run(go: Callable[..., list[Event]], survivors: Survivors) -> None:
    assert kinds(go("leaves-orphan"))[-1] == "checkpoint"
    assert survivors() == []


def test_a_trainer_that_says_nothing_for_too_long_is_stopped(
    go: Callable[..., list[Event]], survivors: Survivors, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(supervisor, "SILENCE", 0.6)
    with pytest.raises(BackendError, match=r"printed nothing for .* hung"):
        go("stubborn")
    assert survivors() == []


def test_exit_code_0_after_a_request_to_stop_is_not_success(go: Callable[..., list[Event]]) -> None:
    with pytest.raises(Interrupted):
        go("exits-0-on-ctrl-c", on_event=press_ctrl_c(events.PhaseStarted))


def test_a_request_that_comes_after_the_last_step_does_not_undo_the_run(go: Callable[..., list[Event]]) -> None:
    pressed: list[Event] = []

    def hear(event: Event) -> None:
        if isinstance(event, events.Checkpoint) and event.step == 4 and not pressed:
            pressed.append(event)
            os.kill(os.getpid(), signal.SIGINT)

    heard = go(steps=4, seconds=0.1, on_event=hear)
    assert pressed
    assert isinstance(heard[-1], events.Checkpoint | events.Stopping)


def test_a_signal_that_is_ignored_stays_ignored(go: Callable[..., list[Event]]) -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        heard = go(steps=3, seconds=0.05, on_event=press_ctrl_c(events.Step, number=signal.SIGHUP))
    finally:
        signal.signal(signal.SIGHUP, before)
    assert "stopping" not in kinds(heard)


def test_a_run_in_another_thread_leaves_the_signals_alone(go: Callable[..., list[Event]]) -> None:
    before = signal.getsignal(signal.SIGINT)
    during: list[object] = []
    thread = threading.Thread(target=go, kwargs={"on_event": lambda _: during.append(signal.getsignal(signal.SIGINT))})
    thread.start()
    thread.join(20)
    assert during
    assert set(during) == {before}


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
@pytest.mark.parametrize("mode", ["spam", "crash"])
def test_a_full_disk_stops_the_trainer_with_one_clear_error(
    new_run: NewRun, survivors: Survivors, monkeypatch: pytest.MonkeyPatch, mode: str
) -> None:
    monkeypatch.setattr(supervisor, "GRACE", 0.5)
    plan, folder = new_run(mode)
    folder.log_file.symlink_to("/dev/full")
    with Record(folder) as record, pytest.raises(RunFolderError, match=r"log.txt cannot be written: No space left"):
        supervise(plan, folder, FakeBackend(), record)
    assert survivors() == []


def test_a_bug_while_listening_stops_the_trainer_too(
    new_run: NewRun, survivors: Survivors, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(supervisor, "GRACE", 0.5)
    plan, folder = new_run("sigterm-saves")

    class Broken(Record):
        def emit(self, event: Event) -> None:
            super().emit(event)
            if isinstance(event, events.PhaseStarted):
                raise KeyError("a defect")

    with Broken(folder) as record, pytest.raises(KeyError):
        supervise(plan, folder, FakeBackend(), record)
    assert (folder.path / "got-sigterm").exists()
    assert survivors() == []
