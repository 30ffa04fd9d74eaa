"""The files SimpleTuner is started with, exactly. `LORAPORT_UPDATE_GOLDEN=1` writes the golden files anew."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest

from loraport.planning import Context, Kind
from loraport_simpletuner.translate import translate

HERE = Path(__file__).parent
CASES = ("12gb", "24gb", "style", "lokr", "details", "multi-resolution", "sets", "resume")


def files(make_spec: Any, golden_cases: dict[str, Any], name: str) -> dict[str, str]:
    sections, resume = golden_cases[name]
    return translate(make_spec(**sections), Context(Path("/runs/a"), resume)).files


@pytest.mark.parametrize("name", CASES)
def test_the_generated_files_are_the_golden_ones(make_spec, golden_cases, name: str) -> None:
    made = files(make_spec, golden_cases, name)
    golden = HERE / "golden" / name
    if os.environ.get("LORAPORT_UPDATE_GOLDEN"):
        for path, text in made.items():
            target = golden / path.removeprefix("backend/")
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_text(text, encoding="utf-8")
    there = {
        f"backend/{path.relative_to(golden).as_posix()}": path.read_text(encoding="utf-8")
        for path in golden.rglob("*.json")
    }
    assert made == there


def test_every_case_has_its_golden_files(golden_cases) -> None:
    assert set(golden_cases) == set(CASES) == {path.name for path in (HERE / "golden").iterdir()}


def test_no_path_of_the_users_is_in_simpletuners_own_files(make_spec, golden_cases) -> None:
    for name in golden_cases:
        for path, text in files(make_spec, golden_cases, name).items():
            if path != "backend/launch.json":
                assert "/data" not in text
                assert "/models" not in text


def test_a_new_run_never_resumes_and_a_resumed_one_does(make_spec) -> None:
    def resume(again: bool) -> str:
        made = translate(make_spec(), Context(Path("/runs/a"), again)).files
        return json.loads(made["backend/config/config.json"])["resume_from_checkpoint"]

    assert resume(False) == ""
    assert resume(True) == "latest"


def test_the_command_is_our_own_launcher(make_spec) -> None:
    made = translate(make_spec(), Context(Path("/runs/ü a")))
    assert made.command == [sys.executable, "-m", "loraport_simpletuner.launch", "/runs/ü a"]


def test_a_refused_spec_has_no_files(make_spec) -> None:
    made = translate(make_spec(model={"checkpoint": "tiny"}), Context(Path("/runs/a")))
    assert made.files == {}
    assert any(verdict.kind is Kind.REFUSED for verdict in made.verdicts)
