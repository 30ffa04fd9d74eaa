"""total += left · right + others in one pass over memory, as an operator that the compiler takes as it is.

The compiler would make a matrix of the product first. On CUDA the narrow products of a LoRA, also those that others are
added to, are a Triton kernel: they are bound by memory, and cuBLAS, whose tiles are made for long sums, took half as
long again on an H200 (docs/benchmarks/2026-11-21-h200-narrow-products.jsonl).
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor

from loraport_native.device import compilers

_WIDEST = 64  #: rank from which on the product is bound by arithmetic, which cuBLAS is better at
_LIBRARY = torch.library.Library("loraport", "DEF")
_LIBRARY.define(
    "add_product_(Tensor(a!) total, Tensor left, Tensor right, Tensor[] others) -> ()",
    tags=(torch.Tag.pt2_compliant_tag, torch.Tag.needs_fixed_stride_order),
)
_LIBRARY.define("narrow_product(Tensor left, Tensor right) -> Tensor", tags=torch.Tag.pt2_compliant_tag)


def add_product_(total: Tensor, left: Tensor, right: Tensor, others: Sequence[Tensor] = ()) -> None:
    """total (M, N) += left (M, K) · right (K, N) + the sum of others, each (M, N)."""
    torch.ops.loraport.add_product_(total, left, right, list(others))


def narrow_product(left: Tensor, right: Tensor) -> Tensor:
    """left (M, K) · right (K, N), a LoRA's part that wide products will be added to."""
    result: Tensor = torch.ops.loraport.narrow_product(left, right)
    return result


def _anywhere(total: Tensor, left: Tensor, right: Tensor, others: list[Tensor]) -> None:
    total.addmm_(left, right)
    for other in others:
        total.add_(other)


def _on_cuda(total: Tensor, left: Tensor, right: Tensor, others: list[Tensor]) -> None:
    if len(others) > 1 or not _is_for_the_kernel(left):
        _anywhere(total, left, right, others)
        return
    from loraport_native.add_product_kernel import launch

    launch(total, left, right, *others)


def _narrow(left: Tensor, right: Tensor) -> Tensor:
    return left @ right


def _narrow_on_cuda(left: Tensor, right: Tensor) -> Tensor:
    if not _is_for_the_kernel(left):
        return _narrow(left, right)
    from loraport_native.add_product_kernel import launch

    result = left.new_empty(left.shape[0], right.shape[1])
    launch(result, left, right, adds=False)
    return result


def _is_for_the_kernel(left: Tensor) -> bool:
    return left.shape[1] <= _WIDEST and left.dtype in (torch.bfloat16, torch.float16) and _triton_builds()


@cache
def _triton_builds() -> bool:
    """Whether there is a compiler for the part of a launcher that Triton builds at a kernel's first use."""
    return any(map(shutil.which, compilers("cuda")))


def _shapes_only(total: Tensor, left: Tensor, right: Tensor, others: list[Tensor]) -> None:
    pass


_LIBRARY.impl("add_product_", _anywhere, "CompositeExplicitAutograd")
_LIBRARY.impl("add_product_", _on_cuda, "CUDA")
_LIBRARY.impl("narrow_product", _narrow, "CompositeExplicitAutograd")
_LIBRARY.impl("narrow_product", _narrow_on_cuda, "CUDA")
torch.library.register_fake("loraport::add_product_", _shapes_only)
torch.library.register_fake("loraport::narrow_product", _narrow)
