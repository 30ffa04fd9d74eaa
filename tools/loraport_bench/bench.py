"""A bench: its schedule run row by row, resumed where it was, and gathered into results.json."""

from __future__ import annotations

import contextlib
import datetime
import fcntl
import re
import shlex
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from loraport.errors import Interrupted, LoraPortError, SpecError
from loraport.families import check_family
from loraport.files import write_atomic
from loraport.planning import Plan
from loraport.plugins import plugins
from loraport.sets import image_sets, largest_resolution
from loraport.spec.load import build_spec
from loraport.spec.models import TrainSpec
from loraport_bench import RESULTS
from loraport_bench import records as r
from loraport_bench.equal_work import with_differences
from loraport_bench.foreign import refuse_foreign
from loraport_bench.idle import alone_on_machine
from loraport_bench.images import Staged, planned, stage_images
from loraport_bench.overhead import measure_overhead
from loraport_bench.places import shortened
from loraport_bench.quality import score_rows
from loraport_bench.row import RECORD, TO_SCORE, Machinery, read_row, run_row
from loraport_bench.schedule import Job, expected_seconds, group_name, schedule
from loraport_bench.settings import FILE as SETTINGS
from loraport_bench.settings import Settings
from loraport_bench.tiers import MATCHED, MEASURED, best_effort, inequalities, make, matched

#: What going through LoraPort may cost: a share of a step, and seconds of a run.
OVERHEAD_SHARE, OVERHEAD_SECONDS = 0.01, 2.0
_NO_OVERHEAD = "The overhead could not be measured"
#: Reasons of failures that may be gone the next time.
_MAY_SUCCEED = ("error", "out-of-memory", "not-ready")
Tell = Callable[[str], None]


@dataclass
class Bench:
    """A bench in its folder. `tell` hears what is going on; `machinery` says how rows are run."""

    settings: Settings
    folder: Path
    machinery: Machinery
    tell: Tell
    command: str
    queue: bool = False  #: wait for the machine's lock
    _contents: dict[tuple[str, str, int], dict[str, dict[str, Any]]] = field(default_factory=dict)
    _changed: dict[str, str] = field(default_factory=lambda: dict(MEASURED))

    def __post_init__(self) -> None:
        self.jobs = schedule(self.settings)
        self.spec = build_spec(self.settings.given, base=Path.cwd(), origin="the spec").spec

    # -- what is there ------------------------------------------------------------------------------------------

    def stage(self) -> Staged:
        """The images, staged once. Raises DataError when a row that is there is of others, or of other work."""
        family = check_family(self.spec, plugins().families())
        staged, done = stage_images(self.spec, self.settings.held_out, family, self.folder / "data"), self.done()
        for job in self.jobs:
            if job.key in done:
                refuse_foreign(job, done[job.key], self.plan(job, staged), staged.sha256, self.machinery)
        return staged

    def check(self) -> None:
        """Make every plan, which writes nothing. Raises SpecError when what was asked for is no valid spec."""
        staged = planned(self.spec, self.folder / "data")
        for job in self.jobs:
            self.plan(job, staged)

    def done(self) -> dict[str, r.Run]:
        """The records of rows that are finished, by key."""
        found = (read_row(self.machinery.row_folder(job)) for job in self.jobs)
        return {run.key: run for run in found if run is not None}

    def content(self, job: Job, staged: Staged) -> dict[str, Any]:
        """The spec of a row, as plain data."""
        contents = self._group(*job.group, staged)[job.backend]
        return {**contents, "train": {**contents["train"], "seed": job.seed}}

    def plan(self, job: Job, staged: Staged) -> Plan | LoraPortError:
        """The plan of a row, or why there is none. Raises SpecError when what was asked for is no valid spec."""
        content = self.content(job, staged)
        try:
            return make(content, job.backend, self.machinery.row_folder(job) / "run")
        except LoraPortError as error:
            return error

    def begin(self) -> None:
        """Take the folder for these settings. Raises SpecError when it holds rows of others."""
        try:
            self.settings.keep_in(self.folder)
        except SpecError:
            if any(self.folder.glob("rows/*/")):
                raise
            # Whatever came of the others, such as images that could not be staged, nothing was run.
            (self.folder / SETTINGS).unlink()
            shutil.rmtree(self.folder / "data", ignore_errors=True)
            self.settings.keep_in(self.folder)

    def failed(self) -> frozenset[str]:
        """The keys of rows that may come to their end in a second try: of those that were out of time, only where the
        limit is longer now."""
        return frozenset(
            run.key
            for run in self.done().values()
            if run.failure is not None
            and (
                run.failure.reason in _MAY_SUCCEED
                or (run.failure.reason == "time-out" and run.total_s < self.settings.time_limit_s)
            )
        )

    def unfinished(self, job: Job, done: dict[str, r.Run]) -> bool:
        """Whether anything of a job is left: its row, its overhead, or its score."""
        return job.key not in done or self._lacks_overhead(job, done) or self._waits_for_score(job)

    # -- running ------------------------------------------------------------------------------------------------

    def run(self, jobs: list[Job], session_limit: float | None = None, again: frozenset[str] = frozenset()) -> None:
        """Run the jobs that are not done, or whose keys are in `again`, each alone on the machine, and score them.
        After `session_limit` seconds nothing else is begun."""
        staged, begun, ran = self.stage(), time.monotonic(), 0

        def time_is_up() -> bool:
            return session_limit is not None and ran > 0 and time.monotonic() - begun > session_limit

        for job in jobs:
            if time_is_up():
                self.tell("The session's time is up; the same command goes on with what is left.")
                break
            with self._row_lock(job) as mine:
                done = self.done()
                there = job.key in done and job.key not in again
                if there and not self._lacks_overhead(job, done):
                    self.tell(f"{job.key}: there already")
                elif not mine:
                    self.tell(f"{job.key}: another session runs it now")
                else:
                    with alone_on_machine(f"row {job.key} of {self.folder}", self.queue):
                        if not there:
                            self.run_job(job, staged)
                            ran += 1
                        if self._lacks_overhead(job, self.done()) and not time_is_up():
                            self._add_overhead(job, staged)
                            ran += 1
                    self.gather()
        self.score(jobs)

    def run_job(self, job: Job, staged: Staged) -> None:
        """Run one row, whose lock is held."""
        expected = expected_seconds(job, self.done().values())
        self.tell(f"{job.key} …" + (f" (about {expected:.0f} s)" if expected else ""))
        run = run_row(job, self.plan(job, staged), self.machinery, staged.sha256)
        self.tell(f"{job.key}: {summary(run)}")

    def score(self, jobs: list[Job]) -> None:
        """Score what these jobs trained and is not scored yet. What cannot be done is told: the rows stay."""
        done = self.done()
        folders = [self.machinery.row_folder(job) for job in jobs if job.key in done and self._waits_for_score(job)]
        if not folders:
            return
        with alone_on_machine(f"scoring of {self.folder}", self.queue):
            self.tell("Scoring what was trained …")
            try:
                problems = score_rows(folders, self.settings, self.stage())
            except Interrupted:
                raise
            except LoraPortError as error:
                problems = [f"Not scored, the same command tries it again: {error}"]
            for problem in problems:
                self.tell(problem)

    def gather(self) -> r.Results:
        """Write results.json, and the reports on it, from the rows that there are."""
        from loraport_bench.report import write_reports

        staged, done = self.stage(), self.done()
        # Rows are shortened as they are recorded; what was noted on them later, or by earlier versions, is here.
        rows = [shortened(done[job.key].model_dump(mode="json"), self.folder) for job in self.jobs if job.key in done]
        for job, row in zip((job for job in self.jobs if job.key in done), rows, strict=True):
            if self._waits_for_score(job):
                row["notes"].append("Not scored yet; the same command goes on with that.")
        runs = with_differences(list(map(r.Run.model_validate, rows)))
        path = self.folder / RESULTS
        now = datetime.datetime.now(datetime.UTC)
        created = r.Results.read(path).created if path.exists() else now
        results = r.Results(
            name=self.spec.name,
            command=self.command,
            created=created,
            updated=now,
            complete=not any(self.unfinished(job, done) for job in self.jobs),
            spec_sha256=self.settings.spec_sha256,
            spec=shortened(self.settings.given, self.folder),
            protocol=self._protocol(staged),
            inequalities=self._inequalities(staged),
            runs=runs,
        )
        results.write(path)
        write_reports(results, self.folder)
        return results

    @contextlib.contextmanager
    def _row_lock(self, job: Job) -> Iterator[bool]:
        """Hold a row, also against other hosts that share the folder; False when somebody else holds it."""
        path = self.folder / "rows" / f".{job.folder}.lock"
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                yield False
            else:
                yield True

    # -- parts --------------------------------------------------------------------------------------------------

    def _group(self, tier: r.Tier, profile: str, batch: int, staged: Staged) -> dict[str, dict[str, Any]]:
        """The spec of each backend in a group."""
        if (tier, profile, batch) not in self._contents:
            if tier == "matched":
                contents, changed = matched(self.settings, staged, profile, batch)
                self._changed |= changed
            else:
                names = self.settings.backends
                contents = {name: best_effort(self.settings, staged, profile, batch, name) for name in names}
            self._contents[tier, profile, batch] = contents
        return self._contents[tier, profile, batch]

    def _inequalities(self, staged: Staged) -> dict[str, list[r.Inequality]]:
        found = {}
        for group in dict.fromkeys(job.group for job in self.jobs):
            of_group = [job for job in self.jobs if (job.group, job.repeat) == (group, 0)]
            plans = {job.backend: made for job in of_group if isinstance(made := self.plan(job, staged), Plan)}
            told = [shortened(each.model_dump(), self.folder, self.settings.given) for each in inequalities(plans)]
            found[group_name(*group)] = [r.Inequality(**each) for each in told]
        return found

    def _protocol(self, staged: Staged) -> r.Protocol:
        settings, job = self.settings, self.jobs[0]
        content = TrainSpec.model_validate(self.content(job, staged))
        train = content.train
        return r.Protocol(
            backends=settings.backends,
            profiles=settings.profiles,
            batches=settings.batches,
            tiers=settings.tiers,
            repeats=settings.repeats,
            seeds=settings.seeds[: settings.repeats],
            steps=settings.steps,
            warm_up=settings.warm_up,
            images=staged.images,
            held_out=staged.held_out_images,
            images_sha256=staged.sha256,
            sets=len(image_sets(content.dataset)),
            resolution=largest_resolution(content.dataset),
            images_a_step=[batch * train.gradient_accumulation * train.gpus for batch in settings.batches],
            text_tokens=f"the captions as they are, at most {content.dataset.max_text_tokens} tokens",
            sampling_s=settings.sampling_s,
            time_limit_s=settings.time_limit_s,
            matched_fields=list(MATCHED),
            changed=self._changed,
        )

    def runs_left(self, job: Job, done: dict[str, r.Run], again: frozenset[str]) -> int:
        """Trainings that a job still takes if all goes well, those of the overhead included."""
        row = job.key not in done or job.key in again
        if any(run.backend == job.backend and run.status == "ok" for run in done.values()):
            overhead = self._lacks_overhead(job, done)
        else:
            overhead = job.key == next(each.key for each in self.jobs if each.backend == job.backend)
        return int(row) + 2 * self.settings.overhead_pairs * int(overhead)

    def _waits_for_score(self, job: Job) -> bool:
        return self.settings.held_out > 0 and (self.machinery.row_folder(job) / TO_SCORE).exists()

    def _lacks_overhead(self, job: Job, done: dict[str, r.Run]) -> bool:
        """Whether what LoraPort costs is still to be measured on this row: on the first good one of its backend.
        A share with a folder of its own leaves that to the one that has the backend's first row."""
        first = next(each.key for each in self.jobs if each.backend == job.backend)
        of_backend = [run for run in done.values() if run.backend == job.backend and run.status == "ok"]
        if not self.settings.overhead_pairs or first not in done or not of_backend:
            return False
        tried = any(run.overhead or _NO_OVERHEAD in " ".join(run.notes) for run in of_backend)
        return not tried and of_backend[0].key == job.key

    def _add_overhead(self, job: Job, staged: Staged) -> None:
        """Measure what LoraPort costs, and write it into the row's record."""
        self.tell(f"{job.key}: the overhead, {self.settings.overhead_pairs} pairs …")
        row = self.machinery.row_folder(job)
        place, run = row / "overhead", self.done()[job.key]
        place.mkdir(exist_ok=True)
        measured, notes = None, []
        try:
            measured = measure_overhead(self.content(job, staged), job.backend, self.settings, place)
        except Interrupted:
            raise
        except LoraPortError as error:
            notes = [f"{_NO_OVERHEAD}: {error.message}"]
        if measured and (measured.step_share > OVERHEAD_SHARE or measured.run_extra_s > OVERHEAD_SECONDS):
            most = f"{OVERHEAD_SHARE:.0%} of a step or {OVERHEAD_SECONDS:g} s of a run"
            notes = [f"By the median of its pairs, LoraPort costs more than {most} here."]
        run = run.model_copy(update={"overhead": measured, "notes": [*run.notes, *notes]})
        write_atomic(row / RECORD, run.model_dump_json() + "\n")
        shutil.rmtree(place)


def summary(run: r.Run) -> str:
    """A row in a few words."""
    if run.failure is not None:
        return f"{run.status} ({run.failure.reason}): {' '.join(run.failure.message.split())[:200]}"
    steps = f", {run.steps.seconds.median:.3f} s a step" if run.steps else ""
    memory = f", {run.device_memory.peak_bytes / 2**30:.1f} GiB" if run.device_memory else ""
    return f"{run.status} in {run.total_s:.0f} s{steps}{memory}"


def shortened_command(arguments: list[str], folder: Path) -> str:
    """The command for the record, the places of this machine shortened."""
    # An argument, or what an option or a field is given, is a path as a whole.
    spec = [{"path": each[each.index("/") :]} for each in arguments if re.match(r"([\w.:-]+=)?/", each)]
    return f"loraport {shlex.join(shortened(arguments, folder, spec))}"
