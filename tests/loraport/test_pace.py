"""Times come from measured trainings, scaled by tokens; without one, none is told."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from loraport.gpu import Card
from loraport.ideogram4 import IDEOGRAM4
from loraport.pace import Pace, Sample, Unmeasured, dataset_key, pace
from loraport.plugins import plugins
from loraport.profiles import STEP_FIELDS, Measurement, resolve_memory
from loraport.spec.models import TrainSpec

CARD = Card("A card", 24.0, (8, 9))
ROW = Measurement(
    family="ideogram4",
    backend="native",
    card="A card",
    date="2026-11-20",
    resolution=1024,
    text_tokens=512,
    rank=32,
    batch_size=1,
    optimizer="adamw8bit",
    gpus=1,
    memory=dict(zip(STEP_FIELDS, ("nf4", "model", "none", "regional", "full"), strict=True)),
    step_s=2.0,
    peak_allocated_gib=8.0,
    peak_reserved_gib=9.0,
    source="rows.jsonl",
)
TOKENS = 64**2 + 512  # of the measured step


def spec(**sections: dict[str, Any]) -> TrainSpec:
    content: dict[str, Any] = {
        "name": "a",
        "model": {"checkpoint": "a/b"},
        "dataset": {"path": "/nowhere", "resolution": 1024},
        "lora": {"rank": 32},
        "memory": {"quantize": "nf4", "compile": "regional"},
    }
    for name, values in sections.items():
        content[name] = {**content.get(name, {}), **values}
    return resolve_memory(TrainSpec.model_validate(content), plugins().profiles())


def told(
    *rows: Measurement, card: Card | None = CARD, sample: Sample | None = None, backend: str = "native", **sections: Any
) -> Pace | Unmeasured:
    return pace(spec(**sections), backend, IDEOGRAM4, card, rows or (ROW,), sample)


def known(*rows: Measurement, **given: Any) -> Pace:
    found = told(*rows, **given)
    assert isinstance(found, Pace)
    return found


def reason(*rows: Measurement, **given: Any) -> str:
    found = told(*rows, **given)
    assert isinstance(found, Unmeasured)
    return found.reason


def test_a_run_like_the_measured_one_takes_as_long() -> None:
    found = known()
    assert (found.step_s, found.scaled, found.differs) == (2.0, 1.0, [])
    assert found.measured is ROW


def test_a_step_grows_with_the_tokens_and_passes_that_it_has() -> None:
    assert known(sample=Sample(512**2, 512)).scaled == pytest.approx((32**2 + 512) / TOKENS)
    assert known(train={"batch_size": 4}).step_s == pytest.approx(8.0)
    assert known(train={"gradient_accumulation": 3}).step_s == pytest.approx(6.0)
    assert known(dataset={"resolution": 512}).step_s == pytest.approx(2.0 * (32**2 + 512) / TOKENS)


def test_what_was_different_is_named() -> None:
    found = known(lora={"rank": 8, "dora": True}, train={"optimizer": "lion"})
    assert found.differs == ["rank 32", "adamw8bit", "plain LoRA"]
    assert found.to_dict()["measured"]["source"] == "rows.jsonl"


def test_the_nearest_measurement_counts() -> None:
    small = replace(ROW, resolution=512, step_s=0.5)
    other = replace(ROW, optimizer="lion", step_s=9.0)
    low = replace(ROW, rank=16, step_s=1.9)
    newer = replace(ROW, date="2026-12-01", step_s=1.8)
    assert known(ROW, small, other, low).measured is ROW
    assert known(ROW, small, sample=Sample(512**2, 512)).measured is small
    assert known(ROW, low, lora={"rank": 16}).measured is low
    assert known(ROW, newer).measured is newer
    assert known(ROW, other, train={"optimizer": "lion"}).measured is other


def test_a_run_on_the_same_dataset_is_not_scaled_by_its_sizes() -> None:
    own = replace(ROW, dataset=dataset_key(spec()), text_tokens=900)  # the longest caption's
    assert known(own, sample=Sample(700**2, 300)).scaled == 1
    assert known(own, sample=Sample(700**2, 300), train={"batch_size": 2}).scaled == 2
    assert known(replace(own, dataset="another"), sample=Sample(700**2, 300)).scaled == 1
    smaller = known(replace(own, dataset="another"), sample=Sample(500**2, 300), dataset={"resolution": 512})
    assert smaller.scaled == pytest.approx((32**2 + 900) / (64**2 + 900))


@pytest.mark.parametrize(
    ("given", "why"),
    [
        ({"card": None}, "no NVIDIA card; with these memory settings it was measured on A card"),
        ({"card": Card("Another", 24.0, (8, 9))}, "nothing was measured on Another"),
        ({"memory": {"compile": "none"}}, "no training with these memory settings has been measured"),
        ({"train": {"gpus": 2}}, "these memory settings and 2 GPUs"),
        ({"backend": "other"}, "no training of Ideogram 4 with other has been measured"),
        ({"model": {"checkpoint": "tiny"}}, "tiny checkpoint"),
    ],
    ids=str,
)
def test_without_a_measurement_no_time_is_told(given: dict[str, Any], why: str) -> None:
    assert why in reason(**given)


def test_a_local_checkpoint_of_another_size_has_no_time(tmp_path: Path) -> None:
    from loraport_native.tiny import write_tiny

    folder = write_tiny(tmp_path / "tiny", "official")
    assert "has other dimensions than ideogram-ai/ideogram-4-fp8" in reason(model={"checkpoint": str(folder)})
    (tmp_path / "empty").mkdir()
    assert "could not be read" in reason(model={"checkpoint": str(tmp_path / "empty")})


def test_the_packages_own_measurements_tell_the_time_on_their_card() -> None:
    rows = plugins().measurements()
    assert rows
    for row in rows:
        memory = {name: value for name, value in row.memory.items() if name not in ("storage", "compute")}
        found = told(
            *rows,
            card=Card(row.card, 140.0, (9, 0)),
            memory={**memory, "quantize": None, "storage": row.memory["storage"], "compute": row.memory["compute"]},
            dataset={"resolution": row.resolution},
            lora={"rank": row.rank},
            train={"batch_size": row.batch_size, "optimizer": row.optimizer, "gpus": row.gpus},
        )
        assert isinstance(found, Pace)
        assert (found.scaled, found.step_s) == (1, found.measured.step_s)
        same = ("memory", "gpus", "resolution", "rank", "batch_size", "optimizer")
        assert [getattr(found.measured, name) for name in same] == [getattr(row, name) for name in same]
