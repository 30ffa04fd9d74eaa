from __future__ import annotations

import contextlib
import sqlite3
from pathlib import Path

import pytest

from loraport.errors import BackendError, DataError, Interrupted, LoraPortError, OutOfMemoryError, SpecError
from loraport.run.errors_line import encode_error
from loraport.run.events import Checkpoint, Progress, Resumed, Step, Validation, Warn
from loraport_ai_toolkit.losses import Steps
from loraport_ai_toolkit.progress import Reader, diagnose, explain_failure, phase_of


def log(path: Path, rows: list[tuple[int, str, float, float]]) -> Path:
    """A log database as ai-toolkit's UILogger writes it; rows are (step from 0, key, value, time)."""
    with contextlib.closing(sqlite3.connect(path)) as database, database:
        database.execute("CREATE TABLE IF NOT EXISTS steps (step INTEGER PRIMARY KEY, wall_time REAL NOT NULL)")
        database.execute(
            "CREATE TABLE IF NOT EXISTS metrics (step INTEGER, key TEXT, value_real REAL, value_text TEXT, "
            "PRIMARY KEY (step, key))"
        )
        for step, key, value, time in rows:
            database.execute("INSERT OR REPLACE INTO steps VALUES (?, ?)", (step, time))
            database.execute("INSERT OR REPLACE INTO metrics VALUES (?, ?, ?, NULL)", (step, key, value))
    return path


def bar(done: int, loss: str) -> str:
    return f"a name:  20%|██        | {done}/5 [00:01<00:04,  1.00it/s, lr: 1.0e-04 loss: {loss}]"


def test_steps_come_from_the_database_and_the_first_from_the_bar(tmp_path: Path) -> None:
    database = tmp_path / "loss_log.db"
    steps = Steps(database, total=5, images_per_step=2, begun=100.0)
    log(database, [])
    steps.read_bar(bar(0, "2.226e+00"))
    steps.read_bar(bar(1, "2.226e+00"))
    assert list(steps.new()) == []
    log(database, [(1, "loss/loss", 1.25, 101.0), (1, "learning_rate", 1e-4, 101.0)])
    log(database, [(2, "loss/loss", 1.5, 105.0), (2, "learning_rate", 2e-4, 105.0)])

    told = [event for event in steps.new() if isinstance(event, Step)]

    assert [(one.step, one.loss, one.lr, one.seconds) for one in told] == [
        (1, 2.226, 1e-4, None),
        (2, 1.25, 1e-4, None),
        (3, 1.5, 2e-4, 4.0),
    ]
    assert told[2].images_per_second == 0.5
    assert [one.time for one in told[1:]] == [101.0, 105.0]  # when they were done, however late they are read
    steps.paused(106.0)
    log(database, [(3, "loss/loss", 1.5, 107.0), (4, "loss/loss", 1.5, 109.0)])
    assert [one.seconds for one in steps.new() if isinstance(one, Step)] == [None, 2.0]  # the first one's holds a save
    assert list(steps.new(last=True)) == []


def test_without_a_database_the_bar_tells_each_step_once(tmp_path: Path) -> None:
    steps = Steps(tmp_path / "none.db", total=5, images_per_step=1, begun=0.0)
    told = []
    for line in (bar(0, "1.0e+00"), bar(1, "1.0e+00"), bar(1, "2.0e+00"), bar(2, "3.0e+00"), bar(3, "3.0e+00")):
        steps.read_bar(line)
        told += [(one.step, one.loss) for one in steps.new() if isinstance(one, Step)]

    assert told == [(1, 1.0), (2, 2.0), (3, 3.0)]


def test_rows_of_an_earlier_session_are_not_told_again(tmp_path: Path) -> None:
    database = log(tmp_path / "loss_log.db", [(7, "loss/loss", 9.0, 50.0), (7, "learning_rate", 1e-4, 50.0)])
    steps = Steps(database, total=20, images_per_step=1, begun=100.0)
    steps.begin(5)

    assert list(steps.new()) == []


def test_a_loss_that_is_no_number_is_told_as_none_and_counted(tmp_path: Path) -> None:
    steps = Steps(tmp_path / "none.db", total=5, images_per_step=1, begun=0.0)
    for done, loss in ((0, "1.0e+00"), (1, "0.000e+00")):
        if done:
            steps.read_bar("loss is nan")
        steps.read_bar(bar(done, loss))

    assert [one.loss for one in steps.new() if isinstance(one, Step)] == [1.0, None]
    assert steps.nan_in_a_row() == 1


def test_held_out_losses_are_told(tmp_path: Path) -> None:
    database = log(tmp_path / "loss_log.db", [(1, "val/loss", 0.5, 9.0), (1, "learning_rate", 1e-4, 9.0)])
    steps = Steps(database, total=5, images_per_step=1, begun=1.0)

    assert [(one.step, one.loss) for one in steps.new() if isinstance(one, Validation)] == [(2, 0.5)]
    assert [one for one in steps.new() if isinstance(one, Validation)] == []


def test_a_checkpoint_is_told_when_its_optimizer_is_saved_too() -> None:
    reader = Reader()
    path = "backend/output/a/a_000000250.safetensors"

    assert list(reader.read(f"Saved checkpoint to {path}")) == []
    (event,) = reader.read("Saved optimizer to backend/output/a/optimizer.pt")

    assert isinstance(event, Checkpoint)
    assert (event.step, event.path) == (250, path)


def test_the_final_file_is_no_checkpoint() -> None:
    reader = Reader()

    assert list(reader.read("Saved checkpoint to backend/output/a/a.safetensors")) == []
    assert list(reader.read("Saved optimizer to backend/output/a/optimizer.pt")) == []


def test_what_is_cached_and_resumed_is_told() -> None:
    (progress,) = Reader().read("Caching latents to disk:  10%|█         | 1/10 [00:00<00:03,  2.37it/s]")
    (resumed,) = Reader().read("Found step 301 in metadata, starting from there")

    assert isinstance(progress, Progress)
    assert (progress.done, progress.total) == (1, 10)
    assert isinstance(resumed, Resumed)
    assert resumed.step == 301


def test_each_step_skipped_for_memory_is_a_warning() -> None:
    reader = Reader()
    line = "# OOM during training step, skipping batch 1/3 #"

    warnings = [*reader.read(line), *reader.read(line)]

    assert [type(one) for one in warnings] == [Warn, Warn]


@pytest.mark.parametrize(
    ("words", "phase"),
    [
        ("Loading VAE", "load"),
        ("Loading dataset", "cache"),
        ("Training", "train"),
        ("Generating images - 1/4", "sample"),
    ],
)
def test_phases_come_from_what_the_job_says(words: str, phase: str) -> None:
    found = phase_of(words)

    assert found is not None
    assert found.phase == phase


TRACE = """Traceback (most recent call last):
  File "/x/run.py", line 100, in main
    job.run()
  File "/x/toolkit/thing.py", line 7, in load
    raise
{error}"""


@pytest.mark.parametrize(
    ("error", "kind", "says"),
    [
        (
            "RuntimeError: OOM during training step 3 times in a row, aborting training",
            OutOfMemoryError,
            "out of memory",
        ),
        ("torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2 GiB", OutOfMemoryError, "2 GiB"),
        ("huggingface_hub.errors.GatedRepoError: 403 Client Error.", DataError, "gated"),
        ("huggingface_hub.errors.LocalEntryNotFoundError: cannot find the file", DataError, "could not be downloaded"),
        ("huggingface_hub.errors.RepositoryNotFoundError: 404", DataError, "no such checkpoint"),
        ("ModuleNotFoundError: No module named 'oyaml'", BackendError, "oyaml"),
        ("RuntimeError: Error(s) in loading state_dict for Ideogram4Transformer2DModel:", DataError, "do not fit"),
        ("KeyError: 'nf4'", SpecError, "'nf4'"),
        ("ValueError: something new", BackendError, "something new"),
    ],
)
def test_each_way_to_fail_is_one_error_with_the_lines_that_matter(
    error: str, kind: type[LoraPortError], says: str
) -> None:
    found = diagnose(1, ["lots of", "other lines", *TRACE.format(error=error).splitlines()])

    assert type(found) is kind
    assert says in str(found)
    assert "/x/toolkit/thing.py" in str(found)
    assert "other lines" not in str(found)
    assert found.hint


def test_a_killed_trainer_ran_out_of_memory() -> None:
    assert isinstance(diagnose(-9, ["Training"]), OutOfMemoryError)


def test_the_error_the_launcher_told_is_the_one() -> None:
    found = explain_failure(130, encode_error(Interrupted("Stopped after step 7.")) + "\nmore")

    assert isinstance(found, Interrupted)
    assert found.message == "Stopped after step 7."
