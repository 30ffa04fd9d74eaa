"""A LoRA's narrow product, total (4608, N) += left (4608, 32) · right (32, N) in bfloat16: cuBLAS and our kernel.

`python docs/benchmarks/narrow_products.py` prints a line for each N: the median of 20, the cache flushed before each.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from datetime import date

import torch
import triton

from loraport_native.add_product_kernel import launch

TOKENS, RANK = 4608, 32


def microseconds(action: Callable[[], object], repeats: int = 20) -> float:
    flush = torch.empty(256 << 20, dtype=torch.uint8, device="cuda")
    times = []
    for number in range(repeats + 3):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        flush.zero_()
        start.record()
        action()
        end.record()
        torch.cuda.synchronize()
        if number >= 3:  # the first compile
            times.append(start.elapsed_time(end) * 1e3)
    return round(sorted(times)[repeats // 2], 1)


for columns in (4608, 12288, 13824):
    shapes = ((TOKENS, columns), (TOKENS, RANK), (columns, RANK))
    total, left, up = (torch.randn(shape, device="cuda", dtype=torch.bfloat16) for shape in shapes)
    row = {"date": date.today().isoformat(), "card": torch.cuda.get_device_name(), "torch": torch.__version__}
    row |= {"triton": triton.__version__, "columns": columns}
    row["cublas_us"] = microseconds(lambda: total.addmm_(left, up.t()))  # noqa: B023
    row["kernel_us"] = microseconds(lambda: launch(total, left, up.t()))  # noqa: B023
    print(json.dumps(row))
