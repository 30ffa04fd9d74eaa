from __future__ import annotations

import sqlite3
from pathlib import Path

from loraport_ai_toolkit import control


def does_a_step(path: Path, step: int) -> tuple[int, int]:
    """What ai-toolkit does after a step: writes it as text, then reads stop and save_now and takes the latter back."""
    database = sqlite3.connect(path, isolation_level=None)
    database.execute("UPDATE Job SET step = ? WHERE id = ?", (str(step), control.ID))
    stop, save = database.execute("SELECT stop, save_now FROM Job WHERE id = ?", (control.ID,)).fetchone()
    database.execute("UPDATE Job SET save_now = ? WHERE id = ?", ("0", control.ID))
    database.close()
    return stop, save


def saves(path: Path, steps: range) -> list[int]:
    return [step for step in steps if does_a_step(path, step)[1] == 1]


def test_a_save_is_asked_for_after_each_so_many_steps_but_not_at_the_last(tmp_path: Path) -> None:
    control.create(tmp_path / "job.db", 0, 10, 3)
    assert saves(tmp_path / "job.db", range(0, 11)) == [3, 6, 9]

    control.create(tmp_path / "job.db", 0, 9, 3)
    assert saves(tmp_path / "job.db", range(0, 10)) == [3, 6]


def test_a_session_that_begins_at_a_save_does_not_save_it_again(tmp_path: Path) -> None:
    control.create(tmp_path / "job.db", 6, 12, 3)

    assert saves(tmp_path / "job.db", range(6, 13)) == [9]


def test_no_save_is_asked_for_when_there_are_to_be_none(tmp_path: Path) -> None:
    control.create(tmp_path / "job.db", 0, 10, 0)

    assert saves(tmp_path / "job.db", range(0, 11)) == []


def test_a_save_and_an_end_can_be_asked_for(tmp_path: Path) -> None:
    control.create(tmp_path / "job.db", 0, 10, 0)
    control.ask_to_save(tmp_path / "job.db")
    assert does_a_step(tmp_path / "job.db", 1) == (0, 1)

    control.ask_to_stop(tmp_path / "job.db")
    assert does_a_step(tmp_path / "job.db", 2) == (1, 0)


def test_only_a_running_job_says_what_it_does(tmp_path: Path) -> None:
    path = tmp_path / "job.db"
    control.create(path, 0, 10, 0)
    assert control.what_it_does(path) == ""
    for status, info, told in (("running", "Loading VAE", "Loading VAE"), ("error", "it broke", "")):
        database = sqlite3.connect(path, isolation_level=None)
        database.execute("UPDATE Job SET status = ?, info = ?", (status, info))
        database.close()
        assert control.what_it_does(path) == told
