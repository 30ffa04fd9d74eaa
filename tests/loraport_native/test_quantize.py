"""Frozen weights in fewer bits: close to the full model, and a LoRA still learns on top. All of it on a CPU."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny_steps import PATTERNS, step
from torch import nn

from loraport.run.events import Step, Validation
from loraport.spec.models import LoraSection
from loraport_native.lora import inject
from loraport_native.models import weights
from loraport_native.models.checkpoint import find_checkpoint, load_transformer
from loraport_native.quantize import StoredLinear, quantize_blocks

# Largest relative error of one layer's output. Of each weight, as a share of its size: e4m3 rounds 3 bits of mantissa;
# int8 a row's largest number to 127 steps; nf4 keeps 16 levels, 9 % of a Gaussian weight.
LAYER_ERROR = {"fp8": 0.035, "int8": 0.015, "nf4": 0.12}
# Of the whole tiny model, which is random and hence makes any error grow from block to block.
MODEL_ERROR = {"fp8": 0.12, "int8": 0.05, "nf4": 0.45}


def velocity(model: nn.Module) -> torch.Tensor:
    draw = torch.Generator().manual_seed(3)
    latents, text = torch.randn(2, 16, 128, generator=draw), torch.randn(2, 5, 128, generator=draw)
    with torch.no_grad():
        return model.velocity(latents, text, None, torch.tensor([0.2, 0.7]), (4, 4)).float()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("method", LAYER_ERROR)
def test_a_quantised_model_is_close_to_the_full_one(tiny_official: Path, method: str, dtype: torch.dtype) -> None:
    checkpoint = find_checkpoint(str(tiny_official))
    full, small = (load_transformer(checkpoint, dtype, "cpu") for _ in range(2))
    quantize_blocks(small.layers, method)
    linears = [name for name, module in full.layers.named_modules() if isinstance(module, nn.Linear)]
    assert len(linears) == 3 * 6
    inputs = torch.randn(64, 256, generator=torch.Generator().manual_seed(0)).to(dtype)
    for name in linears:
        layer, quantised = full.layers.get_submodule(name), small.layers.get_submodule(name)
        with torch.no_grad():
            wanted, got = (each(inputs[:, : layer.in_features]) for each in (layer, quantised))
        assert got.dtype == dtype
        error = (got - wanted).float().norm() / wanted.float().norm()
        assert 1e-4 < error < LAYER_ERROR[method], f"{name}: {error:.4f}"
    error = (velocity(small) - velocity(full)).norm() / velocity(full).norm()
    assert 0 < error < MODEL_ERROR[method]


@pytest.mark.parametrize("method", LAYER_ERROR)
def test_quantised_weights_take_the_room_they_should(tiny_official: Path, method: str) -> None:
    model = load_transformer(find_checkpoint(str(tiny_official)), torch.bfloat16, "cpu")
    numbers = sum(module.weight.numel() for module in model.layers.modules() if isinstance(module, nn.Linear))
    quantize_blocks(model.layers, method)
    size = sum(
        buffer.numel() * buffer.element_size()
        for module in model.layers.modules()
        if isinstance(module, nn.Linear)
        for buffer in module.buffers()
    )
    assert size / numbers == pytest.approx({"fp8": 1.0, "int8": 1.0, "nf4": 0.5 + 1 / 64}[method], rel=0.05)


@pytest.mark.parametrize("method", LAYER_ERROR)
@pytest.mark.parametrize("kind", ["lora", "lokr"])
def test_an_adapter_learns_on_quantised_weights(make_spec, make_trainer, photos, method: str, kind: str) -> None:
    spec = make_spec(
        lora={"type": kind},
        memory={"quantize": method},
        train={"steps": 20, "batch_size": 4, "learning_rate": 1e-2},
        validation={"every": 20, "path": str(photos)},
    )
    trainer = make_trainer(spec)
    trainer.fit()
    first, last = (event.loss for event in trainer.events if isinstance(event, Validation))
    assert last < 0.85 * first


@pytest.mark.parametrize("method", LAYER_ERROR)
def test_gradients_flow_as_before_after_the_model_was_evaluated(make_spec, make_trainer, method: str) -> None:
    """bitsandbytes repacks 4-bit weights at the first evaluation on some CPUs, and no gradient passes them then."""
    trainer = make_trainer(make_spec(memory={"quantize": method}))
    for factor in trainer.adapter.parameters():
        factor.data.normal_(std=0.1, generator=torch.Generator().manual_seed(1))
    batch = trainer._batch(0)

    def gradients() -> list[torch.Tensor]:
        trainer.model.train()
        return list(torch.autograd.grad(trainer._loss(batch, 0), trainer.masters.weights))

    before = gradients()
    trainer.model.eval()
    with torch.no_grad():
        trainer._loss(batch, 0)
    for earlier, later in zip(before, gradients(), strict=True):
        assert torch.equal(earlier, later)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["none", "fp8", "nf4"])
def test_compiled_blocks_train_like_plain_ones(make_spec, make_trainer, tmp_path, method: str) -> None:
    losses = {}
    for mode in ("none", "regional"):
        spec = make_spec(
            train={"steps": 4}, memory={"quantize": method, "compile": mode, "gradient_checkpointing": True}
        )
        trainer = make_trainer(spec, tmp_path / mode)
        trainer.fit()
        losses[mode] = [event.loss for event in trainer.events if isinstance(event, Step)]
    assert losses["regional"] == pytest.approx(losses["none"], rel=1e-3)


@pytest.mark.parametrize("method", LAYER_ERROR)
def test_dora_on_quantised_weights_is_dora_on_what_they_stand_for(tiny_official: Path, method: str) -> None:
    """Its magnitudes, the result and the gradients; with weights in full precision that hold the quantised numbers."""

    def found(plain: bool) -> list[torch.Tensor]:
        draw = torch.Generator().manual_seed(1)
        model = load_transformer(find_checkpoint(str(tiny_official)), torch.float32, "cpu")
        quantize_blocks(model.layers, method)
        if plain:
            for parent in list(model.layers.modules()):
                for name, layer in list(parent.named_children()):
                    if isinstance(layer, StoredLinear):
                        linear = nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None)
                        linear.weight.data, linear.bias = layer.dequantize(), layer.bias
                        setattr(parent, name, linear)
        adapter = inject(model, LoraSection(rank=4, alpha=4, dora=True), PATTERNS, seed=0)
        for factor in adapter.factors.values():
            if factor.dim() > 1:
                factor.data.normal_(std=0.1, generator=draw)
        magnitudes = [factor.detach().clone() for name, factor in adapter.factors.items() if name.endswith("magnitude")]
        return [*magnitudes, *step(model, adapter)]

    for quantised, plain in zip(found(plain=False), found(plain=True), strict=True):
        torch.testing.assert_close(quantised, plain, rtol=1e-4, atol=1e-5 * plain.abs().max().item())


def test_without_quantisation_nothing_is_touched(tiny_official: Path) -> None:
    model = load_transformer(find_checkpoint(str(tiny_official)), torch.float32, "cpu")
    before = velocity(model)
    quantize_blocks(model.layers, "none")
    assert torch.equal(velocity(model), before)


def test_each_block_is_quantised_before_the_next_one_is_read(tiny_official, monkeypatch) -> None:
    order: list[str] = []
    read = weights.Weights.read

    def note(self, name, device):
        order.append(name)
        return read(self, name, device)

    monkeypatch.setattr(weights.Weights, "read", note)

    def prepare(block) -> None:
        assert not any(parameter.is_meta for parameter in block.parameters())
        order.append("prepare")
        quantize_blocks(block, "int8")

    model = load_transformer(find_checkpoint(str(tiny_official)), torch.float32, "cpu", prepare_block=prepare)
    blocks = [name.split(".")[1] if name.startswith("layers.") else name for name in order]
    assert [name for name in dict.fromkeys(blocks) if name.isdigit()] == ["0", "1", "2"]
    for number in "01":
        last = max(index for index, name in enumerate(blocks) if name == number)
        assert blocks[last + 1] == "prepare"
    assert order.count("prepare") == len(model.layers) == 3
