"""SimpleTuner's final LoRA, with the alpha that it loses. No torch."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from loraport.errors import BackendError
from loraport.lora.storage import read_tensors, write_tensors
from loraport.spec.models import TrainSpec
from loraport_simpletuner import mapping
from loraport_simpletuner.dialect import ALPHA
from loraport_simpletuner.translate import OUTPUT, WORK

FINAL = "pytorch_lora_weights.safetensors"
RESULT = "lora.safetensors"
#: Written last into a checkpoint, with this text.
GUARD, WHOLE = ".guard", "complete"


def collect(spec: TrainSpec, run_dir: Path) -> Path:
    """The final file with alpha in its metadata, under the run's work folder; SimpleTuner's own stays as it is.

    The alpha is the spec's, and must agree with the last checkpoint's where that tells it. Raises BackendError when the
    training did not end well: no final file, another status than completed, or another last step.
    """
    output = run_dir / WORK / OUTPUT
    problem = unfinished(spec.train.steps, output)
    if problem is not None:
        raise BackendError(
            f"SimpleTuner ended without its LoRA: {problem}.",
            hint="Look at log.txt in the run folder, then go on with: loraport resume",
        )
    final = output / FINAL
    if spec.lora.type != "lora":
        return final  # LyCORIS files hold alpha
    tensors = read_tensors(final)
    ranks = {shape[0] for name, shape in tensors.shapes.items() if name.endswith(".lora_A.weight")}
    if ranks != {spec.lora.rank}:
        raise BackendError(f"{final} has LoRA ranks {sorted(ranks)}, where the spec asks for {spec.lora.rank}.")
    alpha = mapping.alpha_of(spec)
    told = _told_alpha(output, spec.train.steps)
    if told is not None and abs(told - alpha) > 1e-6 * alpha:
        raise BackendError(f"SimpleTuner's last checkpoint has alpha {told}, where the spec asks for {alpha}.")
    result = run_dir / WORK / RESULT
    write_tensors(result, tensors, {**tensors.metadata, ALPHA: repr(alpha)})
    return result


def unfinished(steps: int, output: Path) -> str | None:
    """Why the output folder is not that of a whole training, or None."""
    if not (output / FINAL).is_file():
        there = ", ".join(path.name for _, path in checkpoints(output)) or "no checkpoint"
        return f"{FINAL} is missing; there is {there}"
    manifest = _json(output / "training_metrics.json")
    if manifest.get("status") != "completed":
        return f"its own status is {manifest.get('status', 'unknown')!r}, not 'completed'"
    if manifest.get("last_step") != steps:
        return f"its last step is {manifest.get('last_step')}, not {steps}"
    return None


def checkpoints(output: Path) -> list[tuple[int, Path]]:
    """The whole checkpoints in the output folder, as (step, folder), by step."""
    found = []
    for path in output.glob("checkpoint-*"):
        number = re.fullmatch(r"checkpoint-(\d+)", path.name)
        if number and _text(path / GUARD) == WHOLE:
            found.append((int(number[1]), path))
    return sorted(found)


def _told_alpha(output: Path, step: int) -> float | None:
    path = dict(checkpoints(output)).get(step)
    if path is None:
        return None
    metadata = read_tensors(path / FINAL).metadata
    try:
        return float(json.loads(metadata["lora_adapter_metadata"])["transformer.lora_alpha"])
    except (KeyError, ValueError, TypeError):
        return None


def _text(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8").strip()
    except OSError:
        return None


def _json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}
