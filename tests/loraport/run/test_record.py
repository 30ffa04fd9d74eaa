from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from loraport.errors import RunFolderError
from loraport.planning import Plan
from loraport.run import events
from loraport.run.events import Event
from loraport.run.folder import RunFolder
from loraport.run.record import Record, read_events

NewRun = Callable[..., tuple[Plan, RunFolder]]

EVERY_KIND: list[Event] = [
    events.Started(backend="fake", spec_hash="ab", resume=False),
    events.PhaseStarted(phase="cache", detail="images → latents"),
    events.Progress(done=1, total=8),
    events.Step(
        step=1, total=4, loss=0.25, lr=1e-4, seconds=0.5, images_per_second=2.0, grad_norm=1.0, peak_memory_gib=3.5
    ),
    events.Step(step=2, total=4, loss=float("nan")),
    events.Validation(step=2, loss=0.5),
    events.Sample(step=2, path="samples/2.png"),
    events.Checkpoint(step=2, path="checkpoints/2"),
    events.Resumed(step=2),
    events.Warn(message="a line\nand “another”"),
    events.Stopping(),
    events.Interrupted(step=2),
    events.Failed(message="no", exit_code=5),
    events.Finished(step=4, lora="demo.safetensors", proof="proof.json", worst_difference=1e-3),
]


class Hearing:
    def __init__(self, fails_at: type[Event] | None = None):
        self.heard: list[Event] = []
        self.fails_at = fails_at

    def handle(self, event: Event) -> None:
        self.heard.append(event)
        if self.fails_at is not None and isinstance(event, self.fails_at):
            raise RuntimeError("tracker is down")


def test_events_come_back_from_their_file_as_they_were(new_run: NewRun) -> None:
    _, folder = new_run()
    with Record(folder) as record:
        for event in EVERY_KIND:
            record.emit(event)
    back = list(read_events(folder.events_file))
    assert [event.type for event in back] == [event.type for event in EVERY_KIND]
    assert back[3] == EVERY_KIND[3]
    assert back[9] == EVERY_KIND[9]
    assert isinstance(back[4], events.Step)
    assert back[4].loss is None  # JSON has no NaN
    assert len(folder.events_file.read_bytes().splitlines()) == len(EVERY_KIND)


@pytest.mark.parametrize("torn", [b'{"type":"st', b"x" * 200_000])
def test_a_torn_last_line_is_cut_off_when_the_run_goes_on(new_run: NewRun, torn: bytes) -> None:
    _, folder = new_run()
    with Record(folder) as record:
        record.emit(events.Resumed(step=1))
    with open(folder.events_file, "ab") as file:
        file.write(torn)
    assert len(list(read_events(folder.events_file))) == 1
    with Record(folder) as record:
        record.emit(events.Resumed(step=2))
    assert [event.step for event in read_events(folder.events_file) if isinstance(event, events.Resumed)] == [1, 2]


def test_a_file_that_is_one_torn_line_becomes_empty(new_run: NewRun) -> None:
    _, folder = new_run()
    folder.events_file.write_bytes(b'{"type"')
    Record(folder).close()
    assert folder.events_file.read_bytes() == b""


def test_a_line_that_is_no_event_is_named(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    path.write_text('{"type": "stopping", "time": 1}\n{"type": "party"}\n')
    with pytest.raises(RunFolderError, match="line 2 is not an event"):
        list(read_events(path))


def test_a_failing_listener_is_one_warning_and_the_others_hear_everything(new_run: NewRun) -> None:
    _, folder = new_run()
    failing, well = Hearing(fails_at=events.Step), Hearing()
    heard: list[Event] = []
    with Record(folder, [failing, well], heard.append) as record:
        for step in (1, 2, 3):
            record.emit(events.Step(step=step, total=3, loss=None))
    kinds = ["step", "warning", "step", "step"]
    assert [event.type for event in well.heard] == kinds
    assert [event.type for event in heard] == kinds
    assert [event.type for event in failing.heard] == kinds  # a tracker may come back
    warning = heard[1]
    assert isinstance(warning, events.Warn)
    assert warning.message == "Hearing failed and may miss events: RuntimeError: tracker is down"
    assert [event.type for event in read_events(folder.events_file)] == kinds


def test_a_listener_hears_an_event_when_it_is_already_written(new_run: NewRun) -> None:
    _, folder = new_run()
    seen: list[int] = []
    with Record(folder, on_event=lambda _: seen.append(len(folder.events_file.read_bytes().splitlines()))) as record:
        for step in (1, 2):
            record.emit(events.Step(step=step, total=2, loss=None))
    assert seen == [1, 2]


def test_the_state_is_written_at_checkpoints_but_not_at_every_step(
    new_run: NewRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, folder = new_run()
    with Record(folder) as record:
        record.emit(events.Started(backend="fake", spec_hash="x", resume=False))
        record.emit(events.Step(step=1, total=4, loss=None))
        assert folder.read_state().step == 0
        record.emit(events.Checkpoint(step=1, path="checkpoints/1"))
        assert folder.read_state().step == 1
        monkeypatch.setattr("loraport.run.record.STATE_SECONDS", 0.0)
        record.emit(events.Step(step=2, total=4, loss=None))
        assert folder.read_state().step == 2


@pytest.mark.skipif(sys.platform != "linux", reason="file size limits differ elsewhere")
def test_a_full_disk_is_one_clear_error_and_tears_no_line(new_run: NewRun) -> None:
    import resource
    import signal

    _, folder = new_run()
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    with Record(folder) as record:
        record.emit(events.Resumed(step=1))
        whole = folder.events_file.read_bytes()
        try:
            resource.setrlimit(resource.RLIMIT_FSIZE, (len(whole) + 10, before[1]))  # room for half a line
            with pytest.raises(RunFolderError, match=r"events.jsonl cannot be written: File too large"):
                record.emit(events.Resumed(step=2))
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
            signal.signal(signal.SIGXFSZ, handler)
        assert folder.events_file.read_bytes() == whole
        record.emit(events.Resumed(step=3))  # space was made
    assert len(list(read_events(folder.events_file))) == 2
