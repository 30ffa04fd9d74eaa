"""A LoRA file's change put on a model for as long as one looks at it; the weights themselves stay as they are."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from loraport.errors import DataError
from loraport.lora.canonical import LoraFile, LoraModule, LowRank, RowScale
from loraport.lora.dora import with_norms
from loraport_native.stream import at_hand


@contextmanager
def applied(model: nn.Module, lora: LoraFile) -> Iterator[None]:
    """Within the block each module of the file adds its update to the output of the model's Linear of that name.

    The products are computed in the inputs' dtype. Raises DataError for a module that the model lacks, or whose shape
    is another, or that scales columns.
    """
    linears = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    with ExitStack() as hooks:
        for name, module in lora.modules.items():
            if name not in linears:
                raise DataError(f"The LoRA changes {name}, which is no Linear of this model.")
            with at_hand(model, name):
                hook = _hook(linears[name], module)
            hooks.callback(linears[name].register_forward_hook(hook).remove)
        yield


def _hook(linear: nn.Linear, module: LoraModule) -> Any:
    shape = (linear.out_features, linear.in_features)
    if module.factors.shape != shape:
        raise DataError(f"LoRA module {module.name} is for a weight of {module.factors.shape}; the model's is {shape}.")
    device = next(iter([*linear.parameters(), *linear.buffers()])).device
    factors = module.factors
    # LoRA stays in its factors; the others' change is formed, which costs a matrix of the weight's size.
    parts = [factors.down, factors.up] if isinstance(factors, LowRank) else [factors.product()(0, shape[0])]
    matrices = [_tensor(part, device).flatten(1) for part in parts]
    gain = None if module.dora is None else _tensor(_gain(linear, module), device)

    def add(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        update = inputs[0]
        for matrix in matrices:
            update = nn.functional.linear(update, matrix.to(update.dtype))
        changed = output + module.scale * update
        return changed if gain is None else changed * gain.to(output.dtype)

    return add


def _gain(linear: nn.Linear, module: LoraModule) -> Any:
    if not isinstance(module.dora, RowScale):
        raise DataError(f"LoRA module {module.name} scales the columns of its weight; only rows are scored.")
    known = with_norms(module, _weight(linear).numpy())
    assert isinstance(known.dora, RowScale)
    return known.dora.gain()


@torch.no_grad()
def _weight(linear: nn.Linear) -> Tensor:
    """The weight (out, in) in float32 on the CPU, whatever it is stored as."""
    if linear.weight is not None:
        return linear.weight.float().cpu()
    device = next(linear.buffers()).device
    identity = torch.eye(linear.in_features, dtype=torch.bfloat16, device=device)
    bias = 0 if linear.bias is None else linear.bias
    return (linear(identity) - bias).T.float().cpu()


def _tensor(array: Any, device: torch.device) -> Tensor:
    """An array of any float as float32 on the device."""
    return torch.from_numpy(array.astype("float32")).to(device)
