"""What is seen of a process tree from outside: real processes; the card's driver is a stand-in."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from fake_driver import Driver

from loraport_bench.idle import machine, wait_until_idle
from loraport_bench.nvml import used_bytes, visible_cards
from loraport_bench.sampling import CardSample, TreeSampler, energy_between, size_of, throttled

MEGABYTE = 2**20
ASKED = [
    "nvmlDeviceGetMemoryInfo",
    "nvmlDeviceGetComputeRunningProcesses",
    "nvmlDeviceGetClockInfo",
    "nvmlDeviceGetPowerUsage",
    "nvmlDeviceGetTemperature",
    "nvmlDeviceGetUtilizationRates",
    "nvmlDeviceGetCurrentClocksThrottleReasons",
    "nvmlDeviceGetTotalEnergyConsumption",
    "nvmlDeviceGetCudaComputeCapability",
]

#: Starts a child that holds 60 MB and writes 8 MB, which the parent outlives.
TREE = """
import subprocess, sys, time
child = "held = b'1' * 60_000_000; f = open(sys.argv[1], 'wb'); f.write(b'1' * 8_000_000); f.flush(); time.sleep(0.7)"
subprocess.run([sys.executable, "-c", "import os, sys, time; " + child + "; os.fsync(f.fileno())", sys.argv[1]])
time.sleep(0.7)
"""


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> Driver:
    made = Driver()
    monkeypatch.setitem(sys.modules, "pynvml", made)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    return made


def test_memory_and_disk_of_children_count_also_when_they_have_ended(tmp_path: Path) -> None:
    process = subprocess.Popen([sys.executable, "-c", TREE, str(tmp_path / "written")])
    with TreeSampler(process.pid, 0.02, [], [tmp_path]) as sampler:
        process.wait()
    seen = sampler.samples
    most = max(used for _, used in seen.host)
    assert 60_000_000 < most < 200_000_000
    after = [used for moment, used in seen.host if moment > max(m for m, used in seen.host if used == most) + 0.3]
    assert min(used for used in after if used) < 40_000_000
    assert seen.written is not None
    if Path("/proc/self/io").exists() and seen.written:  # a file system in memory stores nothing
        assert seen.written >= 8_000_000
    assert max(size for _, size in seen.sizes) == 8_000_000
    assert seen.device == seen.own == seen.cards == []


def test_samples_come_at_the_interval_that_was_asked_for(tmp_path: Path) -> None:
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(1.5)"])
    with TreeSampler(process.pid, 0.05, []) as sampler:
        process.wait()
    gaps = sorted(b[0] - a[0] for a, b in zip(sampler.samples.host, sampler.samples.host[1:], strict=False))
    assert gaps[len(gaps) // 2] == pytest.approx(0.05, abs=0.03)


def test_the_memory_of_the_trees_own_processes_is_told_apart_from_the_rest_of_the_card(driver: Driver) -> None:
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(1.2)"])
    driver.used = 900 * MEGABYTE
    driver.processes = {process.pid: 300 * MEGABYTE, os.getpid(): 500 * MEGABYTE}
    driver.throttle = 0x4
    with TreeSampler(process.pid, 0.02, ["0"]) as sampler:
        process.wait()
    seen = sampler.samples
    assert seen.tells_processes
    assert max(used for _, used in seen.own) == 300 * MEGABYTE
    assert max(used for _, used in seen.device) == 900 * MEGABYTE
    (card,) = seen.cards
    assert {(one.clock_mhz, one.power_w, one.temperature_c) for one in card} == {(1800, 250, None)}
    assert throttled(card) == ["power limit"]
    spent = energy_between(card, card[0].time, card[0].time + 0.6)
    assert spent == pytest.approx(250 * 0.6, rel=0.15)


def test_a_driver_that_names_no_process_of_ours_leaves_the_whole_card(driver: Driver) -> None:
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(0.3)"])
    driver.processes = {os.getpid(): 500 * MEGABYTE, process.pid: None}  # None: the driver does not tell how much
    with TreeSampler(process.pid, 0.02, ["0"]) as sampler:
        process.wait()
    assert not sampler.samples.tells_processes


def test_every_card_of_a_run_is_sampled_and_one_that_is_not_there_is_left_out(driver: Driver) -> None:
    driver.cards, driver.used = 2, 100 * MEGABYTE
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(0.3)"])
    with TreeSampler(process.pid, 0.02, ["0", "1", "2", "GPU-unknown"]) as sampler:
        process.wait()
    assert [bool(card) for card in sampler.samples.cards] == [True, True]
    assert max(used for _, used in sampler.samples.device) == 200 * MEGABYTE


def test_what_the_driver_keeps_for_itself_is_not_in_use(driver: Driver) -> None:
    driver.used, driver.reserved = 5 * MEGABYTE, 700 * MEGABYTE
    assert used_bytes("card 0") == 5 * MEGABYTE
    driver.old = True  # it knows the first version of the answer alone
    assert used_bytes("card 0") == 705 * MEGABYTE


@pytest.mark.parametrize("lacking", [[name] for name in ASKED] + [ASKED], ids=[*ASKED, "everything"])
def test_a_card_that_does_not_tell_something_gives_everything_else(driver: Driver, lacking: list[str]) -> None:
    driver.unsupported = set(lacking)
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(0.2)"])
    driver.processes = {process.pid: 300 * MEGABYTE}
    with TreeSampler(process.pid, 0.02, ["0"]) as sampler:
        process.wait()
    seen = sampler.samples
    assert bool(seen.device) == ("nvmlDeviceGetMemoryInfo" not in lacking)
    assert bool(seen.own) == seen.tells_processes == ("nvmlDeviceGetComputeRunningProcesses" not in lacking)
    (card,) = seen.cards
    told = {
        "nvmlDeviceGetClockInfo": {one.clock_mhz for one in card},
        "nvmlDeviceGetPowerUsage": {one.power_w for one in card},
        "nvmlDeviceGetTemperature": {one.temperature_c for one in card},
        "nvmlDeviceGetUtilizationRates": {one.utilisation_percent for one in card},
        "nvmlDeviceGetCurrentClocksThrottleReasons": {one.throttle for one in card},
    }
    assert {name for name, values in told.items() if values == {None}} == told.keys() & set(lacking)
    counted = energy_between(card, card[0].time, card[0].time) is not None or len(card) < 2
    assert counted or "nvmlDeviceGetTotalEnergyConsumption" in lacking
    assert (throttled(card) is None) == ("nvmlDeviceGetCurrentClocksThrottleReasons" in lacking)
    wait_until_idle(1, patience=0, insist=False)
    assert machine().card == "Fake Card"


def test_energy_between_samples_is_in_proportion() -> None:
    def at(moment: float, joules: float | None) -> CardSample:
        return CardSample(moment, None, None, None, None, None, joules, 0)

    samples = [at(0, 100), at(1, None), at(2, 300), at(4, 340)]
    assert energy_between(samples, 0, 4) == 240
    assert energy_between(samples, 1, 3) == 120
    assert energy_between(samples[:2], 0, 1) is None


def test_links_count_for_nothing_in_the_size_of_a_folder(tmp_path: Path) -> None:
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "a" / "b" / "file").write_bytes(b"1" * 1000)
    (tmp_path / "a" / "link").symlink_to(tmp_path / "a" / "b" / "file")
    (tmp_path / "a" / "loop").symlink_to(tmp_path / "a")
    assert size_of(tmp_path) == 1000
    assert size_of(tmp_path / "gone") == 0


def test_the_cards_are_those_that_a_run_would_use(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3, GPU-7")
    assert visible_cards(1) == ["3"]
    assert visible_cards(2) == ["3", "GPU-7"]
    for hidden in ("", "-1"):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", hidden)
        assert visible_cards(1) == []
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    assert visible_cards(2) == ["0", "1"]
