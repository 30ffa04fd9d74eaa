"""What a file's header alone tells about a module: its keys, kind, size and rank."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from loraport.errors import DataError
from loraport.lora.canonical import Array, ColumnScale, Factors, LoHa, LoKr, LowRank, RowScale, Tucker
from loraport.lora.stacked import Full, Verbatim
from loraport_convert.codec import keys
from loraport_convert.families.rules import ModuleMap


def fields_of(
    prefixed: str, endings: Mapping[str, str], magnitudes: Sequence[str], path: Path
) -> tuple[dict[str, str], list[str]]:
    """Field → key of one module, and the keys that belong to another kind of adapter than the one read.

    Of several kinds under one name it is the one that ComfyUI applies. `magnitudes` are the endings that mean a DoRA.
    Raises DataError when a half is missing, or for a kind that LoraPort does not know.
    """
    for ending, key in endings.items():
        if ending in keys.UNSUPPORTED:
            raise DataError(f"{path}: {key} cannot be converted: {keys.UNSUPPORTED[ending]}.")
    found = _kind(endings)
    if not found:
        return {}, list(endings.values())
    missing = [prefixed + end for end in found.values() if end not in endings]
    if missing:
        raise DataError(f"{path}: LoRA module {prefixed} is not whole: {', '.join(missing)} is missing.")
    if any(field.startswith("verbatim" + keys.OFT) for field in found) and keys.RESCALE in endings:
        found["verbatim" + keys.RESCALE] = keys.RESCALE
    if any(field.startswith("verbatim") for field in found):
        if keys.ALPHA in endings:
            found["verbatim" + keys.ALPHA] = keys.ALPHA
        if keys.DORA_SCALE in endings:
            raise DataError(f"{path}: LoRA module {prefixed} has a DoRA on a kind that has none in any trainer.")
    elif "diff" not in found:
        if keys.ALPHA in endings:
            found["alpha"] = keys.ALPHA
        if magnitude := next((end for end in magnitudes if end in endings), None):
            found["magnitude"] = magnitude
    used = set(found.values())
    rest = [key for end, key in endings.items() if end not in used]
    return {field: endings[end] for field, end in found.items()}, rest


def _kind(endings: Mapping[str, str]) -> dict[str, str]:
    """Field → ending of the factors."""
    if found := next((end for end in (keys.SET, keys.SCALE) if end in endings), None):
        return {"verbatim" + keys.SET: found}
    whole = (*keys.WHOLE, keys.DIFF_BIAS, keys.NORM_BIAS, keys.PEFT_BIAS, keys.DIFF_MODULATION)
    if found := next((end for end in whole if end in endings), None):
        return {"diff": found}
    if lokr := {f"lokr.{name}": end for end, name in keys.LOKR.items() if end in endings}:
        return lokr
    if any(end in endings for end in keys.LOHA):
        cores = keys.LOHA_CORES if any(end in endings for end in keys.LOHA_CORES) else {}
        return {f"loha.{name}": end for end, name in (keys.LOHA | cores).items()}
    if turning := [end for end in (keys.OFT, *keys.OFT_PARTS) if end in endings]:
        return {"verbatim" + end: end for end in (turning[:1] if turning[0] == keys.OFT else turning)}
    if any(end in endings for end in keys.GLORA):
        return {"verbatim" + end: end for end in keys.GLORA}
    pairs = (pair for pair in keys.LOW_RANK if pair[0] in endings or pair[1] in endings)
    pair = next(({"up": up, "down": down} for up, down in pairs), {})
    if keys.MID in endings and pair.get("up") == keys.LOW_RANK[0][0]:
        pair["mid"] = keys.MID
    if pair and keys.RESHAPE in endings:
        pair["reshape"] = keys.RESHAPE
    return pair


def dora_of(magnitude: Array, ending: str, rows: int, columns: int) -> RowScale | ColumnScale | None:
    """What a DoRA's numbers scale, from their shape; None where they fit neither rows nor columns.

    PEFT's are by row, and its (1, out, 1, 1) of a convolution looks like LyCORIS' (1, in, 1, 1) by column.
    """
    axes = max(magnitude.ndim, 2)
    peft = not ending.endswith(keys.DORA_SCALE)
    if magnitude.size == rows and (peft or magnitude.shape[:1] == (rows,)):
        return RowScale(magnitude.reshape(-1), axes=axes)
    by_column = not peft and magnitude.ndim > 1 and magnitude.shape[:2] == (1, magnitude.size)
    if by_column and magnitude.size and (columns == magnitude.size or (axes > 2 and columns % magnitude.size == 0)):
        return ColumnScale(magnitude.reshape(-1), axes)
    return None


def measure(shapes: Mapping[str, tuple[int, ...]], name: str, path: Path) -> tuple[tuple[int, int], int | None]:
    """((rows, columns), rank) of a module, from the shapes of its tensors by field.

    Raises DataError when they do not fit together.
    """
    # Arrays of the right shape that take no memory: the canonical classes know the rules.
    factors = factors_of({field: np.broadcast_to(np.float32(0), shape) for field, shape in shapes.items()})
    problem = factors.problem()
    if problem is not None:
        raise DataError(
            f"{path}: LoRA module {name}: {problem}.", hint="The file is damaged: copy or download it again."
        )
    if isinstance(factors, Verbatim):
        return factors.shape, None
    if 0 in factors.shape or factors.rank == 0:
        raise DataError(f"{path}: LoRA module {name} is empty: {factors.shape}, rank {factors.rank}.")
    if "reshape" in shapes and shapes["reshape"] != (2,):
        raise DataError(f"{path}: {name}{keys.RESHAPE} must be two numbers, not {shapes['reshape']}.")
    if "alpha" in shapes and math.prod(shapes["alpha"]) != 1:
        raise DataError(f"{path}: {name}: alpha must be one number, not {shapes['alpha']}.")
    return factors.shape, factors.rank


def check_growth(family: ModuleMap | None, native: str, shape: tuple[int, int], reshape: Array, key: str) -> None:
    """Raise DataError where a LoRA makes a weight larger in a way that no written file would tell."""
    told = tuple(reshape.tolist())
    if reshape.dtype.kind not in "iu" or family is None or native not in family.grows or told != shape:
        raise DataError(
            f"{key} makes a weight larger, to {told}, which LoraPort knows only of LoRAs for FLUX.1's img_in.",
            hint="Load the file as it is.",
        )


def factors_of(arrays: Mapping[str, Array]) -> Factors:
    """The factors that the fields of one module make. Raises DataError where a field is of another kind."""
    if "diff" in arrays:
        return Full(arrays["diff"])
    verbatim = {field.removeprefix("verbatim"): each for field, each in arrays.items() if field.startswith("verbatim")}
    if verbatim:
        return Verbatim(verbatim)
    if "mid" in arrays:
        return Tucker(down=arrays["down"], mid=arrays["mid"], up=arrays["up"])
    if "up" in arrays:
        return LowRank(down=arrays["down"], up=arrays["up"])
    named = {field.partition(".")[2]: array for field, array in arrays.items() if "." in field}
    return LoKr(**named) if any(field.startswith("lokr.") for field in arrays) else LoHa(**named)
