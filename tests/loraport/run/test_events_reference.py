"""The page on events in docs is what the models say."""

from __future__ import annotations

import typing
from pathlib import Path

import pytest
from pydantic import BaseModel

from loraport.run.events import Event
from loraport.run.events_reference import events_page

PAGE = Path(__file__).parents[3] / "docs" / "events.md"


def test_the_page_in_docs_is_current() -> None:
    assert PAGE.read_text(encoding="utf-8") == events_page(), "run: loraport spec events > docs/events.md"


@pytest.mark.parametrize("event", typing.get_args(Event))
def test_every_event_has_a_section_with_a_row_for_each_field(event: type[BaseModel]) -> None:
    sections = [
        part for part in events_page().split("\n## ") if part.startswith(f"{event.model_fields['type'].default}\n")
    ]
    assert len(sections) == 1
    for name in set(event.model_fields) - {"type", "time"}:
        assert f"| `{name}` | " in sections[0]


def test_what_may_be_null_is_told() -> None:
    assert "| `loss` | number or null | – | Mean training loss of the step. |" in events_page()
    assert "| `total` | integer | ≥ 1 | Optimizer steps in all. |" in events_page()
