"""Earlier runs as measurements: what a training took on this machine is the best guess of what the next one takes."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from statistics import median
from typing import Any

from loraport.errors import LoraPortError
from loraport.pace import dataset_key
from loraport.profiles import STEP_FIELDS, Measurement
from loraport.run import events
from loraport.run.eta import WARM_UP, WINDOW
from loraport.run.folder import DEFAULT_ROOT, RunFolder, list_runs
from loraport.sets import largest_resolution

#: Runs that are looked at, newest first, and bytes at the end of each one's events.
MOST_RUNS = 50
TAIL_BYTES = 1 << 16


def measured_runs(root: Path = DEFAULT_ROOT) -> list[Measurement]:
    """The runs in a folder that a card trained for long enough to tell their pace; none that cannot be read."""
    try:
        entries = list_runs(root)[:MOST_RUNS]
    except LoraPortError:
        return []
    found = []
    for entry in entries:
        try:
            row = _measurement(RunFolder(entry.path))
        except (LoraPortError, OSError, ValueError, KeyError, TypeError):  # damaged, or of another version
            continue
        found += [] if row is None else [row]
    return found


def _measurement(folder: RunFolder) -> Measurement | None:
    plan: dict[str, Any] = json.loads(folder.plan_file.read_bytes())
    forecast = plan["memory"]
    if not forecast or not forecast["card"]:  # on the CPU, or by a backend that says nothing of memory
        return None
    steps = _last_steps(folder.events_file)
    if not steps:
        return None
    spec, state = folder.read_spec(), folder.read_state()
    return Measurement(
        family=spec.model.family,
        backend=plan["backend"],
        card=forecast["card"]["name"],
        date=time.strftime("%Y-%m-%d", time.gmtime(state.created)),
        resolution=largest_resolution(spec.dataset),
        text_tokens=forecast["assumes"]["text_tokens"],
        rank=spec.lora.rank,
        batch_size=spec.train.batch_size,
        optimizer=spec.train.optimizer,
        gpus=spec.train.gpus,
        memory={name: getattr(spec.memory, name) for name in STEP_FIELDS},
        step_s=median(step.seconds for step in steps if step.seconds) / spec.train.gradient_accumulation,
        peak_allocated_gib=max(step.peak_memory_gib or 0.0 for step in steps),
        peak_reserved_gib=max(step.peak_reserved_gib or 0.0 for step in steps),
        source=str(folder.path),
        dataset=dataset_key(spec),
    )


def _last_steps(file: Path) -> list[events.Step]:
    """The last steps that tell their time; none when there are too few beyond the warm-up."""
    with open(file, "rb") as stream:
        size = stream.seek(0, os.SEEK_END)
        stream.seek(max(0, size - TAIL_BYTES))
        lines = stream.read().splitlines()
    steps = []
    for line in lines[1:] if size > TAIL_BYTES else lines:
        try:
            event = events.decode(line.decode())
        except ValueError:  # the last line of a run that is being written, or one of another version
            continue
        if isinstance(event, events.Step) and event.seconds and event.step > WARM_UP:
            steps.append(event)
    return steps[-WINDOW:] if len(steps) >= WARM_UP else []
