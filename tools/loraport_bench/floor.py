"""The least that a step could cost: its matrix products at the rate the card was measured to have, and nothing else.

With h the width, f the feed-forward's, n the blocks and L the tokens, a pass of all blocks is 2·n·(4h² + 3hf)·L
operations in the projections (q, k, v and o; w1, w2 and w3) and 4·n·L²·h in attention. Training a LoRA on frozen
weights takes the forward pass and the gradients of the inputs: two passes of the projections, and of attention one and
the 2.5 of its backward pass (FlashAttention-2, arXiv:2307.08691, section 4.1). Recomputing all blocks adds one of each.
The adapter, the norms and everything around the blocks count for nothing. 8-bit products run at twice the bf16 rate.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

PIXELS = 16  #: of an image token's side
FP8_SPEEDUP = 2.0
ATTENTION_BACKWARD = 2.5
BITS = {"none": 16.0, "fp8": 8.0, "int8": 8.0, "nf4": 4.13}  #: of a stored weight; nf4 has a byte for each 64


@dataclass(frozen=True)
class Dimensions:
    """What counts of the transformer's config.json."""

    blocks: int
    width: int
    feed_forward: int

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> Self:
        width = config["attention_head_dim"] * config["num_attention_heads"]
        return cls(config["num_layers"], width, config["intermediate_size"])

    @property
    def projections(self) -> int:
        """Parameters of the blocks' projections."""
        return self.blocks * (4 * self.width**2 + 3 * self.width * self.feed_forward)

    def adapter(self, rank: int) -> int:
        """Parameters of a LoRA on all projections, with q, k and v fused into one."""
        return self.blocks * rank * (9 * self.width + 3 * self.feed_forward)


def tokens(resolution: int, text: int) -> int:
    return text + (resolution // PIXELS) ** 2


def floor_seconds(
    dimensions: Dimensions, length: int, batch: int, recomputed: bool, fp8: bool, bf16_tflops: float
) -> float:
    """Seconds of a step of `batch` sequences of `length` tokens."""
    projections = 2 * dimensions.projections * length * (3 if recomputed else 2)
    attention = 4 * dimensions.blocks * length**2 * dimensions.width * (1 + ATTENTION_BACKWARD + recomputed)
    rate = bf16_tflops * 1e12
    return batch * (projections / (rate * (FP8_SPEEDUP if fp8 else 1)) + attention / rate)


def floor_gib(
    dimensions: Dimensions, length: int, batch: int, rank: int, storage: str, streamed: bool, activations: bool
) -> float:
    """GiB that a step with recomputed blocks cannot do without: the frozen projections (of one block, where they are
    streamed), one activation a block in bf16 (none, where `activations` are offloaded), and the adapter in float32 with
    its gradient and two moments. The working set of the block at hand comes to it."""
    weights = dimensions.projections * BITS[storage] / 8 / (dimensions.blocks if streamed else 1)
    saved = 0 if activations else dimensions.blocks * batch * length * dimensions.width * 2
    return (weights + saved + dimensions.adapter(rank) * 16) / 2**30
