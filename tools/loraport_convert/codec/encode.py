"""The tensors of one module as most formats write them."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np

from loraport.lora.canonical import Array, ColumnScale, Factors, LoHa, LoKr, LoraModule, LowRank, RowScale, Tucker
from loraport.lora.stacked import Full, NotExact, Stacked, Verbatim
from loraport_convert.codec import keys
from loraport_convert.dtypes import cast

_LETTERS = {"loha": "hada", "lokr": "lokr"}


def spelled(prefixed: str, ending: str) -> str:
    """The key of a tensor of a module, by the module's name in a file: the change of a bias stands with its module."""
    owner = prefixed.removesuffix(keys.BIAS)
    return owner + keys.DIFF_BIAS if owner != prefixed and ending == keys.DIFF else prefixed + ending


def narrow(module: LoraModule, dtype: str | None) -> dict[str, Array]:
    """The factors of a module in `dtype`, or each in its own."""
    arrays = module.factors.arrays()
    if dtype is None:
        return arrays
    return {name: cast(array, dtype, f"LoRA module {module.name}: {name}") for name, array in arrays.items()}


def low_rank_tensors(module: LoraModule, dtype: str | None, up: str, down: str) -> dict[str, Array]:
    """A LoRA's factors under the endings `up` and `down`, and its alpha; nothing for another kind."""
    if not isinstance(module.factors, LowRank):
        return {}
    arrays = narrow(module, dtype)
    return {up: arrays["up"], down: arrays["down"], keys.ALPHA: alpha(module, module.factors.rank)}


def of_one_module(dora: ColumnScale, name: str) -> ColumnScale:
    """The DoRA by column, where it is that of one module. Raises NotExact for one of several, which no file holds."""
    if dora.ends:
        raise NotExact(
            f"LoRA module {name} is put together from DoRAs by column, whose norms are those of each part alone.",
            module=name,
            hint="Its whole change can be written: --base MODEL --dora diff.",
        )
    return dora


def dora_shaped(numbers: Array, dora: RowScale | ColumnScale) -> Array:
    """A DoRA's numbers in the shape in which LyCORIS and ComfyUI hold them against the weight: (out, 1[, 1, 1]), or
    (1, in[, 1, 1]) by column."""
    kernel = (1,) * (dora.axes - 2)
    return numbers.reshape((1, -1, *kernel) if isinstance(dora, ColumnScale) else (-1, 1, *kernel))


def without_core(module: LoraModule) -> LoraModule:
    """A Tucker convolution's LoRA as a plain one of the same change, its core multiplied into `down` in fp32; others as
    they are. For layouts that have no core."""
    factors = module.factors
    if not isinstance(factors, Tucker):
        return module
    down = factors.inner().astype(np.float32).reshape(factors.mid.shape[0], -1, *factors.mid.shape[2:])
    return replace(module, factors=LowRank(down=down, up=factors.up))


def lycoris_tensors(module: LoraModule, dtype: str | None, format: str) -> dict[str, Array]:
    """LoHa, LoKr and whole differences as LyCORIS writes them.

    Raises NotExact, naming `format`, for rows of several adapters.
    """
    factors = module.factors
    if isinstance(factors, Full):
        diff = narrow(module, dtype)["diff"]
        return {keys.DIFF: diff if module.scale == 1.0 else _folded(module, "diff", diff)}
    if isinstance(factors, Verbatim):
        return factors.arrays()
    if isinstance(factors, Tucker):
        named = {f".lora_{name}.weight": array for name, array in narrow(module, dtype).items()}
        return {**named, keys.ALPHA: alpha(module, factors.rank)}
    if not isinstance(factors, LoHa | LoKr):
        raise NotExact(
            f"LoRA module {module.name} is made of several adapters, which {format} cannot hold as one.",
            module=module.name,
            hint="Choose how to come near it: --approximate svd, or --approximate diff for a large and exact file."
            + _exact_as_lora(factors),
        )
    tensors = {f".{_LETTERS[factors.kind]}_{name}": array for name, array in narrow(module, dtype).items()}
    if factors.rank is not None:
        tensors[keys.ALPHA] = alpha(module, factors.rank)
    elif module.scale != 1.0:
        # The smaller side of a Kronecker product, because fp32 costs little there.
        name, smaller = min(factors.arrays().items(), key=lambda item: item[1].size)
        tensors[f".lokr_{name}"] = _folded(module, name, smaller)
    return tensors


def _exact_as_lora(factors: Factors) -> str:
    """A sentence on the rank of a LoRA that makes the very change, where such a one is smaller than the change."""
    rank = _rank_bound(factors)
    out, columns = factors.shape
    return (
        f" A LoRA of rank {rank} is exact: --approximate svd --rank {rank}."
        if rank * (out + columns) < out * columns
        else ""
    )


def _rank_bound(factors: Factors) -> int:
    """The most that the rank of the change can be."""
    if isinstance(factors, Stacked):
        return sum(_rank_bound(part.factors) for part in factors.parts)
    if isinstance(factors, LoKr):
        inner = (each.shape[:1] if each is not None else () for each in (factors.w1_b, factors.w2_b))
        return math.prod(min(*side.shape, *rank) for side, rank in zip(factors.sides(), inner, strict=True))
    if isinstance(factors, LoHa):
        return int(factors.w1_b.shape[0] * factors.w2_b.shape[0])
    return factors.rank or min(factors.shape)


def alpha(module: LoraModule, rank: int) -> Array:
    """alpha = scale · rank, in fp32."""
    return cast(np.array(module.scale * rank), "fp32", f"LoRA module {module.name}: alpha")


def _folded(module: LoraModule, name: str, array: Array) -> Array:
    """The array times the module's scale, in fp32 so that no scale is rounded twice."""
    return cast(module.scale * array.astype(np.float64), "fp32", f"LoRA module {module.name}: {name}")
