"""Optimizers and learning-rate schedules, all from kept libraries."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.optim.lr_scheduler import LRScheduler

from loraport.errors import SpecError
from loraport.spec.models import TrainSection


def wants_shapes(train: TrainSection) -> bool:
    """Whether the optimizer treats rows and columns apart; the others see numbers only, and may have them flat."""
    return train.optimizer == "adafactor"


def make_optimizer(parameters: list[nn.Parameter], train: TrainSection) -> torch.optim.Optimizer:
    """The optimizer of the spec over float32 parameters.

    adamw: torch. adamw8bit: bitsandbytes (block-wise 8-bit moments). adafactor: transformers, with the given rate
    instead of its relative steps. prodigy: prodigyopt. lion: lion-pytorch.
    """
    options: dict[str, Any] = {"lr": train.learning_rate, "weight_decay": train.weight_decay}
    if train.optimizer == "adamw":
        return torch.optim.AdamW(parameters, fused=parameters[0].device.type == "cuda", **options)
    if train.optimizer == "adamw8bit":
        if max(weight.numel() for weight in parameters) >= 2**31:  # bitsandbytes counts them in 32 bits
            raise SpecError("train.optimizer: adamw8bit takes fewer than 2 billion trained numbers.", hint="Set adamw.")
        return _adamw8bit()(parameters, **options)
    if train.optimizer == "adafactor":
        from transformers.optimization import Adafactor

        return Adafactor(parameters, scale_parameter=False, relative_step=False, warmup_init=False, **options)
    if train.optimizer == "prodigy":
        from prodigyopt import Prodigy

        return Prodigy(parameters, **options)
    assert train.optimizer == "lion"
    from lion_pytorch import Lion

    return Lion(parameters, **options)


def _adamw8bit() -> type[torch.optim.Optimizer]:
    """bitsandbytes' AdamW8bit, whose `step` (0.50.2) waits for the device; this one goes on."""
    from bitsandbytes.optim import AdamW8bit

    class QueuedAdamW8bit(AdamW8bit):
        @torch.no_grad()
        def step(self, closure: Any = None) -> None:  # type: ignore[override]
            if not self.initialized:
                self.check_overrides()
                self.to_gpu()  # the state that was loaded
                self.initialized = True
            for group_number, group in enumerate(self.param_groups):
                for number, weight in enumerate(group["params"]):
                    if weight.grad is None:
                        continue
                    if not self.state[weight]:
                        self.init_state(group, weight, group_number, number)
                    self.update_step(group, weight, group_number, number)

    return QueuedAdamW8bit


def make_schedule(optimizer: torch.optim.Optimizer, train: TrainSection) -> LRScheduler:
    """The learning rate over optimizer steps, from diffusers' `get_scheduler`."""
    from diffusers.optimization import get_scheduler

    name = train.lr_scheduler
    if name == "constant" and train.warmup_steps:
        name = "constant_with_warmup"  # type: ignore[assignment]  # diffusers' name for it
    return get_scheduler(
        name,
        optimizer,
        num_warmup_steps=train.warmup_steps,
        num_training_steps=train.steps,
        num_cycles=train.lr_cycles,
    )
