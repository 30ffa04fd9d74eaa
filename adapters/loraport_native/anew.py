"""A conversion that a compiled backward pass does once more, as an operator of its own.

The compiler sees both passes at once. Of a conversion that both have it keeps the result for the backward pass, since
that is quicker than to convert again: a copy of every weight, as large as if nothing were stored in fewer bits. An
operator that also takes a tensor of the backward pass can be no part of the forward pass.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

_LIBRARY = torch.library.Library("loraport", "FRAGMENT")
_LIBRARY.define("to_anew(Tensor stored, ScalarType dtype, Tensor after) -> Tensor", tags=torch.Tag.pt2_compliant_tag)


def to_anew(stored: Tensor, dtype: torch.dtype, after: Tensor) -> Tensor:
    """A copy of `stored` in `dtype`, made where `after` is there, of which nothing is read."""
    result: Tensor = torch.ops.loraport.to_anew(stored, dtype, after)
    return result


def _copied(stored: Tensor, dtype: torch.dtype, after: Tensor) -> Tensor:
    return stored.to(dtype, copy=True)


_LIBRARY.impl("to_anew", _copied, "CompositeExplicitAutograd")
torch.library.register_fake("loraport::to_anew", _copied)


def teach_compiler() -> None:
    """Have torch's code generator make the operator a conversion like any other, which it then fuses."""
    from torch._inductor.lowering import lowerings, register_lowering, to_dtype

    operator = torch.ops.loraport.to_anew.default
    if operator not in lowerings:

        @register_lowering(operator, type_promotion_kind=None)
        def _converted(stored: Any, dtype: torch.dtype, after: Any) -> Any:
            return to_dtype(stored, dtype, copy=True)
