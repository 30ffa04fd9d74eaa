"""Reading a LoRA file of any dialect into the canonical form: the work all dialects share.

Only the header is read at first. A module's tensors are read when it is asked for, so memory does not grow with the
file; what the header can tell (a missing half, a scale told nowhere) is raised at once.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np

from loraport.errors import DataError
from loraport.lora.canonical import ColumnScale, LoraFile, LoraModule, RowScale
from loraport.lora.dialect import UnknownScale
from loraport.lora.lazy import LazyModules
from loraport.lora.proof import prove
from loraport.lora.stacked import Part, Verbatim
from loraport.lora.storage import Tensors, read_tensors
from loraport_convert.codec import keys
from loraport_convert.codec.header import check_growth, dora_of, factors_of, fields_of, measure
from loraport_convert.codec.keys import MODEL, NAMED, Module
from loraport_convert.codec.rows import cut, fuse
from loraport_convert.codec.scale import Told
from loraport_convert.codec.turning import Piece, is_plain, joined, pieces_of
from loraport_convert.codec.turning import cut as cut_pieces
from loraport_convert.families import ENCODERS, FAMILIES, ModuleMap
from loraport_convert.families.detect import detect_family
from loraport_convert.families.rules import Span, cuts

FAMILY_KEY = "loraport.family"
#: Why a kind cannot be put together from parts, or taken apart.
_WHY_NOT = {
    "OFT": "an edge between the parts goes through one of its blocks",
    "BOFT": "its butterflies mix rows of the whole module, so the turns of the parts are none of the whole",
    "GLoRA": "each part is multiplied by a matrix of its own",
    "replaced weight": "only the whole weight can take another's place",
}


@dataclass(frozen=True)
class _Source:
    """One module of the file: its keys by field, and the scale where no alpha tensor tells it. `axes` is how many its
    factors have, and `weight` the shape of the weight whose rows it has: of a bias, that of its module."""

    module: Module
    fields: Mapping[str, str]
    shape: tuple[int, int]
    scale: float | None
    axes: int
    weight: tuple[int, int] | None


@dataclass(frozen=True)
class _Move:
    """Rows `start` to `stop` of a source become those from `to` on of a module of `rows` rows."""

    source: _Source
    start: int
    stop: int
    to: int
    rows: int

    @property
    def end(self) -> int:
        return self.to + self.stop - self.start


def decode(path: Path, told: Told, hint: str | None = None, family_told: str | None = None) -> LoraFile:
    """The LoRA in a file, its modules under native names; `told` gives the scale of modules without an alpha tensor.

    Where the family is not known, neither from the file nor as `family_told`, the names stay as they are in the file,
    without prefixes. Raises DataError when a module is not whole, or when names with underscores for dots are of no
    known family, and UnknownScale, with `hint` on where the scale may be, when nothing tells it.
    """
    tensors = read_tensors(path)
    sources, unread = _sources(tensors, told, hint)
    family = _family(tensors, sources, family_told)
    moves: dict[str, list[_Move]] = {}
    for source in sources:
        spans = _spans(family, source)
        if reshape := source.fields.get("reshape"):
            check_growth(family, spans[0].module if spans else "", source.shape, tensors[reshape], reshape)
        ranges = None if spans is None else cuts(spans, source.shape[0])
        if spans is None or ranges is None:
            unread.extend(source.fields.values())
            continue
        for span, (start, stop) in zip(spans, ranges, strict=True):
            share, rest = divmod(stop - start, span.count)
            if rest:
                raise DataError(
                    f"{path}: {source.module.name} has {stop - start} rows, which are not {span.count} equal parts."
                )
            move = _Move(source, start, stop, share * span.first, share * span.total)
            moves.setdefault(span.module, []).append(move)
    for name, several in moves.items():
        if len({move.rows for move in several}) > 1 or len({move.source.shape[1] for move in several}) > 1:
            shapes = ", ".join(f"{move.source.module.name} {move.source.shape}" for move in several)
            raise DataError(f"{path}: the parts of {name} have sizes that do not fit together: {shapes}.")
    builders = {name: partial(_build, name, several, tensors) for name, several in moves.items()}
    return LoraFile(family.name if family else None, LazyModules(builders), tensors.metadata, tuple(unread))


def _sources(tensors: Tensors, told: Told, hint: str | None) -> tuple[list[_Source], list[str]]:
    modules, unread = keys.grouped(tensors)
    shapes = tensors.shapes
    sources: dict[str, _Source] = {}
    silent: list[tuple[str, int]] = []
    for prefixed, endings in modules.items():
        fields, rest = fields_of(prefixed, endings, (*keys.MAGNITUDES, keys.DORA_SCALE), tensors.path)
        unread.extend(rest)
        if not fields:
            continue
        sizes = {field: shapes[key] for field, key in fields.items()}
        shape, rank = measure(sizes, prefixed, tensors.path)
        if "magnitude" in sizes:
            # An array of the right shape that takes no memory.
            numbers = np.broadcast_to(np.float32(0), sizes["magnitude"])
            if dora_of(numbers, fields["magnitude"], *shape) is None:
                raise DataError(
                    f"{tensors.path}: LoRA module {prefixed} is a DoRA of shape {sizes['magnitude']}, which fits "
                    f"neither its {shape[0]} rows nor its {shape[1]} columns."
                )
        module = keys.parse(prefixed)
        scale = None
        if "alpha" not in fields:
            scale = 1.0 if rank is None else told(module, rank)
            if scale is None and rank is not None:
                silent.append((prefixed, rank))
        if fields.get("diff", "").endswith(keys.PEFT_BIAS):
            scale = _scale_of_lora(prefixed.removesuffix(keys.BIAS), modules, tensors, told)
        axes = max(len(size) for size in sizes.values())
        sources[prefixed] = _Source(module, fields, shape, scale, axes, shape)
    if silent:
        ranks = ", ".join(map(str, sorted({rank for _, rank in silent})))
        raise UnknownScale(
            f"{tensors.path} does not tell its scale: {len(silent)} modules, such as {silent[0][0]}, of rank {ranks}, "
            "have no alpha, and no metadata name one.",
            hint=f"{hint + ' Or give' if hint else 'Give'} the alpha it was trained with (--alpha N), or say that it "
            "was the rank (--assume-alpha rank).",
        )
    for prefixed in [each for each in sources if each.endswith(keys.BIAS)]:
        owner = sources.get(prefixed.removesuffix(keys.BIAS))
        sources[prefixed] = replace(sources[prefixed], weight=owner.shape if owner else None)
    return list(sources.values()), unread


def _scale_of_lora(prefixed: str, modules: Mapping[str, Mapping[str, str]], tensors: Tensors, told: Told) -> float:
    """The scale of the LoRA that a bias of PEFT's belongs to. Raises DataError where there is none, or a DoRA."""
    fields, _ = fields_of(prefixed, modules.get(prefixed, {}), keys.MAGNITUDES, tensors.path)
    if "down" not in fields or "magnitude" in fields:
        what = "a DoRA, which scales it by norms of the base weights" if "magnitude" in fields else "missing"
        raise DataError(f"{tensors.path}: the LoRA that {prefixed}{keys.PEFT_BIAS} belongs to is {what}.")
    rank = tensors.shapes[fields["down"]][0]
    if "alpha" in fields and rank:
        return float(tensors[fields["alpha"]].reshape(())) / rank
    return told(keys.parse(prefixed), rank) or 1.0  # where nothing tells it, the LoRA itself is refused


def _family(tensors: Tensors, sources: list[_Source], said: str | None) -> ModuleMap | None:
    told = tensors.metadata.get(FAMILY_KEY)
    if told in FAMILIES:
        if said not in (None, told):
            raise DataError(
                f"{tensors.path} says that it is of the family {told}, not {said}.", hint="Leave --family out."
            )
        return FAMILIES[told]
    if said is not None:
        return FAMILIES[said]
    models = [each for each in sources if each.module.part == MODEL]
    # Biases and norms have no width that would tell models apart.
    matrices = [each for each in models if each.axes > 1] or models
    shapes = {(each.module.name, each.module.flat): each.shape for each in matrices}
    if shapes:
        family = detect_family(shapes)
        flat = next((each.module.name for each in models if each.module.flat), None)
        if family is None and flat is not None:
            raise DataError(
                f"{tensors.path} has underscores for dots in its names, such as {flat}, and those of no family that "
                "LoraPort knows; which modules they mean cannot be told.",
                hint=f"Name the family with --family: {', '.join(FAMILIES)}. A file made for ComfyUI may load there "
                "as it is.",
            )
        return family
    # Text encoders alone: two of CLIP are SDXL's, one is that of SD 1.5.
    encoders = {source.module.part for source in sources}
    return FAMILIES["sdxl" if "te2" in encoders else "sd15"] if encoders <= {"te1", "te2"} else None


def _spans(family: ModuleMap | None, source: _Source) -> tuple[Span, ...] | None:
    module = source.module
    if module.part == NAMED:
        return (Span(module.name, 0, 1, 1),)
    if module.part == MODEL and family is None:
        return (Span(module.name, 0, 1, 1),)
    encoder = None if module.part == MODEL else _text_encoder(family, module)
    names = family if module.part == MODEL else ENCODERS["t5" if encoder and encoder.startswith("t5") else "clip"]
    if names is None or (module.part != MODEL and encoder is None):
        return None
    spans = names.native(module.name, source.weight, module.flat)
    if spans is None:
        return None
    _check_parameter(names, source, spans)
    start = f"{keys.TEXT_ENCODERS}{encoder}.transformer." if encoder else ""
    return tuple(replace(span, module=start + span.module) for span in spans)


def _check_parameter(names: ModuleMap, source: _Source, spans: tuple[Span, ...]) -> None:
    """Raise DataError for a change of a parameter that the model does not have, or has in another form."""
    key, name = next(iter(source.fields.values())), spans[0].module
    if name.endswith(keys.BIAS):
        if not names.has_bias(name.removesuffix(keys.BIAS)):
            raise DataError(
                f"{key} changes a bias, and {name.removesuffix(keys.BIAS)} has none in {names.name}.",
                hint="ComfyUI leaves it out without a word. Without it the file converts; train without biases.",
            )
        module = source.module
        if source.weight is None and len({names.native(module.name, (2, n), module.flat) for n in (1, 2)}) > 1:
            raise DataError(f"{key} changes a bias whose order of rows only the change of its weight would tell.")
    elif names.is_matrix(name):
        if source.axes < 2:
            raise DataError(f"{key} has one axis, and {name} of {names.name} is a matrix.")
    elif not any(field == "diff" or field.endswith(keys.SET) for field in source.fields):
        raise DataError(f"{key}: {name} of {names.name} is no matrix; only a whole change fits.")


def _text_encoder(family: ModuleMap | None, module: Module) -> str | None:
    """ComfyUI's name of the text encoder that a module is of, None where the family has no such encoder."""
    if family is None or not family.encoders:
        return None
    number = int(module.part.removeprefix("te"))
    # FLUX.1 has two encoders, and sd-scripts calls the second the third.
    return family.encoders[min(number, len(family.encoders)) - 1]


def _build(name: str, moves: list[_Move], tensors: Tensors) -> LoraModule:
    first, *others = [_fused(name, several, tensors) for several in _readings(moves)]
    for other in others:
        if not prove(LoraFile(None, {name: first}), LoraFile(None, {name: other})).ok:
            raise DataError(
                f"{tensors.path} holds the module {name} under two names, and the two say different things: "
                f"{', '.join(move.source.module.name for move in moves)}.",
                hint="Loaders disagree about such a file: some apply one, some both. Take out those not meant.",
            )
    return first


def _readings(moves: list[_Move]) -> list[list[_Move]]:
    """The moves, apart where they give the same rows twice: some files hold both `qkv` and `to_q`, for any loader."""
    readings: list[list[_Move]] = []
    for move in sorted(moves, key=lambda each: each.start - each.stop):
        fitting = (one for one in readings if all(each.end <= move.to or move.end <= each.to for each in one))
        if (reading := next(fitting, None)) is None:
            readings.append([move])
        else:
            reading.append(move)
    return [sorted(reading, key=lambda each: each.to) for reading in readings]


def _fused(name: str, moves: list[_Move], tensors: Tensors) -> LoraModule:
    if any("verbatim" in field for move in moves for field in move.source.fields):
        return _verbatim(name, moves, tensors)
    parts: list[Part] = []
    doras: list[RowScale | ColumnScale] = []
    for move in moves:
        arrays = {field: tensors.on_disk(key) for field, key in move.source.fields.items()}
        magnitude = arrays.pop("magnitude", None)
        factors, scale = factors_of(arrays), move.source.scale
        if scale is None:
            scale = float(arrays["alpha"].reshape(())) / factors.rank if factors.rank else 1.0
        # Its own check first, so that an error names the module of the file.
        LoraModule(move.source.module.name, factors, scale)
        parts += cut(Part(0, factors, scale), move.start, move.stop, move.to)
        if magnitude is not None:
            dora = dora_of(magnitude, move.source.fields["magnitude"], *move.source.shape)
            assert dora is not None
            by_row = isinstance(dora, RowScale)
            doras.append(replace(dora, trained=dora.trained[move.start : move.stop]) if by_row else dora)
    fused, scale = fuse(parts, moves[0].rows)
    unscaled = len({part.scale for part in parts}) == 1  # then these are the numbers that have just been checked
    return LoraModule(name, fused, scale, _dora(name, doras, moves), finite=unscaled)


def _verbatim(name: str, moves: list[_Move], tensors: Tensors) -> LoraModule:
    """A module of a kind that is kept as it is, which can only change its name; an OFT also the place of its blocks."""
    pieces: list[Piece] = []
    for move in moves:
        factors = factors_of({field: tensors[key] for field, key in move.source.fields.items()})
        if not isinstance(factors, Verbatim):
            raise DataError(f"{tensors.path}: the parts of {name} are adapters of kinds that do not go together.")
        if len(moves) == 1 and _is_whole(moves) and (is_plain(factors) or not pieces_of(factors)):
            return LoraModule(name, factors, 1.0)
        mine = pieces_of(factors)
        cut_out = None if mine is None else cut_pieces(mine, move.start, move.stop, move.to)
        if cut_out is None:
            raise DataError(
                f"{tensors.path}: {move.source.module.name} is a {factors.algorithm}, whose rows have another place in "
                f"{name}, and {_WHY_NOT[factors.algorithm]}.",
                hint="Train it on modules that the model for ComfyUI has too, or as a LoRA.",
            )
        pieces += cut_out
    blocks = joined(pieces, moves[0].rows)
    if blocks is None:
        raise DataError(
            f"{tensors.path}: {name} is put together from OFTs whose blocks do not end where its parts do.",
            hint="Train with blocks whose size divides each part's rows.",
        )
    return LoraModule(name, Verbatim({keys.OFT: blocks}), 1.0)


def _dora(name: str, doras: list[RowScale | ColumnScale], moves: list[_Move]) -> RowScale | ColumnScale | None:
    if not doras:
        return None
    rows = [each for each in doras if isinstance(each, RowScale)]
    if not rows and len({id(move.source) for move in moves}) == 1 and _is_whole(moves):
        return doras[0]
    if not rows and len(doras) == len(moves) and _is_whole(moves):
        trained = [each.trained for each in doras]
        return ColumnScale(np.stack(trained), doras[0].axes, tuple(move.end for move in moves))
    if len(rows) < len(doras):
        raise DataError(
            f"LoRA module {name} is made of parts of DoRAs by column, whose norms are those of other rows too.",
            hint="Train q, k and v alike, or the DoRA by row (LyCORIS: wd_on_output).",
        )
    if len(doras) < len(moves) or sum(len(each.trained) for each in rows) != moves[0].rows:
        raise DataError(
            f"LoRA module {name} is a DoRA in some of its rows only, which no file for ComfyUI can hold.",
            hint="Train q, k and v alike.",
        )
    return RowScale(np.concatenate([each.trained for each in rows]), axes=rows[0].axes)


def _is_whole(moves: list[_Move]) -> bool:
    """Whether the moves fill every row of the module, and take every row of their sources."""
    taken = {id(move.source): move.source.shape[0] for move in moves}
    return sum(move.stop - move.start for move in moves) == moves[0].rows == sum(taken.values())
