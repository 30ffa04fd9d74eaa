"""What to write for a module that a file format cannot hold exactly: its whole change, or the best of a given rank."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import ml_dtypes
import numpy as np

from loraport.errors import DataError
from loraport.lora.canonical import Factors, Float64, LoraModule, LowRank, exact
from loraport.lora.stacked import Full

_BLOCK_NUMBERS = 4_000_000
_OVERSAMPLING, _ITERATIONS = 16, 2  # of the randomised range finder; see Halko, Martinsson and Tropp, 2011


@dataclass(frozen=True)
class Loss:
    """What an approximation costs: `error` is ‖difference‖ before rounding, `norm` is ‖ΔW‖ (Frobenius)."""

    error: float
    norm: float

    @property
    def difference(self) -> float:
        """The error relative to the change."""
        return self.error / self.norm if self.norm else 0.0


@dataclass(frozen=True)
class Approximation:
    """A module that stands for another."""

    module: LoraModule
    loss: Loss


def whole(module: LoraModule) -> Approximation:
    """The change itself, in the shape of the weight and the dtype of the factors (bf16 for fp8 ones). Not for DoRA."""
    _refuse_dora(module)
    out, columns = module.factors.shape
    product = module.factors.product()
    diff = np.empty((out, columns), _dtype(module))
    block = max(1, _BLOCK_NUMBERS // columns)
    squares = 0.0
    for start in range(0, out, block):
        stop = min(start + block, out)
        part = module.scale * product(start, stop)
        squares += float(np.sum(part**2))
        diff[start:stop] = part
    diff = diff.reshape(out, -1, *_kernel(module.factors))
    return Approximation(LoraModule(module.name, Full(diff), 1.0), Loss(0.0, math.sqrt(squares)))


def truncated(module: LoraModule, rank: int) -> Approximation:
    """The closest change of at most `rank`.

    A LoRA is decomposed through QR of its factors and never multiplied out; other kinds by randomised SVD over blocks
    of rows, with a fixed seed. A LoRA of no higher rank comes back as it is, and so does what is no matrix. Raises
    DataError for a DoRA, whose row norms belong to the untruncated change.
    """
    _refuse_dora(module)
    factors = module.factors
    if isinstance(factors, Full) and 1 in (factors.diff.ndim, *factors.shape):
        return Approximation(module, Loss(0.0, abs(module.scale) * float(np.linalg.norm(exact(factors.diff)))))
    if isinstance(factors, LowRank):
        left, right = exact(factors.up), exact(factors.down)
        left_q, left_r = np.linalg.qr(left)
        right_q, right_r = np.linalg.qr(right.T)
        u, sizes, vt = np.linalg.svd(left_r @ right_r.T, full_matrices=False)
        norm = abs(module.scale) * float(np.linalg.norm(sizes))
        if factors.rank <= rank:
            return Approximation(module, Loss(0.0, norm))
        u, vt = left_q @ u, vt @ right_q.T
    else:
        u, sizes, vt, norm = _randomised(module, rank)
        norm *= abs(module.scale)
    kept = sizes[:rank] * abs(module.scale)
    root = np.sqrt(kept)
    error = math.sqrt(max(norm**2 - float(np.sum(kept**2)), 0.0))
    up = u[:, :rank] * root * np.sign(module.scale)
    down = root[:, None] * vt[:rank]
    dtype = _dtype(module)
    if kernel := _kernel(factors):
        up, down = up.reshape(*up.shape, *(1 for _ in kernel)), down.reshape(len(down), -1, *kernel)
    low = LowRank(down.astype(dtype), up.astype(dtype))
    return Approximation(replace(module, factors=low, scale=1.0), Loss(error, norm))


def _randomised(module: LoraModule, rank: int) -> tuple[Float64, Float64, Float64, float]:
    """Left vectors, sizes and right vectors of the product, and its norm; only blocks of rows are ever formed."""
    out, columns = module.factors.shape
    product = module.factors.product()
    block = max(1, _BLOCK_NUMBERS // columns)
    rows = [(start, min(start + block, out)) for start in range(0, out, block)]
    width = min(rank + _OVERSAMPLING, out, columns)
    sketch = np.random.default_rng(0).standard_normal((columns, width))
    squares = 0.0
    for _ in range(_ITERATIONS):
        sketch, _ = np.linalg.qr(sketch)
        applied = np.zeros_like(sketch)
        for start, stop in rows:
            part = product(start, stop)
            applied += part.T @ (part @ sketch)
        sketch = applied
    right, _ = np.linalg.qr(sketch)
    image = np.empty((out, right.shape[1]))
    for start, stop in rows:
        part = product(start, stop)
        squares += float(np.sum(part**2))
        image[start:stop] = part @ right
    u, sizes, vt = np.linalg.svd(image, full_matrices=False)
    return u, sizes, vt @ right.T, math.sqrt(squares)


def _dtype(module: LoraModule) -> np.dtype[Any]:
    first = next(iter(module.factors.arrays().values())).dtype
    if first.kind not in "fV":
        return np.dtype(np.float32)
    return first if first.itemsize > 1 else np.dtype(ml_dtypes.bfloat16)


def _kernel(factors: Factors) -> tuple[int, ...]:
    """(kh, kw) of a convolution, () where there is none or the factors do not tell it."""
    arrays = factors.arrays()
    return next((arrays[name].shape[2:] for name in ("mid", "t1", "t2", "down", "diff", "w2") if name in arrays), ())


def _refuse_dora(module: LoraModule) -> None:
    if module.dora is not None:
        raise DataError(
            f"LoRA module {module.name} is a DoRA, which cannot be approximated without the base weights.",
            hint="Convert it as it is.",
        )
