"""Events: what a trainer prints is read back, and ordinary output never is taken for one."""

from __future__ import annotations

import json
import typing

import jsonschema
import pytest
from pydantic import BaseModel, ValidationError

from loraport.run import events
from loraport.run.events import PREFIX, Event, decode, decode_line, encode, json_schema

KINDS = typing.get_args(Event)

EXAMPLES: list[Event] = [
    events.Started(backend="native", spec_hash="00", resume=False),
    events.PhaseStarted(phase="train"),
    events.Progress(done=1, total=2),
    events.Step(step=1, total=2, loss=0.5, lr=1e-4, seconds=0.1, images_per_second=10, peak_memory_gib=1.5),
    events.Step(step=2, total=2, loss=None),
    events.Validation(step=1, loss=0.25),
    events.Sample(step=1, path="samples/1.png"),
    events.Checkpoint(step=1, path="checkpoints/1"),
    events.Resumed(step=1),
    events.Warn(message="ünïcode\nand a second line"),
    events.Stopping(),
    events.Interrupted(step=1),
    events.Failed(message="no", exit_code=5),
    events.Finished(step=2, lora="a.safetensors", proof="proof.json", worst_difference=0.0),
]


def test_there_is_an_example_of_every_event() -> None:
    assert {type(event) for event in EXAMPLES} == set(KINDS)


@pytest.mark.parametrize("event", EXAMPLES, ids=lambda event: event.type)
def test_an_event_is_one_line_that_is_read_back(event: Event) -> None:
    line = encode(event)
    assert "\n" not in line
    assert decode_line(line) == event
    assert decode(json.loads(line.removeprefix(PREFIX))) == event


@pytest.mark.parametrize("event", EXAMPLES, ids=lambda event: event.type)
def test_the_schema_describes_a_line(event: Event) -> None:
    validator = jsonschema.Draft202012Validator(json_schema())
    content = json.loads(event.model_dump_json())
    validator.validate(content)
    with pytest.raises(jsonschema.ValidationError):
        validator.validate({**content, "surprise": 1})


@pytest.mark.parametrize(
    "line",
    [
        "loss 0.5",
        "",
        PREFIX,
        PREFIX + "{",
        PREFIX + "[]",
        PREFIX + '{"type": "step"}',
        PREFIX + '{"type": "party"}',
        " " + PREFIX + '{"type": "stopping"}',
        PREFIX + '{"type": "step", "step": 0, "total": 1, "loss": 1}',
    ],
)
def test_ordinary_output_is_no_event(line: str) -> None:
    assert decode_line(line) is None


def test_a_broken_event_is_refused_when_it_has_to_be_one() -> None:
    with pytest.raises(ValidationError):
        decode('{"type": "party"}')


@pytest.mark.parametrize("kind", KINDS)
def test_every_event_and_field_is_described(kind: type[BaseModel]) -> None:
    assert kind.__doc__
    assert all(info.description for name, info in kind.model_fields.items() if name != "type")
