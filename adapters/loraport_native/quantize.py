"""Storage of the frozen weights in fewer bits, and what their products are computed in.

Only the Linears inside the blocks are quantised: they hold nearly all parameters, and the small layers around them set
the precision of everything else. The adapter is injected afterwards and stays in full precision.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from loraport_native.scaled_matmul import scaled_linear, to_rows, widened_linear

_ROWS = {"fp8": torch.float8_e4m3fn, "int8": torch.int8}
_NF4_BLOCK = 64


def quantize_blocks(blocks: nn.Module, storage: str, compute: str = "model") -> None:
    """Replace, in place, every Linear in `blocks` by one whose weight is stored as `storage`, on the same device.

    storage: none; fp8 (e4m3) or int8, a scale a row; nf4, bitsandbytes' 4-bit normal float in blocks of 64.
    compute: "model", the dtype of the activations; "fp8" or "int8", products of 8-bit rows forward and backward.
    """
    if storage == "none":
        return
    for parent in list(blocks.modules()):
        for name, linear in list(parent.named_children()):
            if type(linear) is nn.Linear:
                setattr(parent, name, stored_linear(linear, storage, compute))


def stored_linear(linear: nn.Linear, storage: str, compute: str) -> nn.Linear:
    """`linear` with its weight quantised; see `quantize_blocks`."""
    bias = linear.bias
    if storage == "nf4":
        return Nf4Linear(linear.weight.data, bias, compute)
    rows, scale = _rows_of(linear, _ROWS[storage])
    return RowsLinear(rows, scale, bias, compute)


def _rows_of(linear: nn.Linear, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The rows that the checkpoint holds (`loraport_native.models.weights.fill` kept them), or ones made here."""
    if linear.weight.dtype == dtype:
        return linear.weight.data, linear.weight_scale  # type: ignore[return-value]
    return to_rows(linear.weight.data, dtype)


class _Stored(nn.Linear):
    """A Linear without a `weight`: its subclasses keep that in buffers of their own."""

    def __init__(self, out_features: int, in_features: int, bias: nn.Parameter | None, compute: str) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features, self.compute = in_features, out_features, compute
        self.bias = bias
        self.register_parameter("weight", None)  # peft asks whether it is distributed

    @property
    def qweight(self) -> Tensor:
        """The stored numbers as bytes; peft puts an adapter on their device."""
        return next(self.buffers()).view(torch.uint8)

    def forward(self, x: Tensor) -> Tensor:
        result = self._multiply(x)
        return result if self.bias is None else result + self.bias

    def _multiply(self, x: Tensor) -> Tensor:
        raise AssertionError


class RowsLinear(_Stored):
    """A weight of 8-bit rows (out, in), e4m3 or int8, with a float32 scale (out, 1) each."""

    def __init__(self, rows: Tensor, scale: Tensor, bias: nn.Parameter | None, compute: str = "model") -> None:
        super().__init__(*rows.shape, bias, compute)
        self.register_buffer("rows", rows)
        self.register_buffer("scale", scale)

    def _multiply(self, x: Tensor) -> Tensor:
        multiply = widened_linear if self.compute == "model" else scaled_linear
        return multiply(x, self.rows, self.scale)


class Nf4Linear(_Stored):
    """A weight in bitsandbytes' nf4: packed (out·in/2, 1) uint8, and a float32 largest value for each 64 numbers."""

    def __init__(self, weight: Tensor, bias: nn.Parameter | None, compute: str = "model") -> None:
        import bitsandbytes  # noqa: F401  (registers the operators)

        super().__init__(*weight.shape, bias, compute)
        packed, absmax = torch.ops.bitsandbytes.quantize_4bit(weight, _NF4_BLOCK, "nf4", torch.uint8)
        self.register_buffer("packed", packed)
        self.register_buffer("absmax", absmax)

    def _multiply(self, x: Tensor) -> Tensor:
        return _Nf4Linear.apply(x, self.packed, self.absmax, self.out_features, self.compute)


class _Nf4Linear(torch.autograd.Function):
    """Unpacks the weight for one product at a time, and keeps the packed one for the backward pass."""

    @staticmethod
    def forward(ctx, x: Tensor, packed: Tensor, absmax: Tensor, rows: int, compute: str) -> Tensor:  # type: ignore[override, no-untyped-def]
        ctx.save_for_backward(packed, absmax)
        ctx.rows, ctx.compute = rows, compute
        weight = _unpack(packed, absmax, (rows, x.shape[-1]), x.dtype)
        return x @ weight.t() if compute == "model" else scaled_linear(x, *to_rows(weight, _ROWS[compute]))

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override, no-untyped-def]
        packed, absmax = ctx.saved_tensors
        weight = _unpack(packed, absmax, (ctx.rows, 2 * packed.numel() // ctx.rows), gradient.dtype)
        if ctx.compute == "model":
            return gradient @ weight, None, None, None, None
        return scaled_linear(gradient, *to_rows(weight.t(), _ROWS[ctx.compute])), None, None, None, None


def _unpack(packed: Tensor, absmax: Tensor, shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
    unpacked: Tensor = torch.ops.bitsandbytes.dequantize_4bit(packed, absmax, _NF4_BLOCK, "nf4", shape, dtype)
    return unpacked
