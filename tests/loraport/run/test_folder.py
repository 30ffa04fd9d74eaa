from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from loraport.errors import RunFolderError
from loraport.planning import Plan
from loraport.run import folder as folder_module
from loraport.run.folder import RunFolder, free_path, list_runs

MakePlan = Callable[..., Plan]
NewRun = Callable[..., tuple[Plan, RunFolder]]


def test_a_new_folder_holds_spec_plan_and_state(new_run: NewRun) -> None:
    plan, folder = new_run(steps=7)
    assert folder.read_spec() == plan.spec
    assert '"backend": "fake"' in folder.plan_file.read_text()
    state = folder.read_state()
    assert (state.status, state.name, state.total) == ("planned", "demo", 7)
    assert sorted(os.listdir(folder.path)) == [".lock", "plan.json", "spec.yaml", "state.json"]


def test_an_empty_folder_can_be_used(make_plan_for: MakePlan, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    RunFolder.create(tmp_path / "run", make_plan_for()).release()
    assert (tmp_path / "run" / "state.json").exists()


def test_a_file_in_the_way_is_left_alone(make_plan_for: MakePlan, tmp_path: Path) -> None:
    (tmp_path / "run").write_text("my notes")
    with pytest.raises(RunFolderError, match="is a file"):
        RunFolder.create(tmp_path / "run", make_plan_for())
    assert (tmp_path / "run").read_text() == "my notes"


def test_a_folder_under_a_file_is_refused(make_plan_for: MakePlan, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    plan = replace(make_plan_for(), run_dir=tmp_path / "file" / "run")
    with pytest.raises(RunFolderError, match="lies under one"):
        RunFolder.create(plan.run_dir, plan)


@pytest.mark.skipif(sys.platform != "linux", reason="/proc takes no folders, from root either")
def test_a_place_that_cannot_be_written_is_refused(make_plan_for: MakePlan) -> None:
    plan = replace(make_plan_for(), run_dir=Path("/proc/self/run"))
    with pytest.raises(RunFolderError, match="/proc/self/run cannot be used"):
        RunFolder.create(plan.run_dir, plan)


def test_a_folder_with_anything_in_it_is_refused_and_untouched(make_plan_for: MakePlan, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.txt").write_text("final")
    with pytest.raises(RunFolderError, match=r"not empty \(it holds thesis.txt\)"):
        RunFolder.create(tmp_path / "run", make_plan_for())
    assert os.listdir(tmp_path / "run") == ["thesis.txt"]


def test_a_folder_with_a_run_says_how_to_go_on(new_run: NewRun) -> None:
    plan, folder = new_run()
    folder.release()
    before = {path: path.read_bytes() for path in folder.path.iterdir()}
    with pytest.raises(RunFolderError, match=f"loraport resume {folder.path}"):
        RunFolder.create(folder.path, plan)
    assert {path: path.read_bytes() for path in folder.path.iterdir()} == before


@pytest.mark.parametrize("there_before", [True, False])
def test_a_full_disk_leaves_no_half_made_folder(
    make_plan_for: MakePlan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, there_before: bool
) -> None:
    def full(path: Path, content: str) -> None:
        if path.name == "plan.json":
            raise RunFolderError(f"{path} cannot be written: No space left on device.")
        path.write_text(content)

    if there_before:
        (tmp_path / "run").mkdir()
    monkeypatch.setattr(folder_module, "write_atomic", full)
    with pytest.raises(RunFolderError, match="No space left"):
        RunFolder.create(tmp_path / "run", make_plan_for())
    assert (os.listdir(tmp_path / "run") == []) if there_before else not (tmp_path / "run").exists()


def test_a_folder_in_use_names_the_process_that_has_it(new_run: NewRun) -> None:
    _, folder = new_run()
    code = (
        "import sys; from pathlib import Path; from loraport.run.folder import RunFolder\n"
        "RunFolder(Path(sys.argv[1])).lock()"
    )
    other = subprocess.run([sys.executable, "-c", code, str(folder.path)], capture_output=True, text=True, timeout=20)
    assert f"RunFolderError: {folder.path} is in use by process {os.getpid()}" in other.stderr


def test_two_threads_cannot_share_a_folder_either(new_run: NewRun) -> None:
    _, folder = new_run()
    with pytest.raises(RunFolderError, match="in use"):
        RunFolder.open(folder.path).lock()
    folder.release()
    again = RunFolder.open(folder.path)
    again.lock()
    again.release()


def test_of_many_that_want_the_same_new_folder_one_gets_it(make_plan_for: MakePlan, tmp_path: Path) -> None:
    plan = make_plan_for()
    got: list[RunFolder] = []
    refused: list[RunFolderError] = []
    barrier = threading.Barrier(8)

    def attempt() -> None:
        barrier.wait()
        try:
            got.append(RunFolder.create(tmp_path / "run", plan))
        except RunFolderError as error:
            refused.append(error)

    threads = [threading.Thread(target=attempt) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (len(got), len(refused)) == (1, 7)
    assert got[0].read_state().status == "planned"
    got[0].release()


def test_the_lock_is_free_after_its_process_was_killed(new_run: NewRun) -> None:
    _, folder = new_run()
    folder.release()
    code = (
        "import sys, time; from pathlib import Path; from loraport.run.folder import RunFolder\n"
        "folder = RunFolder(Path(sys.argv[1])); folder.lock(); print('locked', flush=True); time.sleep(60)"
    )
    other = subprocess.Popen([sys.executable, "-c", code, str(folder.path)], stdout=subprocess.PIPE, text=True)
    assert other.stdout is not None
    assert other.stdout.readline() == "locked\n"
    assert folder.in_use()
    other.kill()
    other.wait()
    assert not folder.in_use()
    folder.lock()


def test_a_run_that_says_running_but_has_no_lock_has_died(new_run: NewRun) -> None:
    _, folder = new_run()
    folder.write_state(replace(folder.read_state(), status="running"))
    assert RunFolder.open(folder.path).status() == "running"
    folder.release()
    assert RunFolder.open(folder.path).status() == "died"


def test_opening_says_what_is_missing_and_which_runs_are_near(new_run: NewRun, tmp_path: Path) -> None:
    _, folder = new_run()
    with pytest.raises(RunFolderError, match=rf"is not there.\n  Runs nearby: {folder.path}"):
        RunFolder.open(tmp_path / "rnu")
    folder.state_file.unlink()
    with pytest.raises(RunFolderError, match=r"not a run folder: state.json missing"):
        RunFolder.open(folder.path)
    with pytest.raises(RunFolderError, match="is a file, not a run folder"):
        RunFolder.open(folder.spec_file)


def test_opening_where_there_are_no_runs_says_how_to_start_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(RunFolderError, match="start one with: loraport train"):
        RunFolder.open(tmp_path / "nothing")


def test_a_list_of_runs_shows_damaged_ones_and_skips_other_folders(new_run: NewRun, tmp_path: Path) -> None:
    _, folder = new_run(steps=9)
    (tmp_path / "pictures").mkdir()
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "state.json").write_text("{")
    entries = {entry.path.name: entry for entry in list_runs(tmp_path)}
    assert set(entries) == {"run", "broken"}
    assert entries["run"].cells()[:4] == ("run", "fake", "planned", "0/9")
    assert entries["run"].to_dict()["path"] == str(folder.path)
    assert entries["broken"].status == "unreadable"
    assert "damaged" in entries["broken"].cells()[-1]


def test_a_run_folder_lists_itself(new_run: NewRun) -> None:
    _, folder = new_run()
    assert [entry.path for entry in list_runs(folder.path)] == [folder.path]


def test_a_folder_that_is_not_there_has_no_runs_and_a_file_is_an_error(tmp_path: Path) -> None:
    assert list_runs(tmp_path / "runs") == []
    (tmp_path / "file").write_text("")
    with pytest.raises(RunFolderError, match="cannot be listed"):
        list_runs(tmp_path / "file")


def test_a_taken_name_is_numbered(tmp_path: Path) -> None:
    assert free_path("demo", tmp_path) == tmp_path / "demo"
    for name in ("demo", "demo-2"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "state.json").write_text("")
    (tmp_path / "demo-3").write_text("a file")
    (tmp_path / "demo-4").mkdir()  # empty, so it is free
    assert free_path("demo", tmp_path) == tmp_path / "demo-4"
