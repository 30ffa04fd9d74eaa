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
