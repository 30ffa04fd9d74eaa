"""From a path to the canonical form: which files there are, which dialect each is in, and the scale where it lacks."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from loraport.errors import DataError
from loraport.lora.canonical import LoraFile
from loraport.lora.dialect import AskingDialect, Dialect, FamilyDialect, UnknownScale, detect_dialect
from loraport.lora.lazy import LazyModules
from loraport_convert.codec.decode import FAMILY_KEY
from loraport_convert.dialects.base import known

PEFT_WEIGHTS = "adapter_model.safetensors"


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
    """Read any LoRA. `scale` and `family` count only where the file does not tell them itself.

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
        if scale is None or not isinstance(dialect, AskingDialect):
            raise
        return Found(path, dialect, dialect.read_with_alpha(path, scale.alpha), asked=True)


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
