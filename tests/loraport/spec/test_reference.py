"""The reference page in docs is what the models say."""

from __future__ import annotations

from pathlib import Path

import pytest

from loraport.spec.aliases import ALIASES
from loraport.spec.models import leaf_fields
from loraport.spec.reference import reference_page

PAGE = Path(__file__).parents[3] / "docs" / "spec.md"


def test_the_page_in_docs_is_current() -> None:
    assert PAGE.read_text(encoding="utf-8") == reference_page(), "run: loraport spec reference > docs/spec.md"


@pytest.mark.parametrize("path", leaf_fields())
def test_every_field_has_a_row_with_its_meaning(path: str) -> None:
    rows = [line for line in reference_page().splitlines() if line.startswith(f"| `{path}` |")]
    assert len(rows) == 1
    assert rows[0].endswith(f"| {leaf_fields()[path].description} |")
    assert rows[0].count("|") == 6


@pytest.mark.parametrize(
    "row",
    [
        "| `name` | text | **needed** |",
        "| `train.steps` | integer | `1000` | ≥ 1, ≤ 10000000 |",
        "| `lora.targets` | text or list of text | `attention+mlp` | – |",
        "| `dataset.flip` | true or false | `false` | – |",
        "| `memory.profile` | text | – | – |",
        "| `dataset.resolution` | integer | `1024` | ≥ 64, ≤ 4096, multiple of 16 |",
        "| `model.dtype` | `bf16`, `fp16`, `fp32` | `bf16` | – |",
        "| `dataset.path` | path | – | – |",
        "| `dataset.sets` | list of sections | – | – |",
        "| `dataset.sets[n].path` | path | **needed** | – |",
        "| `dataset.sets[n].weight` | number | – | > 0, ≤ 1000 |",
        "| `backend.options` | mapping | – | – |",
    ],
)
def test_types_defaults_and_bounds_read_well(row: str) -> None:
    assert row in reference_page()


@pytest.mark.parametrize("alias", ALIASES)
def test_every_alias_is_listed(alias: str) -> None:
    assert f"| `{alias}` | `{ALIASES[alias]}` |" in reference_page()
