"""The measurements that the package carries are those of docs/benchmarks, and stand beside the profiles they are of."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from loraport.footprint import CONTEXT_GIB
from loraport.plugins import plugins
from loraport_bench.rows import ROWS
from loraport_profiles.measured import copied, measurement, measurements, native_rows, settings

BENCHMARKS = Path(__file__).parents[2] / "docs" / "benchmarks"
PROFILES = plugins().profiles()

BENCH_ROW: dict[str, Any] = {
    "row": "fp8-dynamic-streamed",
    "date": "2026-12-01T10:00:00+00:00",
    "card": "A card",
    "settings": {
        "resolution": 768,
        "text_tokens": 512,
        "rank": 16,
        "batch": 2,
        "blocks": 34,
        "width": 4608,
        "optimizer": "adamw",
        "gpus": 1,
        "memory": {
            "quantize": "fp8-dynamic",
            "offload": "group",
            "compile": "regional",
            "gradient_checkpointing": True,
        },
    },
    "status": "ok",
    "step_s": {"median": 0.5, "mean": 0.6},
    "peak_allocated_gib": 3.5,
    "peak_reserved_gib": 4.0,
}


def test_every_number_in_the_package_is_one_of_the_benchmarks() -> None:
    rows = measurements()
    assert rows
    for row in rows:
        assert row in copied(BENCHMARKS / row.source, PROFILES)


def test_of_lines_for_the_same_row_the_newest_counts(tmp_path: Path) -> None:
    file = tmp_path / "step.jsonl"
    again = {**BENCH_ROW, "step_s": {"median": 0.4, "mean": 0.4}}
    file.write_text("".join(json.dumps(row) + "\n" for row in (BENCH_ROW, again)))
    assert [row.step_s for row in copied(file, PROFILES)] == [0.4]


def test_a_profile_carries_the_measurements_with_its_settings_and_no_others() -> None:
    hardware = [profile for (kind, _), profile in PROFILES.items() if kind == "hardware"]
    assert any(profile.measured for profile in hardware)
    for profile in hardware:
        assert all(row.memory == settings(profile.sets, PROFILES) for row in profile.measured)


HARDWARE = {name: profile for (kind, name), profile in PROFILES.items() if kind == "hardware"}


@pytest.mark.parametrize("name", HARDWARE)
def test_a_preset_was_measured_to_fit_its_card_in_the_training_it_is_for(name: str) -> None:
    profile = HARDWARE[name]
    assert profile.card_gib
    rows = [
        row
        for row in profile.measured
        if {"resolution": row.resolution, "batch_size": row.batch_size, "rank": row.rank} == profile.shape
    ]
    if not rows:
        pytest.skip("not measured yet: loraport bench step --rows preset-" + name)
    for row in rows:
        assert row.peak_reserved_gib
        assert row.peak_reserved_gib + CONTEXT_GIB <= profile.card_gib


@pytest.mark.parametrize("name", HARDWARE)
def test_the_bench_measures_a_preset_in_the_training_it_is_for_on_as_much_as_its_card_has(name: str) -> None:
    (row,) = [row for row in ROWS if row.memory.get("profile") == name]
    assert {"resolution": row.resolution, "batch_size": row.batch, "rank": row.rank} == HARDWARE[name].shape
    assert row.limit_gib == (HARDWARE[name].card_gib or 0) - CONTEXT_GIB


def test_a_row_of_the_bench_command_is_read(tmp_path: Path) -> None:
    file = tmp_path / "step.jsonl"
    file.write_text(json.dumps(BENCH_ROW) + "\n")
    (row,) = copied(file, PROFILES)
    assert (row.step_s, row.batch_size, row.date, row.source) == (0.5, 2, "2026-12-01", "step.jsonl")
    assert row.memory == {
        "storage": "fp8",
        "compute": "fp8",
        "offload": "group",
        "compile": "regional",
        "gradient_checkpointing": "full",
    }


def test_a_row_that_names_a_preset_has_its_settings() -> None:
    row = {**BENCH_ROW, "settings": {**BENCH_ROW["settings"], "memory": {"profile": "12gb"}}}
    found = measurement(row, "x", PROFILES)
    assert found.memory == settings(PROFILES["hardware", "12gb"].sets, PROFILES)


def test_failed_small_and_foreign_rows_and_those_over_seeds_are_not_copied(tmp_path: Path) -> None:
    told = BENCH_ROW["settings"]
    rows = [
        {**BENCH_ROW, "status": "out of memory"},
        {**BENCH_ROW, "settings": {**told, "blocks": 3}},
        {**BENCH_ROW, "settings": {name: value for name, value in told.items() if name != "memory"}},  # another recipe
        {"row": "rate", "status": "ok", "bf16_tflops": 700.0},
    ]
    file = tmp_path / "step.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert native_rows(file) == []
    file.write_text(json.dumps({**BENCH_ROW, "seed": 1}) + "\n")
    assert len(native_rows(file)) == 1
    assert copied(file, PROFILES) == []
