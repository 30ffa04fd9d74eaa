"""What going through LoraPort costs: its run against the plan's own command, started by hand in the same folder."""

from __future__ import annotations

import shutil
import statistics
import sys
import time
from pathlib import Path

from pydantic import TypeAdapter

from loraport.errors import BackendError
from loraport.files import write_atomic
from loraport.plugins import plugins
from loraport.run import events
from loraport.run.record import read_events
from loraport.run.supervisor import write_files
from loraport_bench import records as r
from loraport_bench.process import own_environment, run_watched
from loraport_bench.settings import Settings
from loraport_bench.tiers import make
from loraport_bench.told import sort_out

_UNWATCHED = 3600.0  # seconds between samples: nothing but the run itself is to take time


class _Timed(r.Data):
    """Seconds of a run up to the end of its training."""

    step: float  #: median of the steps after the warm-up
    run: float
    phases: dict[r.PhaseName, float]


_PAIRS = TypeAdapter(list[tuple[_Timed, _Timed]])


def measure_overhead(content: dict[str, object], backend: str, settings: Settings, folder: Path) -> r.Overhead:
    """Run pairs of trainings, one through `loraport train` and one by the plan's files and command alone, first the one
    and then the other. Pairs that are in `folder` already, because this was cut off, are not run again.

    Converting and proving are left out of the first, as nobody does them by hand. Every run begins with an empty cache.
    Raises BackendError when one of them fails, and Interrupted.
    """
    file, ways = folder / "pairs.json", (_through, _by_hand)
    pairs = _PAIRS.validate_json(file.read_bytes()) if file.exists() else []
    for number in range(len(pairs), settings.overhead_pairs):
        order = ways if number % 2 == 0 else ways[::-1]
        timed = {way: way(content, backend, settings, folder) for way in order}
        pairs.append((timed[_through], timed[_by_hand]))
        write_atomic(file, _PAIRS.dump_json(pairs))
    steps = [round(through.step / by_hand.step - 1, 5) for through, by_hand in pairs]
    runs = [round(through.run - by_hand.run, 3) for through, by_hand in pairs]
    return r.Overhead(
        step_median_s=round(statistics.median(by_hand.step for _, by_hand in pairs), 5),
        step_share=round(statistics.median(steps), 5),
        run_s=round(statistics.median(by_hand.run for _, by_hand in pairs), 3),
        run_extra_s=round(statistics.median(runs), 3),
        pairs=len(pairs),
        step_shares=steps,
        run_extras_s=runs,
        phase_extras_s=_phase_extras(pairs),
    )


def _phase_extras(pairs: list[tuple[_Timed, _Timed]]) -> dict[r.PhaseName, float]:
    names = dict.fromkeys(name for pair in pairs for timed in pair for name in timed.phases)
    extra = {
        name: [through.phases.get(name, 0.0) - by_hand.phases.get(name, 0.0) for through, by_hand in pairs]
        for name in names
    }
    return {name: round(statistics.median(seconds), 3) for name, seconds in extra.items()}


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
    converts = next(
        at for at, each in enumerate(told) if isinstance(each, events.PhaseStarted) and each.phase == "convert"
    )
    return _timed(told[:converts], done.began, told[converts].time, settings)


def _by_hand(content: dict[str, object], backend: str, settings: Settings, folder: Path) -> _Timed:
    run_dir = _fresh(folder)
    made = make(content, backend, run_dir)
    run_dir.mkdir()
    write_atomic(run_dir / "spec.yaml", made.spec.to_yaml())
    write_files(made, run_dir)
    reader = plugins().backend(backend)
    told: list[events.Event] = []
    environment = {"PYTHONUNBUFFERED": "1", **own_environment(folder), **made.env}
    hear = lambda line: told.extend(reader.read_line(line) or ())  # noqa: E731
    done = run_watched(made.command, environment, settings.time_limit_s, _UNWATCHED, [], [], hear=hear, cwd=run_dir)
    if done.code != 0:
        raise BackendError(f"The plan's command, started by hand, failed ({done.code}).")
    return _timed(told, done.began, done.ended, settings)


def _timed(told: list[events.Event], began: float, ended: float, settings: Settings) -> _Timed:
    found = sort_out(told, began, ended)
    seconds = [step.seconds for step in found.steps if step.step > settings.warm_up and step.seconds is not None]
    if not seconds:
        raise BackendError("The trainer told the time of no step after the warm-up, so its overhead is not known.")
    return _Timed(step=statistics.median(seconds), run=ended - began, phases=found.phases())


def _fresh(folder: Path) -> Path:
    for name in ("overhead-run", "cache", "compiled"):
        shutil.rmtree(folder / name, ignore_errors=True)
    time.sleep(0.2)  # let the system settle after the run before
    return folder / "overhead-run"
