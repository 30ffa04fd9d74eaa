"""Attention over 18 heads of width 256 in bfloat16, forward and backward: torch's kernels and FlashAttention-3's.

`python docs/benchmarks/attention.py` prints a line for each kernel and size, in milliseconds: the median of 20, the
cache flushed before each. FlashAttention-3 only where `flash_attn_interface` is installed.
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable
from datetime import date

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, activate_flash_attention_impl, sdpa_kernel

HEADS, WIDTH = 18, 256


def milliseconds(action: Callable[[], object], repeats: int = 20) -> float:
    flush = torch.empty(256 << 20, dtype=torch.uint8, device="cuda")
    times = []
    for number in range(repeats + 3):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        flush.zero_()
        start.record()
        action()
        end.record()
        torch.cuda.synchronize()
        if number >= 3:
            times.append(start.elapsed_time(end))
    return round(sorted(times)[repeats // 2], 3)


def measure(name: str, backend: SDPBackend) -> None:
    for batch, tokens in ((1, 4608), (4, 4608), (1, 2816)):
        shape = (batch, tokens, 3, HEADS, WIDTH)
        fused = torch.randn(shape, device="cuda", dtype=torch.bfloat16, requires_grad=True)
        query, key, value = (part.transpose(1, 2) for part in fused.unbind(2))
        upstream = torch.randn_like(value)

        def forward(query: Tensor = query, key: Tensor = key, value: Tensor = value) -> Tensor:
            with sdpa_kernel(backend):
                return F.scaled_dot_product_attention(query, key, value)

        attended = forward()
        back = lambda: torch.autograd.grad(attended, (query, key, value), upstream, retain_graph=True)  # noqa: B023, E731
        row = {
            "date": date.today().isoformat(),
            "card": torch.cuda.get_device_name(),
            "torch": torch.__version__,
            "cudnn": torch.backends.cudnn.version(),
        }
        row |= {"kernel": name, "batch": batch, "tokens": tokens}
        print(json.dumps(row | {"forward_ms": milliseconds(forward), "backward_ms": milliseconds(back)}))


measure("cudnn", SDPBackend.CUDNN_ATTENTION)
measure("flash 2", SDPBackend.FLASH_ATTENTION)
if importlib.util.find_spec("flash_attn_interface"):
    activate_flash_attention_impl("FA3")
    measure("flash 3", SDPBackend.FLASH_ATTENTION)
