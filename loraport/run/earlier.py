"""Earlier runs as measurements: what a training took on this machine is the best guess of what the next one takes."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from loraport.errors import LoraPortError
from loraport.pace import dataset_key, unlike_the_released_model
from loraport.profiles import STEP_FIELDS, Measurement
from loraport.run import events
from loraport.run.eta import WARM_UP, WINDOW
from loraport.run.folder import DEFAULT_ROOT, RunFolder, list_runs
from loraport.sets import largest_resolution

if TYPE_CHECKING:
    from loraport.families import Family

#: Runs that are looked at, newest first, and bytes at the end of each one's events.
MOST_RUNS = 50
TAIL_BYTES = 1 << 16


def measured_runs(root: Path = DEFAULT_ROOT) -> list[Measurement]:
    """The runs in a folder that a card trained for long enough to tell their pace.

    Those that cannot be read are left out, and those of a checkpoint of another size than the family's own.
    """
    from loraport.plugins import plugins

    families = plugins().families()
    try:
        entries = list_runs(root)[:MOST_RUNS]
    except LoraPortError:
        return []
    found = []
    for entry in entries:
        try:
            row = _measurement(RunFolder(entry.path), families)
        except (LoraPortError, OSError, ValueError, KeyError, TypeError):  # damaged, or of another version
            continue
        found += [] if row is None else [row]
    return found


def _measurement(folder: RunFolder, families: Mapping[str, Family]) -> Measurement | None:
    plan: dict[str, Any] = json.loads(folder.plan_file.read_bytes())
    spec = folder.read_spec()
    device = str(spec.backend.options.get("device", "auto"))
    if plan["card"] is None or not device.startswith(("auto", "cuda")):
        return None
    if unlike_the_released_model(spec, families[spec.model.family]):
        return None
    times = _last_step_times(folder.events_file)
    if not times:
        return None
    forecast = plan["memory"] or {"assumes": {}}
    return Measurement(
        family=spec.model.family,
        backend=plan["backend"],
        card=plan["card"],
        date=time.strftime("%Y-%m-%d", time.gmtime(folder.read_state().created)),
        resolution=largest_resolution(spec.dataset),
        text_tokens=forecast["assumes"].get("text_tokens", 0),
        rank=spec.lora.rank,
        batch_size=spec.train.batch_size,
        optimizer=spec.train.optimizer,
        gpus=spec.train.gpus,
        memory={name: getattr(spec.memory, name) for name in STEP_FIELDS},
        step_s=median(times) / spec.train.gradient_accumulation,
        source=str(folder.path),
        dataset=dataset_key(spec),
    )


def _last_step_times(file: Path) -> list[float]:
    """Seconds of the last steps, as the trainer tells them or by their events; none when there are too few beyond the
    warm-up."""
    with open(file, "rb") as stream:
        size = stream.seek(0, os.SEEK_END)
        stream.seek(max(0, size - TAIL_BYTES))
        lines = stream.read().splitlines()
    times: list[float] = []
    before: events.Step | None = None
    for line in lines[1:] if size > TAIL_BYTES else lines:
        try:
            event = events.decode(line.decode())
        except ValueError:  # the last line of a run that is being written, or one of another version
            continue
        if isinstance(event, events.Started):
            before = None
        if not isinstance(event, events.Step):
            continue
        seconds = event.seconds
        if seconds is None and before is not None and event.step > before.step:
            seconds = (event.time - before.time) / (event.step - before.step)
        if seconds and event.step > WARM_UP:
            times.append(seconds)
        before = event
    return times[-WINDOW:] if len(times) >= WARM_UP else []
