"""Where a transformer's blocks are put."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from loraport.spec.models import MemorySection
from loraport_native.models.checkpoint import find_checkpoint
from loraport_native.placement import load_placed


def test_a_model_that_only_draws_keeps_no_second_copy_of_its_weights(tiny_official: Path) -> None:
    memory = MemorySection.model_validate(
        {"storage": "fp8", "compute": "fp8", "offload": "none", "gradient_checkpointing": "none"}
    )
    checkpoint, cpu = find_checkpoint(str(tiny_official)), torch.device("cpu")

    def kept(trains: bool) -> int:
        model, _ = load_placed(checkpoint, memory, torch.bfloat16, cpu, trains=trains)
        eight_bit = (tensor for tensor in model.state_dict().values() if tensor.element_size() == 1)
        return sum(tensor.numel() for tensor in eight_bit)

    assert kept(trains=True) == pytest.approx(2 * kept(trains=False))
