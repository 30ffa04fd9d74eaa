"""Where the LoRA is found, and when it is not believed to be there."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from loraport.errors import BackendError
from loraport.lora.storage import write_tensors
from loraport.spec.models import TrainSpec
from loraport_diffsynth.collect import collect, whole_saves


@pytest.fixture
def output(tmp_path: Path) -> Path:
    folder = tmp_path / "backend" / "output"
    folder.mkdir(parents=True)
    return folder


def test_the_lora_of_the_last_step_is_taken(output: Path, tmp_path: Path, make_spec: Callable[..., TrainSpec]) -> None:
    for step in (2, 4):
        write_tensors(output / f"step-{step:06d}.safetensors", {"a": np.zeros(2, np.float32)}, {})
    assert collect(make_spec(train={"steps": 4}), tmp_path).name == "step-000004.safetensors"


def test_an_exit_without_a_file_is_a_failure(output: Path, tmp_path: Path, make_spec: Callable[..., TrainSpec]) -> None:
    write_tensors(output / "step-000002.safetensors", {"a": np.zeros(2, np.float32)}, {})
    with pytest.raises(BackendError, match=r"without the LoRA of step 4\. There: step-000002"):
        collect(make_spec(train={"steps": 4}), tmp_path)


def test_a_file_that_was_cut_off_or_is_a_draft_is_no_save(output: Path, tmp_path: Path) -> None:
    write_tensors(output / "step-000002.safetensors", {"a": np.zeros(100, np.float32)}, {})
    (output / "step-000004.safetensors").write_bytes((output / "step-000002.safetensors").read_bytes()[:-9])
    (output / ".step-000006.safetensors").write_bytes(b"")
    assert list(whole_saves(tmp_path)) == [2]
