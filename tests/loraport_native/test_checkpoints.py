"""Checkpoints are whole or not there, whatever ends the process or fills the disk."""

from __future__ import annotations

import resource
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from loraport.errors import RunFolderError
from loraport.lora.storage import write_tensors
from loraport_native import checkpoints
from loraport_native.checkpoints import load_state, save_checkpoint, whole_checkpoints


def write_adapter(path: Path) -> None:
    write_tensors(path, {"a": np.ones(1000, np.float32)}, {})


def save(run_dir: Path, step: int, keep: int = 10, write: Callable[[Path], None] = write_adapter) -> Path:
    return save_checkpoint(run_dir, step, write, {"step": step, "weights": torch.full((50_000,), float(step))}, keep)


def names(run_dir: Path) -> list[str]:
    return sorted(path.name for path in (run_dir / "checkpoints").iterdir())


def test_a_checkpoint_holds_the_adapter_and_the_state(tmp_path: Path) -> None:
    folder = save(tmp_path, 250)
    assert folder == tmp_path / "checkpoints" / "step-000250"
    assert sorted(path.name for path in folder.iterdir()) == ["adapter.safetensors", "state.pt"]
    state = load_state(folder)
    assert state["step"] == 250
    assert torch.equal(state["weights"], torch.full((50_000,), 250.0))


def test_checkpoints_are_ordered_by_number_and_strangers_are_left_alone(tmp_path: Path) -> None:
    for step in (999_999, 1_000_000, 5):
        save(tmp_path, step)
    (tmp_path / "checkpoints" / "step-000007").write_text("a file")
    (tmp_path / "checkpoints" / "step-000008-copy").mkdir()
    assert list(whole_checkpoints(tmp_path)) == [5, 999_999, 1_000_000]
    save(tmp_path, 1_000_001, keep=1)
    assert names(tmp_path) == ["step-000007", "step-000008-copy", "step-1000001"]


def test_leftovers_of_a_killed_process_count_for_nothing_and_go(tmp_path: Path) -> None:
    save(tmp_path, 1)
    for name in (".step-000002.draft", ".step-000000.old"):
        (tmp_path / "checkpoints" / name).mkdir()
        (tmp_path / "checkpoints" / name / "state.pt").write_bytes(b"half")
    assert list(whole_checkpoints(tmp_path)) == [1]
    save(tmp_path, 2)
    assert names(tmp_path) == ["step-000001", "step-000002"]


def test_a_kill_while_an_old_checkpoint_goes_leaves_no_half_of_it(tmp_path: Path, monkeypatch) -> None:
    save(tmp_path, 1)

    def killed(path: Path, **_: object) -> None:
        (path / "state.pt").unlink()
        raise KeyboardInterrupt

    monkeypatch.setattr(checkpoints.shutil, "rmtree", killed)
    with pytest.raises(KeyboardInterrupt):
        save(tmp_path, 2, keep=1)
    assert list(whole_checkpoints(tmp_path)) == [2]


@pytest.mark.parametrize("limit", [2_000, 50_000], ids=["in the adapter", "in the state"])
def test_a_full_disk_leaves_the_earlier_checkpoints(tmp_path: Path, limit: int) -> None:
    """A limit on the size of files stands in for the full disk: the same writes fail half way, with another errno."""
    save(tmp_path, 1)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        with pytest.raises(RunFolderError, match=r"step-000002 could not be written.*[\s\S]*loraport resume") as caught:
            save(tmp_path, 2, keep=1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert caught.value.exit_code == 7
    assert names(tmp_path) == ["step-000001"]
    assert load_state(tmp_path / "checkpoints" / "step-000001")["step"] == 1
    save(tmp_path, 2)
    assert list(whole_checkpoints(tmp_path)) == [1, 2]


def test_a_place_that_cannot_be_written_is_told(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").write_text("in the way")
    with pytest.raises(RunFolderError, match="step-000001"):
        save(tmp_path, 1)
    assert (tmp_path / "checkpoints").read_text() == "in the way"
