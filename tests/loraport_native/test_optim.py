"""Optimizers from their libraries with the spec's numbers, and the learning rate of every step."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from loraport.errors import SpecError
from loraport.spec.models import TrainSection
from loraport_native.optim import make_optimizer, make_schedule

CLASSES = {
    "adamw": "torch.optim.adamw.AdamW",
    "adamw8bit": "bitsandbytes.optim.adamw.AdamW8bit",
    "adafactor": "transformers.optimization.Adafactor",
    "prodigy": "prodigyopt.prodigy.Prodigy",
    "lion": "lion_pytorch.lion_pytorch.Lion",
}


def weights() -> list[nn.Parameter]:
    draw = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(128, 64, generator=draw))]


@pytest.mark.parametrize("name", CLASSES)
def test_the_optimizer_is_the_librarys_with_the_specs_numbers(name: str) -> None:
    train = TrainSection(optimizer=name, learning_rate=3e-4, weight_decay=0.05)
    optimizer = make_optimizer(weights(), train)
    kind = next(kind for kind in type(optimizer).__mro__ if kind.__module__.split(".")[0] != "loraport_native")
    assert f"{kind.__module__}.{kind.__qualname__}".endswith(CLASSES[name].split(".")[-1])
    assert kind.__module__.split(".")[0] == CLASSES[name].split(".")[0]
    (group,) = optimizer.param_groups
    assert (group["lr"], group["weight_decay"]) == (3e-4, 0.05)


@pytest.mark.parametrize("name", CLASSES)
def test_the_optimizer_finds_a_minimum(name: str) -> None:
    (weight,) = parameters = weights()
    rate = 1.0 if name == "prodigy" else 1e-1
    optimizer = make_optimizer(parameters, TrainSection(optimizer=name, learning_rate=rate, weight_decay=0))
    for _ in range(100):
        optimizer.zero_grad()
        loss = (weight - 1).square().mean()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.05


def test_the_8_bit_optimizer_keeps_its_moments_in_8_bits() -> None:
    (weight,) = parameters = weights()
    optimizer = make_optimizer(parameters, TrainSection(optimizer="adamw8bit"))
    weight.grad = torch.ones_like(weight)
    optimizer.step()
    assert optimizer.state[weight]["state1"].dtype == torch.uint8


def test_more_numbers_than_the_8_bit_optimizer_counts_are_refused() -> None:
    train = TrainSection.model_validate({"optimizer": "adamw8bit", "learning_rate": 0.1})
    with pytest.raises(SpecError, match=r"train\.optimizer: adamw8bit"):
        make_optimizer([nn.Parameter(torch.empty(2**31, device="meta"))], train)


FACTORS = [
    (16, 1000),
    (4608, 4),
    (3, 5),
    (64, 64),
]  #: one whose size is no multiple of 256, one below bitsandbytes' least


@pytest.mark.parametrize("name", sorted(set(CLASSES) - {"adafactor"}))
def test_factors_that_lie_in_one_tensor_are_stepped_as_each_by_itself(name: str) -> None:
    """So one kernel can step them all. Adafactor knows rows and columns, and steps each by itself."""
    draw = torch.Generator().manual_seed(0)
    starts = [0]
    for shape in FACTORS:
        starts.append(starts[-1] + math.ceil(math.prod(shape) / 256) * 256)
    flat = nn.Parameter(torch.zeros(starts[-1]))
    flat.grad = torch.zeros_like(flat)
    alone = [nn.Parameter(torch.randn(shape, generator=draw)) for shape in FACTORS]

    def parts(whole: torch.Tensor) -> list[torch.Tensor]:
        return [
            whole[start : start + math.prod(shape)].view(shape) for start, shape in zip(starts, FACTORS, strict=False)
        ]

    for part, weight in zip(parts(flat.detach()), alone, strict=True):
        part.copy_(weight.detach())
    train = TrainSection(optimizer=name, learning_rate=1.0 if name == "prodigy" else 1e-2, weight_decay=0.1)
    together, apart = make_optimizer([flat], train), make_optimizer(alone, train)
    for _ in range(20):
        for part, weight in zip(parts(flat.grad), alone, strict=True):
            weight.grad = torch.randn(weight.shape, generator=draw) + weight.detach()
            part.copy_(weight.grad)
        together.step()
        apart.step()
    for part, weight in zip(parts(flat.detach()), alone, strict=True):
        if name == "adamw8bit" and weight.numel() < 4096:  # by itself its moments have 32 bits
            torch.testing.assert_close(part, weight.detach(), rtol=0.05, atol=0.01)
        else:
            torch.testing.assert_close(part, weight.detach(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", CLASSES)
def test_the_trainer_steps_one_tensor_however_many_factors_there_are(
    make_spec: Any, make_trainer: Any, name: str
) -> None:
    trainer = make_trainer(make_spec(train={"optimizer": name}))
    (group,) = trainer.optimizer.param_groups
    assert len(trainer.masters.weights) > 10
    assert len(group["params"]) == (len(trainer.masters.weights) if name == "adafactor" else 1)


def linear(step: int, progress: float, cycles: int) -> float:
    return 1 - progress


def cosine(step: int, progress: float, cycles: int) -> float:
    return 0.5 * (1 + math.cos(math.pi * progress))


def restarts(step: int, progress: float, cycles: int) -> float:
    return 0.5 * (1 + math.cos(math.pi * (cycles * progress % 1)))


SHAPES: dict[str, Callable[[int, float, int], float]] = {
    "constant": lambda step, progress, cycles: 1.0,
    "linear": linear,
    "cosine": cosine,
    "cosine_with_restarts": restarts,
}


@pytest.mark.parametrize("warmup", [0, 5])
@pytest.mark.parametrize("name", SHAPES)
def test_the_rate_of_every_step(name: str, warmup: int) -> None:
    """Linear from 0 while it warms up, then the shape over what is left: step n of 20 is the n-th value."""
    cycles = 3
    train = TrainSection(
        steps=20, learning_rate=2e-3, lr_scheduler=name, warmup_steps=warmup, lr_cycles=cycles, optimizer="adamw"
    )
    optimizer = make_optimizer(weights(), train)
    schedule = make_schedule(optimizer, train)
    rates = []
    for _ in range(20):
        rates.append(schedule.get_last_lr()[0])
        assert optimizer.param_groups[0]["lr"] == rates[-1]
        optimizer.step()
        schedule.step()
    for step, rate in enumerate(rates):
        progress = (step - warmup) / (20 - warmup)
        factor = step / warmup if step < warmup else SHAPES[name](step, progress, cycles)
        assert rate == pytest.approx(2e-3 * factor, abs=1e-12), step


def test_the_rates_are_told_with_the_steps_they_were_used_in(make_spec: Any, make_trainer: Any) -> None:
    from loraport.run.events import Step

    spec = make_spec(train={"steps": 4, "learning_rate": 1e-3, "lr_scheduler": "linear", "warmup_steps": 2})
    trainer = make_trainer(spec)
    trainer.fit()
    rates = [event.lr for event in trainer.events if isinstance(event, Step)]
    assert rates == pytest.approx([0, 5e-4, 1e-3, 5e-4])
