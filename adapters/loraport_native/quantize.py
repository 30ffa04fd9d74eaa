"""Storage of the frozen weights in fewer bits, and what their products are computed in.

Only the Linears inside the blocks are quantised: they hold nearly all parameters, and the small layers around them set
the precision of everything else. The adapter is injected afterwards and stays in full precision.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from loraport_native.frozen import NF4_BLOCK, frozen_linear, to_bytes, widened
from loraport_native.scaled_matmul import to_rows

_ROWS = {"fp8": torch.float8_e4m3fn, "int8": torch.int8}


def quantize_blocks(blocks: nn.Module, storage: str, compute: str = "model", columns: bool = False) -> None:
    """Replace, in place, every Linear in `blocks` by one whose weight is stored as `storage`, on the same device.

    storage: none; fp8 (e4m3) or int8, a scale a row; nf4, bitsandbytes' 4-bit normal float in blocks of 64.
    compute: "model", the dtype of the activations; "fp8" or "int8", products of 8-bit rows forward and backward.
    columns: keep rows that are multiplied in 8 bits transposed as well, which takes their memory once more and spares
        the backward pass transposing them.
    """
    if storage == "none":
        return
    for parent in list(blocks.modules()):
        for name, linear in list(parent.named_children()):
            if type(linear) is nn.Linear:
                setattr(parent, name, stored_linear(linear, storage, compute, columns))


def stored_linear(linear: nn.Linear, storage: str, compute: str, columns: bool = False) -> nn.Linear:
    """`linear` with its weight quantised; see `quantize_blocks`."""
    bias = linear.bias
    if storage == "nf4":
        return Nf4Linear(linear.weight.data, bias, compute)
    rows, scale = _rows_of(linear, _ROWS[storage])
    return RowsLinear(rows, scale, bias, compute, columns)


def _rows_of(linear: nn.Linear, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The rows that the checkpoint holds (`loraport_native.models.weights.fill` kept them), or ones made here."""
    if linear.weight.dtype == dtype:
        return linear.weight.data, linear.weight_scale  # type: ignore[return-value]
    return to_rows(linear.weight.data, dtype)


class StoredLinear(nn.Linear):
    """A Linear without a `weight`: its subclasses keep that in buffers of their own. `kind` is one of
    `loraport_native.frozen.PRODUCTS`."""

    kind: str

    def __init__(self, out_features: int, in_features: int, bias: nn.Parameter | None) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = in_features, out_features
        self.register_parameter("bias", bias)
        self.register_parameter("weight", None)  # peft asks whether it is distributed

    @property
    def stored(self) -> tuple[Tensor, ...]:
        """The buffers that hold the weight."""
        return tuple(self._buffers.values())  # type: ignore[arg-type]

    @property
    def qweight(self) -> Tensor:
        """The stored numbers as bytes; peft puts an adapter on their device."""
        return self.stored[0].view(torch.uint8)

    @property
    def W_q(self) -> Tensor:
        """The stored numbers; HQQ's name for them, by which peft's DoRA knows a layer that can be dequantised."""
        return self.qweight

    @torch.no_grad()
    def dequantize(self) -> Tensor:
        """The weight (out, in) in float32."""
        return widened(self.kind, self.stored, (self.out_features, self.in_features))

    def forward(self, x: Tensor) -> Tensor:
        result = frozen_linear(x, self.kind, self.stored)
        return result if self.bias is None else result + self.bias


class RowsLinear(StoredLinear):
    """A weight of 8-bit rows (out, in), e4m3 or int8, with a float32 scale (out, 1) each."""

    def __init__(
        self, rows: Tensor, scale: Tensor, bias: nn.Parameter | None, compute: str = "model", columns: bool = False
    ) -> None:
        super().__init__(rows.shape[0], rows.shape[1], bias)
        self.kind = "rows" if compute == "model" else "scaled rows"
        self.register_buffer("rows", rows)
        self.register_buffer("scale", scale)
        if columns and compute != "model":
            self.kind = "scaled rows and columns"
            self.register_buffer("columns", rows.t().contiguous())


class Nf4Linear(StoredLinear):
    """A weight in bitsandbytes' nf4: packed (out·in/2, 1) uint8, and the largest value of each 64 numbers in 8 bits."""

    def __init__(self, weight: Tensor, bias: nn.Parameter | None, compute: str = "model") -> None:
        super().__init__(weight.shape[0], weight.shape[1], bias)
        self.kind = "nf4" if compute == "model" else f"nf4 {compute}"
        packed, largest = _to_nf4(weight)
        self.register_buffer("packed", packed)
        for name, buffer in zip(("largest", "least", "step"), to_bytes(largest), strict=True):
            self.register_buffer(name, buffer)


def _to_nf4(weight: Tensor) -> tuple[Tensor, Tensor]:
    """The packed numbers, and the largest value (float32) of each `NF4_BLOCK`.

    bitsandbytes 0.50 quantises on CUDA's default stream, whichever is current (`backends/cuda/ops.py` passes none).
    """
    import bitsandbytes  # noqa: F401  (registers the operators)

    weight = weight.contiguous()
    on_card = weight.device.type == "cuda"
    if on_card:
        current, default = torch.cuda.current_stream(weight.device), torch.cuda.default_stream(weight.device)
        default.wait_stream(current)
    packed, largest = torch.ops.bitsandbytes.quantize_4bit(weight, NF4_BLOCK, "nf4", torch.uint8)
    if on_card:
        current.wait_stream(default)
    return packed, largest
