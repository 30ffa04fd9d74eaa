"""A stranger's backend, installed by pip: it plans, trains, resumes, and ends in a proven file for ComfyUI."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path

import pytest

from loraport.lora.storage import read_tensors

EXAMPLE = Path(__file__).parents[2] / "examples" / "stranger_backend"

Loraport = Callable[..., "subprocess.CompletedProcess[str]"]
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The environment of a process that sees the example, installed into a folder of its own."""
    target = tmp_path_factory.mktemp("site-packages")
    subprocess.run(
        [
            *(sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"),
            *("--disable-pip-version-check", "--target", str(target), str(EXAMPLE)),
        ],
        check=True,
    )
    return {**os.environ, "PYTHONPATH": str(target), "COLUMNS": "200"}


@pytest.fixture
def loraport(installed: dict[str, str], tmp_path: Path) -> Loraport:
    (tmp_path / "spec.yaml").write_text(
        "name: demo\nmodel: {checkpoint: tiny}\ndataset: {path: images}\n"
        "lora: {rank: 4, alpha: 2}\ntrain: {steps: 30, learning_rate: 0.05}\nsave: {every: 10}\n"
    )

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "loraport.cli.main", *arguments],
            cwd=tmp_path,
            env=installed,
            capture_output=True,
            text=True,
            timeout=60,
        )

    return run


def test_it_is_one_short_file_with_one_entry_point() -> None:
    assert len((EXAMPLE / "loraport_stranger.py").read_text().splitlines()) < 120
    project = tomllib.loads((EXAMPLE / "pyproject.toml").read_text())
    assert project["project"]["entry-points"] == {"loraport": {"stranger": "loraport_stranger"}}


def test_it_is_listed_and_judges_every_field(loraport: Loraport) -> None:
    assert "stranger 1.0: A toy" in loraport("backends").stdout
    assert "stranger: loraport_stranger" in loraport("plugins").stdout
    done = loraport("plan", "spec.yaml", "--backend", "stranger", "--against", "native", "--json")
    stranger, native = json.loads(done.stdout)
    assert [each["path"] for each in stranger["verdicts"]] == [each["path"] for each in native["verdicts"]]
    assert all(each["reason"] for each in stranger["verdicts"])


def test_what_it_cannot_do_is_refused_before_anything_starts(loraport: Loraport, tmp_path: Path) -> None:
    done = loraport("train", "spec.yaml", "--backend", "stranger", "--set", "lora.type=lokr")
    assert done.returncode == 3
    assert "lora.type = 'lokr': refused: only lora; set lora.type: lora" in done.stderr
    assert not (tmp_path / "runs").exists()


def test_it_trains_a_lora_that_is_written_for_comfyui_and_proven(loraport: Loraport, tmp_path: Path) -> None:
    done = loraport("train", "spec.yaml", "--backend", "stranger", "--out", "run", "--json")
    assert done.returncode == 0, done.stderr
    run = tmp_path / "run"
    told = [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]
    losses = [event["loss"] for event in told if event["type"] == "step"]
    assert len(losses) == 30
    assert losses[-1] < 0.8 * losses[0]
    assert told[-1]["type"] == "finished"
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == [
        "step-00000010.safetensors",
        "step-00000020.safetensors",
        "step-00000030.safetensors",
    ]
    tensors = read_tensors(run / "demo.safetensors")
    assert tensors.shapes["diffusion_model.layers.0.attention.qkv.lora_down.weight"] == (4, 32)
    assert float(tensors["diffusion_model.layers.0.attention.o.alpha"]) == 2.0
    proof = json.loads((run / "proof.json").read_text())
    assert {module["name"] for module in proof["modules"]} == {"layers.0.attention.qkv", "layers.0.attention.o"}
    assert all(module["difference"] < module["tolerance"] for module in proof["modules"])


def test_stopped_and_resumed_it_ends_with_the_same_lora(
    loraport: Loraport, installed: dict[str, str], tmp_path: Path
) -> None:
    many = ("--set", "train.steps=3000", "--set", "save.every=500")
    assert loraport("train", "spec.yaml", "-b", "stranger", "--out", "whole", *many).returncode == 0
    started = subprocess.Popen(
        [
            *(sys.executable, "-m", "loraport.cli.main", "train", "spec.yaml", "-b", "stranger", "--out", "stopped"),
            *("--json", *many),
        ],
        cwd=tmp_path,
        env=installed,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert started.stdout is not None
    for line in started.stdout:
        if json.loads(line).get("step", 0) >= 50:
            started.send_signal(signal.SIGINT)
            break
    started.stdout.read()
    assert started.wait(30) == 130
    started.stdout.close()
    done = loraport("resume", "stopped")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "stopped/demo.safetensors").read_bytes() == (tmp_path / "whole/demo.safetensors").read_bytes()
