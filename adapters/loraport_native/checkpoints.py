"""Training checkpoints: a folder appears whole, under its final name, or not at all.

`checkpoints/step-000250/` holds `adapter.safetensors` (what would be the LoRA at that step, see `dialect.py`) and
`state.pt` (masters, optimizer, schedule, EMA: what resuming needs).
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from loraport.errors import RunFolderError

_NAME = re.compile(r"step-(\d{6,})")


def checkpoint_folder(run_dir: Path, step: int) -> Path:
    return run_dir / "checkpoints" / f"step-{step:06d}"


def whole_checkpoints(run_dir: Path) -> dict[int, Path]:
    """The whole checkpoints of a run by step, oldest first."""
    found = {}
    for path in (run_dir / "checkpoints").glob("step-*"):
        match = _NAME.fullmatch(path.name)
        if match and path.is_dir():
            found[int(match[1])] = path
    return dict(sorted(found.items()))


def save_checkpoint(
    run_dir: Path, step: int, write_adapter: Callable[[Path], None], state: dict[str, Any], keep: int
) -> Path:
    """Write the checkpoint of a step and remove the oldest beyond `keep`.

    `write_adapter(path)` writes the adapter file. Raises RunFolderError when the disk is full or not writable; the
    earlier checkpoints are then still there.
    """
    final = checkpoint_folder(run_dir, step)
    draft = final.with_name(f".{final.name}.draft")
    try:
        draft.parent.mkdir(exist_ok=True)
        for leftover in draft.parent.glob(".step-*"):  # of a process that was killed while it wrote or removed
            shutil.rmtree(leftover)
        draft.mkdir()
        write_adapter(draft / "adapter.safetensors")
        torch.save(state, draft / "state.pt")
        for file in draft.iterdir():
            _sync(file)
        os.rename(draft, final)
        _sync(final.parent)
        for old in list(whole_checkpoints(run_dir).values())[:-keep]:
            doomed = old.with_name(f".{old.name}.old")
            os.rename(old, doomed)  # first, so that half of a checkpoint never bears its name
            shutil.rmtree(doomed)
    except (OSError, RuntimeError, RunFolderError) as error:  # torch.save's own for a full disk is a RuntimeError
        shutil.rmtree(draft, ignore_errors=True)
        reason = error.message if isinstance(error, RunFolderError) else f"{error}."
        raise RunFolderError(
            f"The checkpoint {final} could not be written. {reason}",
            hint=f"Free some space, then go on with: loraport resume {run_dir}",
        ) from error
    return final


class Writer:
    """Writes checkpoints in a thread of its own, one at a time, while training goes on."""

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._writing: Future[Path] | None = None

    def begin(self, save: Callable[[], Path]) -> None:
        """Have a checkpoint written by `save`, which must only read what nobody changes."""
        assert self._writing is None, "the one before was not asked for"
        self._writing = self._thread.submit(save)

    def written(self, wait: bool) -> Path | None:
        """The checkpoint that was begun, once, when it is whole; None while it is not, unless it is waited for. Raises
        what writing it raised."""
        if self._writing is None or not (wait or self._writing.done()):
            return None
        whole, self._writing = self._writing, None
        return whole.result()


def on_host(state: Any) -> Any:
    """A copy of a training state, with its tensors on the CPU: the training may go on with its own."""
    if isinstance(state, Tensor):
        return state.detach().to("cpu", copy=True)
    if isinstance(state, dict):
        return {name: on_host(value) for name, value in state.items()}
    if isinstance(state, list | tuple):
        return type(state)(map(on_host, state))
    return state


def load_state(folder: Path) -> dict[str, Any]:
    """The training state of a whole checkpoint, on the CPU."""
    state: dict[str, Any] = torch.load(folder / "state.pt", map_location="cpu", weights_only=True)
    return state


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
