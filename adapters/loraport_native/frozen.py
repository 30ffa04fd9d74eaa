"""Products with a frozen weight, however it is stored, and with a LoRA on top.

A weight is a kind and its stored tensors:

    plain         (weight (out, in),)
    rows          (8-bit rows (out, in), float32 scales (out, 1)), multiplied in the dtype of the activations
    scaled rows   the same, multiplied in 8 bits forward and backward: activations and gradients are quantised as they
                  come, a scale a token
    scaled rows and columns
                  the same, with the rows' transpose (in, out) beside them for the backward pass
    nf4           (bitsandbytes' packed (out·in/2, 1) uint8; the largest value of each 64 numbers by `to_bytes`)
    nf4 fp8       the same, multiplied in 8-bit floats
    nf4 int8      the same, multiplied in 8-bit integers
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from loraport_native.add_product import add_product_, narrow_product
from loraport_native.anew import to_anew
from loraport_native.scaled_matmul import product, to_rows

NF4_BLOCK = 64
_GROUP = 256  # of these blocks' scales, quantised together
#: (x (M, in), *stored) → x·Wᵀ, or (gradient (M, out), *stored) → gradient·W; a new tensor.
Product = Callable[..., Tensor]


def frozen_linear(x: Tensor, kind: str, stored: tuple[Tensor, ...]) -> Tensor:
    """x (…, in) · Wᵀ. The weight gets no gradient, and no wide copy of it outlives one product."""
    rows = x.flatten(0, -2)
    # The compiler of torch 2.11 fails at a Function that autograd has no use for.
    differentiated = torch.is_grad_enabled() and x.requires_grad
    result = _Frozen.apply(rows, kind, *stored) if differentiated else PRODUCTS[kind][0](rows, *stored)
    return result.unflatten(0, x.shape[:-1])


def widened(kind: str, stored: tuple[Tensor, ...], shape: tuple[int, int]) -> Tensor:
    """The weight (out, in) in float32."""
    if kind.startswith("nf4"):
        return _unpack(shape, torch.float32, *stored)
    return stored[0].float() * stored[1] if kind != "plain" else stored[0].float()


class Adapted(NamedTuple):
    """A frozen weight and the LoRA on it: x·Wᵀ + scale·(x·downᵀ)·upᵀ, down (rank, in) and up (out, rank)."""

    down: Tensor
    up: Tensor
    scale: float
    kind: str
    stored: tuple[Tensor, ...]


def adapted_linears(x: Tensor, *layers: Adapted) -> tuple[Tensor, ...]:
    """Each layer's result for the same x (…, in).

    The LoRA's part is added by the matrix product itself, to the result and to the gradient in place: as a tensor of
    its own it would cross the device's memory three more times. Layers that share their input read it once for all
    their LoRAs, and sum its gradient where the LoRAs' part is added.
    """
    rows = x.flatten(0, -2)
    if torch.is_grad_enabled():
        plans = tuple((layer.scale, layer.kind, 2 + len(layer.stored)) for layer in layers)
        tensors = (tensor for layer in layers for tensor in (layer.down, layer.up, *layer.stored))
        results = _Adapted.apply(rows, plans, *tensors)
    else:
        results, _ = _adapted(rows, layers)
    return tuple(result.unflatten(0, x.shape[:-1]) for result in results)


class _Frozen(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, kind: str, *stored: Tensor) -> Tensor:  # type: ignore[no-untyped-def]
        ctx.save_for_backward(*stored)
        ctx.kind = kind
        return PRODUCTS[kind][0](x, *stored)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[no-untyped-def]
        stored = ctx.saved_tensors
        return PRODUCTS[ctx.kind][1](gradient, *stored), None, *(None for _ in stored)


def _adapted(x: Tensor, layers: Sequence[Adapted]) -> tuple[tuple[Tensor, ...], Tensor]:
    """The results for x (M, in), and the layers' scale·x·downᵀ (M, rank) side by side."""
    inner = x @ _joined([layer.down for layer in layers]).t()
    inner = _joined([_times(part, layer.scale) for layer, part in _parts(inner, layers)], dim=1)
    return tuple(_with_lora(x, layer, part) for layer, part in _parts(inner, layers)), inner


def _with_lora(x: Tensor, layer: Adapted, inner: Tensor) -> Tensor:
    """A layer's result for x (M, in) and its scale·x·downᵀ (M, rank)."""
    if layer.kind == "plain":  # the wide product adds itself to the LoRA's part, which is then only written
        result = narrow_product(inner, layer.up.t())
        add_product_(result, x, layer.stored[0].t())
    else:
        result = PRODUCTS[layer.kind][0](x, *layer.stored)
        add_product_(result, inner, layer.up.t())
    return result


def _to_input(gradients: Sequence[Tensor], layers: Sequence[Adapted], outer: Tensor) -> Tensor:
    """The gradient of x (M, in), with the layers' scale·gradient·up (M, rank) side by side."""
    downs = _joined([layer.down for layer in layers])
    if all(layer.kind == "plain" for layer in layers):
        to_x = narrow_product(outer, downs)
        for gradient, layer in zip(gradients, layers, strict=True):
            add_product_(to_x, gradient, layer.stored[0])
    else:
        to_x, *others = (
            PRODUCTS[layer.kind][1](gradient, *layer.stored) for gradient, layer in zip(gradients, layers, strict=True)
        )
        add_product_(to_x, outer, downs, others)
    return to_x


class _Adapted(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[no-untyped-def]
        ctx, x: Tensor, plans: tuple[tuple[float, str, int], ...], *tensors: Tensor
    ) -> tuple[Tensor, ...]:
        results, inner = _adapted(x, _layers(plans, tensors))
        ctx.save_for_backward(x, inner, *tensors)
        ctx.plans = plans
        return results

    @staticmethod
    def backward(ctx, *gradients: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[no-untyped-def]
        x, inner, *tensors = ctx.saved_tensors
        layers = _layers(ctx.plans, tensors)
        outer = _joined(
            [_times(gradient @ layer.up, layer.scale) for gradient, layer in zip(gradients, layers, strict=True)], dim=1
        )
        to_x = _to_input(gradients, layers, outer) if ctx.needs_input_grad[0] else None
        to_tensors: list[Tensor | None] = []
        to_downs = _parts((outer.t() @ x).t(), layers)
        for gradient, (layer, to_down), (_, part) in zip(gradients, to_downs, _parts(inner, layers), strict=True):
            to_tensors += [to_down.t(), gradient.t() @ part, *(None for _ in layer.stored)]
        return to_x, None, *to_tensors


def _layers(plans: tuple[tuple[float, str, int], ...], tensors: Sequence[Tensor]) -> list[Adapted]:
    layers, start = [], 0
    for scale, kind, count in plans:
        down, up, *stored = tensors[start : start + count]
        layers.append(Adapted(down, up, scale, kind, tuple(stored)))
        start += count
    return layers


def _parts(side_by_side: Tensor, layers: Sequence[Adapted]) -> list[tuple[Adapted, Tensor]]:
    """Each layer with its (…, rank) of (…, sum of the ranks)."""
    return list(zip(layers, side_by_side.split([len(layer.down) for layer in layers], dim=-1), strict=True))


def _joined(tensors: list[Tensor], dim: int = 0) -> Tensor:
    return tensors[0] if len(tensors) == 1 else torch.cat(tensors, dim)


def _times(values: Tensor, scale: float) -> Tensor:
    return values if scale == 1 else values * scale  # a kernel less in each of hundreds of products


def _plain(x: Tensor, weight: Tensor) -> Tensor:
    return x @ weight.t()


def _plain_back(gradient: Tensor, weight: Tensor) -> Tensor:
    return gradient @ weight


def _rows(x: Tensor, rows: Tensor, scale: Tensor) -> Tensor:
    # Every 8-bit number is exact in bfloat16, so nothing of the weight is rounded: its scales go on the result.
    return (x @ rows.to(x.dtype).t()) * scale.t().to(x.dtype)


def _rows_back(gradient: Tensor, rows: Tensor, scale: Tensor) -> Tensor:
    scaled = gradient * scale.t().to(gradient.dtype)
    return scaled @ to_anew(rows, gradient.dtype, scaled)


def _scaled_rows(x: Tensor, rows: Tensor, scale: Tensor) -> Tensor:
    return product(*to_rows(x, rows.dtype), rows, scale, x.dtype)


def _scaled_rows_back(gradient: Tensor, rows: Tensor, scale: Tensor) -> Tensor:
    return _scaled_columns_back(gradient, rows, scale, rows.t().contiguous())


def _scaled_rows_with_columns(x: Tensor, rows: Tensor, scale: Tensor, columns: Tensor) -> Tensor:
    return _scaled_rows(x, rows, scale)


def _scaled_columns_back(gradient: Tensor, rows: Tensor, scale: Tensor, columns: Tensor) -> Tensor:
    # The sum is over the weight's rows now, so their scales go on the gradient before it is quantised.
    ones = scale.new_ones(len(columns), 1)
    return product(*to_rows(gradient.float() * scale.t(), rows.dtype), columns, ones, gradient.dtype)


def _nf4(x: Tensor, *stored: Tensor) -> Tensor:
    return x @ _unpack((-1, x.shape[1]), x.dtype, *stored).t()


def _nf4_back(gradient: Tensor, *stored: Tensor) -> Tensor:
    return gradient @ _unpack_anew(gradient, *stored)


def _nf4_in(dtype: torch.dtype) -> tuple[Product, Product]:
    def times(x: Tensor, *stored: Tensor) -> Tensor:
        return _scaled_rows(x, *to_rows(_unpack((-1, x.shape[1]), x.dtype, *stored), dtype))

    def back(gradient: Tensor, *stored: Tensor) -> Tensor:
        rows, scale = to_rows(_unpack_anew(gradient, *stored).t(), dtype)
        return _scaled_rows(gradient, rows.contiguous(), scale)  # as a card's products want them

    return times, back


def _unpack(
    shape: tuple[int, int], dtype: torch.dtype, packed: Tensor, largest: Tensor, least: Tensor, step: Tensor
) -> Tensor:
    """The weight; -1 stands for the side that follows from the number of its numbers."""
    known = max(shape)
    full = tuple(2 * packed.numel() // known if side == -1 else side for side in shape)
    scales = from_bytes(largest, least, step)[: 2 * packed.numel() // NF4_BLOCK]
    weight: Tensor = torch.ops.bitsandbytes.dequantize_4bit(packed, scales, NF4_BLOCK, "nf4", full, dtype)
    return weight


def _unpack_anew(gradient: Tensor, packed: Tensor, largest: Tensor, least: Tensor, step: Tensor) -> Tensor:
    """The weight (out, in) for the gradient (M, out), in its dtype."""
    least = to_anew(least, least.dtype, gradient)  # the smallest of what the weight is made of
    return _unpack((gradient.shape[1], -1), gradient.dtype, packed, largest, least, step)


def to_bytes(values: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Quantise a float32 vector to 8 bits, evenly between the least and the greatest of each 256: value ≈ least +
    step·byte. Bytes (n / 256, 256), the last group filled up; least and step float32 (n / 256, 1).

    QLoRA's double quantisation (arXiv 2305.14314), which saves 0.4 bits a weight. Scales of neighbouring blocks are
    alike, so even steps between their extremes err less than the one code for all that bitsandbytes has.
    """
    groups = math.ceil(len(values) / _GROUP)
    filled = torch.cat((values, values[-1:].expand(groups * _GROUP - len(values)))).view(groups, _GROUP)
    least, greatest = filled.amin(dim=1, keepdim=True), filled.amax(dim=1, keepdim=True)
    step = ((greatest - least) / 255).clamp(min=torch.finfo(torch.float32).tiny)
    return ((filled - least) / step).round().to(torch.uint8), least, step


def from_bytes(numbers: Tensor, least: Tensor, step: Tensor) -> Tensor:
    """The vector (n,) that `to_bytes` was given, nearly, with the last group's filling."""
    return torch.addcmul(least, numbers.float(), step).flatten()


PRODUCTS: dict[str, tuple[Product, Product]] = {
    "plain": (_plain, _plain_back),
    "rows": (_rows, _rows_back),
    "scaled rows": (_scaled_rows, _scaled_rows_back),
    "scaled rows and columns": (_scaled_rows_with_columns, _scaled_columns_back),
    "nf4": (_nf4, _nf4_back),
    "nf4 fp8": _nf4_in(torch.float8_e4m3fn),
    "nf4 int8": _nf4_in(torch.int8),
}
