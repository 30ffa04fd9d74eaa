"""Gradient checkpointing as a dial: what of a block's forward pass is kept for its backward pass.

none keeps everything; full keeps a block's inputs and computes the rest again, but for the last block, whose backward
pass comes next; selective also keeps what attention gave, which takes as much memory as a block's input and is the
dearest part to compute; auto recomputes only as many blocks as it must for the rest to fit the card.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

if TYPE_CHECKING:
    from loraport_native.models.ideogram4 import Ideogram4

_aten = torch.ops.aten
_ATTENTION = {
    _aten._scaled_dot_product_flash_attention.default,
    _aten._scaled_dot_product_cudnn_attention.default,
    _aten._scaled_dot_product_efficient_attention.default,
    _aten._scaled_dot_product_flash_attention_for_cpu.default,
}
#: One in so many blocks, the last of those that are recomputed in full, is recomputed from outside of its compiled
#: code: by two graphs, whose border lets the compiler keep less than within one. Nowhere else is it needed: most is in
#: memory during the backward passes of the last blocks, when the inputs of all others are still there.
_FROM_OUTSIDE = 8
_MARGIN = 0.04  #: share of a card's memory that auto leaves for fragmentation and what the probe did not see


def recompute(model: Ideogram4, mode: str, blocks: int | None = None) -> None:
    """Set what `model` keeps of its blocks: none, selective or full; of the first `blocks` of them (default: all).

    Never of the last: what it would compute again would be in memory at once, in place of what it kept.
    """
    last = len(model.layers) - 1
    chosen = range(0 if mode == "none" else last if blocks is None else min(blocks, last))
    draws = any(isinstance(module, nn.Dropout) and module.p for module in model.modules())
    if draws:  # compiled, it would else draw from generators of the compiler's own, which no step's seed reaches
        from torch._inductor import config

        config.fallback_random = True
    keep = partial(keeping, mode == "selective", draws)
    first = max(0, len(chosen) - len(model.layers) // _FROM_OUTSIDE)
    outside = chosen[first:] if mode == "full" else range(0)
    for number, block in enumerate(model.blocks()):
        block.passing = keep if number in chosen and number not in outside else None

    def run_block(number: int, block: nn.Module, *inputs: Any) -> Tensor:
        return keep(block, *inputs) if number in outside and torch.is_grad_enabled() else block(*inputs)

    model.run_block = run_block


def keeping(attention: bool, draws: bool, forward: Callable[..., Tensor], *inputs: Any) -> Tensor:
    """Run a block's forward pass keeping its inputs and, where asked, what attention gave.

    Mostly inside the block, so that a compiled one is compiled together with it: the passes are then one graph each,
    which the host queues in one go, and the policy sees what it decides on. What is compiled has a policy also where
    nothing else is kept: without one the compiler of torch 2.11 keeps all that autograd functions give.
    """
    policy: dict[str, Any] = {}
    if attention or torch.compiler.is_compiling():
        policy["context_fn"] = _keeping_attention if attention else _keeping_nothing
    result: Tensor = checkpoint(forward, *inputs, use_reentrant=False, preserve_rng_state=draws, **policy)
    return result


def _policy(kept: Collection[Any], context: Any, operator: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if operator in kept else CheckpointPolicy.PREFER_RECOMPUTE


_keeping_attention = partial(create_selective_checkpoint_contexts, partial(_policy, _ATTENTION))
_keeping_nothing = partial(create_selective_checkpoint_contexts, partial(_policy, ()))


def recompute_what_must_be(model: Ideogram4, probe: Callable[[], None], limit: int) -> int:
    """Mode auto on a CUDA card: recompute the fewest blocks with which `probe` needs no more than `limit` bytes.

    probe: runs a forward and backward pass of the largest batch. Two are run: one that recomputes all it can, one that
    leaves two blocks more alone; each block left alone adds as much again. Returns how many blocks are recomputed.
    """
    total = len(model.layers) - 1  # the last never is
    fewer = max(0, total - 2)

    def peak(recomputed: int) -> int:
        recompute(model, "full", recomputed)
        probe()  # the first pass also compiles and fills caches, which is not what is measured
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        probe()
        return torch.cuda.max_memory_allocated()

    least, spared = peak(total), 0
    with contextlib.suppress(torch.OutOfMemoryError):  # what does not fit even once is recomputed
        each = max(1, (peak(fewer) - least) // max(1, total - fewer))
        spared = max(0, min(total, int((limit * (1 - _MARGIN) - least) // each)))
    recompute(model, "full", total - spared)
    torch.cuda.empty_cache()
    return total - spared
