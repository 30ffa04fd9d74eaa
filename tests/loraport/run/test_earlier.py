"""Earlier runs tell the pace of this machine's card."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from loraport.pace import dataset_key
from loraport.plugins import plugins
from loraport.profiles import resolve_memory
from loraport.run.earlier import TAIL_BYTES, measured_runs
from loraport.run.state import State
from loraport.spec.models import TrainSpec

CONTENT: dict[str, Any] = {
    "name": "a",
    "model": {"checkpoint": "a/b"},
    "dataset": {"path": "/nowhere", "resolution": 768},
    "train": {"gradient_accumulation": 2},
    "memory": {"quantize": "nf4"},
}
FORECAST = {"assumes": {"text_tokens": 300}}


def run(
    root: Path,
    name: str,
    seconds: list[float | None],
    forecast: Any = FORECAST,
    card: str | None = "A card",
    **sections: dict[str, Any],
) -> Path:
    """A run folder as `loraport train` leaves it; a step of unknown seconds comes two seconds after the one before."""
    folder = root / name
    folder.mkdir(parents=True)
    spec = resolve_memory(TrainSpec.model_validate({**CONTENT, **sections}), plugins().profiles())
    (folder / "spec.yaml").write_text(spec.to_yaml())
    (folder / "plan.json").write_text(json.dumps({"backend": "native", "memory": forecast, "card": card}))
    state = State("finished", backend="native", name="a", total=9, created=1_795_000_000.0, updated=0.0)
    (folder / "state.json").write_text(state.to_json())
    lines: list[dict[str, Any]] = [{"type": "phase", "time": 0.0, "phase": "train", "detail": ""}]
    lines += [
        {"type": "step", "time": 2.0 * number, "step": number, "total": 99, "loss": 0.5, "seconds": each}
        for number, each in enumerate(seconds, start=1)
    ]
    (folder / "events.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def test_a_run_is_a_measurement_with_its_settings(tmp_path: Path) -> None:
    folder = run(tmp_path, "one", [60, 60, 60, 2.0, 3.0, 2.0, 2.0])
    (row,) = measured_runs(tmp_path)
    assert row.step_s == 1.0  # half of the median step, which was two passes; the warm-up is left out
    assert (row.card, row.resolution, row.text_tokens, row.date) == ("A card", 768, 300, "2026-11-18")
    assert row.memory["storage"] == "nf4"
    assert row.dataset == dataset_key(TrainSpec.load(folder / "spec.yaml"))
    assert row.source == str(folder)


def test_a_backend_that_tells_neither_memory_nor_seconds_has_its_pace_from_its_events(tmp_path: Path) -> None:
    run(tmp_path, "one", [None] * 9, forecast=None)
    (row,) = measured_runs(tmp_path)
    assert (row.step_s, row.text_tokens) == (1.0, 0)


def test_runs_that_tell_no_pace_are_left_out(tmp_path: Path) -> None:
    run(tmp_path, "short", [1.0, 1.0, 1.0, 1.0])
    run(tmp_path, "no-card", [1.0] * 9, card=None)
    run(tmp_path, "on-the-cpu", [1.0] * 9, backend={"options": {"device": "cpu"}})
    run(tmp_path, "small", [1.0] * 9, model={"checkpoint": "tiny"})
    run(tmp_path, "stranger", [1.0] * 9, model={"checkpoint": "a/b", "family": "gone"})
    (run(tmp_path, "damaged", [1.0] * 9) / "plan.json").write_text("{")
    (run(tmp_path, "no-events", [1.0] * 9) / "events.jsonl").unlink()
    (run(tmp_path, "old", [1.0] * 9) / "spec.yaml").write_text("version: 0\n")
    assert measured_runs(tmp_path) == []


@pytest.mark.parametrize("name", ["gone", "file"])
def test_without_runs_there_are_none(tmp_path: Path, name: str) -> None:
    (tmp_path / "file").write_text("")
    assert measured_runs(tmp_path / name) == []


def test_of_a_long_run_its_last_steps_count_and_a_torn_line_does_not(tmp_path: Path) -> None:
    folder = run(tmp_path, "long", [9.0] * 2000 + [4.0] * 31)
    with open(folder / "events.jsonl", "a") as file:
        file.write('{"type": "ste')
    assert (folder / "events.jsonl").stat().st_size > TAIL_BYTES
    (row,) = measured_runs(tmp_path)
    assert row.step_s == 2.0
