"""Attention: torch's own, or FlashAttention-3 where that is installed and faster.

At head width 256 cuDNN's backward pass, which torch takes on Hopper, is slower than FlashAttention-3's
(docs/benchmarks/2026-11-21-h200-attention.jsonl). The package is optional; docs/native.md says where it is.
"""

from __future__ import annotations

import importlib
import importlib.util
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from loraport.errors import BackendError

_DEVICE = "cuda"
_HOPPER = (9, 0)  #: compute capability of the only cards that FlashAttention-3 is for
_PACKAGE = "flash_attn_interface"
_WIDTH = 256  #: of a head, at which it was measured to be faster


def attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None) -> Tensor:
    """Attention over (B, L, heads, head_dim), all of one shape, scaled by head_dim^-0.5 → the same shape.

    mask: boolean, broadcasting to (B, heads, L, L); False leaves out.
    """
    query, key, value = (part.transpose(1, 2) for part in (query, key, value))
    if mask is None and _flash_3_takes(query):
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            attended = F.scaled_dot_product_attention(query, key, value)
    else:
        attended = F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
    return attended.transpose(1, 2)


def _flash_3_takes(query: Tensor) -> bool:
    return (
        query.device.type == _DEVICE
        and query.shape[-1] == _WIDTH
        and query.dtype in (torch.bfloat16, torch.float16)
        and not torch.are_deterministic_algorithms_enabled()  # its sums at this width come in any order
        and _flash_3_is_used(query.device.index)
    )


@torch.compiler.assume_constant_result
def _flash_3_is_used(card: int | None) -> bool:
    """Let it be torch's flash attention if it is there: once a model attends, so that no other model is touched."""
    if not flash_3_is_there(card):
        return False
    if torch.nn.attention.current_flash_attention_impl() != "FA3":
        torch.nn.attention.activate_flash_attention_impl("FA3")
    return True


@cache
def flash_3_is_there(card: int | None) -> bool:
    """Whether this CUDA device (None: the current one) is one for FlashAttention-3, that is installed, and torch (2.11
    and up) takes it.

    BackendError when it is installed but cannot be loaded; ask before compiling, which would bury the message.
    """
    if (
        torch.cuda.get_device_capability(card) != _HOPPER
        or importlib.util.find_spec(_PACKAGE) is None
        or not hasattr(torch.nn.attention, "activate_flash_attention_impl")
    ):
        return False
    try:
        importlib.import_module(_PACKAGE)
    except (ImportError, OSError) as error:
        raise BackendError(
            f"FlashAttention-3 is installed, but cannot be loaded: {error}",
            hint="Install the build for this torch and CUDA (docs/native.md), or uninstall flash-attn-3.",
        ) from error
    return True
