"""The LoRA of a finished training is that of its last step, and nothing else."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from loraport.errors import BackendError
from loraport.spec.models import TrainSpec
from loraport_native.collect import collect


def add(run_dir: Path, step: int) -> Path:
    path = run_dir / "checkpoints" / f"step-{step:06d}" / "adapter.safetensors"
    path.parent.mkdir(parents=True)
    path.write_bytes(b"")
    return path


def test_the_last_step_is_collected(tmp_path: Path, make_spec: Callable[..., TrainSpec]) -> None:
    add(tmp_path, 5)
    last = add(tmp_path, 10)
    assert collect(make_spec(train={"steps": 10}), tmp_path) == last


def test_a_missing_last_step_is_told_with_what_is_there(tmp_path: Path, make_spec: Callable[..., TrainSpec]) -> None:
    add(tmp_path, 5)
    with pytest.raises(BackendError, match=r"step-000010.*There: step-000005"):
        collect(make_spec(train={"steps": 10}), tmp_path)
    with pytest.raises(BackendError, match="There: none"):
        collect(make_spec(train={"steps": 10}), tmp_path / "nowhere")
