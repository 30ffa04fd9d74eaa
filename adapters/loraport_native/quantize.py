"""Storage of the frozen weights in fewer bits, by torchao (fp8, int8) and bitsandbytes (nf4).

Only the Linears inside the blocks are quantised: they hold nearly all parameters, and the small layers around them set
the precision of everything else. The adapter is injected afterwards and stays in full precision.
"""

from __future__ import annotations

import torch
from torch import nn


def quantize_blocks(blocks: nn.Module, method: str) -> None:
    """Replace, in place, the weights of every Linear in `blocks`, or in one, by quantised ones on the device.

    fp8: e4m3 with a scale a row; int8: a scale a row; nf4: bitsandbytes' 4-bit normal float in blocks of 64 with
    double quantisation off. The matrix product is computed in the weights' original dtype.
    """
    if method == "none":
        return
    if method == "nf4":
        _to_nf4(blocks)
        return
    from torchao.quantization import Float8WeightOnlyConfig, Int8WeightOnlyConfig, quantize_

    quantize_(blocks, Float8WeightOnlyConfig() if method == "fp8" else Int8WeightOnlyConfig(version=2))


def _to_nf4(blocks: nn.Module) -> None:
    from bitsandbytes.nn import Linear4bit, Params4bit

    for parent in list(blocks.modules()):
        for name, linear in list(parent.named_children()):
            if type(linear) is not nn.Linear:
                continue
            weight = linear.weight
            small = Linear4bit(
                linear.in_features,
                linear.out_features,
                bias=linear.bias is not None,
                compute_dtype=weight.dtype,
                quant_type="nf4",
                device="meta",
            )
            # Params4bit quantises when it is moved to the device, so it starts from the CPU copy.
            packed = Params4bit(weight.data.to("cpu"), requires_grad=False, quant_type="nf4", compress_statistics=False)
            small.weight = packed
            small.bias = linear.bias
            packed.module = small
            # Else the first evaluation on such a CPU repacks the weight for good, and no gradient passes it any more.
            small.support_avx512bf16_for_cpu = False
            setattr(parent, name, small.to(weight.device))


def compile_blocks(blocks: nn.ModuleList, mode: str) -> None:
    """Compile each block in place with torch.compile when `mode` is "regional"; equal blocks share one compilation."""
    if mode == "regional":
        torch._dynamo.config.cache_size_limit = max(torch._dynamo.config.cache_size_limit, 64)
        for block in blocks:
            block.compile()
