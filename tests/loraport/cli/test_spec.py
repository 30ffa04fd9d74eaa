"""`loraport spec`: what editors and the docs are made from."""

from __future__ import annotations

import json

import jsonschema
from typer.testing import CliRunner

from loraport.cli.main import build_app
from loraport.run.events import Stopping
from loraport.run.events_reference import events_page
from loraport.spec.reference import reference_page


def run(*arguments: str) -> str:
    result = CliRunner().invoke(build_app(), ["spec", *arguments])
    assert (result.exit_code, result.stderr) == (0, "")
    return result.stdout


def test_the_schema_is_a_json_schema_with_descriptions() -> None:
    schema = json.loads(run("schema"))
    jsonschema.Draft202012Validator.check_schema(schema)
    assert schema["$defs"]["TrainSection"]["properties"]["steps"]["description"] == "Optimizer steps in all."


def test_the_reference_pages_are_printed_as_they_are() -> None:
    assert run("reference") == reference_page()
    assert run("events") == events_page()


def test_the_events_schema_describes_a_line() -> None:
    schema = json.loads(run("events", "--schema"))
    jsonschema.Draft202012Validator(schema).validate(json.loads(Stopping().model_dump_json()))
