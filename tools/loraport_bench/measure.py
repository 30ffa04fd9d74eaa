"""One row: a process is started, watched, and what it tells is read."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import statistics
import sys
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from loraport.errors import BackendError, Interrupted, LoraPortError, OutOfMemoryError, SpecError
from loraport.files import write_atomic
from loraport.run import events
from loraport.run.events import Event
from loraport.run.record import read_events
from loraport.spec.yaml_text import dump_yaml
from loraport_bench.data import child, make_dataset
from loraport_bench.monitor import DeviceMonitor
from loraport_bench.process import Running
from loraport_bench.rows import Row, StockRow

_MESSAGE = 400  # characters of a failure that are kept
_TOO_LARGE = "does not fit the card"  # what a run says that is not begun because of its predicted memory
#: What a run that may share its card and cores says nothing of.
_OF_SPEED = ("step_s", "first_steps_extra_s", "card_peak_gib", "phases_s")


@dataclass(frozen=True)
class Bench:
    """What all rows of a session share."""

    checkpoint: Path
    images: Path
    work: Path
    steps: int  #: measured
    warm_up: int  #: before them
    python: str = sys.executable
    running: Running = field(default_factory=Running, compare=False)


@dataclass(frozen=True)
class Held:
    """For the held-out loss: the seed, the card of several on which the run goes, and how many runs share the machine's
    cores."""

    seed: int
    card: str | None = None
    at_once: int = 1


def train_row(row: Row, bench: Bench, held: Held | None = None) -> dict[str, Any]:
    """Train a row by `loraport train` and return its numbers; `status` says whether it came to its end."""
    name = row.name if held is None else f"{row.name}-{held.seed}"
    run_dir, cache = bench.work / "runs" / name, bench.work / "features"
    if row.limit_gib:  # the caching passes are part of what has to fit
        cache = bench.work / f"features-{name}"
        shutil.rmtree(cache, ignore_errors=True)
    shutil.rmtree(run_dir, ignore_errors=True)
    run_dir.parent.mkdir(parents=True, exist_ok=True)
    file = run_dir.with_suffix(".yaml")
    write_atomic(file, dump_yaml(spec_of(row, bench, held)))
    environment = {**os.environ, "LORAPORT_CACHE": str(cache)}
    if held and held.card:
        environment["CUDA_VISIBLE_DEVICES"] = held.card
    if held and held.at_once > 1:
        for variable in ("OMP_NUM_THREADS", "TORCHINDUCTOR_COMPILE_THREADS"):
            environment.setdefault(variable, str(max(1, _cores() // held.at_once)))
    command = [bench.python, "-m", "loraport.cli.main", "train", str(file), "--backend", "native"]
    try:
        with DeviceMonitor(held.card if held else None) as monitor:
            code, said = bench.running.run([*command, "--out", str(run_dir), "--json"], environment)
        if code == Interrupted.exit_code:
            raise Interrupted(f"Stopped while measuring {name}; the same command goes on with that row.")
        told = list(read_events(run_dir / "events.jsonl")) if (run_dir / "events.jsonl").exists() else []
        numbers = summarise(told, bench.warm_up, monitor)
        if code:
            failed = [event.message for event in told if isinstance(event, events.Failed)]
            with contextlib.suppress(OSError):  # what else there is to learn of a failure
                shutil.copy(run_dir / "log.txt", run_dir.with_suffix(".log"))
            message = (failed[-1] if failed else said[-_MESSAGE:]).replace(str(bench.work), "…")
            return {**_failure(code, message), **numbers}
        if held:
            numbers = {name: value for name, value in numbers.items() if name not in _OF_SPEED}
        return {"status": "ok", **numbers}
    finally:
        shutil.rmtree(run_dir, ignore_errors=True)
        if row.limit_gib:
            shutil.rmtree(cache, ignore_errors=True)


def spec_of(row: Row, bench: Bench, held: Held | None = None) -> dict[str, Any]:
    """The spec of a row. Each image comes once for each of a batch, so that every batch is whole."""
    steps = bench.warm_up + bench.steps
    data = make_dataset(bench.images, bench.work, row.resolution, row.text, bench.checkpoint)
    return {
        "version": 1,
        "name": row.name,
        "model": {"checkpoint": str(bench.checkpoint), "dtype": "bf16"},
        "dataset": {"path": str(data), "caption_ext": "txt", "resolution": row.resolution, "repeats": row.batch},
        "lora": {"rank": row.rank, "targets": "attention+mlp"},
        "train": {
            "steps": steps,
            "batch_size": row.batch,
            "optimizer": row.optimizer,
            "seed": held.seed if held else 0,
            **({"gpus": row.gpus} if row.gpus > 1 else {}),
        },
        "memory": row.memory,
        "save": {"every": 0 if held else max(1, steps // 2), "keep": 1},
        "validation": {"every": steps if held else 0, "images": 2},
        "backend": {"options": {"memory_limit_gib": row.limit_gib} if row.limit_gib else {}},
    }


def summarise(told: Iterable[Event], warm_up: int, monitor: DeviceMonitor) -> dict[str, Any]:
    """The numbers in a run's events. A step lasts from the end of the one before to its own: data, logging and
    checkpoints are in it."""
    seconds: dict[int, float] = {}
    phases: defaultdict[str, float] = defaultdict(float)
    spans: defaultdict[str, list[float]] = defaultdict(list)
    held_out: list[float] = []
    peaks: dict[str, float] = {}  # of the passes before training, by phase
    before: float | None = None
    phase: events.PhaseStarted | None = None
    last: events.Step | None = None
    first_seconds: list[float] = []
    for event in told:
        if isinstance(event, events.PhaseStarted | events.Finished | events.Failed):
            if phase is not None:
                phases[phase.phase] += event.time - phase.time
                spans[phase.phase] += [phase.time, event.time]
            phase = event if isinstance(event, events.PhaseStarted) else None
            before = None
        elif isinstance(event, events.Step):
            if event.step <= warm_up:
                first_seconds.append(event.seconds or 0.0)
            elif before is not None:
                seconds[event.step] = event.time - before
            before, last = event.time, event
        elif isinstance(event, events.Validation):
            held_out.append(event.loss)
        elif isinstance(event, events.Progress) and event.peak_memory_gib is not None and phase is not None:
            peaks[phase.phase] = max(peaks.get(phase.phase, 0.0), event.peak_memory_gib)
    card = {name: monitor.peak_gib(min(times), max(times)) for name, times in spans.items()}
    numbers: dict[str, Any] = {
        "phases_s": {name: round(value, 2) for name, value in phases.items()},
        "card_peak_gib": {name: value for name, value in card.items() if value is not None},
    }
    numbers |= {f"{name}_peak_allocated_gib": round(peak, 3) for name, peak in peaks.items()}
    if seconds and last is not None:
        step = spread(list(seconds.values()))
        numbers |= {
            "step_s": step,
            # What compiling and tuning cost: the first steps' time beyond that of as many later ones.
            "first_steps_extra_s": round(max(0.0, sum(first_seconds) - len(first_seconds) * step["median"]), 2),
            "peak_allocated_gib": _rounded(last.peak_memory_gib),
            "peak_reserved_gib": _rounded(last.peak_reserved_gib),
            "last_loss": last.loss,
        }
    if held_out:
        numbers["held_out"] = {"start": held_out[0], "end": held_out[-1]}
    return numbers


def stock_row(row: StockRow, bench: Bench) -> dict[str, Any]:
    """Run diffusers' own recipe in a process of its own; its numbers by the same names."""
    wanted = {"resolution": row.resolution, "rank": row.rank, "batch": row.batch, "text": row.text}
    options = [part for name, value in wanted.items() for part in (f"--{name}", str(value))]
    options += ["--steps", str(bench.steps), "--warm-up", str(bench.warm_up)]
    try:
        with DeviceMonitor() as monitor:
            told = _native("stock", [row.kind, "--config", _config(bench), *options], bench)
    except LoraPortError as error:
        return _failure(error.exit_code, error.message)
    peaks = {name: _rounded(told[name]) for name in ("peak_allocated_gib", "peak_reserved_gib")}
    numbers = {"status": "ok", "step_s": spread(told["seconds"]), **peaks}
    peak = monitor.peak_gib()
    return {**numbers, **({"card_peak_gib": {"train": peak}} if peak is not None else {})}


def rate_row(bench: Bench) -> dict[str, Any]:
    """The rate of the device's matrix products, for the floor."""
    return {"status": "ok", **_native("rate", [], bench)}


def spread(values: list[float]) -> dict[str, float]:
    """Median, 10th and 90th percentile, and mean, rounded to 0.1 ms."""
    deciles = statistics.quantiles(values, n=10, method="inclusive") if len(values) > 1 else values * 9
    found = {"median": statistics.median(values), "p10": deciles[0], "p90": deciles[-1]}
    found["mean"] = statistics.fmean(values)
    return {name: round(value, 4) for name, value in found.items()}


def _cores() -> int:
    """How many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def with_limit(row: Row, gib: float | None) -> Row:
    """The row under another limit, if one is given."""
    return row if gib is None else replace(row, limit_gib=gib)


def _config(bench: Bench) -> str:
    return str(bench.checkpoint / "transformer" / "config.json")


def _native(module: str, arguments: list[str], bench: Bench) -> dict[str, Any]:
    said = child([bench.python, "-m", f"loraport_native.{module}", *arguments])
    return dict(json.loads(said.strip().splitlines()[-1]))


def _failure(code: int, message: str) -> dict[str, Any]:
    out_of_memory = code == OutOfMemoryError.exit_code or "out of memory" in message.lower()
    refused = code == SpecError.exit_code and _TOO_LARGE in message
    status = "out of memory" if out_of_memory else "does not fit" if refused else "failed"
    return {"status": status, "exit_code": code or BackendError.exit_code, "message": message[:_MESSAGE]}


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 3)
