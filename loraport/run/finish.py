"""The last part of a run: the trainer's LoRA becomes a file for ComfyUI that is proven to mean the same."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from loraport.errors import BackendError
from loraport.files import atomic_path, write_atomic
from loraport.planning import Plan
from loraport.run import events
from loraport.run.folder import RunFolder
from loraport.run.metadata import lora_metadata
from loraport.run.record import Record

if TYPE_CHECKING:
    from loraport.families import Family
    from loraport.lora.dialect import Dialect

PUBLISHED = "comfyui"  #: the dialect of the published file


def finish(
    plan: Plan, source: Path, folder: RunFolder, record: Record, dialects: Mapping[str, Dialect], family: Family
) -> None:
    """Write the LoRA at `source` as `<name>.safetensors`, with `proof.json` beside it, and tell that the run finished.

    Raises DataError when no dialect knows the file or it is damaged, and BackendError when what was written does not
    mean what was trained; then nothing is published.
    """
    from loraport.lora.dialect import WritableDialect, detect_dialect
    from loraport.lora.proof import prove

    spec = plan.spec
    record.emit(events.PhaseStarted(phase="convert", detail=f"to {PUBLISHED}"))
    writer = dialects.get(PUBLISHED)
    if not isinstance(writer, WritableDialect):
        raise BackendError(
            f"The LoRA dialect {PUBLISHED!r}, which the result is written in, is not installed.",
            hint="Install LoraPort again; `loraport plugins` shows plugins that failed to load.",
        )
    trained = detect_dialect(source, dialects).read(source)
    target = folder.lora_file(spec.name)
    with atomic_path(target) as draft:
        writer.write(trained, draft, spec.save.dtype, lora_metadata(plan, family))
        proof = prove(trained, writer.read(draft))
        if not proof.ok:
            raise BackendError(
                f"The LoRA written for ComfyUI does not mean what {plan.backend} trained: {proof.why}. "
                "Nothing was published.",
                hint=f"The trainer's own file is {source}. Please report this.",
            )
    write_atomic(folder.proof_file, json.dumps(proof.to_json(), indent=2, allow_nan=False) + "\n")
    record.emit(
        events.Finished(
            step=spec.train.steps,
            lora=target.name,
            proof=folder.proof_file.name,
            worst_difference=max(module.difference for module in proof.modules),
        )
    )
