"""The job database: how ai-toolkit's web interface asks a running job to save or to stop, used here for the same.

Its `diffusion_trainer` looks into the table Job after every optimizer step (extensions_built_in/sd_trainer/
DiffusionTrainer.py): it writes `step`, then ends when `stop` is 1, then saves when `save_now` is 1. A save asked for in
this way holds exactly `step` optimizer steps. Its own save_every is looked at inside the step, whose number is then one
too low: such a save says 250 and holds 251 steps, and a resumed run does one of them twice.
"""

from __future__ import annotations

import contextlib
import sqlite3
from pathlib import Path

#: The job's id, which ai-toolkit takes from the environment.
ID_VARIABLE = "AITK_JOB_ID"
ID = "loraport"


def create(path: Path, step: int, steps: int, save_every: int) -> None:
    """A new database for a session that begins at `step`; whatever was there is removed.

    The trigger asks for a save after each `save_every` optimizer steps (0: never), except the last one.
    """
    for old in (path, *(path.with_name(path.name + end) for end in ("-wal", "-shm", "-journal"))):
        old.unlink(missing_ok=True)
    with contextlib.closing(sqlite3.connect(path)) as database, database:
        database.execute(
            "CREATE TABLE Job (id TEXT PRIMARY KEY, status TEXT, info TEXT, speed_string TEXT, step INTEGER NOT NULL, "
            "stop INTEGER NOT NULL DEFAULT 0, return_to_queue INTEGER NOT NULL DEFAULT 0, "
            "save_now INTEGER NOT NULL DEFAULT 0, sample_now INTEGER NOT NULL DEFAULT 0)"
        )
        database.execute("INSERT INTO Job (id, status, step) VALUES (?, 'queued', ?)", (ID, step))
        if save_every:
            # It only fires when a step was done, not when the session tells where it begins.
            database.execute(
                "CREATE TRIGGER save_in_time AFTER UPDATE OF step ON Job "
                f"WHEN NEW.step = OLD.step + 1 AND NEW.step % {int(save_every)} = 0 AND NEW.step < {int(steps)} "
                "BEGIN UPDATE Job SET save_now = 1 WHERE id = NEW.id; END"
            )


def ask_to_save(path: Path) -> None:
    """A save after the step that is being done."""
    _set(path, "save_now")


def ask_to_stop(path: Path) -> None:
    """An end after the step, or the save, that is being done; the trainer then exits with code 1."""
    _set(path, "stop")


def what_it_does(path: Path) -> str:
    """What the job says that it is doing, in ai-toolkit's words; empty when it says nothing, or has ended."""
    with contextlib.closing(_open(path)) as database:
        # Once it has ended, it says there why.
        row = database.execute("SELECT info FROM Job WHERE id = ? AND status = 'running'", (ID,)).fetchone()
    return str(row[0]) if row and row[0] else ""


def _set(path: Path, column: str) -> None:
    with contextlib.closing(_open(path)) as database, database:
        database.execute(f"UPDATE Job SET {column} = 1 WHERE id = ?", (ID,))


def _open(path: Path) -> sqlite3.Connection:
    return sqlite3.connect(path, timeout=30)
