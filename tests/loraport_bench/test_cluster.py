"""A bench spread over machines: submitit's own executor on this one, shares by hand, and a SkyPilot task."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from bench_results import results

from loraport_bench.schedule import part_of, schedule
from loraport_bench.settings import Settings

SLURM = Path(__file__).parents[1] / "stand_ins" / "slurm.py"
pytestmark = pytest.mark.usefixtures("stand_ins")


def test_submitit_runs_a_job_for_each_backend_profile_and_seed_and_the_rows_are_gathered(
    bench: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("submitit")
    options = ("--backends", "swift,broken", "--tiers", "matched", "--seeds", "0", "--held-out", "0")
    code, said = bench(*options, "--on", "local", "--job", "timeout_min=5")
    assert code == 0, said
    assert said.count(": done") == 2
    told = results(tmp_path)
    assert told.complete
    assert {run.backend: run.status for run in told.runs} == {"swift": "ok", "broken": "failed"}
    code, said = bench(*options, "--on", "local")
    assert code == 0, said
    assert "job" not in said.splitlines()[0]  # nothing is submitted again


@pytest.mark.parametrize("cards", ["7", None])
def test_jobs_of_this_machine_see_the_cards_that_the_command_sees(
    bench: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cards: str | None
) -> None:
    pytest.importorskip("submitit")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if cards:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", cards)
    code, said = bench("--backends", "swift", "--tiers", "matched", "--seeds", "0", "--held-out", "0", "--on", "local")
    assert code == 0, said
    assert f"cards {cards}" in (tmp_path / "out" / "rows" / "matched-spec-swift-0-0" / "log.txt").read_text()


def test_jobs_outlive_a_command_that_is_stopped_which_says_so(bench: Any, spec_file: Path, tmp_path: Path) -> None:
    pytest.importorskip("submitit")
    options = ("--backends", "endless", "--tiers", "matched", "--seeds", "0", "--held-out", "0", "--time-limit", "4")
    command = [sys.executable, "-m", "loraport.cli.main", "bench", str(spec_file), "-o", str(tmp_path / "out")]
    row = tmp_path / "out" / "rows" / "matched-spec-endless-0-0"
    with open(tmp_path / "said.txt", "w") as said:
        given = [*command, "--steps", "6", "--warm-up", "2", *options, "--on", "local"]
        process = subprocess.Popen(given, stdout=said, stderr=said)
        until(lambda: (row / "child.pid").exists())
        process.send_signal(signal.SIGINT)
        assert process.wait(30) == 130
    told = " ".join((tmp_path / "said.txt").read_text().split())
    assert "what was submitted goes on: job" in told
    until(lambda: (row / "run.json").exists())
    _, again = bench(*options, "--on", "local")
    assert "job" not in again.splitlines()[0]
    assert results(tmp_path).complete


def until(there: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not there() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert there()


def test_a_job_that_fails_is_told_with_its_error(bench: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("submitit")
    (tmp_path / "lock").mkdir()  # a folder cannot be locked as a file
    monkeypatch.setenv("LORAPORT_BENCH_LOCK", str(tmp_path / "lock"))
    code, said = bench("--backends", "swift", "--tiers", "matched", "--seeds", "0", "--on", "local")
    assert code == 5
    assert "job" in said
    assert "RunFolderError: The machine's lock" in said


def test_a_parameter_that_submitit_does_not_know_is_told(bench: Any, tmp_path: Path) -> None:
    pytest.importorskip("submitit")
    code, said = bench("--backends", "swift", "--on", "local", "--job", "timeout_mn=5")
    assert code == 3
    assert "timeout_mn" in said
    code, said = bench("--backends", "swift", "--on", "local", "--job", "slurm")
    assert code == 3


def test_a_bench_goes_through_slurm_with_the_cards_and_the_time_that_its_rows_need(
    bench: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("submitit")
    (tmp_path / "slurm").mkdir()
    for name in ("sbatch", "srun", "sacct"):
        command = tmp_path / "slurm" / name
        command.write_text(f"#!{sys.executable}\n{SLURM.read_text()}")
        command.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'slurm'}{os.pathsep}{os.environ['PATH']}")
    options = ("--backends", "swift", "--tiers", "matched", "--seeds", "0,1", "--time-limit", "1200", "--held-out", "0")
    code, said = bench(*options, "--overhead-pairs", "1", "--on", "slurm", "--job", "slurm_partition=gpu")
    assert code == 0, said
    told = results(tmp_path)
    assert [run.status for run in told.runs] == ["ok", "ok"]
    first, second = sorted((tmp_path / "slurm").glob("*.sbatch"))
    for line in ("--partition=gpu", "--gpus-per-node=1", "--time=75", "--job-name=bench-swift-spec-0"):
        assert f"#SBATCH {line}\n" in first.read_text()
    assert "--job-name=bench-swift-spec-1" in second.read_text()
    assert "--time=35\n" in second.read_text(), "no pair of the overhead is its"


def test_slurm_is_looked_for_before_anything_is_written(
    bench: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("submitit")
    monkeypatch.setenv("PATH", str(tmp_path))
    code, said = bench("--backends", "swift", "--on", "slurm")
    assert code == 5
    assert "no srun and sbatch" in said
    assert not (tmp_path / "out").exists()


def test_shares_by_hand_are_disjoint_and_the_last_one_to_come_gathers_them(bench: Any, tmp_path: Path) -> None:
    options = ("--backends", "swift,steady", "--tiers", "matched", "--seeds", "0")
    code, said = bench(*options, "--part", "2/2")
    assert code == 0, said
    first = results(tmp_path)
    assert [run.backend for run in first.runs] == ["steady"]
    assert not first.complete
    code, said = bench(*options, "--part", "1/2")
    told = results(tmp_path)
    assert [run.backend for run in told.runs] == ["swift", "steady"]
    assert told.complete
    assert all(run.quality for run in told.runs)


def test_a_sky_task_gives_every_node_its_share_and_takes_the_rows_to_a_bucket(bench: Any, tmp_path: Path) -> None:
    file = tmp_path / "task.yaml"
    code, said = bench(
        *("--backends", "swift,steady", "--tiers", "matched", "--seeds", "0,1", "--write-sky", str(file)),
        *("--set", "train.learning_rate=2e-4", "--for", "swift:backend.options.fast=true"),
    )
    assert code == 0, said
    assert not (tmp_path / "out").exists()
    task = yaml.safe_load(file.read_text())
    assert task["num_nodes"] == 4
    assert task["file_mounts"]["~/bench-input/images"] == str(tmp_path / "images")
    assert task["file_mounts"]["~/bench-output"] == {"name": "${RESULTS_BUCKET}", "mode": "MOUNT"}
    command = shlex.split(task["run"].splitlines()[0])
    assert command[:3] == ["loraport", "bench", "~/bench-input/spec.yaml"]
    given = " ".join(command)
    assert "--backends swift,steady --tiers matched --seeds 0,1 --steps 6 --warm-up 2" in given
    assert "--for swift:backend.options.fast=true" in given
    assert "--set train.learning_rate=2e-4" in given
    assert "--set dataset.path=~/bench-input/images --set model.checkpoint=~/bench-input/checkpoint" in given
    assert given.endswith("--part $((SKYPILOT_NODE_RANK + 1))/$SKYPILOT_NUM_NODES -o ~/bench")
    assert "loraport backends install steady" in task["setup"]
    assert task["run"].count("~/bench/data ") == 1, "with the images, by which the rows are known to be of this bench"


def test_a_sky_task_takes_every_set_of_images_along(bench: Any, spec_file: Path, tmp_path: Path) -> None:
    content = yaml.safe_load(spec_file.read_text())
    folder = content["dataset"].pop("path")
    content["dataset"]["sets"] = [{"path": folder}, {"path": "hub:somebody/pictures"}]
    spec_file.write_text(yaml.safe_dump(content))
    code, said = bench("--backends", "swift", "--tiers", "matched", "--write-sky", str(tmp_path / "task.yaml"))
    assert code == 0, said
    task = yaml.safe_load((tmp_path / "task.yaml").read_text())
    assert task["file_mounts"]["~/bench-input/set-0"] == folder
    assert not {"~/bench-input/set-1", "~/bench-input/images"} & task["file_mounts"].keys()
    given = " ".join(shlex.split(task["run"].splitlines()[0]))
    assert "--set dataset.sets[0].path=~/bench-input/set-0" in given
    assert "dataset.sets[1]" not in given


def test_the_shares_of_any_number_of_machines_make_the_whole_schedule() -> None:
    settings = Settings(
        given={}, backends=["a", "b", "c"], profiles=["fp8", "nf4"], batches=[1], card=None,
        tiers=["matched", "best-effort"], repeats=4, seeds=[0, 1], steps=2, warm_up=1,
        checkpoints=0, held_out=0, time_limit_s=1, sampling_s=0.1,
        overhead_pairs=0,
    )  # fmt: skip
    jobs = schedule(settings)
    assert len({job.key for job in jobs}) == len(jobs) == 4 * 2 * 2 * 3
    assert [job.backend for job in jobs[:3]] == ["a", "b", "c"]
    assert [job.backend for job in jobs if job.repeat == 1][:3] == ["c", "b", "a"]
    for count in (1, 2, 5, 20):
        shares = [part_of(jobs, number, count) for number in range(count)]
        assert sorted(job.position for share in shares for job in share) == list(range(len(jobs)))
        for share in shares:
            others = {(job.backend, job.profile, job.seed) for other in shares if other is not share for job in other}
            assert not others & {(job.backend, job.profile, job.seed) for job in share}
