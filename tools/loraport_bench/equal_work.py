"""Whether the rows of a group did the same work, by what their outputs say."""

from __future__ import annotations

from collections import Counter

from loraport_bench.records import Run, Work


def with_differences(runs: list[Run]) -> list[Run]:
    """The rows with `work.differs` filled in: against the spec, and in the matched tier against the group's others."""
    return [run if run.work is None else run.model_copy(update={"work": _judged(run, run.work, runs)}) for run in runs]


def _judged(run: Run, work: Work, runs: list[Run]) -> Work:
    differs = []
    if run.status == "ok":
        if work.steps != work.expected_steps:
            differs.append(f"{work.steps} optimizer steps instead of {work.expected_steps}")
        if work.images is None:
            differs.append("the trainer does not tell how many images it trained")
        elif work.images != work.expected_images:
            differs.append(f"{work.images} images instead of {work.expected_images}")
        for name in ("modules", "parameters") if run.tier == "matched" else ():
            counts = Counter(
                getattr(other.work, name)
                for other in runs
                if other.group == run.group and other.work is not None and getattr(other.work, name) is not None
            )
            own = getattr(work, name)
            if len(counts) > 1 and own is not None:
                others = ", ".join(f"{count:,}" for count in counts if count != own)
                differs.append(f"{own:,} trained {name}; others of the group: {others}")
    return work.model_copy(update={"differs": differs})
