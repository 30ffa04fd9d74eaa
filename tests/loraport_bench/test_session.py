"""The runs of a session: the cards that they go to, and that none is left when the session is stopped."""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from loraport.errors import Interrupted, SpecError
from loraport_bench import session
from loraport_bench.measure import Bench
from loraport_bench.process import Running
from loraport_bench.results import DataFile
from loraport_bench.rows import Row
from loraport_bench.session import Session, places


@pytest.mark.parametrize(
    ("visible", "cards", "asked", "expected"),
    [
        (None, 4, (4, 2), ["0", "0", "1", "1", "2", "2", "3", "3"]),
        ("2, GPU-abc,5", 8, (2, 1), ["2", "GPU-abc"]),
        ("3", 8, (1, 2), [None, None]),  # a run takes what this process was given
        (None, 0, (2, 1), ["0", "1"]),  # no driver: on the CPU, where the names mean nothing
    ],
)
def test_runs_go_to_the_cards_that_this_process_may_use(
    visible: str | None,
    cards: int,
    asked: tuple[int, int],
    expected: list[str | None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(session, "machine", lambda: {"cards": cards})
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert places(*asked) == expected


@pytest.mark.parametrize(("visible", "cards"), [("0,0,1,1", 8), (None, 2)])
def test_more_cards_than_there_are_is_an_error(
    visible: str | None, cards: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(session, "machine", lambda: {"cards": cards})
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    with pytest.raises(SpecError, match="--gpus: 4 are asked for, and there are 2: 0, 1"):
        places(4, 1)


def _wait_for(condition: Callable[[], Any]) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_stopping_ends_what_other_threads_wait_for_and_starts_nothing_more(tmp_path: Path) -> None:
    running, ended = Running(), []

    def wait(number: int) -> None:
        code = f"import os, time; open({str(tmp_path / str(number))!r}, 'w').write(str(os.getpid())); time.sleep(60)"
        try:
            running.run([sys.executable, "-c", code], os.environ)
        except Interrupted:
            ended.append(number)

    threads = [threading.Thread(target=wait, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    _wait_for(
        lambda: all((tmp_path / str(number)).exists() and (tmp_path / str(number)).read_text() for number in (0, 1))
    )
    pids = [int((tmp_path / str(number)).read_text()) for number in (0, 1)]
    running.stop()
    for thread in threads:
        thread.join(30)
    assert sorted(ended) == [0, 1]
    assert not any(psutil.pid_exists(pid) for pid in pids)
    with pytest.raises(Interrupted):
        running.run([sys.executable, "-c", ""], os.environ)


def test_a_stopped_session_records_no_run_as_failed_and_ends_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One of two runs is interrupted: the other is ended too, and the file holds what was done."""
    begun: list[tuple[str, int]] = []

    def run(row: Row, bench: Bench, held: Any) -> dict[str, Any]:
        begun.append((row.name, held.seed))
        if row.name == "quick":
            return {"status": "ok"}
        if row.name == "interrupted":
            _wait_for(lambda: ("waits", 0) in begun)
            raise Interrupted("Stopped.")
        bench.running.run([sys.executable, "-c", "import time; time.sleep(60)"], os.environ)
        return {"status": "failed"}

    monkeypatch.setattr(session, "train_row", run)
    monkeypatch.setattr(session, "make_dataset", lambda *arguments: tmp_path)
    monkeypatch.setattr(session, "_settings", lambda row, bench: {})
    file = DataFile(tmp_path / "rows.jsonl")
    bench = Bench(tmp_path, tmp_path, tmp_path, steps=3, warm_up=0)
    rows = [Row(name, {}) for name in ("quick", "interrupted", "waits")]
    with pytest.raises(Interrupted):
        Session(bench, file, lambda text: None).quality(rows, [0, 1, 2], [None, None])
    assert {name for name, _ in file.rows} == {"quick"}
    assert ("waits", 2) not in begun
