"""What going through LoraPort costs: its run against the plan's own command, started by hand in the same folder."""

from __future__ import annotations

import shutil
import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from loraport.errors import BackendError
from loraport.files import write_atomic
from loraport.plugins import plugins
from loraport.run import events
from loraport.run.record import read_events
from loraport.run.supervisor import write_files
from loraport_bench.process import own_environment, run_watched
from loraport_bench.records import Overhead
from loraport_bench.settings import Settings
from loraport_bench.tiers import make

_UNWATCHED = 3600.0  # seconds between samples: nothing but the run itself is to take time


@dataclass(frozen=True)
class _Timed:
    step: float  #: median seconds of a step after the warm-up
    run: float  #: wall seconds to the end of the training


def measure_overhead(content: dict[str, object], backend: str, settings: Settings, folder: Path) -> Overhead:
    """Run pairs of trainings, one through `loraport train` and one by the plan's files and command alone, first the one
    and then the other.

    Converting and proving are left out of the first, as nobody does them by hand. Every run begins with an empty cache.
    Raises BackendError when one of them fails.
    """
    pairs = []
    ways = (_through, _by_hand)
    for number in range(settings.overhead_pairs):
        order = ways if number % 2 == 0 else ways[::-1]
        timed = {way: way(content, backend, settings, folder) for way in order}
        pairs.append((timed[_through], timed[_by_hand]))
    steps = [round(through.step / by_hand.step - 1, 5) for through, by_hand in pairs]
    runs = [round(through.run - by_hand.run, 3) for through, by_hand in pairs]
    return Overhead(
        step_median_s=round(statistics.median(by_hand.step for _, by_hand in pairs), 5),
        step_share=round(statistics.median(steps), 5),
        run_s=round(statistics.median(by_hand.run for _, by_hand in pairs), 3),
        run_extra_s=round(statistics.median(runs), 3),
        pairs=len(pairs),
        step_shares=steps,
        run_extras_s=runs,
    )


def _through(content: dict[str, object], backend: str, settings: Settings, folder: Path) -> _Timed:
    run_dir = _fresh(folder)
    spec_file = folder / "overhead.yaml"
    write_atomic(spec_file, make(content, backend, run_dir).spec.to_yaml())
    command = [sys.executable, "-m", "loraport.cli.main", "train", str(spec_file), "--backend", backend]
    done = run_watched(
        [*command, "--out", str(run_dir)], own_environment(folder), settings.time_limit_s, _UNWATCHED, [], []
    )
    if done.code != 0:
        raise BackendError(f"A run through LoraPort failed while its overhead was measured ({done.code}).")
    told = list(read_events(run_dir / "events.jsonl"))
    converted = next(each.time for each in told if isinstance(each, events.PhaseStarted) and each.phase == "convert")
    return _Timed(_median([each for each in told if isinstance(each, events.Step)], settings), converted - done.began)


def _by_hand(content: dict[str, object], backend: str, settings: Settings, folder: Path) -> _Timed:
    run_dir = _fresh(folder)
    made = make(content, backend, run_dir)
    run_dir.mkdir()
    write_atomic(run_dir / "spec.yaml", made.spec.to_yaml())
    write_files(made, run_dir)
    reader = plugins().backend(backend)
    steps: list[events.Step] = []

    def hear(line: str) -> None:
        steps.extend(event for event in reader.read_line(line) or () if isinstance(event, events.Step))

    environment = {"PYTHONUNBUFFERED": "1", **own_environment(folder), **made.env}
    done = run_watched(made.command, environment, settings.time_limit_s, _UNWATCHED, [], [], hear=hear, cwd=run_dir)
    if done.code != 0:
        raise BackendError(f"The plan's command, started by hand, failed ({done.code}).")
    return _Timed(_median(steps, settings), done.ended - done.began)


def _fresh(folder: Path) -> Path:
    for name in ("overhead-run", "cache", "compiled"):
        shutil.rmtree(folder / name, ignore_errors=True)
    time.sleep(0.2)  # let the system settle after the run before
    return folder / "overhead-run"


def _median(steps: list[events.Step], settings: Settings) -> float:
    seconds = [step.seconds for step in steps if step.step > settings.warm_up and step.seconds is not None]
    if not seconds:
        raise BackendError("The trainer told the time of no step after the warm-up, so its overhead is not known.")
    return statistics.median(seconds)
