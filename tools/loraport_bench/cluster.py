"""A bench spread over machines: a job for each (backend, profile, seed), by submitit or as a SkyPilot task."""

from __future__ import annotations

import importlib.util
import os
import re
import shlex
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, cast, get_args

from loraport.errors import BackendError, Interrupted, SpecError, unknown
from loraport.files import write_atomic
from loraport.spec.yaml_text import dump_yaml, parse_yaml
from loraport_bench.bench import Bench
from loraport_bench.row import Machinery
from loraport_bench.schedule import Job
from loraport_bench.settings import Settings

Cluster = Literal["slurm", "local"]
_POLL = 1.0
_VISIBLE = "CUDA_VISIBLE_DEVICES"
_MARGIN_MIN = 15  # minutes of a job for staging, scoring, and waiting for the machine


@dataclass(frozen=True)
class Where:
    """A cluster, and parameters for submitit such as slurm_partition, by their own names."""

    cluster: Cluster
    parameters: dict[str, Any] = field(default_factory=dict)


def find_cluster(name: str, parameters: list[str]) -> Where:
    """A cluster that jobs can be submitted to from here. Raises SpecError for an unknown one or a parameter in another
    form, and BackendError when submitit or Slurm is not there."""
    if name not in get_args(Cluster):
        raise SpecError(unknown("--on:", name, get_args(Cluster)))
    where = Where(cast(Cluster, name), read_parameters(parameters))
    if importlib.util.find_spec("submitit") is None:
        raise BackendError("--on needs submitit.", hint="Install it with: pip install 'loraport[bench]'")
    if name == "slurm" and not (shutil.which("srun") and shutil.which("sbatch")):
        raise BackendError(
            "--on slurm: this machine has no srun and sbatch.",
            hint="Start the bench on a login node of the cluster, or try it here with --on local.",
        )
    return where


def read_parameters(given: list[str]) -> dict[str, Any]:
    """`NAME=VALUE` options as parameters, the values read as YAML. Raises SpecError for another form."""
    found = {}
    for text in given:
        name, equals, value = text.partition("=")
        if not equals or not name:
            raise SpecError(f"--job {text!r}: write it as NAME=VALUE, for example slurm_partition=gpu.")
        found[name] = parse_yaml(value, f"--job {text}") if value else None
    return found


def run_on(
    bench: Bench, jobs: list[Job], where: Where, poll: float = _POLL, again: frozenset[str] = frozenset()
) -> list[str]:
    """Submit what is not done, a job for each (backend, profile, seed), wait for all, and return what went wrong. Rows
    whose keys are in `again` are run once more.

    Everything of a job is in the bench's folder, which all machines must share: one that was finished meanwhile, by
    whomever, is not run again. Raises SpecError for a parameter that submitit does not know, and Interrupted, which
    tells what goes on.
    """
    import submitit

    bench.stage()  # once, not by every job
    done = bench.done()
    groups: dict[tuple[str, str, int], list[Job]] = {}
    for job in jobs:
        if job.key in again or bench.unfinished(job, done):
            groups.setdefault((job.backend, job.profile, job.seed), []).append(job)
    executor = submitit.AutoExecutor(folder=str(bench.folder / "jobs"), cluster=where.cluster)
    # submitit's own executor hides all cards from its jobs, unless told how many; Slurm gives jobs theirs.
    hides = where.cluster == "local" and not any("gpus" in name for name in where.parameters)
    cards = {_VISIBLE: os.environ.get(_VISIBLE)} if hides else {}
    submitted = {}
    for (backend, profile, seed), members in groups.items():
        runs = sum(bench.runs_left(job, done, again) for job in members)
        minutes = round(runs * bench.settings.time_limit_s / 60) + _MARGIN_MIN
        gpus = {"gpus_per_node": bench.spec.train.gpus} if where.cluster == "slurm" else {}
        named: Mapping[str, Any] = {"name": f"bench-{backend}-{profile}-{seed}", "timeout_min": minutes, **gpus}
        try:
            executor.update_parameters(**{**named, **where.parameters})
        except (NameError, TypeError, ValueError, AssertionError) as error:
            raise SpecError(f"--job: submitit does not take this: {error}") from error
        place, keys = str(bench.folder), [job.key for job in members]
        more = bench.machinery.patience, bench.machinery.busy, again, cards
        started = executor.submit(run_part, place, keys, bench.command, *more)
        bench.tell(f"job {started.job_id}: {backend}, {profile}, seed {seed}")
        submitted[started.job_id] = started
    try:
        return _wait_for(submitted, bench.tell, poll)
    except Interrupted as error:
        left = [number for number, job in submitted.items() if not job.done()]
        raise Interrupted(
            f"Stopped waiting; what was submitted goes on: job {', '.join(left)}.",
            hint="Once it is done, the same command gathers its rows and submits what is left.",
        ) from error


def run_part(
    folder: str,
    keys: list[str],
    command: str,
    patience: float,
    busy: bool,
    again: frozenset[str] = frozenset(),
    environment: Mapping[str, str | None] | None = None,
) -> None:
    """The content of one job: run and score some rows of the bench in `folder`. Variables of `environment` are set
    first, or taken away."""
    for name, value in (environment or {}).items():
        os.environ.pop(name, None)
        if value is not None:
            os.environ[name] = value
    place = Path(folder)
    settings = Settings.read_from(place)
    machinery = Machinery(place, settings, patience, busy)
    bench = Bench(settings, place, machinery, lambda text: print(text, flush=True), command, queue=True)
    bench.run([job for job in bench.jobs if job.key in keys], again=again)


def _wait_for(submitted: dict[str, Any], tell: Callable[[str], None], poll: float) -> list[str]:
    problems = []
    waiting = dict(submitted)
    while waiting:
        for number, job in list(waiting.items()):
            if not job.done():
                continue
            del waiting[number]
            error = job.exception()
            if error is None:
                tell(f"job {number}: done")
            else:
                problems.append(f"job {number}: {_told_by(error)} (its output: {job.paths.stderr})")
        if waiting:
            time.sleep(poll)
    return problems


def _told_by(error: BaseException) -> str:
    """The error in a job's traceback, or the first line of what submitit says of a job that vanished."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    told = [line for line in lines if re.match(r"[\w.]+(Error|Interrupted|Exit): ", line)]
    return told[-1] if told else lines[0]


def _places(given: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """What a spec reads: (path of its field, folder or hub id, a name for it)."""
    dataset, model = given["dataset"], given["model"]
    found = [("dataset.path", dataset["path"], "images"), ("model.checkpoint", model["checkpoint"], "checkpoint")]
    found += [(f"dataset.sets[{at}].path", one["path"], f"set-{at}") for at, one in enumerate(dataset["sets"])]
    found.append(("dataset.regularization.path", dataset["regularization"]["path"], "regularization"))
    found.append(("validation.path", given["validation"]["path"], "held-out"))
    return [(path, str(place), name) for path, place, name in found if place]


def write_sky(file: Path, spec_file: Path, bench: Bench, options: list[str]) -> None:
    """Write a SkyPilot task in which every node runs its share of the bench and copies its rows into a bucket.

    `options` are those of the command, without the spec, the folder and this one. Raises RunFolderError.
    """
    given = bench.settings.given
    mounts: dict[str, Any] = {
        "~/bench-input/spec.yaml": str(spec_file.absolute()),
        "~/bench-output": {"name": "${RESULTS_BUCKET}", "mode": "MOUNT"},
    }
    changes = []
    for path, place, name in _places(given):
        if place.startswith("/"):  # else an id in the hub
            mounts[f"~/bench-input/{name}"] = place
            changes += ["--set", f"{path}=~/bench-input/{name}"]
    parts = {(job.backend, job.profile, job.seed) for job in bench.jobs}
    others = [name for name in bench.settings.backends if name != "native"]
    command = shlex.join(["loraport", "bench", "SPEC", *options, *changes])
    command = command.replace("SPEC", "~/bench-input/spec.yaml", 1)
    task = {
        "name": f"bench-{bench.spec.name}".lower().replace("_", "-").replace(".", "-"),
        "num_nodes": len(parts),
        "resources": {"accelerators": f"H200:{bench.spec.train.gpus}", "disk_size": 500},
        "envs": {"RESULTS_BUCKET": None},
        "secrets": {"HF_TOKEN": ""},
        "workdir": ".",
        "file_mounts": mounts,
        "setup": "\n".join(
            [
                "pip install -c constraints.txt '.[native,bench]'",
                *(f"loraport backends install {name}" for name in others),
            ]
        )
        + "\n",
        "run": f"{command} --part $((SKYPILOT_NODE_RANK + 1))/$SKYPILOT_NUM_NODES -o ~/bench\n"
        "mkdir -p ~/bench-output/rows && cp -r ~/bench/rows/. ~/bench-output/rows/\n"
        '[ "$SKYPILOT_NODE_RANK" != 0 ] || cp -r ~/bench/data ~/bench-output/\n',
    }
    head = (
        "# Choose the accelerator under `resources`, then, in LoraPort's source folder:\n"
        "#   sky launch THIS_FILE --env RESULTS_BUCKET=a-name --secret HF_TOKEN\n"
        "# Then copy the bucket's `rows` and `data` into the bench's folder here and give the command without\n"
        "# --write-sky: it finds every row there and writes the results.\n"
    )
    write_atomic(file, head + dump_yaml(task))
