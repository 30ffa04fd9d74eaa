"""8-bit rows with a scale each, and matrix products of such rows on the tensor cores.

A row is a vector along the dimension that a product sums over, so its scale can be taken out of the sum:
(s·q)·(t·p) = s·t·(q·p). On CUDA the products are `torch._scaled_mm` (e4m3, compute capability 8.9 and up) and
`torch._int_mm` (int8); elsewhere the same numbers are multiplied in float32.

torchao has these kernels for inference, without a backward pass, and for training, with a high-precision weight that is
quantised anew each step. Frozen 8-bit weights under a trained adapter need neither.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

LARGEST = {torch.float8_e4m3fn: 448.0, torch.int8: 127.0}  #: the largest number of each format
_SMALLEST_SCALE = 1e-12  # a row of zeros must not divide by zero
_FEWEST_ROWS = 17  # that `torch._int_mm` multiplies on a card; a modulation has one row an image


def to_rows(values: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Quantise (…, K) over its last dimension: numbers of `dtype`, and float32 scales (…, 1); value ≈ scale·number."""
    values = values.float()
    scale = values.abs().amax(dim=-1, keepdim=True).clamp(min=_SMALLEST_SCALE) / LARGEST[dtype]
    scaled = values / scale
    return (scaled if dtype.is_floating_point else scaled.round()).to(dtype), scale


def product(left: Tensor, left_scale: Tensor, right: Tensor, right_scale: Tensor, dtype: torch.dtype) -> Tensor:
    """left (M, K) · rightᵀ (K, N) in `dtype`, both 8-bit and row-major, with float32 scales (M, 1) and (N, 1)."""
    on_card, integers = left.device.type == "cuda", left.dtype == torch.int8
    if on_card and not integers:
        # Cards other than Hopper's give nothing but bfloat16 of scaled rows.
        scales = {"scale_a": left_scale, "scale_b": right_scale.t()}
        result = torch._scaled_mm(left, right.t(), **scales, out_dtype=torch.bfloat16, use_fast_accum=True)
    else:
        plain = integer_product(left, right).float() if on_card else left.float() @ right.float().t()
        result = plain * left_scale * right_scale.t()
    # A conversion that changes nothing is none: the compiler of torch 2.11 loses the gradient at one.
    return result if result.dtype == dtype else result.to(dtype)


def integer_product(left: Tensor, right: Tensor) -> Tensor:
    """left (M, K) · rightᵀ (K, N) of int8 in int32, for any M."""
    rows = len(left)
    if rows < _FEWEST_ROWS:
        left = F.pad(left, (0, 0, 0, _FEWEST_ROWS - rows))
    return torch._int_mm(left, right.t())[:rows]
