"""A bench spread over machines: submitit's own executor on this one, shares by hand, and a SkyPilot task."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml

from loraport_bench.records import Results
from loraport_bench.schedule import part_of, schedule
from loraport_bench.settings import Settings

pytestmark = pytest.mark.usefixtures("stand_ins")


def test_submitit_runs_a_job_for_each_backend_profile_and_seed_and_the_rows_are_gathered(
    bench: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("submitit")
    options = ("--backends", "swift,broken", "--tiers", "matched", "--seeds", "0", "--held-out", "0")
    code, said = bench(*options, "--on", "local", "--job", "timeout_min=5")
    assert code == 0, said
    assert said.count(": done") == 2
    told = Results.read(tmp_path / "out" / "results.json")
    assert told.complete
    assert {run.backend: run.status for run in told.runs} == {"swift": "ok", "broken": "failed"}
    code, said = bench(*options, "--on", "local")
    assert code == 0, said
    assert "job" not in said.splitlines()[0]  # nothing is submitted again


def test_a_parameter_that_submitit_does_not_know_is_told(bench: Any, tmp_path: Path) -> None:
    pytest.importorskip("submitit")
    code, said = bench("--backends", "swift", "--on", "local", "--job", "timeout_mn=5")
    assert code == 3
    assert "timeout_mn" in said
    code, said = bench("--backends", "swift", "--on", "local", "--job", "slurm")
    assert code == 3


def test_shares_by_hand_are_disjoint_and_the_last_one_to_come_gathers_them(bench: Any, tmp_path: Path) -> None:
    options = ("--backends", "swift,steady", "--tiers", "matched", "--seeds", "0")
    code, said = bench(*options, "--part", "2/2")
    assert code == 0, said
    first = Results.read(tmp_path / "out" / "results.json")
    assert [run.backend for run in first.runs] == ["steady"]
    assert not first.complete
    code, said = bench(*options, "--part", "1/2")
    told = Results.read(tmp_path / "out" / "results.json")
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


def test_the_shares_of_any_number_of_machines_make_the_whole_schedule() -> None:
    settings = Settings(
        given={}, backends=["a", "b", "c"], profiles=["fp8", "nf4"], tiers=["matched", "best-effort"], card=None,
        repeats=4, seeds=[0, 1], steps=2, warm_up=1, checkpoints=0, held_out=0, time_limit_s=1, sampling_s=0.1,
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
