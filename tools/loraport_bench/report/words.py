"""Sentences that both reports say."""

from __future__ import annotations

from collections import Counter

from loraport_bench.records import Results
from loraport_bench.report.numbers import Group
from loraport_bench.report.tables import FIRST_STEPS, evaluators
from loraport_bench.schedule import schedule

_MOST_MISSING = 6  #: rows named that are not there
_FAR_APART = 0.1  #: seconds between samples of memory that are told

LOSSES = (
    "Each trainer prints a loss of its own: weighted, averaged and drawn at times its own way. These curves say "
    "whether a run learned; they must not be compared between trainers. Each has its own axis."
)


def state(results: Results) -> str:
    """How many rows there are, how they ended, and which of the schedule are not there."""
    counts = Counter("came to its end" if run.status == "ok" else run.status for run in results.runs)
    if counts["came to its end"] != 1:
        counts["came to their end"] = counts.pop("came to its end", 0)
    order = ("came to its end", "came to their end", "failed", "refused")
    told = ", ".join(f"{counts[name]} {name}" for name in order if name in counts)
    text = f"{len(results.runs)} {'row' if len(results.runs) == 1 else 'rows'}: {told}."
    missing = _missing(results)
    if missing:
        more = "" if len(missing) <= _MOST_MISSING else f" and {len(missing) - _MOST_MISSING} more"
        text += f" Not run: {', '.join(missing[:_MOST_MISSING])}{more}; the command that measured this goes on with it."
    return text


def _missing(results: Results) -> list[str]:
    """The rows of the schedule, or of those of the benches that were gathered, that are not there."""
    there = {run.key for run in results.runs}
    protocols = [source.protocol for source in results.sources] or [results.protocol]
    scheduled = dict.fromkeys(job.key for protocol in protocols for job in schedule(protocol))
    return [] if results.complete else [key for key in scheduled if key not in there]


def under_headline(group: Group) -> list[str]:
    """What must be known to read a group's table."""
    notes = []
    good = [one for one in group.entries if one.good]
    if any(one.step_s and one.step_s.count > 1 for one in good):
        text = "Seconds a step: median (10th – 90th percentile) of every measured step of all repeats. "
        if all(len(one.good) == 1 for one in good):
            text += "Each trainer ran once: how far runs differ from each other is not known."
        else:
            text += "The others are medians of the repeats."
        notes.append(text)
    scopes = {scope for one in good for scope in one.scopes}
    if scopes:
        text = "Memory: the peak of samples of the device's memory from outside, while steps were trained and over the "
        text += "whole run"
        text += ", of the run's own processes." if scopes == {"processes"} else "."
        longest = max(trace.longest_gap_s for one in good for run in one.good if (trace := run.device_memory))
        if longest > _FAR_APART:
            text += f" The longest time between two samples was {longest:.2f} s."
        if "device" in scopes:
            text += " * All that is in use on the card: the driver doesn't tell processes apart there."
        notes.append(text)
    steps = sorted({run.work.expected_steps for one in good for run in one.good if run.work})
    if steps:
        notes.append(f"Whole run: the command from its start to its end, with {' or '.join(map(str, steps))} steps.")
    if group.without is not None:
        several = any(one.loss and one.loss.count > 1 for one in good)
        of = "median (least – most) over the seeds" if several else "of one seed"
        notes.append(
            f"Held-out loss: {of}, and its change from {group.without:.4f} without a LoRA; lower is better. "
            f"Scored by {evaluators([run for one in good for run in one.good])}."
        )
    clocks = {run.steps.measured for one in good for run in one.good if run.steps}
    if len(clocks) > 1:
        notes.append(
            "Some trainers time their steps themselves, others are timed from outside: “clock” among all runs says."
        )
    hosts = {(at.card, at.driver, at.processor) for one in good for run in one.good if (at := run.machine)}
    if len(hosts) > 1:
        notes.append("These runs were not all on the same hardware: “Machine” says which there were.")
    if group.tier == "best-effort":
        notes.append("Settings differ between the trainers here: each runs as it is recommended for the card.")
    return notes


def under_phases(group: Group) -> list[str]:
    """What must be known to read the table of phases."""
    if not any(one.first_steps_s for one in group.entries):
        return []
    first = sorted({run.steps.warm_up for one in group.entries for run in one.good if run.steps})
    steps = " or ".join(map(str, first))
    return [
        f"“{FIRST_STEPS}”: what training took before its measured steps, the first {steps}, in which trainers compile "
        "kernels, try them out or fill their caches. The longer a training is, the less they matter."
    ]
