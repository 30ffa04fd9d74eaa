"""What is kept bit for bit, because only the base weight completes it, means the same to ComfyUI as to LyCORIS.

What is refused does not. Needs COMFY_SRC, a ComfyUI checkout, and LyCORIS."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(
    "COMFY_SRC" not in os.environ or importlib.util.find_spec("lycoris") is None,
    reason="COMFY_SRC names no ComfyUI checkout, or LyCORIS is not installed",
)
KEPT = ["OFT", "BOFT", "BOFT with rescale", "GLoRA"]
REFUSED = ["OFT with rescale", "OFT with a constraint"]


@pytest.fixture(scope="module")
def apart(tmp_path_factory):
    report = tmp_path_factory.mktemp("turns") / "report.json"
    child = Path(__file__).with_name("turns_child.py")
    command = [sys.executable, str(child), os.environ["COMFY_SRC"], str(report)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(report.read_text())


@pytest.mark.parametrize("kind", KEPT)
def test_what_is_kept_is_computed_by_comfyui_as_it_was_trained(apart, kind):
    assert max(apart[kind].values()) < 1e-6, apart[kind]


@pytest.mark.parametrize("kind", REFUSED)
def test_what_is_refused_would_have_been_wrong(apart, kind):
    assert min(apart[kind].values()) > 0.01, apart[kind]
