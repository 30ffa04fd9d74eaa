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
from collections.abc import Callable

import torch
from torch import Tensor

from loraport_native.add_product import add_product_
from loraport_native.scaled_matmul import product, to_rows

NF4_BLOCK = 64
_GROUP = 256  # of these blocks' scales, quantised together
Product = Callable[
    ..., Tensor
]  #: (x (M, in), *stored) → x·Wᵀ, or (gradient (M, out), *stored) → gradient·W; a new tensor


def frozen_linear(x: Tensor, kind: str, stored: tuple[Tensor, ...]) -> Tensor:
    """x (…, in) · Wᵀ. The weight gets no gradient, and no wide copy of it outlives one product."""
    rows = x.flatten(0, -2)
    # The compiler of torch 2.11 fails at a Function that autograd has no use for.
    differentiated = torch.is_grad_enabled() and x.requires_grad
    result = _Frozen.apply(rows, kind, *stored) if differentiated else PRODUCTS[kind][0](rows, *stored)
    return result.unflatten(0, x.shape[:-1])


def adapted_linear(x: Tensor, down: Tensor, up: Tensor, scale: float, kind: str, stored: tuple[Tensor, ...]) -> Tensor:
    """x·Wᵀ + scale·(x·downᵀ)·upᵀ for a LoRA of factors down (rank, in) and up (out, rank).

    The LoRA's part is added by the matrix product itself, to the result and to the gradient in place: as a tensor of
    its own it would cross the device's memory three more times.
    """
    rows = x.flatten(0, -2)
    if torch.is_grad_enabled():
        result = _Adapted.apply(rows, down, up, scale, kind, *stored)
    else:
        result, _ = _adapted(rows, down, up, scale, kind, stored)
    return result.unflatten(0, x.shape[:-1])


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


def _adapted(
    x: Tensor, down: Tensor, up: Tensor, scale: float, kind: str, stored: tuple[Tensor, ...]
) -> tuple[Tensor, Tensor]:
    """The result for x (M, in), and scale·x·downᵀ (M, rank)."""
    result = PRODUCTS[kind][0](x, *stored)
    inner = _times(x @ down.t(), scale)
    add_product_(result, inner, up.t())
    return result, inner


class _Adapted(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[no-untyped-def]
        ctx, x: Tensor, down: Tensor, up: Tensor, scale: float, kind: str, *stored: Tensor
    ) -> Tensor:
        result, inner = _adapted(x, down, up, scale, kind, stored)
        ctx.save_for_backward(x, inner, down, up, *stored)
        ctx.scale, ctx.kind = scale, kind
        return result

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[no-untyped-def]
        x, inner, down, up, *stored = ctx.saved_tensors
        outer = _times(gradient @ up, ctx.scale)
        to_x = None
        if ctx.needs_input_grad[0]:
            to_x = PRODUCTS[ctx.kind][1](gradient, *stored)
            add_product_(to_x, outer, down)
        return to_x, outer.t() @ x, gradient.t() @ inner, None, None, *(None for _ in stored)


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
    return (gradient * scale.t().to(gradient.dtype)) @ rows.to(gradient.dtype)


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
    return gradient @ _unpack((gradient.shape[1], -1), gradient.dtype, *stored)


def _nf4_in(dtype: torch.dtype) -> tuple[Product, Product]:
    def times(x: Tensor, *stored: Tensor) -> Tensor:
        return _scaled_rows(x, *to_rows(_unpack((-1, x.shape[1]), x.dtype, *stored), dtype))

    def back(gradient: Tensor, *stored: Tensor) -> Tensor:
        weight = _unpack((gradient.shape[1], -1), gradient.dtype, *stored)
        return _scaled_rows(gradient, *to_rows(weight.t(), dtype))

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
