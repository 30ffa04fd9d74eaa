"""torch.compile over the transformer: block by block, or whole."""

from __future__ import annotations

import torch
from torch import nn

#: Compilations that one block's code may have: one for the first size, one for any size, and as many again for
#: evaluation, with some left for what torch guards on.
_COMPILATIONS = 64


def compile_model(model: nn.Module, blocks: nn.ModuleList, mode: str) -> None:
    """Compile in place. "regional": each block; all share one compilation, which from the second size of image or text
    on holds for any size. "full": the whole model in one graph, which takes longer to compile. "none": nothing.
    """
    if mode == "none":
        return
    torch._dynamo.config.cache_size_limit = max(torch._dynamo.config.cache_size_limit, _COMPILATIONS)
    for part in blocks if mode == "regional" else [model]:
        part.compile()
