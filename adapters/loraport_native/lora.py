"""The trainable adapter: injected into the frozen model, read out, and put back.

LoRA and DoRA are peft's layers, LoKr and LoHa are lycoris-lora's. Whatever the library, an adapter's state is a flat
dict `<module>.<factor>` → tensor, with the module's own name in the model.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from torch import nn

from loraport.errors import SpecError, nearest
from loraport.families import matches
from loraport.lora.storage import write_tensors
from loraport.spec.models import LoraSection
from loraport_native.dialect import FORMAT
from loraport_native.frozen import Adapted, adapted_linears
from loraport_native.quantize import StoredLinear
from loraport_native.stream import at_hand

#: Names of the trained tensors in the state, by the ending of the library's parameter name.
_PEFT_FACTORS = {
    "lora_A.default.weight": "lora_A",
    "lora_B.default.weight": "lora_B",
    "lora_magnitude_vector.default.weight": "magnitude",
}
_ALIGNMENT = 256  # numbers; as many as 8-bit optimizers keep one scale for, so that no two factors share one


@dataclass
class Adapter:
    """An injected adapter. `factors` are the live parameters by `<module>.<factor>`; `scales` the true scale s of each
    module's update (ΔW = s·B·A for LoRA)."""

    model: nn.Module
    factors: dict[str, nn.Parameter]
    scales: dict[str, float]

    def parameters(self) -> list[nn.Parameter]:
        return list(self.factors.values())


def inject(model: nn.Module, lora: LoraSection, patterns: list[str], seed: int) -> Adapter:
    """Freeze `model` and put an adapter on every Linear whose name a pattern matches as a whole.

    The initial factors depend on `seed` alone and give an update of zero. Raises SpecError when a pattern matches no
    Linear.
    """
    model.requires_grad_(False)
    linears = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    for pattern in patterns:
        if not any(matches([pattern], name) for name in linears):
            inside = next((name for name in linears if re.search(pattern, name)), None)
            example = inside or nearest(pattern.replace("\\", ""), linears) or next(iter(linears))
            raise SpecError(
                f"lora.targets: {pattern!r} matches no linear module of the model; one is named {example!r}.",
                hint="A pattern is a regular expression that matches a module's whole name.",
            )
    targets = [name for name in linears if matches(patterns, name)]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        inject_into = _inject_peft if lora.type == "lora" else _inject_lycoris
        adapter = inject_into(model, lora, targets, linears)
    device = next(parameter.device for parameter in model.parameters() if not parameter.requires_grad)
    for parameter in adapter.parameters():
        parameter.data = parameter.data.to(device)  # of a quantised layer the libraries don't know where it is
    return adapter


def _inject_peft(model: nn.Module, lora: LoraSection, targets: list[str], linears: dict[str, nn.Linear]) -> Adapter:
    from peft import LoraConfig, inject_adapter_in_model
    from peft.tuners.lora import LoraLayer

    config = LoraConfig(
        r=lora.rank,
        lora_alpha=lora.effective_alpha,  # type: ignore[arg-type]  # peft computes with floats as well
        use_rslora=lora.rslora,
        use_dora=lora.dora,
        lora_dropout=lora.dropout,
        target_modules=targets,
    )
    if not (lora.dora or lora.dropout):
        config._register_custom_module({nn.Linear: _fused_layer()})
    inject_adapter_in_model(config, model)
    if lora.dora:
        _measure_magnitudes(model)
    scales = {name: layer.scaling["default"] for name, layer in model.named_modules() if isinstance(layer, LoraLayer)}
    assert set(scales) == set(targets)
    factors: dict[str, nn.Parameter] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            module, ending = _split_peft_name(name)
            factors[f"{module}.{_PEFT_FACTORS[ending]}"] = parameter
    return Adapter(model, factors, scales)


def _measure_magnitudes(model: nn.Module) -> None:
    """DoRA's magnitudes in blocks whose weights wait elsewhere, of which peft has measured nothing."""
    waiting: list[Any] = [block for block in model.modules() if hasattr(block, "lend")]
    for block in waiting:
        layers: list[Any] = [layer for layer in block.modules() if getattr(layer, "lora_magnitude_vector", None)]
        with block.lend():
            for layer in layers:
                layer.lora_magnitude_vector["default"].update_layer(
                    base_layer=layer.get_base_layer(),
                    lora_A=layer.lora_A["default"].weight,
                    lora_B=layer.lora_B["default"].weight,
                    scaling=layer.scaling["default"],
                )


def _fused_layer() -> type[nn.Module]:
    """peft's LoRA layer with the product and the LoRA computed together."""
    from peft.tuners.lora import Linear

    class FusedLora(Linear):
        @property
        def adapted(self) -> Adapted:
            """Weight and LoRA without the bias: what layers of one input are computed together by."""
            base: Any = self.base_layer
            down: Any = self.lora_A["default"].weight
            up: Any = self.lora_B["default"].weight
            kind, stored = (base.kind, base.stored) if isinstance(base, StoredLinear) else ("plain", (base.weight,))
            return Adapted(down, up, self.scaling["default"], kind, stored)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            (result,) = adapted_linears(x, self.adapted)
            bias: Any = self.base_layer.bias
            return result if bias is None else result + bias

    return FusedLora


def _split_peft_name(name: str) -> tuple[str, str]:
    for ending in _PEFT_FACTORS:
        if name.endswith("." + ending):
            return name[: -len(ending) - 1], ending
    raise AssertionError(f"{name} is not a peft LoRA parameter")


def _inject_lycoris(model: nn.Module, lora: LoraSection, targets: list[str], linears: dict[str, nn.Linear]) -> Adapter:
    from lycoris.modules.loha import LohaModule
    from lycoris.modules.lokr import LokrModule

    factors: dict[str, nn.Parameter] = {}
    scales: dict[str, float] = {}
    holder = nn.ModuleList()
    for name in targets:
        options = {"lora_dim": lora.rank, "alpha": lora.effective_alpha, "bypass_mode": True}
        # Bypass adds the update to the layer's output, so the frozen weight may be quantised.
        module = (
            LokrModule(name, linears[name], factor=lora.factor, **options)
            if lora.type == "lokr"
            else LohaModule(name, linears[name], **options)
        )
        module.apply_to()
        holder.append(module)
        scales[name] = float(module.scale)
        factors |= {f"{name}.{factor}": parameter for factor, parameter in module.named_parameters()}
    model.add_module("lycoris", holder)
    return Adapter(model, factors, scales)


@torch.no_grad()
def write_adapter(path: Path, adapter: Adapter, weights: Mapping[str, torch.Tensor], family: str, step: int) -> None:
    """Write `weights`, one for each of the adapter's factors, in float32 in the native dialect."""
    written_adapter(adapter, weights, family, step)(path)


def written_adapter(
    adapter: Adapter, weights: Mapping[str, torch.Tensor], family: str, step: int
) -> Callable[[Path], None]:
    """What writes the weights that there are now, wherever they have got to when it does: it has copies of them.

    Not by safetensors' own writer, whose header comes in another order each time: equal runs give equal files.
    """
    tensors = {name: weight.detach().to("cpu", torch.float32, copy=True) for name, weight in weights.items()}
    dora = [name.removesuffix(".magnitude") for name in tensors if name.endswith(".magnitude")]
    for _, modules in groupby(dora, key=lambda name: name.split(".")[:2]):  # `layers.3`: what may wait together
        together = list(modules)
        with at_hand(adapter.model, together[0]):
            for name in together:
                tensors |= _dora_norms(adapter, name, tensors)
    metadata = {
        "loraport.format": FORMAT,
        "loraport.family": family,
        "loraport.scales": json.dumps(adapter.scales),
        "loraport.step": str(step),
    }
    arrays = {name: tensor.numpy() for name, tensor in tensors.items()}
    return lambda path: write_tensors(path, arrays, metadata)


def _dora_norms(adapter: Adapter, module: str, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Row norms of W and of W + s·B·A, float32 (out,): what a reader without W needs."""
    layer: Any = adapter.model.get_submodule(module)
    base = layer.base_layer
    weight = (base.dequantize() if isinstance(base, StoredLinear) else base.weight.detach().float()).cpu()
    merged = weight + adapter.scales[module] * (tensors[f"{module}.lora_B"] @ tensors[f"{module}.lora_A"])
    return {f"{module}.base_norm": weight.norm(dim=1), f"{module}.merged_norm": merged.norm(dim=1)}


class Masters:
    """Full-precision copies of the adapter's parameters, which the optimizer updates.

    A model that computes in bf16 would lose small updates if its own bf16 factors were stepped. When the factors are
    float32 already, the masters are the factors themselves.

    They lie in one tensor, `flat`, of which `weights` are views, and so do their gradients: clipping, summing over GPUs
    and stepping are then a kernel each, not one for each of hundreds of factors. Each begins at a multiple of
    `_ALIGNMENT` numbers; what is between them has no gradient and is never read.
    """

    def __init__(self, adapter: Adapter, dtype: torch.dtype):
        self.names = list(adapter.factors)
        self.shared = dtype == torch.float32
        self.live = adapter.parameters()
        starts = [0]
        for parameter in self.live:
            starts.append(math.ceil((starts[-1] + parameter.numel()) / _ALIGNMENT) * _ALIGNMENT)
        self.places = [(start, parameter.shape) for start, parameter in zip(starts, self.live, strict=False)]
        self.flat = nn.Parameter(torch.zeros(starts[-1], device=self.live[0].device))
        views = self._views(self.flat.detach())
        torch._foreach_copy_(views, [parameter.detach() for parameter in self.live])
        for parameter, view in zip(self.live, views, strict=True):
            parameter.data = view if self.shared else parameter.data.to(dtype)
        self.weights = self.live if self.shared else [nn.Parameter(view) for view in views]

    def _views(self, flat: torch.Tensor) -> list[torch.Tensor]:
        return [flat[start : start + shape.numel()].view(shape) for start, shape in self.places]

    def collect_gradients(self) -> None:
        """Add the live gradients to the masters' in float32 and clear the live ones."""
        if self.flat.grad is None:
            self.flat.grad = torch.zeros_like(self.flat)
            views = self._views(self.flat.grad)
            torch._foreach_copy_(views, _gradients(self.live))
            for master, view in zip(self.weights, views, strict=True):
                master.grad = view
        elif not self.shared:  # else autograd has added to them in place
            torch._foreach_add_(_gradients(self.weights), [gradient.float() for gradient in _gradients(self.live)])
        if not self.shared:
            for live in self.live:
                live.grad = None

    def forget_gradients(self) -> None:
        """Give the gradients' memory back."""
        for parameter in (self.flat, *self.weights):
            parameter.grad = None

    @torch.no_grad()
    def publish(self, weights: list[torch.Tensor] | None = None) -> None:
        """Copy the masters (or other weights of the same shapes) into the live factors."""
        source = self.weights if weights is None else weights
        if self.shared and weights is None:
            return
        torch._foreach_copy_(list[torch.Tensor](self.live), list[torch.Tensor](source))

    def state(self) -> dict[str, torch.Tensor]:
        """Copies of the masters on the CPU, float32."""
        return {
            name: weight.detach().to("cpu", copy=True) for name, weight in zip(self.names, self.weights, strict=True)
        }

    @torch.no_grad()
    def load(self, state: dict[str, torch.Tensor]) -> None:
        for name, weight in zip(self.names, self.weights, strict=True):
            weight.copy_(state[name])
        self.publish()


def _gradients(parameters: list[nn.Parameter]) -> list[torch.Tensor]:
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    assert len(gradients) == len(parameters), "every factor takes part in every pass"
    return gradients


class Ema:
    """Exponential moving average of the masters: e ← d·e + (1−d)·w, with d warmed up as min(decay, (1+n)/(10+n)).

    The warm-up is the one of torch-ema and diffusers' EMAModel; n counts steps.
    """

    def __init__(self, masters: Masters, decay: float):
        self.decay = decay
        self.steps = 0
        self.weights = [weight.detach().clone() for weight in masters.weights]

    @torch.no_grad()
    def update(self, masters: Masters) -> None:
        self.steps += 1
        decay = min(self.decay, (1 + self.steps) / (10 + self.steps))
        torch._foreach_lerp_(self.weights, list[torch.Tensor](masters.weights), 1 - decay)

    def state(self) -> dict[str, object]:
        """A copy on the CPU."""
        return {"steps": self.steps, "weights": [weight.to("cpu", copy=True) for weight in self.weights]}

    @torch.no_grad()
    def load(self, state: dict) -> None:
        self.steps = state["steps"]
        for average, saved in zip(self.weights, state["weights"], strict=True):
            average.copy_(saved)
