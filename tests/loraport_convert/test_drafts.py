"""What a process that is killed leaves behind, and who takes it away."""

import os
import signal
import subprocess
import sys

import numpy as np
import pytest

from loraport.lora.storage import write_tensors
from loraport_convert import drafts
from loraport_convert.drafts import draft_folder

#: Runs `loraport` with a proof that says that it is reached, and waits.
WAITING = """
import sys, time
import loraport_convert.publishing as publishing
def waiting(*arguments, **named):
    print("reached", flush=True)
    time.sleep(60)
publishing.prove = waiting
sys.argv[0] = "loraport"
from loraport.cli.main import main
main()
"""


@pytest.fixture
def folder(tmp_path):
    module = "diffusion_model.layers.0.attention.qkv"
    tensors = {
        f"{module}.lora_down.weight": np.ones((4, 16), np.float32),
        f"{module}.lora_up.weight": np.ones((48, 4), np.float32),
        f"{module}.alpha": np.array(4, np.float32),
    }
    write_tensors(tmp_path / "a.safetensors", tensors, {})
    return tmp_path


def names(folder):
    return sorted(each.name for each in folder.iterdir())


def waiting(folder, out):
    """A conversion whose draft is written and not yet proven."""
    command = [sys.executable, "-c", WAITING, "convert", "a.safetensors", "-o", out]
    process = subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE)
    assert process.stdout.readline() == b"reached\n"
    return process


def converted(folder, out):
    command = [sys.executable, "-m", "loraport.cli.main", "convert", "a.safetensors", "-o", out]
    subprocess.run(command, cwd=folder, check=True, capture_output=True)


def test_the_draft_of_a_killed_conversion_goes_with_the_next_one(folder):
    process = waiting(folder, "out.safetensors")
    process.kill()
    process.communicate()
    assert len(names(folder)) == 2  # nobody could clean up
    converted(folder, "other.safetensors")
    assert len(names(folder)) == 4  # another output's drafts are nobody else's business
    converted(folder, "out.safetensors")
    assert names(folder) == [
        "a.safetensors",
        "other.proof.json",
        "other.safetensors",
        "out.proof.json",
        "out.safetensors",
    ]


def test_the_draft_of_a_conversion_that_goes_on_elsewhere_stays(folder):
    process = waiting(folder, "out.safetensors")
    before = names(folder)
    converted(folder, "out.safetensors")
    assert names(folder) == sorted([*before, "out.proof.json", "out.safetensors"])
    process.send_signal(signal.SIGTERM)
    process.communicate()
    assert names(folder) == ["a.safetensors", "out.proof.json", "out.safetensors"]


def test_only_folders_that_look_like_drafts_are_taken(tmp_path):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "mine").write_text("mine")
    work = tmp_path / "work"
    work.mkdir()
    (work / ".out.safetensors.file.tmp").write_text("a file")
    (work / ".out.safetensors.link.tmp").symlink_to(elsewhere)
    (work / ".out.safetensors.empty.tmp").mkdir()
    (work / ".other.safetensors.x.tmp").mkdir()
    (work / ".other.safetensors.x.tmp" / "draft").write_text("another's")
    (work / ".out.safetensors.old.tmp").mkdir()
    (work / ".out.safetensors.old.tmp" / "draft").write_text("of a killed process")
    with draft_folder(work / "out.safetensors") as draft:
        assert ".out.safetensors.old.tmp" not in names(work)
        (draft / "out.safetensors").write_text("half")
    assert names(work) == [
        ".other.safetensors.x.tmp",
        ".out.safetensors.empty.tmp",
        ".out.safetensors.file.tmp",
        ".out.safetensors.link.tmp",
    ]
    assert (elsewhere / "mine").read_text() == "mine"


def test_where_there_are_no_locks_nothing_is_taken(tmp_path, monkeypatch):
    def flock(descriptor, operation):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(drafts.fcntl, "flock", flock)
    old = tmp_path / ".out.safetensors.old.tmp"
    old.mkdir()
    (old / "draft").write_text("perhaps in use")
    opened = len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 0
    with draft_folder(tmp_path / "out.safetensors") as draft:
        assert draft.is_dir()
    assert names(tmp_path) == [old.name]
    assert not opened or len(os.listdir("/proc/self/fd")) == opened
