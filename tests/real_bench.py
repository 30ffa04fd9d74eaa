"""`loraport bench SPEC` with real trainers on the tiny checkpoint, as a user starts it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from loraport.spec.yaml_text import dump_yaml
from loraport_bench.records import Results

SOURCE = Path(__file__).parents[1] / "examples" / "quickstart" / "images"
STEPS = 4
CHECKPOINT = "small"  #: not tiny: for a folder of that name the harness of ai-toolkit leaves its sizes to its launcher


def bench(
    folder: Path, backends: list[str], environment: dict[str, str], *options: str, cards: str | None = ""
) -> Results:
    """The results of a bench on three photographs, two of them trained, and one that all LoRAs are scored on. `cards`
    are those that it may use, None for all."""
    from loraport_native.tiny import write_tiny

    (folder / "images").mkdir()
    for name in ("cat", "coffee", "rocket"):
        for suffix in ("jpg", "json"):
            (folder / "images" / f"{name}.{suffix}").symlink_to(SOURCE / f"{name}.{suffix}")
    content = {
        "name": "real",
        "model": {"checkpoint": str(write_tiny(folder / CHECKPOINT, "official"))},
        "dataset": {"path": str(folder / "images"), "resolution": 64},
        "lora": {"rank": 4},
        "train": {"optimizer": "adamw", "learning_rate": 0.01},
    }
    (folder / "spec.yaml").write_text(dump_yaml(content))
    command = [sys.executable, "-m", "loraport.cli.main", "bench", str(folder / "spec.yaml"), "-o", str(folder / "out")]
    given = ["--backends", ",".join(backends), "--tiers", "matched", "--steps", str(STEPS), "--warm-up", "1"]
    given += ["--held-out", "1", "--checkpoints", "2"]
    visible = {} if cards is None else {"CUDA_VISIBLE_DEVICES": cards}
    done = subprocess.run(
        [*command, *given, *options],
        env={**os.environ, "OMP_NUM_THREADS": "1", **visible, **environment},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return Results.read(folder / "out" / "results.json")
