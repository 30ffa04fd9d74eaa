"""A bench that was cut off, that failed in part, or that is asked for once more: nothing is lost or done twice."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
from bench_results import results

from loraport.errors import DataError, Interrupted
from loraport.scoring import Score

pytestmark = pytest.mark.usefixtures("stand_ins")


def test_a_bench_goes_on_where_it_was_and_only_what_is_asked_for_is_run_again(bench: Any, tmp_path: Path) -> None:
    options = ("--backends", "swift,broken", "--tiers", "matched", "--seeds", "0")
    code, said = bench(*options, "--session-limit", "0")
    assert code == 0, said
    assert "The session's time is up" in said
    before = results(tmp_path)
    assert [run.key for run in before.runs] == ["matched/spec/swift/0/0"]
    assert not before.complete
    code, said = bench(*options, "--dry-run")
    assert "matched/spec/swift/0/0: done" in said
    assert "matched/spec/broken/0/0: to run, time not known yet" in said
    code, said = bench(*options)
    assert "matched/spec/swift/0/0: there already" in said
    after = results(tmp_path)
    assert after.complete
    assert after.created == before.created
    assert after.runs[0] == before.runs[0]
    code, said = bench(*options, "--retry")
    again = results(tmp_path)
    assert again.runs[0] == before.runs[0]
    assert again.runs[1].started > after.runs[1].started


def test_a_failed_row_is_kept_until_its_second_try_begins(bench: Any, tmp_path: Path) -> None:
    import fcntl

    options = ("--backends", "broken,greedy", "--tiers", "matched", "--seeds", "0", "--held-out", "0")
    bench(*options)
    failed = results(tmp_path).runs
    assert len(failed) == 2
    with open(tmp_path / "machine.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert bench(*options, "--retry")[0] == 7
    assert results(tmp_path).runs == failed
    assert bench(*options, "--retry", "--dry-run")[1].count("to run") == 2
    bench(*options, "--retry", "--session-limit", "0")
    first, second = results(tmp_path).runs
    assert first.started > failed[0].started
    assert second == failed[1], "there was no time for it"


def test_what_was_out_of_time_is_tried_again_only_with_a_longer_limit(bench: Any, tmp_path: Path) -> None:
    options = ("--backends", "endless", "--tiers", "matched", "--seeds", "0", "--held-out", "0", "--retry")
    started = []
    for limit in ("2", "2", "3"):
        bench(*options, "--time-limit", limit)
        started.append(results(tmp_path).runs[0].started)
    assert started[0] == started[1] < started[2]


def test_settings_that_nothing_was_run_with_do_not_hold_the_folder(bench: Any, tmp_path: Path) -> None:
    options = ("--backends", "swift", "--tiers", "matched", "--seeds", "0", "--held-out")
    code, said = bench(*options, "20")
    assert code == 4, said
    code, said = bench(*options, "1")
    assert code == 0, said
    assert results(tmp_path).protocol.held_out == 1


def test_a_score_that_was_cut_off_or_failed_is_left_to_do_and_said_to_be(
    bench: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = ("--backends", "swift", "--tiers", "matched", "--seeds", "0")

    def fails(*arguments: Any) -> Any:
        raise DataError("There is no checkpoint.")

    def stops(*arguments: Any) -> Any:
        raise Interrupted("Stopped.")

    for does, expected in ((stops, 130), (fails, 0)):
        with monkeypatch.context() as patch:
            patch.setattr("loraport_bench.quality.run_to_end", does)
            code, said = bench(*options)
        assert code == expected, said
        assert expected or "Not scored, the same command tries it again: There is no checkpoint." in said
        told = results(tmp_path)
        assert not told.complete
        assert "Not scored yet; the same command goes on with that." in told.runs[0].notes
    code, said = bench(*options)
    assert code == 0, said
    assert results(tmp_path).complete
    assert results(tmp_path).runs[0].quality is not None
    assert results(tmp_path).runs[0].started == told.runs[0].started


def test_a_finished_bench_is_gathered_also_while_another_measures(bench: Any, tmp_path: Path) -> None:
    import fcntl

    options = ("--backends", "swift", "--tiers", "matched", "--seeds", "0")
    bench(*options)
    with open(tmp_path / "machine.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        code, said = bench(*options)
    assert code == 0, said


def test_a_loss_that_is_not_a_number_is_told_and_its_row_stays(
    bench: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from loraport_bench import quality

    def scores(scorer: Any, spec: Any, files: list[Path]) -> Any:
        nothing = Score(lora=None, losses=[1.0])
        return {None: nothing} | {str(file): Score(lora=str(file), losses=[float("nan")]) for file in files}

    monkeypatch.setattr(quality, "_run", scores)
    options = ("--backends", "swift", "--tiers", "matched", "--seeds", "0")
    for _ in range(2):
        code, said = bench(*options)
        assert code == 0, said
    (run,) = results(tmp_path).runs
    assert (run.status, run.quality) == ("ok", None)
    assert any("is not a number" in note for note in run.notes)


def test_a_bench_goes_on_with_a_longer_limit_for_what_was_out_of_time(bench: Any, tmp_path: Path) -> None:
    options = ("--backends", "swift", "--tiers", "matched", "--seeds", "0", "--held-out", "0")
    bench(*options, "--time-limit", "60")
    code, said = bench(*options, "--time-limit", "90")
    assert code == 0, said
    assert "matched/spec/swift/0/0: there already" in said
    assert results(tmp_path).protocol.time_limit_s == 90


def test_another_spec_or_other_settings_are_refused_by_name_and_nothing_is_lost(
    bench: Any, spec_file: Path, tmp_path: Path
) -> None:
    options = ("--backends", "swift", "--tiers", "matched", "--seeds", "0", "--held-out", "0")
    bench(*options)
    before = (tmp_path / "out" / "results.json").read_bytes()
    code, said = bench(*options, "--repeats", "2")
    assert code == 3
    assert "repeats was 1 and is 2 now" in said
    spec_file.write_text(spec_file.read_text().replace("rank: 4", "rank: 8"))
    code, said = bench(*options)
    assert code == 3
    assert "the spec's lora.rank" in said
    assert (tmp_path / "out" / "results.json").read_bytes() == before


def test_a_killed_bench_leaves_no_trainer_and_is_gone_on_with(bench: Any, spec_file: Path, tmp_path: Path) -> None:
    options = ("--backends", "endless", "--tiers", "matched", "--seeds", "0", "--steps", "6", "--warm-up", "2")
    command = [
        sys.executable,
        "-m",
        "loraport.cli.main",
        "bench",
        str(spec_file),
        "-o",
        str(tmp_path / "out"),
        *options,
    ]
    child_file = tmp_path / "out" / "rows" / "matched-spec-endless-0-0" / "child.pid"
    for number, code in ((signal.SIGINT, 130), (signal.SIGKILL, -9)):
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        deadline = time.monotonic() + 60
        while not (child_file.exists() and child_file.read_text()) and time.monotonic() < deadline:
            time.sleep(0.05)
        child = int(child_file.read_text())
        os.kill(process.pid, number)
        _, said = process.communicate(timeout=60)
        assert process.returncode == code, said
        while psutil.pid_exists(child) and time.monotonic() < deadline:
            time.sleep(0.05)
        assert not psutil.pid_exists(child)
        assert not (tmp_path / "out" / "rows" / "matched-spec-endless-0-0" / "run.json").exists()
        child_file.unlink(missing_ok=True)
        assert number != signal.SIGINT or "goes on" in said
