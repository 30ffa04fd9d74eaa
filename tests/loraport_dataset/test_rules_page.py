"""docs/dataset-rules.md is what the rules say of themselves, and docs/dataset.md names what is there."""

from __future__ import annotations

import json
import re
from dataclasses import fields
from pathlib import Path

from typer.testing import CliRunner

from loraport.cli.main import build_app
from loraport.plugins import plugins
from loraport.rules import Finding
from loraport_dataset.findings import FORMAT_VERSION, Report
from loraport_dataset.rules_page import page

DOCS = Path(__file__).parents[2] / "docs"


def test_the_page_of_the_rules_is_up_to_date() -> None:
    """After changing a rule: loraport dataset rules --page > docs/dataset-rules.md"""
    written = (DOCS / "dataset-rules.md").read_text(encoding="utf-8")
    assert written == page(plugins().rules().values())
    assert written == CliRunner().invoke(build_app(), ["dataset", "rules", "--page"]).stdout


def test_every_rule_has_its_section_with_severity_and_fix() -> None:
    sections = (DOCS / "dataset-rules.md").read_text(encoding="utf-8").split("\n### ")[1:]
    assert {section.split("`")[1] for section in sections} == set(plugins().rules())
    for section in sections:
        rule = plugins().rules()[section.split("`")[1]]
        assert f"*{rule.severity}, looks at" in section
        assert f"**Fix:** {rule.fix}" in section
        assert ("refuses to start" in section) == rule.stops_training


def test_the_findings_file_is_documented_as_it_is_written() -> None:
    text = (DOCS / "dataset.md").read_text(encoding="utf-8")
    example = re.search(r"```json\n(.*?)```", text, re.DOTALL)
    assert example
    document = json.loads(example[1])
    assert document["version"] == FORMAT_VERSION
    assert list(document["findings"][0]) == ["dataset", *(field.name for field in fields(Finding))]
    assert set(document) == {"version", "findings", *Report().summary()}
    assert document["findings"][0]["rule"] in plugins().rules()


def test_every_option_of_the_command_is_documented() -> None:
    text = (DOCS / "dataset.md").read_text(encoding="utf-8")
    shown = (
        CliRunner().invoke(build_app(), ["dataset", "check", "--help"], env={"COLUMNS": "200", "NO_COLOR": "1"}).stdout
    )
    options = set(re.findall(r"--[a-z-]+", shown)) - {"--help"}
    assert len(options) > 8
    assert all(f"{option}`" in text or f"{option} " in text for option in options), options
