"""Rows in a bench's folder that are not of it: copied from another, or trained on images that were changed since."""

from __future__ import annotations

from loraport.errors import DataError
from loraport.planning import Plan
from loraport.profiles import AUTO
from loraport_bench.compare import WORK, differing, settings_of
from loraport_bench.records import Run
from loraport_bench.row import Machinery, configuration
from loraport_bench.schedule import Job

#: What all rows of a bench share, whatever the machine: the work, and the numbers that the model computes in.
_SAME = (*WORK, "model.family", "model.dtype")


def refuse_foreign(job: Job, run: Run, made: Plan | object, images_sha256: str, machinery: Machinery) -> None:
    """Raise DataError when the record of a job is of other work than its plan here, or of other images.

    What only the machine decides is not looked at, as rows come from several: memory settings for its card. Nor is what
    an earlier version did not record.
    """
    reasons = []
    if run.images_sha256 not in (None, images_sha256):
        reasons.append("its images or captions are not those that are staged here now")
    given = machinery.settings.given["memory"]["profile"]
    same = (*_SAME, "memory.") if job.tier == "matched" and given != AUTO else _SAME
    if (recorded := settings_of([run])) is not None and isinstance(made, Plan):
        planned = settings_of([run.model_copy(update={"configuration": configuration(made, machinery.folder)})])
        assert planned is not None
        reasons += [
            f"{path} is {there!r} in it, and {here!r} here"
            for path, (there, here) in differing(recorded, planned).items()
            if path.startswith(same) and path in recorded
        ]
    if run.steps is not None and run.steps.warm_up != (warm_up := machinery.settings.warm_up):
        reasons.append(f"--warm-up is {run.steps.warm_up} in it, and {warm_up} here")
    if reasons:
        raise DataError(
            f"{machinery.row_folder(job)} is of another bench: {'; '.join(reasons)}.",
            hint="Take it away, and the row is run here; or give the spec and options that it was measured with. Of "
            "rows from another machine, copy its folder `data` as well.",
        )
