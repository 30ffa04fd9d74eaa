"""The dtypes a LoRA file is written in, and the one cast that checks for overflow."""

from __future__ import annotations

import ml_dtypes
import numpy as np

from loraport.errors import DataError, unknown
from loraport.lora.canonical import Array

FILE_DTYPES = {
    "bf16": np.dtype(ml_dtypes.bfloat16),
    "fp16": np.dtype(np.float16),
    "fp32": np.dtype(np.float32),
}


def cast(array: Array, dtype: str, where: str) -> Array:
    """The array in a file dtype. Raises DataError when a number is too large for it, naming `where`."""
    if dtype not in FILE_DTYPES:
        raise DataError(unknown("LoRA dtype", dtype, FILE_DTYPES))
    with np.errstate(over="ignore"):
        narrowed = array.astype(FILE_DTYPES[dtype])
    if not np.isfinite(narrowed).all():
        largest = float(np.abs(array.astype(np.float64)).max())
        raise DataError(
            f"{where} holds {largest:.3g}, which is too large for {dtype}.",
            hint="Write the LoRA in bf16, which has the range of fp32, or in fp32.",
        )
    return narrowed
