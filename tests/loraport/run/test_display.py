from __future__ import annotations

import io
import json

import pytest

from loraport.run import events
from loraport.run.display import JsonLines, LiveBar, PlainLines, choose_display
from loraport.run.events import Event


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def step(number: int, total: int = 100, time: float = 0.0, **fields: float) -> events.Step:
    return events.Step(time=time, step=number, total=total, loss=fields.pop("loss", 0.5), **fields)  # type: ignore[arg-type]


RUN: list[Event] = [
    events.Started(backend="fake", spec_hash="x", resume=False),
    events.PhaseStarted(phase="load", detail="[bold] transformer"),
    events.PhaseStarted(phase="cache", detail="latents"),
    events.Progress(done=1, total=2),
    events.Progress(done=2, total=2),
    *[step(n, total=10, seconds=2.0, peak_memory_gib=11.25) for n in range(1, 11)],
    events.Checkpoint(step=10, path="checkpoints/10"),
    events.Validation(step=10, loss=0.125),
    events.Sample(step=10, path="samples/10.png"),
    events.Warn(message="careful [/red]"),
    events.Stopping(),
    events.Finished(step=10, lora="demo.safetensors", proof="proof.json", worst_difference=0.0021),
]


def shown(display_events: list[Event]) -> list[str]:
    stream = io.StringIO()
    with PlainLines(stream) as display:
        for event in display_events:
            display(event)
    return stream.getvalue().splitlines()


def test_a_terminal_gets_a_bar_a_pipe_lines_and_a_machine_json(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    assert isinstance(choose_display(False, Terminal()), LiveBar)
    assert isinstance(choose_display(False, io.StringIO()), PlainLines)
    assert isinstance(choose_display(True, Terminal()), JsonLines)
    monkeypatch.setenv("TERM", "dumb")
    assert isinstance(choose_display(False, Terminal()), PlainLines)


def test_json_lines_are_the_events() -> None:
    stream = io.StringIO()
    with choose_display(True, stream) as display:
        for event in RUN:
            display(event)
    assert [events.decode(line) for line in stream.getvalue().splitlines()] == RUN
    assert json.loads(stream.getvalue().splitlines()[0])["type"] == "started"


def test_plain_lines_tell_phases_steps_and_results() -> None:
    lines = shown(RUN)
    assert lines[:3] == ["Starting with fake", "Loading: [bold] transformer", "Preparing: latents"]
    assert "step 10/10  loss 0.5000  2.00 s/step  11.2 GiB  0 s left" in lines
    assert lines[-6:-1] == [
        "Checkpoint at step 10: checkpoints/10",
        "Held-out loss at step 10: 0.1250",
        "Sample at step 10: samples/10.png",
        "Warning: careful [/red]",
        "Stopping after a checkpoint; ask again (Ctrl-C) to stop at once",
    ]
    assert lines[-1].startswith("Finished at step 10: demo.safetensors, proven to match")
    assert "2.1e-03, proof.json" in lines[-1]


def test_fast_steps_are_told_every_tenth_of_the_run() -> None:
    told = [line.split()[1] for line in shown([step(n, time=n * 0.01) for n in range(1, 101)])]
    assert told == [
        "1/100",
        "11/100",
        "21/100",
        "31/100",
        "41/100",
        "51/100",
        "61/100",
        "71/100",
        "81/100",
        "91/100",
        "100/100",
    ]


def test_slow_steps_are_told_every_ten_seconds() -> None:
    told = [line.split()[1] for line in shown([step(n, total=10_000, time=n * 3.0) for n in range(1, 11)])]
    assert told == ["1/10000", "5/10000", "9/10000"]


def test_after_going_back_to_a_checkpoint_steps_are_told_again() -> None:
    told = shown([step(50), events.Resumed(step=20), step(21)])
    assert [line.split()[1] for line in told if line.startswith("step")] == ["50/100", "21/100"]


def test_a_phase_is_told_once() -> None:
    lines = shown([events.PhaseStarted(phase="train"), events.PhaseStarted(phase="train")])
    assert lines == ["Training"]


@pytest.mark.parametrize("end", [events.Failed(message="x", exit_code=5), events.Interrupted(step=3)])
def test_the_error_is_left_to_the_caller(end: Event) -> None:
    assert shown([end]) == []


def test_the_live_bar_shows_the_same_facts_and_takes_text_as_text(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    stream = Terminal()
    with LiveBar(stream) as display:
        for event in RUN:
            display(event)
            display._progress.refresh()
    text = stream.getvalue()
    for part in (
        "Loading: [bold] transformer",
        "Preparing: latents",
        "Training",
        "2.00 s/step",
        "11.2 GiB",
        "12 s left",
    ):
        assert part in text, part
    assert "Warning: careful [/red]" in text
    assert "Finished at step 10" in text


def test_a_phase_after_training_does_not_keep_its_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    stream = Terminal()
    with LiveBar(stream) as display:
        for event in (step(7, total=9), events.PhaseStarted(phase="convert")):
            display(event)
            display._progress.refresh()
    after = stream.getvalue().partition("Converting")[2]
    assert "/9" not in after
    assert "0/?" in after
