"""What the entry asks of DiffSynth's training module, counted in the module itself."""

from __future__ import annotations

import json
import math
import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from loraport.spec.models import TrainSpec
from loraport_diffsynth import launch
from loraport_diffsynth.translate import entry_settings, phases


@pytest.mark.slow
def test_scale_targets_and_noise_levels_are_the_specs(
    diffsynth_python: Path, make_spec: Callable[..., TrainSpec], tiny: Path, tmp_path: Path
) -> None:
    spec = make_spec(lora={"rank": 4, "alpha": 6, "targets": "all"}, train={"timestep_mean": 0.5, "timestep_std": 1.25})
    (tmp_path / "checkpoint").symlink_to(tiny)
    arguments = phases(spec)[0]["arguments"]
    child = [str(diffsynth_python), str(Path(__file__).with_name("module_child.py")), str(launch.ENTRY), "checkpoint"]
    done = subprocess.run(
        [*child, json.dumps(entry_settings(spec)), *arguments],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    line = next(line for line in done.stdout.splitlines() if line.startswith("@found "))
    found = json.loads(line.removeprefix("@found "))
    assert found["scales"] == [1.5]
    modules = {name.removeprefix("pipe.dit.").rpartition(".lora_")[0] for name in found["trained"]}
    parts = (
        "attention.qkv",
        "attention.o",
        "feed_forward.w1",
        "feed_forward.w2",
        "feed_forward.w3",
        "adaln_modulation",
    )
    assert modules == {f"layers.{block}.{part}" for block in range(3) for part in parts}
    assert {dtype for _, dtype in found["trained"].values()} == {"torch.bfloat16"}
    assert {min(shape) for shape, _ in found["trained"].values()} == {4}
    for size, pixels in (("512x512", 512 * 512), ("1024x512", 1024 * 512)):
        middle, deviation = found["levels"][size]
        assert middle == pytest.approx(0.5 + 0.5 * math.log(pixels / 512**2), abs=0.02)
        assert deviation == pytest.approx(1.25, rel=0.02)
