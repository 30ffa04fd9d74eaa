"""torch.compile over the transformer: block by block, or whole."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn

from loraport_native.anew import teach_compiler

if TYPE_CHECKING:
    from loraport_native.models.ideogram4 import Ideogram4

#: Compilations that one block's code may have: one for the first size, one for any size, and as many again for
#: evaluation, with some left for what torch guards on.
_COMPILATIONS = 64


def compile_model(model: Ideogram4, blocks: nn.ModuleList, mode: str) -> None:
    """Compile in place. "regional": each block; all share one compilation, which from the second size of image or text
    on holds for any size. "full": the whole model in one graph, which takes longer to compile. "none": nothing.
    """
    if mode == "none":
        return
    teach_compiler()
    torch._dynamo.config.cache_size_limit = max(torch._dynamo.config.cache_size_limit, _COMPILATIONS)
    if mode == "regional":
        for block in blocks:
            block.compile()
    else:
        # What trains and validates; `forward` is the pipeline's.
        model.velocity = torch.compile(model.velocity)  # type: ignore[method-assign]
