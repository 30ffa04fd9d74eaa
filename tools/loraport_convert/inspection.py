"""What a LoRA file says of itself: from its header and its tiny alpha tensors, whatever its size."""

from __future__ import annotations

import contextlib
import math
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from loraport.errors import DataError
from loraport.lora.dialect import Dialect
from loraport.lora.storage import Tensors, parse_json, read_tensors
from loraport_convert.codec import keys
from loraport_convert.codec.header import fields_of, measure
from loraport_convert.codec.keys import MODEL, Module
from loraport_convert.codec.scale import Told, first_told, from_adapter_metadata, from_kohya, from_peft
from loraport_convert.comfyui_rules import Verdict, judge
from loraport_convert.families import FAMILIES
from loraport_convert.families.detect import detect_family
from loraport_convert.reading import lora_file

_CONFIG, _NATIVE_SCALES, _FAMILY = "adapter_config.json", "loraport.scales", "loraport.family"


@dataclass(frozen=True)
class ModuleFacts:
    """One module as the file holds it. `name` is under the file's own prefix; `scale` None is not told by the file."""

    name: str
    kind: str
    rows: int
    columns: int
    rank: int | None
    alpha: float | None
    scale: float | None
    scale_from: str
    dtype: str
    dora: bool


@dataclass(frozen=True)
class Facts:
    """Everything that is known of a file without its numbers. `dialects` are (name, confidence), surest first."""

    path: Path
    size: int
    dialects: tuple[tuple[str, float], ...]
    family: str | None
    modules: tuple[ModuleFacts, ...]
    damaged: tuple[str, ...]  #: what is wrong with modules that cannot be read
    unknown: tuple[str, ...]  #: keys that mean nothing to anybody
    metadata: Mapping[str, str]
    comfyui: Verdict

    def counts(self, field: str) -> list[tuple[Any, int]]:
        """(value, modules that have it) of a field of the modules, commonest first."""
        return Counter(getattr(module, field) for module in self.modules).most_common()

    def to_json(self) -> dict[str, Any]:
        return {
            "path": str(self.path),
            "size": self.size,
            "dialects": dict(self.dialects),
            "family": self.family,
            "modules": [asdict(module) for module in self.modules],
            "damaged": list(self.damaged),
            "unknown": list(self.unknown),
            "metadata": dict(self.metadata),
            "comfyui": asdict(self.comfyui),
        }


def inspect(path: Path, dialects: Mapping[str, Dialect]) -> Facts:
    """Read the header and the alphas of a LoRA. Raises DataError when the header lies or holds no LoRA at all."""
    path = lora_file(path)
    tensors = read_tensors(path)
    grouped, unknown = keys.grouped(tensors)
    told = _told(path, tensors.metadata)
    modules, damaged = [], []
    for prefixed, endings in grouped.items():
        try:
            facts, rest = _module(prefixed, endings, tensors, told)
        except DataError as error:
            damaged.append(error.message.removeprefix(f"{path}: "))
            continue
        unknown += rest
        if facts is not None:
            modules.append(facts)
    if not modules and not damaged:
        raise DataError(f"{path} holds no LoRA: its keys are like {', '.join(list(tensors)[:3]) or 'none'}.")
    family = _family(modules, tensors.metadata)
    sure = {
        name: dialect.detect(tensors.keys(), tensors.shapes, tensors.metadata) for name, dialect in dialects.items()
    }
    ranked = sorted(((name, round(value, 3)) for name, value in sure.items() if value > 0), key=lambda each: -each[1])
    scales = {module.name: module.scale for module in modules}
    return Facts(
        path,
        path.stat().st_size,
        tuple(ranked),
        family,
        tuple(modules),
        tuple(damaged),
        tuple(unknown),
        tensors.metadata,
        judge(tensors, grouped, family, scales),
    )


def _module(
    prefixed: str, endings: Mapping[str, str], tensors: Tensors, told: Told
) -> tuple[ModuleFacts | None, list[str]]:
    fields, rest = fields_of(prefixed, endings, (*keys.MAGNITUDES, keys.DORA_SCALE), tensors.path)
    if not fields:
        return None, rest
    shapes = {field: tensors.shapes[key] for field, key in fields.items()}
    (rows, columns), rank = measure(shapes, prefixed, tensors.path)
    alpha = float(tensors[fields["alpha"]].reshape(())) if "alpha" in fields else None
    scale: float | None
    if rank is None:
        scale, origin = 1.0, "its kind has none"
    elif alpha is not None:
        scale, origin = alpha / rank, "alpha tensor"
    else:
        scale = told(keys.parse(prefixed), rank)
        origin = "not in the file" if scale is None else "metadata"
    if scale is not None and not math.isfinite(scale):
        raise DataError(f"{prefixed}: the scale is {scale}.")
    dtypes = {tensors.dtypes[key] for field, key in fields.items() if field not in ("alpha", "magnitude")}
    kind = _kind(prefixed, fields, columns)
    dora = "magnitude" in fields
    facts = ModuleFacts(prefixed, kind, rows, columns, rank, alpha, scale, origin, "+".join(sorted(dtypes)), dora)
    return facts, rest


def _kind(prefixed: str, fields: Mapping[str, str], columns: int) -> str:
    first = next(iter(fields))
    if first == "diff":
        return "bias" if prefixed.endswith(keys.BIAS) else "norm" if columns == 1 else "full"
    if first.startswith("verbatim"):
        own = {keys.OFT: "oft", keys.SET: "replaced weight"}
        return own.get(first.removeprefix("verbatim").rstrip(".01234567"), "glora")
    return {"up": "lora"}.get(first, first.partition(".")[0])


def _told(path: Path, metadata: Mapping[str, str]) -> Told:
    """Where a scale can be besides the alpha tensors: in the metadata, or in PEFT's configuration beside the file."""
    rules: list[Told] = []
    config = _json_object(_text(path.with_name(_CONFIG)))
    with contextlib.suppress(DataError):  # damaged metadata tell nothing
        rules.append(from_adapter_metadata(metadata))
        if "lora_alpha" in config:
            rules.append(from_peft(config))
    native = _json_object(metadata.get(_NATIVE_SCALES, ""))
    rules.append(lambda module, rank: _number(native.get(module.name)) if module.part == MODEL else None)
    return first_told(*rules, from_kohya(metadata))


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, ValueError):
        return ""


def _json_object(text: str) -> dict[str, Any]:
    try:
        content = parse_json(text)
    except ValueError:
        return {}
    return content if isinstance(content, dict) else {}


def _number(value: object) -> float | None:
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None


def _family(modules: Iterable[ModuleFacts], metadata: Mapping[str, str]) -> str | None:
    if metadata.get(_FAMILY) in FAMILIES:
        return metadata[_FAMILY]
    shapes: dict[tuple[str, bool], tuple[int, int]] = {}
    for module in modules:
        parsed: Module = keys.parse(module.name)
        if parsed.part == MODEL:
            shapes[parsed.name, parsed.flat] = module.rows, module.columns
    try:
        family = detect_family(shapes) if shapes else None
    except DataError:
        family = None
    return family.name if family else metadata.get(_FAMILY)
