"""What a run left behind: how much was trained, counted in the files, and the checkpoints that are to be scored."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path

from loraport.errors import LoraPortError
from loraport.files import atomic_path
from loraport.lora.canonical import LoraFile
from loraport.lora.dialect import AskingDialect, UnknownScale, WritableDialect, detect_dialect
from loraport.lora.storage import read_tensors
from loraport.plugins import plugins
from loraport.run import events
from loraport.run.finish import PUBLISHED

#: Endings of the tensors of a LoRA file that are not trained.
_FIXED = (".alpha", ".scale")


def trained_parameters(lora: Path) -> tuple[int, int]:
    """(modules, numbers in their factors) of a published LoRA. Raises DataError for a damaged file."""
    tensors = read_tensors(lora)
    trained = {key: tensors.shapes[key] for key in tensors if not key.endswith(_FIXED)}
    modules = len(plugins().dialects()[PUBLISHED].read(lora).modules)
    return modules, sum(math.prod(shape) for shape in trained.values())


def keep_checkpoints(
    told: Iterable[events.Checkpoint], run_dir: Path, published: Path, alpha: float, target: Path
) -> tuple[dict[int, Path], list[str]]:
    """Write the LoRA of each checkpoint that is still there as `<target>/step-N.safetensors` in the published dialect.

    Returns them by step, and why others could not be read. Their scales are the published file's, which was proven:
    some trainers leave them out of what they save on the way.
    """
    final = plugins().dialects()[PUBLISHED].read(published)
    kept: dict[int, Path] = {}
    problems: list[str] = []
    for event in told:
        place = run_dir / event.path
        candidates = [place] if place.is_file() else sorted(place.glob("*.safetensors"))
        if not candidates:
            continue  # an older one, removed by the trainer
        path = target / f"step-{event.step}.safetensors"
        try:
            lora = _first_lora(candidates, alpha)
            _write(_with_scales(lora, final), path)
        except LoraPortError as error:
            problems.append(f"The checkpoint of step {event.step} cannot be scored: {error.message}")
        else:
            kept[event.step] = path
    return kept, problems


def _first_lora(files: Iterable[Path], alpha: float) -> LoraFile:
    dialects = plugins().dialects()
    problem: LoraPortError | None = None
    for path in files:
        try:
            dialect = detect_dialect(path, dialects)
            try:
                return dialect.read(path)
            except UnknownScale:
                if not isinstance(dialect, AskingDialect):
                    raise
                return dialect.read_with_alpha(path, alpha)
        except LoraPortError as error:
            problem = error
    assert problem is not None
    raise problem


def _with_scales(lora: LoraFile, final: LoraFile) -> LoraFile:
    modules: Mapping = {
        name: replace(module, scale=final.modules[name].scale) if name in final.modules else module
        for name, module in lora.modules.items()
    }
    return replace(lora, modules=dict(modules))


def _write(lora: LoraFile, path: Path) -> None:
    writer = plugins().dialects()[PUBLISHED]
    assert isinstance(writer, WritableDialect)
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_path(path) as draft:
        writer.write(lora, draft, None, {})
