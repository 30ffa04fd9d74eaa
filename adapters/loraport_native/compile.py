"""torch.compile over the transformer: block by block, or whole."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from loraport_native.anew import teach_compiler

if TYPE_CHECKING:
    from loraport_native.models.ideogram4 import Ideogram4

#: Compilations that one block's code may have: one for the first size, one for any size, and as many again for
#: evaluation, with some left for what torch guards on.
_COMPILATIONS = 64
#: Numbers whose sum one group of threads may take at once, by how they lie in memory, and all that is computed around
#: it with them: norms over a model's width, and over a head of rotated ones. From 1,024 and 64 on, its own limits, the
#: compiler reads everything again for each sum and after it, and writes down what it has computed in between.
_SUMMED_AT_ONCE = {"INNER": 8192, "DEFAULT": 1024}


def compile_model(model: Ideogram4, blocks: nn.ModuleList, mode: str) -> None:
    """Compile in place. "regional": each block; all share one compilation, which from the second size of image or text
    on holds for any size. "full": the whole model in one graph, which takes longer to compile. "none": nothing.
    """
    if mode == "none":
        return
    teach_compiler()
    if hasattr(torch._inductor.config, "inductor_choices_class"):  # torch 2.8 and up
        torch._inductor.config.inductor_choices_class = _choices
    torch._dynamo.config.cache_size_limit = max(torch._dynamo.config.cache_size_limit, _COMPILATIONS)
    if mode == "regional":
        for block in blocks:
            block.compile()
    else:
        # What trains and validates; `forward` is the pipeline's.
        model.velocity = torch.compile(model.velocity)  # type: ignore[method-assign]


def _choices() -> Any:
    """The compiler's heuristics, with `_SUMMED_AT_ONCE`."""
    from torch._inductor.choices import InductorChoices
    from torch._inductor.virtualized import V

    class Choices(InductorChoices):
        @staticmethod
        def should_use_persistent_reduction(features: Any, cooperative_reduction: bool) -> bool:
            most = _SUMMED_AT_ONCE.get(features.get_reduction_hint().name, 0)
            at_once: bool = V.graph.sizevars.statically_known_leq(features.reduction_numel, most)
            return at_once or InductorChoices.should_use_persistent_reduction(features, cooperative_reduction)

        def uuid(self) -> str:
            """What the compiler's caches know these heuristics by."""
            return f"loraport {_SUMMED_AT_ONCE}"

    return Choices()
