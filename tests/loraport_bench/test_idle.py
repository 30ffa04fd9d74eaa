"""Before a run: the card is idle, and nobody else measures."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from fake_driver import Driver

from loraport.errors import BackendError, RunFolderError
from loraport_bench.idle import alone_on_machine, machine, wait_until_idle

HOLDER = """
import sys, time
from loraport_bench.idle import alone_on_machine
with alone_on_machine("a run of mine", wait=False):
    print("held", flush=True)
    time.sleep(float(sys.argv[1]))
"""


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> Driver:
    made = Driver()
    monkeypatch.setitem(sys.modules, "pynvml", made)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr("loraport_bench.idle._POLL", 0.01)
    return made


def test_the_machine_is_described_with_its_card(driver: Driver) -> None:
    told = machine()
    assert (told.card, told.driver, told.compute_capability, told.cards) == ("Fake Card", "999.1", (9, 0), 1)
    assert told.cores >= 1
    assert told.memory_bytes > 10**8
    assert told.processor


def test_cards_that_are_hidden_are_not_waited_for(driver: Driver, monkeypatch: pytest.MonkeyPatch) -> None:
    driver.used = 4 * 2**30
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert wait_until_idle(1, patience=0) is None
    assert machine().card is None


def test_a_card_that_becomes_idle_is_waited_for(driver: Driver) -> None:
    driver.used, driver.percent = 4 * 2**30, 90

    def finish() -> None:
        time.sleep(0.2)
        driver.percent = 0
        driver.used = 5 * 2**20

    thread = threading.Thread(target=finish)
    thread.start()
    idle = wait_until_idle(1, patience=10)
    thread.join()
    assert idle is not None
    assert idle.waited_s >= 0.15
    assert (idle.utilisation_percent, idle.used_bytes, idle.processes) == (0, 5 * 2**20, 0)


def test_a_card_that_stays_busy_is_refused_unless_that_is_wanted(driver: Driver) -> None:
    driver.used, driver.processes = 4 * 2**30, {1: 4 * 2**30}
    with pytest.raises(BackendError, match=r"not idle: 0 % in use, 4\.0 GiB taken, by 1 process\."):
        wait_until_idle(1, patience=0.05)
    idle = wait_until_idle(1, patience=0.05, insist=False)
    assert idle is not None
    assert idle.processes == 1


def test_a_card_that_shares_the_hosts_memory_is_idle_when_nothing_runs_on_it(driver: Driver) -> None:
    driver.unsupported = {"nvmlDeviceGetMemoryInfo"}
    idle = wait_until_idle(1, patience=0)
    assert idle is not None
    assert (idle.used_bytes, idle.processes) == (None, 0)
    assert machine().card_bytes is None
    driver.processes = {1: None}
    with pytest.raises(BackendError, match=r"not idle: 0 % in use, by 1 process\."):
        wait_until_idle(1, patience=0)


def test_a_card_that_is_not_there_is_not_waited_for(driver: Driver, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "7")
    assert wait_until_idle(1, patience=0) is None
    assert machine().card is None


def test_the_lock_is_held_against_other_processes_and_given_back_when_one_is_killed(tmp_path: Path) -> None:
    process = subprocess.Popen([sys.executable, "-c", HOLDER, "60"], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    with pytest.raises(RunFolderError, match="a run of mine"), alone_on_machine("another", wait=False):
        pass
    process.kill()
    process.wait()
    with alone_on_machine("another", wait=False):
        pass


def test_the_lock_that_another_user_made_in_a_shared_folder_is_opened(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = os.open

    def protected(path: Any, flags: int, *more: Any) -> int:
        """As Linux does in /tmp where fs.protected_regular is set."""
        if flags & os.O_CREAT and Path(path).exists():
            raise PermissionError(13, "Permission denied")
        return opened(path, flags, *more)

    monkeypatch.setattr("loraport_bench.idle.os.open", protected)
    for _ in range(2):
        with alone_on_machine("a run", wait=False):
            pass


def test_a_queue_waits_for_the_lock(tmp_path: Path) -> None:
    process = subprocess.Popen([sys.executable, "-c", HOLDER, "0.3"], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    process.stdout.readline()
    started = time.monotonic()
    with alone_on_machine("another", wait=True):
        assert time.monotonic() - started > 0.05
    process.wait()
