"""Sentences that both reports say."""

from __future__ import annotations

from loraport_bench.records import Results
from loraport_bench.report.numbers import Group
from loraport_bench.report.tables import evaluators

LOSSES = (
    "Each trainer prints a loss of its own: weighted, averaged and drawn at times its own way. These curves say "
    "whether a run learned; they must not be compared between trainers. Each has its own axis."
)


def state(results: Results) -> str:
    """How many runs there are, and whether that is all."""
    ended = sum(run.status == "ok" for run in results.runs)
    count = len(results.runs)
    text = f"{count} {'run' if count == 1 else 'runs'}, of which {ended} came to their end."
    if not results.complete:
        text += " The bench is not complete: rows of its schedule are missing; the same command goes on with them."
    return text


def under_headline(group: Group, results: Results) -> list[str]:
    """What must be known to read a group's table."""
    notes = []
    good = [one for one in group.entries if one.good]
    if any(one.step_s and one.step_s.count > 1 for one in good):
        notes.append(
            "Seconds a step: median (10th – 90th percentile) of every measured step of all repeats. "
            "The others are medians of the repeats."
        )
    scopes = {scope for one in good for scope in one.scopes}
    if scopes:
        text = "Device memory: the peak of samples from outside"
        text += ", of the run's own processes." if scopes == {"processes"} else "."
        if "device" in scopes:
            text += " * All that is in use on the card: the driver doesn't tell processes apart there."
        notes.append(text)
    if group.without is not None:
        notes.append(
            f"Held-out loss: median (least – most) over the seeds, and its change from {group.without:.4f} without a "
            f"LoRA; lower is better. Scored by {evaluators(results)}."
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
