"""`loraport bench SPEC ...`: real trainers on the same images."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

from loraport.cli.options import AsJson, SpecFile

if TYPE_CHECKING:
    from loraport_bench.bench import Bench
    from loraport_bench.schedule import Job
    from loraport_bench.settings import Settings

STEPS, WARM_UP, OVERHEAD_PAIRS = 60, 10, 3


class SpecOrCommand(TyperGroup):
    """A group whose `run` may be left out: `bench SPEC` is `bench run SPEC`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        known = {*self.list_commands(ctx), *ctx.help_option_names}
        return super().parse_args(ctx, args if not args or args[0] in known else ["run", *args])


def run(
    context: typer.Context,
    spec: SpecFile,
    backends: Annotated[str, typer.Option(help="Trainers, separated by commas.")] = "native",
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Folder of the bench; the same command goes on there.")
    ] = None,
    profiles: Annotated[
        str, typer.Option(help="Quantisations, separated by commas, such as fp8,nf4; `spec` is the spec's own memory.")
    ] = "spec",
    batches: Annotated[
        str | None, typer.Option(help="Batch sizes, separated by commas; the spec's train.batch_size when left out.")
    ] = None,
    tiers: Annotated[str, typer.Option(help="Tiers, separated by commas.")] = "matched,best-effort",
    repeats: Annotated[int | None, typer.Option(min=1, help="Repeats of each row; one for each seed.")] = None,
    seeds: Annotated[str, typer.Option(help="Seeds, which the repeats take in turn.")] = "0,1,2",
    steps: Annotated[int, typer.Option(min=2, help="Optimizer steps of a run.")] = STEPS,
    warm_up: Annotated[int, typer.Option(min=0, help="First steps that are left out of the times.")] = WARM_UP,
    held_out: Annotated[
        int, typer.Option(min=0, help="Images kept from training, on which every LoRA is scored; 0 scores nothing.")
    ] = 2,
    checkpoints: Annotated[
        int, typer.Option(min=0, help="Checkpoints that are scored over a run, its end among them; 0: only the end.")
    ] = 4,
    card: Annotated[
        str | None, typer.Option(help="Hardware profile for best effort, such as 24gb; by default this card's.")
    ] = None,
    time_limit: Annotated[float, typer.Option(min=1, metavar="SECONDS", help="After which a run is ended.")] = 3600,
    session_limit: Annotated[
        float | None, typer.Option(min=0, metavar="SECONDS", help="After which no new run is begun.")
    ] = None,
    sampling: Annotated[
        float, typer.Option(min=0.01, max=0.1, metavar="SECONDS", help="Time between two samples of memory.")
    ] = 0.05,
    overhead: Annotated[
        bool, typer.Option("--overhead", help="Measure what going through LoraPort costs, once for each trainer.")
    ] = False,
    overhead_pairs: Annotated[
        int | None, typer.Option(min=1, help=f"The same with so many pairs of runs, instead of {OVERHEAD_PAIRS}.")
    ] = None,
    changes: Annotated[
        list[str] | None,
        typer.Option(
            "--for",
            metavar="BACKEND:FIELD=VALUE",
            help="Change the spec for one trainer, such as native:memory.text_encoder=fp8. Repeatable.",
        ),
    ] = None,
    overrides: Annotated[
        list[str] | None,
        typer.Option(
            "--set", metavar="FIELD=VALUE", help="Change a field of the spec, such as lora.rank=32. Repeatable."
        ),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show the schedule and the expected time; nothing is started or written.")
    ] = False,
    retry: Annotated[bool, typer.Option("--retry", help="Run rows anew that failed or were not ready.")] = False,
    queue: Annotated[bool, typer.Option("--queue", help="Wait while another bench measures on this machine.")] = False,
    wait: Annotated[float, typer.Option(min=0, metavar="SECONDS", help="Time for the card to become idle.")] = 60,
    busy: Annotated[bool, typer.Option("--busy", help="Measure although the card is in use; the rows say so.")] = False,
    part: Annotated[
        str | None, typer.Option(metavar="K/N", help="Only the K-th of N shares, for N machines by hand.")
    ] = None,
    on: Annotated[
        str | None, typer.Option(metavar="CLUSTER", help="Spread over a cluster by submitit: slurm, or local to try.")
    ] = None,
    job: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=VALUE", help="Parameter for submitit, such as slurm_partition=gpu. Repeatable."),
    ] = None,
    write_sky: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write a SkyPilot task for this bench, and do no more.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Benchmark trainers on the same images: equal work in one tier, each one's best settings in the other.

    A bench that was cut off goes on where it was when the same command is given again. docs/bench.md says what is
    measured how.
    """
    need_psutil()
    from loraport.cli.options import read_spec
    from loraport_bench.bench import Bench, shortened_command
    from loraport_bench.process import stops_raise
    from loraport_bench.row import Machinery
    from loraport_bench.schedule import part_of
    from loraport_bench.tiers import refuse_options

    _refuse_unread(context.params)
    given = read_spec(spec, overrides)
    refuse_options("--set", given.model_dump(mode="json"), overrides or [], batches=batches is not None)
    settings = _settings(
        given=given.model_dump(mode="json"),
        changes=_changes(changes or []),
        backends=_list(backends),
        profiles=_list(profiles),
        batches=[given.train.batch_size] if batches is None else _list(batches),
        tiers=_list(tiers),
        card=card,
        seeds=_list(seeds),
        repeats=repeats,
        steps=steps,
        warm_up=warm_up,
        checkpoints=checkpoints,
        held_out=held_out,
        time_limit_s=time_limit,
        sampling_s=sampling,
        overhead_pairs=overhead_pairs or (OVERHEAD_PAIRS if overhead else 0),
    )
    folder = (out or Path(f"bench-{given.name}")).expanduser().absolute()
    machinery = Machinery(folder, settings, wait, busy)
    bench = Bench(settings, folder, machinery, _tell, shortened_command(_arguments(), folder), queue)
    jobs = bench.jobs if part is None else part_of(bench.jobs, *_part(part))
    where = None
    if on is not None:
        from loraport_bench.cluster import find_cluster

        where = find_cluster(on, job or [])
    if dry_run:
        _show_schedule(bench, jobs, bench.failed() if retry else frozenset(), as_json)
        return
    if write_sky is not None:
        from loraport_bench.cluster import write_sky as write_task

        write_task(write_sky, spec, bench, _options_for_part(context))
        typer.echo(f"Wrote {write_sky}; its first lines say how to start it.")
        return
    bench.check()
    bench.begin()
    again = bench.failed() if retry else frozenset()
    problems = []
    try:
        with stops_raise():
            if where is not None:
                from loraport_bench.cluster import run_on

                problems = run_on(bench, jobs, where, again=again)
            else:
                bench.run(jobs, session_limit, again)
    finally:
        if bench.done():
            bench.gather()
    _finish(bench, problems, as_json)


def _refuse_unread(params: dict[str, Any]) -> None:
    """Raise SpecError for an option that this command would read in vain, for want of another one or beside it."""
    from loraport.errors import SpecError

    given = {name for name, value in params.items() if value}
    beside = "--write-sky writes a task and does no more"
    for unread, option, why in (
        ("job" in given and "on" not in given, "job", "it is for the cluster that --on names"),
        (
            "card" in given and "best-effort" not in _list(params["tiers"]),
            "card",
            "it is for the best-effort tier, and --tiers leaves that out",
        ),
        (
            params["session_limit"] is not None and "on" in given,
            "session-limit",
            "it is for a session on this machine; with --on, give jobs their time by --job timeout_min=MINUTES",
        ),
        *(("write_sky" in given and name in given, name, beside) for name in ("on", "part", "dry_run")),
        ("write_sky" in given and "as_json" in given, "json", beside),
    ):
        if unread:
            raise SpecError(f"--{option.replace('_', '-')} would do nothing here: {why}.")


def _finish(bench: Bench, problems: list[str], as_json: bool) -> None:
    from loraport.errors import BackendError
    from loraport_bench import RESULTS
    from loraport_bench.bench import summary
    from loraport_bench.records import Results
    from loraport_bench.report import MARKDOWN, PAGE

    if not bench.done():
        raise BackendError("\n  ".join(["No row was run.", *problems]))
    results = Results.read(bench.folder / RESULTS)
    if as_json:
        typer.echo((bench.folder / RESULTS).read_text(encoding="utf-8"), nl=False)
    else:
        for one in results.runs:
            typer.echo(f"{one.key}: {summary(one)}")
        typer.echo(f"Wrote {bench.folder / RESULTS}, {MARKDOWN} and {PAGE}")
    if problems:
        raise BackendError("\n  ".join(["Some jobs failed:", *problems]), hint="The same command submits them again.")
    if results.complete and not any(one.status == "ok" for one in results.runs):
        raise BackendError("No run came to its end.", hint=f"{bench.folder / RESULTS} says why each did not.")


def _settings(**given: Any) -> Settings:
    """Checked settings. Raises SpecError naming the option."""
    from loraport.errors import SpecError, unknown
    from loraport.plugins import plugins
    from loraport_bench.settings import OF_SPEC, Settings
    from loraport_bench.tiers import refuse_options

    for name in given["backends"]:
        plugins().backend(name)
    known = plugins().profiles()
    quantisations = [name for kind, name in known if kind == "quantize"]
    hardware = [name for kind, name in known if kind == "hardware"]
    choices = {"profiles": [*quantisations, OF_SPEC], "tiers": ["matched", "best-effort"]}
    for option, allowed in choices.items():
        for name in given[option]:
            if name not in allowed:
                raise SpecError(unknown(f"--{option}:", name, allowed))
    if given["card"] is not None and given["card"] not in hardware:
        raise SpecError(unknown("--card:", given["card"], hardware))
    for name, changes in given["changes"].items():
        if name not in given["backends"]:
            raise SpecError(unknown("--for:", name, given["backends"]))
        refuse_options(f"--for {name}", given["given"], changes)
    for option, example in (("batches", "1,4"), ("seeds", "0,1,2")):
        given[option] = [_whole(text, option, example) for text in given[option]]
    if any(batch < 1 for batch in given["batches"]):
        raise SpecError("--batches: a batch is of at least 1 image.")
    for option in ("backends", "profiles", "batches", "tiers", "seeds"):
        if not given[option]:
            raise SpecError(f"--{option} names none.")
        if len(set(given[option])) != len(given[option]):
            raise SpecError(f"--{option}: each only once.")
    if given["warm_up"] >= given["steps"]:
        raise SpecError(f"--warm-up {given['warm_up']} leaves no step of {given['steps']} to measure.")
    given["repeats"] = given["repeats"] or len(given["seeds"])
    return Settings(**given)


def _changes(given: list[str]) -> dict[str, list[str]]:
    from loraport.errors import SpecError

    found: dict[str, list[str]] = {}
    for text in given:
        backend, colon, change = text.partition(":")
        if not colon or "=" not in change:
            raise SpecError(f"--for {text!r}: write it as BACKEND:FIELD=VALUE, such as native:memory.text_encoder=fp8.")
        found.setdefault(backend, []).append(change)
    return found


def _whole(value: str | int, option: str, example: str) -> int:
    from loraport.errors import SpecError

    try:
        return int(value)
    except ValueError:
        raise SpecError(f"--{option}: {value!r} is not a whole number; write a list such as {example}.") from None


def _list(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]


def _part(text: str) -> tuple[int, int]:
    """(number from 0, count) out of `K/N`."""
    from loraport.errors import SpecError

    number, _, count = text.partition("/")
    if not (number.isdecimal() and count.isdecimal() and 1 <= int(number) <= int(count)):
        raise SpecError(f"--part {text!r}: write it as K/N with K from 1 to N, such as 2/4.")
    return int(number) - 1, int(count)


def _show_schedule(bench: Bench, jobs: list[Job], again: frozenset[str], as_json: bool) -> None:
    """Print what would be run and how long it will take, as far as rows that are done tell."""
    import json

    from loraport.errors import LoraPortError
    from loraport_bench.images import planned
    from loraport_bench.row import refusal_of
    from loraport_bench.schedule import expected_seconds

    staged, done, lines = planned(bench.spec, bench.folder / "data"), bench.done(), []
    for job in jobs:
        made = bench.plan(job, staged)
        why = str(made) if isinstance(made, LoraPortError) else refusal_of(job, made)
        there = job.key in done and job.key not in again
        runs = 0 if why and not there else bench.runs_left(job, done, again)
        seconds = expected_seconds(job, done.values()) if runs else 0.0
        state = "overhead to measure" if there and runs else "done" if there else "refused" if why else "to run"
        expected = None if seconds is None else runs * seconds
        lines.append({"key": job.key, "state": state, "runs": runs, "expected_s": expected, "reason": why})
    unknown = sum(line["expected_s"] is None for line in lines)
    total = sum(line["expected_s"] or 0.0 for line in lines)  # type: ignore[misc]
    at_most = bench.settings.time_limit_s * sum(line["runs"] for line in lines)  # type: ignore[misc]
    if as_json:
        typer.echo(json.dumps({"rows": lines, "expected_s": total, "unknown": unknown, "at_most_s": at_most}, indent=2))
        return
    for line in lines:
        known = line["expected_s"]
        shown = "" if not line["runs"] else f", about {known:.0f} s" if known else ", time not known yet"
        typer.echo(f"{line['key']}: {line['state']}{shown}" + (f": {line['reason']}" if line["reason"] else ""))
    told = f"{total / 60:.0f} min" if total or not unknown else "not known"
    more = f", and {unknown} rows whose time the first ones will tell" if unknown else ""
    typer.echo(f"Expected: {told}{more}; at most {at_most / 3600:.1f} h, by the limit of each run.")


def _arguments() -> list[str]:
    """The command's own arguments, for the record."""
    return sys.argv[1:]


def _options_for_part(context: typer.Context) -> list[str]:
    """The options of this command that hold for each part of it too."""
    skipped = {"spec", "out", "write_sky", "part", "on", "job", "dry_run", "as_json", "overrides"}
    words: list[str] = []
    for parameter in context.command.params:
        value, name = context.params.get(parameter.name or ""), parameter.name
        if name in skipped or value is None or value == parameter.get_default(context):
            continue
        option = max(parameter.opts, key=len)
        for each in value if isinstance(value, list | tuple) else [value]:
            words += [option] if each is True else [option, str(each)]
    for override in context.params.get("overrides") or []:
        words += ["--set", override]
    return words


def _tell(text: str) -> None:
    typer.echo(text, err=True)


def need_psutil() -> None:
    """Raise BackendError where psutil, with which everything here is measured, is not installed."""
    import importlib.util

    from loraport.errors import BackendError

    if importlib.util.find_spec("psutil") is None:
        raise BackendError("Benchmarks need psutil.", hint="Install it with: pip install 'loraport[bench]'")
