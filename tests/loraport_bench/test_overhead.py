"""What going through LoraPort costs, measured in pairs."""

from __future__ import annotations

import json
import shutil
import statistics
from pathlib import Path
from typing import Any

import pytest
from bench_results import results

from loraport.errors import BackendError, Interrupted
from loraport_bench import overhead
from loraport_bench.records import Results

pytestmark = pytest.mark.usefixtures("stand_ins")


def test_the_overhead_of_going_through_us_is_measured_once_for_each_trainer(bench: Any, tmp_path: Path) -> None:
    code, said = bench("--backends", "swift", "--seeds", "0", "--held-out", "0", "--overhead", "--overhead-pairs", "2")
    assert code == 0, said
    first, second = results(tmp_path).runs
    assert second.overhead is None
    measured = first.overhead
    assert measured is not None
    assert measured.pairs == len(measured.step_shares) == len(measured.run_extras_s) == 2
    assert min(measured.step_shares) <= measured.step_share <= max(measured.step_shares)
    assert min(measured.run_extras_s) <= measured.run_extra_s <= max(measured.run_extras_s)
    differences = [100 * share for share in sorted(measured.step_shares)]
    report = (tmp_path / "out" / "report.md").read_text()
    assert f"{100 * measured.step_share:+.2f} % ({differences[0]:+.2f} – {differences[1]:+.2f})" in report
    # On a machine with other work only roughly: a step waits 10 ms, whoever started it.
    assert 0.01 <= measured.step_median_s < 0.05
    assert abs(measured.step_share) < 0.5
    assert abs(measured.run_extra_s) < 5
    assert {"start", "train"} <= set(measured.phase_extras_s)
    assert sum(measured.phase_extras_s.values()) == pytest.approx(statistics.fmean(measured.run_extras_s), abs=1e-2)


def test_the_overhead_is_gone_on_with_pair_by_pair(bench: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = ("--backends", "swift", "--tiers", "matched", "--seeds", "0", "--held-out", "0")
    pairs, ran, by_hand = ("--overhead", "--overhead-pairs", "3"), [], overhead._by_hand

    def counted(*arguments: Any) -> Any:
        ran.append(len(ran))
        if len(ran) == 2:
            raise Interrupted("Stopped.")
        return by_hand(*arguments)

    monkeypatch.setattr(overhead, "_by_hand", counted)
    code, said = bench(*options, *pairs, "--dry-run", "--time-limit", "3600", "--json")
    assert json.loads(said)["at_most_s"] == 7 * 3600, "a row and three pairs"
    code, said = bench(*options, *pairs)
    assert code == Interrupted.exit_code, said
    assert "swift/0/0: overhead to measure, about" in bench(*options, *pairs, "--dry-run")[1]
    assert not results(tmp_path).complete
    (row,) = results(tmp_path).runs
    assert (row.status, row.overhead) == ("ok", None)

    code, said = bench(*options, *pairs)
    assert code == 0, said
    assert len(ran) == 4, "the first pair is kept, and the second, which was cut off, is run again"
    after = results(tmp_path)
    assert after.complete
    assert after.runs[0].started == row.started, "the row itself is not run again"
    assert after.runs[0].overhead is not None
    assert after.runs[0].overhead.pairs == 3
    assert bench(*options, *pairs)[0] == 0
    assert len(ran) == 4


def test_an_overhead_that_cannot_be_measured_is_told_once(
    bench: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried: list[int] = []

    def fail(*arguments: Any) -> Any:
        tried.append(1)
        raise BackendError("The plan's command, started by hand, failed (9).")

    monkeypatch.setattr(overhead, "_by_hand", fail)
    for _ in range(2):
        code, said = bench("--backends", "swift", "--seeds", "0", "--held-out", "0", "--overhead")
        assert code == 0, said
    assert len(tried) == 1
    notes = [note for note in results(tmp_path).runs[0].notes if "overhead" in note]
    assert notes == ["The overhead could not be measured: The plan's command, started by hand, failed (9)."]


def test_of_shares_in_folders_of_their_own_one_measures_the_overhead(bench: Any, tmp_path: Path) -> None:
    options = ("--backends", "swift", "--tiers", "matched", "--seeds", "0,1", "--held-out", "0")
    pairs = ("--overhead", "--overhead-pairs", "1")
    for share in ("1/2", "2/2"):
        code, said = bench(*options, *pairs, "--part", share, "-o", str(tmp_path / f"share-{share[0]}"))
        assert code == 0, said
    rows = [Results.read(tmp_path / f"share-{number}" / "results.json").runs for number in (1, 2)]
    assert [[run.seed for run in runs] for runs in rows] == [[0], [1]]
    assert [runs[0].overhead is not None for runs in rows] == [True, False]
    shutil.copytree(tmp_path / "share-2" / "rows", tmp_path / "share-1" / "rows", dirs_exist_ok=True)
    assert bench(*options, *pairs, "-o", str(tmp_path / "share-1"))[0] == 0
    assert Results.read(tmp_path / "share-1" / "results.json").complete
