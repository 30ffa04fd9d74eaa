"""`loraport backends`: listed one by one, examined for real, and honest about what cannot be tried."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from small_datasets import write_pair


def loraport(home: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "loraport.cli.main", *arguments],
        env={**os.environ, "LORAPORT_HOME": str(home), "LORAPORT_CACHE": str(home / "cache")},
        cwd=home,
        capture_output=True,
        text=True,
        timeout=240,
    )


def test_each_backend_is_listed_with_why_it_is_not_ready(tmp_path: Path) -> None:
    done = loraport(tmp_path, "backends", "--json")
    rows = {row["name"]: row for row in json.loads(done.stdout)}
    assert {"native", "simpletuner", "diffsynth", "ai-toolkit"} <= rows.keys()
    for name in ("simpletuner", "diffsynth", "ai-toolkit"):
        assert rows[name]["ready"] or f"loraport backends install {name}" in rows[name]["detail"]


def test_a_backend_that_is_not_installed_says_how_to_and_ends_with_five(tmp_path: Path) -> None:
    write_pair(tmp_path / "images", "a.png")
    (tmp_path / "spec.yaml").write_text("name: x\nmodel: {checkpoint: ./m}\ndataset: {path: images}\n")
    for arguments in (["backends", "doctor", "simpletuner"], ["train", "spec.yaml", "--backend", "simpletuner"]):
        done = loraport(tmp_path, *arguments)
        assert done.returncode == 5
        assert "loraport backends install simpletuner" in done.stderr
        assert "Traceback" not in done.stderr
    assert not (tmp_path / "runs").exists()


@pytest.mark.slow
def test_the_doctor_trains_the_native_backend(tmp_path: Path) -> None:
    done = loraport(tmp_path, "backends", "doctor", "native")
    assert done.returncode == 0, done.stderr
    assert "trained 2 steps" in done.stdout


def test_the_doctor_says_which_trainer_cannot_take_the_tiny_checkpoint(tmp_path: Path) -> None:
    from loraport.cli.doctor import train_two_steps

    told: list[str] = []
    train_two_steps("simpletuner", told.append)
    assert "left out" in told[-1]
    assert not list(tmp_path.iterdir())
