"""Comparing two benches: what is beyond the noise is told, what isn't is not, and what can't be compared says why."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from bench_example import example
from typer.testing import CliRunner

from loraport.cli.main import build_app
from loraport.errors import DataError, SpecError
from loraport_bench import records as r
from loraport_bench.compare import aspects_of, compare, share_of

ROW = "matched/fp8/native"


def altered(change: Callable[[dict[str, Any]], None], row: str = ROW) -> r.Results:
    """The example with each run of a row changed."""
    content = example().model_dump(mode="json")
    for run in content["runs"]:
        if f"{run['tier']}/{run['profile']}/{run['backend']}" == row:
            change(run)
    return r.Results.model_validate(content)


def slower(by: float) -> r.Results:
    def change(run: dict[str, Any]) -> None:
        run["steps"]["each"] = [each * by for each in run["steps"]["each"]]

    return altered(change)


def worse_loss(by: float) -> r.Results:
    def change(run: dict[str, Any]) -> None:
        run["quality"]["loss"] += by

    return altered(change)


def test_a_bench_compared_with_itself_has_changed_in_nothing() -> None:
    found = compare(example(), example())
    assert found.worse == 0
    assert {change.verdict for change in found.changes} == {"same"}
    assert {change.aspect for change in found.changes} == {"speed", "memory", "phases", "quality"}
    assert found.differences == found.skipped == found.missing == found.added == []


@pytest.mark.parametrize(
    ("by", "threshold", "verdict"),
    [
        (1.10, 0.05, "worse"),
        (0.90, 0.05, "better"),
        (1.03, 0.05, "same"),  # beyond the spread, but below the threshold
        (1.03, 0.01, "worse"),
        (1.01, 0.001, "same"),  # over the threshold, but within the spread
    ],
)
def test_a_speed_has_changed_when_it_is_beyond_both_the_spread_and_the_threshold(
    by: float, threshold: float, verdict: str
) -> None:
    found = compare(example(), slower(by), threshold)
    (speed,) = [change for change in found.changes if change.row == ROW and change.what == "seconds a step"]
    assert speed.verdict == verdict
    assert speed.share == pytest.approx(by - 1)
    assert found.worse == (verdict == "worse")


def test_memory_phases_and_quality_are_judged_too() -> None:
    def more_memory(run: dict[str, Any]) -> None:
        run["device_memory"]["peak_bytes"] = int(run["device_memory"]["peak_bytes"] * 1.2)

    def longer_load(run: dict[str, Any]) -> None:
        run["phases"]["load_quantise"] += 30
        run["phases"]["save"] *= 2  # less than a second more

    told = compare(example(), altered(more_memory)).of("worse")
    assert [(change.row, change.what) for change in told] == [(ROW, "device memory")]
    told = compare(example(), altered(longer_load)).of("worse")
    assert [(change.row, change.what) for change in told] == [(ROW, "phase load, quantise")]
    told = compare(example(), worse_loss(0.05)).of("worse")
    assert [change.what for change in told] == ["held-out loss"]
    assert told[0].share == pytest.approx(0.05 / 0.781625, rel=1e-3)
    assert "+6.4 % of the loss without a LoRA" in told[0].text()
    assert compare(example(), worse_loss(0.002)).worse == 0
    assert compare(example(), worse_loss(0.05), aspects=["speed"]).worse == 0


def test_a_row_that_no_longer_comes_to_its_end_is_worse_and_the_other_way_round_better() -> None:
    def fall(run: dict[str, Any]) -> None:
        run["status"], run["failure"] = "failed", {"reason": "out-of-memory", "message": "No\nroom.", "exit_code": 6}

    found = compare(example(), altered(fall))
    assert found.broken == [f"{ROW}: 0 of 3 runs come to their end (out-of-memory: No room.)"]
    assert found.worse == 1
    back = compare(altered(fall), example())
    assert back.repaired == [f"{ROW}: 3 of 3 runs come to their end"]
    assert back.worse == 0


def test_rows_of_one_side_only_are_told_and_none_in_common_is_refused() -> None:
    whole = example()
    native = whole.model_copy(update={"runs": [run for run in whole.runs if run.backend == "native"]})
    rest = whole.model_copy(update={"runs": [run for run in whole.runs if run.backend != "native"]})
    found = compare(whole, native)
    assert "matched/fp8/diffsynth" in found.missing
    assert found.worse == 0
    assert "matched/fp8/diffsynth" in compare(native, whole).added
    with pytest.raises(DataError, match="no row in common"):
        compare(native, rest)


def test_other_hardware_versions_and_settings_are_told() -> None:
    def other(run: dict[str, Any]) -> None:
        run["machine"]["card"] = "Another GPU"
        run["versions"]["torch"] = "2.12.0"
        run["configuration"]["spec"]["memory"] = {"compile": "full"}
        run["configuration"]["spec"]["train"]["seed"] += 100

    told = compare(example(), altered(other)).differences
    assert "other hardware or system: GPU Invented GPU → Another GPU, Invented GPU" in told
    assert "native: other version: torch 2.11.0 → 2.12.0" in told
    assert f"{ROW}: other settings: memory.compile None → 'full'" in told
    assert compare(example().model_copy(update={"complete": False}), example()).differences == ["OLD is not complete"]


def test_other_work_other_clocks_and_other_scopes_are_not_compared() -> None:
    def other_rank(run: dict[str, Any]) -> None:
        run["configuration"]["spec"]["lora"] = {"rank": 64}

    def other_measures(run: dict[str, Any]) -> None:
        run["steps"]["measured"] = "outside"
        run["device_memory"]["scope"] = "device"
        run["quality"]["without"] *= 1.2

    found = compare(example(), altered(other_rank))
    assert found.skipped == [f"{ROW}: other work: lora.rank None → 64"]
    assert not any(change.row == ROW for change in found.changes)
    skipped = compare(example(), altered(other_measures)).skipped
    assert skipped == [
        f"{ROW}: seconds a step: by the trainer's own clock in OLD, by a clock outside in NEW",
        f"{ROW}: device memory: of processes in OLD, of device in NEW",
        f"{ROW}: held-out loss: another one without a LoRA: 0.7816 over 8 in OLD, 0.9379 over 8 in NEW",
    ]


def test_two_benches_of_which_nothing_can_be_compared_are_no_success() -> None:
    protocol = example().protocol.model_copy(update={"resolution": 512})
    with pytest.raises(DataError, match="Nothing of the two benches can be compared") as error:
        compare(example(), example().model_copy(update={"protocol": protocol}))
    reasons = str(error.value.hint).splitlines()
    assert any(ROW in reason for reason in reasons)
    assert all("resolution 1024 → 512" in reason for reason in reasons)


def test_what_was_measured_on_one_side_only_is_told() -> None:
    def unscored(run: dict[str, Any]) -> None:
        run["quality"] = None

    assert compare(example(), altered(unscored)).skipped == [f"{ROW}: held-out loss: measured only in OLD"]
    assert compare(altered(unscored), altered(unscored)).skipped == []


def test_the_command_ends_with_8_when_something_got_worse_and_with_0_otherwise(tmp_path: Path) -> None:
    for name, results in (("old", example()), ("new", slower(1.2))):
        (tmp_path / name).mkdir()
        results.write(tmp_path / name / "results.json")

    def run(*options: str) -> Any:
        return CliRunner().invoke(build_app(), ["bench", "compare", *options])

    old, new = str(tmp_path / "old"), str(tmp_path / "new" / "results.json")
    worse = run(old, new)
    assert worse.exit_code == 8
    assert f"worse: {ROW}: seconds a step: 0.455 s → 0.546 s (+20.0 %)" in worse.stdout
    assert "1 thing got worse beyond the noise." in worse.stderr
    assert run(new, old).exit_code == 0
    assert run(old, new, "--threshold", "25%").exit_code == 0
    assert run(old, new, "--of", "memory,quality").exit_code == 0
    machine = run(old, new, "--json")
    assert machine.exit_code == 8
    told = json.loads(machine.stdout)
    assert told["worse"] == 1
    assert [each["row"] for each in told["changes"] if each["verdict"] == "worse"] == [ROW]
    assert run(old, str(tmp_path)).exit_code == 4
    assert run(old, new, "--threshold", "lots").exit_code == 3


def test_thresholds_and_aspects_are_checked() -> None:
    assert share_of("5%", "--threshold") == share_of("0.05", "--threshold") == 0.05
    assert aspects_of("quality, speed") == ["speed", "quality"]
    for wrong in ("", "nan", "-1%", "100%", "5 percent"):
        with pytest.raises(SpecError, match="--threshold"):
            share_of(wrong, "--threshold")
    with pytest.raises(SpecError, match="Did you mean 'memory'"):
        aspects_of("memry")
    with pytest.raises(SpecError, match="nothing to compare"):
        aspects_of(",")
