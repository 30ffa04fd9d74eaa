"""The spec's `memory` section put into effect on a transformer: where its blocks are, and what is kept of a pass."""

from __future__ import annotations

import torch
from torch import nn

from loraport.spec.models import MemorySection
from loraport_native.cache import cache_folder
from loraport_native.models.checkpoint import Checkpoint, load_transformer
from loraport_native.models.ideogram4 import Ideogram4
from loraport_native.quantize import quantize_blocks
from loraport_native.recompute import recompute
from loraport_native.stream import Disk, Host, HostActivations, Stream


def load_placed(
    checkpoint: Checkpoint,
    memory: MemorySection,
    dtype: torch.dtype,
    device: torch.device,
    part: str = "transformer",
    trains: bool = True,
) -> tuple[Ideogram4, Stream | None]:
    """Load a transformer block by block: each is quantised, and put where it waits, before the next one is read.

    The stream, if there is one, is still to be attached, outside of whatever else is put around the blocks. What does
    not train keeps nothing that only a backward pass uses.
    Raises what `load_transformer` raises.
    """
    stream = None
    if memory.offload == "disk":
        stream = Stream(Disk(device, cache_folder().parent / "blocks"), device)
    elif memory.offload != "none":
        stream = Stream(Host(device), device)
    numbers = iter(range(10**6))
    # Nothing recomputed and nothing streamed: memory is not what this run is short of.
    columns = trains and stream is None and memory.gradient_checkpointing == "none"

    def prepare(block: nn.Module) -> None:
        quantize_blocks(block, memory.storage or "none", memory.compute or "model", columns)
        if stream is not None:
            stream.take(next(numbers), block)

    keep_fp8 = memory.storage == "fp8"
    return load_transformer(checkpoint, dtype, device, part, prepare, keep_fp8), stream


def set_passes(model: Ideogram4, memory: MemorySection, stream: Stream | None) -> None:
    """Set how blocks pass: what is recomputed, what waits on the host, and, outermost, when a block is fetched."""
    if memory.offload == "group+activations":
        HostActivations(model.embed_image_indicator.weight.device).attach(model)
    else:
        # auto is settled when there is a batch to try; until then as little is kept as it may come to
        recompute(model, "full" if memory.gradient_checkpointing == "auto" else memory.gradient_checkpointing or "full")
    if stream is not None:
        stream.attach(model, keeps_inputs=memory.offload != "group+activations")
