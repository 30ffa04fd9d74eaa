"""A training on a dataset of the hub, through the whole command, with a hub on this machine."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image
from stand_ins.hub import serve

CAPTION = '{"compositional_deconstruction":{"background":"a wall","elements":[]}}'
SPEC = """
name: hubbed
model: {checkpoint: tiny, dtype: fp32}
dataset:
  resolution: 64
  sets:
    - {path: "hub:me/photos", weight: 1}
    - {path: "hub:me/table@v1", weight: 1, regularization: true, loss_weight: 0.5}
train: {steps: 2, optimizer: adamw}
"""


def photo(seed: int) -> bytes:
    data = io.BytesIO()
    Image.effect_noise((80, 64), 40 + seed).convert("RGB").save(data, format="PNG")
    return data.getvalue()


def loraport(folder: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    own = {"HF_HOME": str(folder / "hf"), "LORAPORT_CACHE": str(folder / "cache"), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, "-m", "loraport.cli.main", *arguments],
        cwd=folder,
        env={**os.environ, **own, **environment},
        capture_output=True,
        text=True,
        timeout=120,
    )


@pytest.mark.slow
def test_sets_of_the_hub_are_downloaded_pinned_and_trained(tmp_path: Path) -> None:
    (tmp_path / "spec.yaml").write_text(SPEC)
    with serve() as hub:
        photos = hub.publish("me/photos", {"a.png": photo(0), "a.json": CAPTION.encode()})
        row = json.dumps({"file_name": "b.png", "text": json.loads(CAPTION)})
        table = hub.publish("me/table", {"b.png": photo(1), "metadata.jsonl": row.encode()}, revision="v1")
        done = loraport(tmp_path, "train", "spec.yaml", HF_ENDPOINT=hub.address)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr
    run = tmp_path / "runs" / "hubbed"
    assert json.loads((run / "datasets.json").read_text()) == {"hub:me/photos": photos, "hub:me/table@v1": table}
    assert (run / "hubbed.safetensors").is_file()
    log = (run / "log.txt").read_text()
    assert f"hub:me/photos is at commit {photos}" in log


def test_without_a_connection_a_run_ends_with_one_error(tmp_path: Path) -> None:
    (tmp_path / "spec.yaml").write_text(SPEC)
    done = loraport(tmp_path, "train", "spec.yaml", HF_HUB_OFFLINE="1")
    assert done.returncode == 4
    assert done.stderr.count("error: ") == 1
    assert "hub:me/photos is not in the hub's cache and the hub cannot be reached" in done.stderr
    assert "Traceback" not in done.stdout + done.stderr
