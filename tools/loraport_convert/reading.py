"""From a path to the canonical form: which files there are, which dialect each is in, and the scale where it lacks."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from loraport.errors import DataError, LoraPortError
from loraport.lora.canonical import LoraFile
from loraport.lora.dialect import AskingDialect, Dialect, FamilyDialect, UnknownScale, detect_dialect
from loraport.lora.lazy import LazyModules
from loraport.lora.storage import read_tensors
from loraport_convert.codec.decode import FAMILY_KEY
from loraport_convert.dialects.base import known

PEFT_WEIGHTS = "adapter_model.safetensors"
_RUN = ("spec.yaml", "plan.json", "state.json")  # what every run folder of LoraPort holds


@dataclass(frozen=True)
class Scale:
    """What a person says about the scale of files that do not tell it. `alpha` None stands for each module's rank."""

    alpha: float | None


@dataclass(frozen=True)
class Found:
    """A file, the dialect it is written in, and what it means."""

    path: Path
    dialect: Dialect
    lora: LoraFile
    asked: bool  #: whether its scale is what the person said
    spec: Path | None = None  #: the spec of the run it lies in, where that tells its scale


def lora_file(path: Path) -> Path:
    """The tensor file of a path: of an adapter folder as PEFT saves it, that in it."""
    return path / PEFT_WEIGHTS if (path / PEFT_WEIGHTS).is_file() else path


def lora_files(path: Path) -> list[Path]:
    """The safetensors files at a path: itself, or all below a folder. Links to folders are not followed.

    Raises DataError when there are none.
    """
    path = lora_file(path)
    if not path.is_dir():
        return [path]
    found = sorted(each for each in path.rglob("*.safetensors") if each.is_file() and not each.name.startswith("."))
    if not found:
        raise DataError(f"{path} holds no .safetensors file.")
    return found


def read_lora(
    path: Path, dialects: Mapping[str, Dialect], scale: Scale | None = None, family: str | None = None
) -> Found:
    """Read any LoRA. `scale` and `family` count only where the file does not tell them itself; before `scale` comes the
    spec of the run in whose folder the file lies.

    Raises DataError when no dialect knows the file, it is damaged, nothing tells its scale, or it says that it is of
    another family.
    """
    path = lora_file(path)
    dialect = detect_dialect(path, dialects, None if family is None else {FAMILY_KEY: known(family)})
    if family is not None:
        if not isinstance(dialect, FamilyDialect):
            raise DataError(f"{path} is written in {dialect.name}, which cannot be told a family (--family).")
        dialect = dialect.for_family(family)
    try:
        return Found(path, dialect, dialect.read(path), asked=False)
    except UnknownScale:
        if not isinstance(dialect, AskingDialect):
            raise
        if told := _told_by_run(path):
            return Found(path, dialect, dialect.read_with_alpha(path, told[0]), asked=False, spec=told[1])
        if scale is None:
            raise
        return Found(path, dialect, dialect.read_with_alpha(path, scale.alpha), asked=True)


def _told_by_run(path: Path) -> tuple[float, Path] | None:
    """(alpha, spec) of the run in whose folder a file lies, as a trainer leaves its checkpoints there.

    None where it lies in none, or its ranks are not those of the run.
    """
    from loraport.spec.models import TrainSpec

    folder = next((each for each in path.resolve().parents if all((each / name).is_file() for name in _RUN)), None)
    if folder is None:
        return None
    try:
        lora = TrainSpec.load(folder / _RUN[0]).lora
    except (LoraPortError, OSError):
        return None
    shapes = read_tensors(path).shapes
    ranks = {shapes[key][0] for key in shapes if key.endswith((".lora_A.weight", ".lora_A.default.weight"))}
    if lora.type != "lora" or ranks != {lora.rank}:
        return None
    return lora.effective_alpha * (math.sqrt(lora.rank) if lora.rslora else 1), folder / _RUN[0]


def read_back(dialect: Dialect, path: Path) -> LoraFile:
    """Read what `dialect` has just written. One that never writes its scale means alpha = rank by that."""
    try:
        return dialect.read(path)
    except UnknownScale:
        if not isinstance(dialect, AskingDialect):
            raise
        return dialect.read_with_alpha(path, None)


def expression_of(option: str, pattern: str) -> re.Pattern[str]:
    """An option's regular expression. Raises DataError, naming the option, when it is none."""
    try:
        return re.compile(pattern)
    except re.error as error:
        raise DataError(f"{option}: {pattern!r} is not a regular expression: {error}.") from error


def only(lora: LoraFile, pattern: str) -> LoraFile:
    """The modules whose whole name matches a regular expression. Raises DataError when none does or it is none."""
    expression = expression_of("--only", pattern)
    kept = [name for name in lora.modules if expression.fullmatch(name)]
    if not kept:
        some = ", ".join(list(lora.modules)[:3])
        raise DataError(f"--only: no module's whole name matches {pattern!r}. Modules are named like {some}.")
    modules = LazyModules({name: partial(lora.modules.__getitem__, name) for name in kept})
    return LoraFile(lora.family, modules, lora.metadata, lora.unread)
