"""`python -m loraport_native.rate`: how fast the device multiplies matrices, as one JSON line; the floor's measure."""

from __future__ import annotations

import json
import time
from collections.abc import Callable

import torch

from loraport_native.device import find_device

REPEATS, WARM_UP = 10, 3


def matmul_rate(device: torch.device) -> dict[str, float]:
    """TFLOP/s of a bf16 matrix product, of sides 8192 on a card and 128 elsewhere: mean of REPEATS after WARM_UP."""
    side = 8192 if device.type == "cuda" else 128
    left, right = (torch.randn(side, side, device=device, dtype=torch.bfloat16) for _ in range(2))

    def products() -> None:
        for _ in range(REPEATS):
            left @ right

    for _ in range(WARM_UP):
        left @ right
    return {"bf16_tflops": round(2 * side**3 * REPEATS / seconds_of(products, device) / 1e12, 4)}


def seconds_of(work: Callable[[], None], device: torch.device) -> float:
    """Seconds until all of `work` is done on the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    started = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - started


if __name__ == "__main__":
    print(json.dumps(matmul_rate(find_device("auto", "auto"))), flush=True)
