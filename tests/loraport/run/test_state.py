from __future__ import annotations

import os

import pytest

from loraport.run import events
from loraport.run.state import State

PLANNED = State("planned", backend="fake", name="demo", total=10, created=1.0, updated=1.0)


def test_a_run_that_goes_well_ends_finished_with_its_result() -> None:
    state = PLANNED
    for event in (
        events.Started(backend="fake", spec_hash="x", resume=False),
        events.Step(step=1, total=12, loss=0.5),
        events.Checkpoint(step=1, path="checkpoints/1"),
        events.Finished(time=99.0, step=12, lora="demo.safetensors", proof="proof.json", worst_difference=1e-4),
    ):
        state = state.after(event)
    assert (state.status, state.step, state.total, state.checkpoint) == ("finished", 12, 12, 1)
    assert (state.lora, state.worst_difference, state.exit_code) == ("demo.safetensors", 1e-4, 0)
    assert (state.pid, state.created, state.updated) == (os.getpid(), 1.0, 99.0)


def test_starting_again_forgets_why_the_run_failed() -> None:
    failed = PLANNED.after(events.Failed(message="no memory", exit_code=6))
    assert (failed.status, failed.message, failed.exit_code) == ("failed", "no memory", 6)
    again = failed.after(events.Started(backend="fake", spec_hash="x", resume=True))
    assert (again.status, again.message, again.exit_code) == ("running", None, None)


def test_going_on_from_a_checkpoint_takes_the_step_back() -> None:
    ahead = PLANNED.after(events.Step(step=7, total=10, loss=None))
    assert ahead.after(events.Resumed(step=4)).step == 4


def test_a_state_survives_its_file() -> None:
    state = PLANNED.after(events.Failed(message="é\n“x”", exit_code=5))
    assert State.from_json(state.to_json()) == state


@pytest.mark.parametrize("text", ["", "{}", "[1]", '{"status": "sleeping"}', PLANNED.to_json()[:-20], "\0"])
def test_a_damaged_state_is_not_taken_for_one(text: str) -> None:
    with pytest.raises(ValueError):
        State.from_json(text)
