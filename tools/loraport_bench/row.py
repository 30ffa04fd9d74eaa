"""One row: a training by `loraport train`, watched from outside, and everything that is known of it afterwards."""

from __future__ import annotations

import contextlib
import datetime
import itertools
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loraport.backend import Backend
from loraport.envs import find_interpreter
from loraport.errors import Interrupted, LoraPortError, OutOfMemoryError
from loraport.files import write_atomic
from loraport.planning import Plan
from loraport.plugins import plugins
from loraport.run.record import read_events
from loraport_bench import records as r
from loraport_bench.idle import is_idle, machine, wait_until_idle
from loraport_bench.nvml import visible_cards
from loraport_bench.outputs import keep_checkpoints, trained_parameters
from loraport_bench.places import shortened
from loraport_bench.process import Ended, own_environment, run_watched
from loraport_bench.results import versions
from loraport_bench.sampling import (
    CardSample,
    Samples,
    energy_between,
    range_of,
    size_of,
    throttled,
)
from loraport_bench.schedule import Job
from loraport_bench.settings import Settings, writing
from loraport_bench.tiers import shown, why_not_matched
from loraport_bench.told import Span, Told, sort_out

RECORD, LORA, TO_SCORE = "run.json", "lora.safetensors", "to-score.json"
_MOST_SAMPLES = 400
_MESSAGE = 2000  # characters of a failure that are kept

#: What is asked of the trainer's environment, besides its own package.
_PACKAGES = ("torch", "triton", "diffusers", "transformers", "peft", "accelerate", "torchao", "bitsandbytes")


@dataclass(frozen=True)
class Machinery:
    """How rows are run. `folder` is the bench's; a busy card is an error after `patience` seconds, unless `busy`."""

    folder: Path
    settings: Settings
    patience: float = 60.0
    busy: bool = False

    def row_folder(self, job: Job) -> Path:
        return self.folder / "rows" / job.folder


def run_row(job: Job, made: Plan | LoraPortError, machinery: Machinery, images_sha256: str) -> r.Run:
    """Train a row and write its record to its folder, with the sum of the staged images. A failure is a record too;
    only Interrupted, a busy card and a folder that cannot be written are raised."""
    folder = machinery.row_folder(job)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    run = _refusal(job, made, machinery) or _trained(job, _plan_of(made), machinery, folder)
    run = run.model_copy(update={"images_sha256": images_sha256})
    write_atomic(folder / RECORD, run.model_dump_json() + "\n")
    return run


def read_row(folder: Path) -> r.Run | None:
    """The record of a row that is done; None when it is not."""
    try:
        return r.Run.model_validate_json((folder / RECORD).read_bytes())
    except (OSError, ValueError):
        return None


def _plan_of(made: Plan | LoraPortError) -> Plan:
    assert isinstance(made, Plan)
    return made


def _refusal(job: Job, made: Plan | LoraPortError, bench: Machinery) -> r.Run | None:
    """The row of a training that is not begun, or None."""
    if isinstance(made, LoraPortError):
        return _row(
            job, None, bench, "refused", r.Failure(reason="refused", message=str(made), exit_code=made.exit_code)
        )
    why = refusal_of(job, made)
    if why is not None:
        return _row(job, made, bench, "refused", r.Failure(reason="refused", message=why))
    readiness = plugins().backend(job.backend).readiness(made.spec.backend.python)
    if not readiness.ready:
        return _row(job, made, bench, "refused", r.Failure(reason="not-ready", message=readiness.detail))
    return None


def refusal_of(job: Job, made: Plan) -> str | None:
    """Why a row is not begun, by its plan alone; None when it is."""
    if made.refused():
        return "; ".join(f"{v.path} = {shown(v.value)}: {v.reason}" for v in made.refused())
    return why_not_matched(made) if job.tier == "matched" else None


def _row(
    job: Job, made: Plan | None, bench: Machinery, status: r.Status, failure: r.Failure | None, **more: Any
) -> r.Run:
    known: dict[str, Any] = {
        "key": job.key,
        "position": job.position,
        "tier": job.tier,
        "profile": job.profile,
        "batch": job.batch,
        "backend": job.backend,
        "repeat": job.repeat,
        "seed": job.seed,
        "status": status,
        "failure": failure and r.Failure(**shortened(failure.model_dump(), bench.folder, bench.settings.given)),
        "started": datetime.datetime.now(datetime.UTC),
        "total_s": 0.0,
        "versions": {},
        "verdicts": [] if made is None else judgements(made, bench.folder),
    }
    return r.Run(**{**known, **more})


def _trained(job: Job, made: Plan, machinery: Machinery, folder: Path) -> r.Run:
    settings, gpus = machinery.settings, made.spec.train.gpus
    idle = wait_until_idle(gpus, machinery.patience, insist=not machinery.busy)
    run_dir, cache, spec_file = folder / "run", folder / "cache", folder / "spec.yaml"
    write_atomic(spec_file, made.spec.to_yaml())
    command = [sys.executable, "-m", "loraport.cli.main", "train", str(spec_file), "--backend", job.backend]
    started = datetime.datetime.now(datetime.UTC)
    try:
        ended = run_watched(
            [*command, "--out", str(run_dir), "--json"],
            own_environment(folder),
            settings.time_limit_s,
            settings.sampling_s,
            visible_cards(gpus),
            (run_dir, cache),
            folder / "output.txt",
        )
        if ended.code == Interrupted.exit_code:
            raise Interrupted("The run was stopped from outside.", hint="The same command goes on with that row.")
        told = sort_out(_events(run_dir), ended.began, ended.ended)
        failure = _failure(ended, told, folder / "output.txt", settings.time_limit_s)
        notes = [f"The trainer warned: {text}" for text in dict.fromkeys(told.warnings)]
        if idle is not None and not is_idle(idle):
            notes.append("The card was in use by others when this began.")
        lora = run_dir / f"{made.spec.name}.safetensors"
        if failure is None:
            notes += _keep_outputs(made, told, run_dir, lora, folder)
        numbers = _numbers(made, settings, told, ended, run_dir, lora if failure is None else None, notes)
        return _row(
            job,
            made,
            machinery,
            "ok" if failure is None else "failed",
            failure,
            started=started,
            total_s=round(ended.ended - ended.began, 3),
            machine=machine(idle),
            versions=_versions(job.backend, made),
            configuration=configuration(made, machinery.folder),
            notes=shortened(notes, machinery.folder, settings.given),
            **numbers,
        )
    finally:
        for name in ("log.txt", "events.jsonl", "plan.json"):
            with contextlib.suppress(OSError):
                shutil.copy(run_dir / name, folder / name)
        shutil.rmtree(run_dir, ignore_errors=True)
        shutil.rmtree(cache, ignore_errors=True)
        shutil.rmtree(folder / "compiled", ignore_errors=True)


def _events(run_dir: Path) -> list[Any]:
    path = run_dir / "events.jsonl"
    return list(read_events(path)) if path.exists() else []


def _failure(ended: Ended, told: Told, output: Path, limit: float) -> r.Failure | None:
    if ended.code == 0:
        return None
    if ended.code is None:
        return r.Failure(reason="time-out", message=f"Ended after {limit:g} s, the limit of a run.")
    said = output.read_text(encoding="utf-8", errors="replace")[-_MESSAGE:].strip() if output.exists() else ""
    message = told.failure.message if told.failure else said
    memory = ended.code == OutOfMemoryError.exit_code or "out of memory" in message.lower()
    reason: r.Reason = "out-of-memory" if memory else "error"
    return r.Failure(reason=reason, message=message[:_MESSAGE], exit_code=ended.code)


def _keep_outputs(made: Plan, told: Told, run_dir: Path, lora: Path, folder: Path) -> list[str]:
    """Put what is to be scored beside the record. Returns what a reader should know of it."""
    a_step = images_a_step(made)
    kept, problems = keep_checkpoints(told.checkpoints, run_dir, lora, made.spec.lora.effective_alpha, folder)
    last = told.steps[-1].step if told.steps else made.spec.train.steps
    points = [
        {"file": kept[event.step].name, "step": event.step, "train_s": round(told.trained_at(event), 3)}
        for event in told.checkpoints
        if event.step in kept and event.step < last
    ]
    for step in set(kept) - {point["step"] for point in points}:
        kept[step].unlink()
    points.append({"file": LORA, "step": last, "train_s": told.phases().get("train", 0.0)})
    with writing(folder / LORA):
        shutil.copy(lora, folder / LORA)
    content = [{**point, "images": point["step"] * a_step} for point in points]  # type: ignore[operator]
    write_atomic(folder / TO_SCORE, json.dumps(content) + "\n")
    return problems


def _numbers(
    made: Plan, settings: Settings, told: Told, ended: Ended, run_dir: Path, lora: Path | None, notes: list[str]
) -> dict[str, Any]:
    """The measured part of a record; adds to `notes`."""
    samples, a_step, steps = ended.samples, images_a_step(made), told.measured(settings.warm_up)
    measured = told.measured_spans(settings.warm_up)
    in_steps = [[one for one in card if any(a <= one.time <= b for a, b in measured)] for card in samples.cards]
    if steps is not None and steps.wall_mean and abs(steps.seconds.mean / steps.wall_mean - 1) > 0.05:
        notes.append(
            f"The trainer's clock says {steps.seconds.mean:.3f} s a step on average; from outside it was "
            f"{steps.wall_mean:.3f} s, which is what images a second are counted by."
        )
    pace = (steps.wall_mean or steps.seconds.median) if steps else None
    own = samples.tells_processes
    device = trace(samples.own if own else samples.device, "processes" if own else "device", told.spans, ended.began)
    last = told.steps[-1] if told.steps else None
    peaks = None
    if device is not None and last is not None and last.peak_memory_gib is not None:
        reserved = last.peak_reserved_gib
        peaks = r.TorchPeaks(
            allocated_bytes=round(last.peak_memory_gib * 2**30),
            reserved_bytes=None if reserved is None else round(reserved * 2**30),
        )
    return {
        "phases": told.phases(),
        "timeline": [(name, round(a - ended.began, 3), round(b - ended.began, 3)) for name, a, b in told.spans],
        "steps": steps,
        "images_per_second": round(a_step / pace, 4) if pace else None,
        "device_memory": device,
        "host_memory": trace(samples.host, "processes", told.spans, ended.began),
        "torch_peaks": peaks,
        "disk": _disk(samples, told, run_dir, lora),
        "cards": [_card(card) for card in in_steps],
        "energy": _energy(samples.cards, ended, told, settings.warm_up, a_step),
        "work": _work(made, told, lora),
        "losses": told.losses(a_step),
    }


def _work(made: Plan, told: Told, lora: Path | None) -> r.Work | None:
    if not told.steps:
        return None
    modules, parameters = trained_parameters(lora) if lora is not None else (None, None)
    expected = made.spec.train.steps
    return r.Work(
        steps=len(told.steps),
        images=told.images(),
        modules=modules,
        parameters=parameters,
        expected_steps=expected,
        expected_images=expected * images_a_step(made),
        differs=[],
    )


def _disk(samples: Samples, told: Told, run_dir: Path, lora: Path | None) -> r.Disk:
    trained_from = min((start for name, start, _ in told.spans if name == "train"), default=float("inf"))
    before = [size for moment, size in samples.sizes if moment <= trained_from]
    return r.Disk(
        written_bytes=samples.written,
        read_bytes=samples.read,
        cache_bytes=max(before, default=0),
        run_folder_bytes=size_of(run_dir),
        lora_bytes=lora.stat().st_size if lora is not None else None,
    )


def _card(samples: list[CardSample]) -> r.Card:
    def seen(name: str) -> r.Range | None:
        found = range_of([getattr(sample, name) for sample in samples])
        return None if found is None else r.Range(low=found[0], median=found[1], high=found[2])

    names = ("clock_mhz", "memory_clock_mhz", "power_w", "temperature_c", "utilisation_percent")
    return r.Card(samples=len(samples), **{name: seen(name) for name in names}, throttled=throttled(samples))


def _energy(cards: list[list[CardSample]], ended: Ended, told: Told, warm_up: int, a_step: int) -> r.Energy | None:
    """Of all cards; None when one of them has no counter. `a_step`: images of an optimizer step."""

    def spent(spans: Iterable[tuple[float, float]]) -> float | None:
        each = [energy_between(samples, start, end) for start, end in spans for samples in cards]
        return None if None in each or not each else sum(one for one in each if one is not None)

    whole = spent([(ended.began, ended.ended)])
    if whole is None:
        return None
    training = spent((start, end) for name, start, end in told.spans if name == "train")
    measured = spent(told.measured_spans(warm_up))
    images = a_step * sum(step.step > warm_up for step in told.steps)
    return r.Energy(
        joules=round(whole, 1),
        train_joules=None if training is None else round(training, 1),
        steps_joules=None if measured is None else round(measured, 1),
        joules_per_image=None if measured is None or not images else round(measured / images, 3),
    )


def trace(samples: list[tuple[float, int]], scope: Any, spans: Iterable[Span], began: float) -> r.Trace | None:
    """Memory samples (seconds since 1970, bytes) as a record; None when there are none."""
    if not samples:
        return None
    by_phase: dict[r.PhaseName, int] = {}
    for name, start, end in spans:
        seen = [used for moment, used in samples if start <= moment <= end]
        if seen:
            by_phase[name] = max(by_phase.get(name, 0), *seen)
    gaps = [later[0] - earlier[0] for earlier, later in itertools.pairwise(samples)]
    span = -(-len(samples) // _MOST_SAMPLES)
    largest = [max(samples[place : place + span], key=lambda one: one[1]) for place in range(0, len(samples), span)]
    return r.Trace(
        scope=scope,
        interval_s=round(sum(gaps) / len(gaps), 4) if gaps else 1.0,
        longest_gap_s=round(max(gaps, default=0.0), 4),
        peak_bytes=max(used for _, used in samples),
        by_phase=by_phase,
        samples=[(round(moment - began, 3), used) for moment, used in largest],
    )


def images_a_step(made: Plan) -> int:
    """Images of an optimizer step."""
    train = made.spec.train
    return train.batch_size * train.gradient_accumulation * train.gpus


def judgements(made: Plan, folder: Path) -> list[r.Judgement]:
    """A plan's verdicts as they are recorded."""
    spec = made.spec.model_dump(mode="json")
    return [r.Judgement(**shortened(verdict, folder, spec)) for verdict in made.to_dict()["verdicts"]]


def configuration(made: Plan, folder: Path) -> r.Configuration:
    """What exactly is run."""
    content = {"spec": made.spec.model_dump(mode="json"), "files": made.files, "command": made.command, "env": made.env}
    return r.Configuration(**shortened(content, folder))


def _versions(backend_name: str, made: Plan) -> dict[str, str]:
    """Of LoraPort, of the trainer as its backend tells it (a checkout is no package), and of Python and libraries in
    the interpreter that it runs in."""
    backend: Backend = plugins().backend(backend_name)
    recipe = getattr(backend, "environment", None)
    python = find_interpreter(backend_name, made.spec.backend.python)
    own = versions()
    if python == Path(sys.executable):
        return own
    wanted = [*([recipe.package] if recipe else []), *_PACKAGES]
    code = (
        "import json, platform, sys, importlib.metadata as m\n"
        "found = {'python': platform.python_version()}\n"
        "for name in sys.argv[1:]:\n"
        "    try: found[name] = m.version(name)\n"
        "    except m.PackageNotFoundError: pass\n"
        "print(json.dumps(found))"
    )
    done = subprocess.run([python, "-I", "-c", code, *wanted], capture_output=True, text=True)
    found: dict[str, str] = json.loads(done.stdout) if done.returncode == 0 else {}
    told = re.match(rf"{re.escape(backend_name)} (\d\S*)", backend.readiness(made.spec.backend.python).detail)
    return {"loraport": own["loraport"], **({backend_name: told[1]} if told else {}), **found}
