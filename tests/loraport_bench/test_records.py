"""The documented data of a bench: read, written, and refused when it is something else."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from bench_example import FILE, example

from loraport.errors import DataError
from loraport_bench.records import Results


def test_the_example_is_what_its_generator_makes_and_reads_back_as_it_was(tmp_path: Path) -> None:
    made = example()
    made.write(tmp_path / "results.json")
    assert (tmp_path / "results.json").read_text() == FILE.read_text(), "run: python tests/bench_example.py"
    assert Results.read(FILE) == made


def test_each_row_is_a_line_of_the_file() -> None:
    lines = FILE.read_text().splitlines()
    rows = [json.loads(line.removesuffix(",")) for line in lines if line.startswith('{"key":')]
    assert [row["key"] for row in rows] == [run.key for run in Results.read(FILE).runs]


@pytest.mark.parametrize(
    ("content", "place"),
    [("[1, 2", "the file"), ('{"version": 2}', "version"), ('{"version": 1, "runs": [{"status": "fine"}]}', "name")],
)
def test_a_file_that_holds_something_else_is_refused_by_the_place_that_is_wrong(
    tmp_path: Path, content: str, place: str
) -> None:
    (tmp_path / "results.json").write_text(content)
    with pytest.raises(DataError, match=rf"results\.json does not hold the results of a bench: {place}"):
        Results.read(tmp_path / "results.json")
    with pytest.raises(DataError, match="cannot be read"):
        Results.read(tmp_path / "none.json")


def test_every_part_of_the_results_is_in_the_page_that_is_generated_from_them() -> None:
    from typer.testing import CliRunner

    from loraport.cli.main import build_app
    from loraport_bench import fields, records

    page = (Path(__file__).parents[2] / "docs" / "bench-results.md").read_text(encoding="utf-8")
    assert fields.fields_page() == page, "run: loraport bench fields > docs/bench-results.md"
    models = {each for each in vars(records).values() if isinstance(each, type) and issubclass(each, records.Data)}
    assert {model for _, model in fields._PARTS} == models - {records.Data}
    assert all(info.description for model in models for info in model.model_fields.values())
    assert CliRunner().invoke(build_app(), ["bench", "fields"]).output == page


def test_the_schema_that_is_printed_accepts_the_example() -> None:
    import jsonschema
    from typer.testing import CliRunner

    from loraport.cli.main import build_app

    schema = json.loads(CliRunner().invoke(build_app(), ["bench", "fields", "--schema"]).output)
    jsonschema.validate(json.loads(FILE.read_text()), schema)
    broken = json.loads(FILE.read_text())
    broken["runs"][0]["status"] = "fine"
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(broken, schema)
