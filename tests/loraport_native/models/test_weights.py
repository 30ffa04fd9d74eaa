"""Weights come from the mapped file one tensor at a time: what a machine needs is what the model will hold."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from loraport_native.models.weights import Weights

LAYERS, SIDE = 24, 2048  # 101 MB of fp8 rows

_LOAD = """
import json, sys, torch
from pathlib import Path
from torch import nn
from loraport_native.models.weights import Weights, fill

def own():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("RssAnon")) * 1024

def peak(work):
    import threading
    most, done = [own()], threading.Event()
    def watch():
        while not done.wait(0.001):
            most.append(own())
    watcher = threading.Thread(target=watch)
    watcher.start()
    work()
    done.set()
    watcher.join()
    return max(most) - most[0]

with torch.device("meta"):
    model = nn.Sequential(*(nn.Linear(int(sys.argv[3]), int(sys.argv[3]), bias=False) for _ in range(int(sys.argv[2]))))
torch.set_num_threads(1)
torch.ones(2048, 2048).to(torch.float8_e4m3fn).view(torch.uint8).max()
print(peak(lambda: fill(model, Weights(Path(sys.argv[1])), torch.bfloat16, "cpu", keep_fp8=lambda name: True)))
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads what Linux tells of a process")
def test_fp8_rows_take_their_own_size_of_the_host_and_no_more(tmp_path: Path) -> None:
    rows = torch.zeros(SIDE, SIDE, dtype=torch.uint8).view(torch.float8_e4m3fn)
    tensors = {f"{number}.weight": rows.clone() for number in range(LAYERS)}
    tensors |= {f"{number}.weight_scale": torch.ones(SIDE) for number in range(LAYERS)}
    save_file(tensors, tmp_path / "model.safetensors")
    done = subprocess.run(
        [sys.executable, "-c", _LOAD, str(tmp_path), str(LAYERS), str(SIDE)], capture_output=True, text=True, check=True
    )
    assert 0.95 < json.loads(done.stdout) / (LAYERS * SIDE**2) < 1.15


@pytest.mark.parametrize("fp8", [False, True])
def test_rows_are_read_alone(tmp_path: Path, fp8: bool) -> None:
    table, scale = torch.randn(10, 4).to(torch.float8_e4m3fn).float(), torch.rand(10) + 0.5
    stored = {"table": table.to(torch.float8_e4m3fn), "table_scale": scale} if fp8 else {"table": table}
    save_file(stored, tmp_path / "model.safetensors")
    index = torch.tensor([7, 0, 7])
    expected = (table * scale[:, None] if fp8 else table)[index]
    assert torch.equal(Weights(tmp_path).read_rows("table", index), expected)
