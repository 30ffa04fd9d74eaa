"""An interpreter that has DiffSynth, for all tests that train with it for real."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from filelock import FileLock


def find_or_install(factory: pytest.TempPathFactory, worker_id: str) -> Path:
    """LORAPORT_DIFFSYNTH_PYTHON, the user's, or one in an environment that one worker makes for the whole test run."""
    from loraport.envs import find_interpreter, install, problem_with
    from loraport_diffsynth.recipe import NAME, RECIPE

    given = os.environ.get("LORAPORT_DIFFSYNTH_PYTHON")
    python = find_interpreter(NAME, Path(given) if given else None)
    if problem_with(python, RECIPE) is None:
        return python
    folder = factory.getbasetemp()
    if worker_id != "master":
        folder = folder.parent  # that of the whole run: workers share what one of them has made
    with FileLock(folder / "diffsynth.lock"), pytest.MonkeyPatch.context() as patch:
        patch.setenv("LORAPORT_HOME", str(folder / "loraport home"))
        return install(NAME, RECIPE, print)
