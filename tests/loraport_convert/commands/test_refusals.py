"""What is no LoRA file is refused by every command, with its reason and code, and never opened in a way that harms."""

import os
import pickle
import zipfile

import numpy as np
import pytest

from loraport.lora.storage import write_tensors

COMMANDS = ["convert", "inspect", "verify", "merge", "resize", "workflow"]


class Boom:
    """Makes a file when it is unpickled."""

    def __reduce__(self):
        return os.mkdir, ("boom",)


def arguments(command, path, good, out):
    return {
        "convert": ["convert", path, "-o", out],
        "inspect": ["inspect", path],
        "verify": ["verify", good, path],
        "merge": ["merge", good, path, "-o", out],
        "resize": ["resize", path, "--rank", 1, "-o", out],
        "workflow": ["workflow", path, "-o", out.with_suffix(".json")],
    }[command]


def pickled(path):
    path.write_bytes(pickle.dumps(Boom()))


def zipped(path):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps(Boom()))


def looped(path):
    path.symlink_to(path.with_name("other.safetensors"))
    path.with_name("other.safetensors").symlink_to(path)


KINDS = {
    "missing": ("x.safetensors", lambda path: None, "cannot be read"),
    "empty": ("x.safetensors", lambda path: path.touch(), "cannot be read"),
    "text": ("x.safetensors", lambda path: path.write_text("hello, this is no LoRA"), "cannot be read"),
    "pickle": ("x.pt", pickled, "is a pickle"),
    "checkpoint": ("x.ckpt", zipped, "is a pickle"),
    "pickle in disguise": ("x.safetensors", pickled, "is a pickle"),
    "zip in disguise": ("x.safetensors", zipped, "is a pickle"),
    "pipe": ("x.safetensors", os.mkfifo, "is not a file"),
    "loop of links": ("x.safetensors", looped, "cannot be read"),
    "empty folder": ("x.safetensors", os.mkdir, ""),
    "no tensors": ("x.safetensors", lambda path: write_tensors(path, {}, {}), ""),
    "numbers only": ("x.safetensors", lambda path: write_tensors(path, {"a.weight": np.ones(3)}, {}), ""),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("command", COMMANDS)
def test_it_is_refused_with_its_reason_and_leaves_nothing(run, comfy, tmp_path, monkeypatch, command, kind):
    name, make, reason = KINDS[kind]
    monkeypatch.chdir(tmp_path)
    good, path = comfy("good.safetensors"), tmp_path / name
    make(path)
    before = sorted(os.listdir(tmp_path))
    code, _, error = run(*arguments(command, path, good, tmp_path / "out.safetensors"))
    assert (code, reason in error, "Traceback" in error) == (4, True, False), error
    assert sorted(os.listdir(tmp_path)) == before


def test_a_link_to_a_lora_is_read_and_stays_a_link(run, comfy, tmp_path):
    path, link = comfy("good.safetensors"), tmp_path / "link.safetensors"
    link.symlink_to(path)
    assert run("convert", link)[0] == 0
    assert link.is_symlink()
    assert (tmp_path / "link.comfyui.safetensors").is_file()


def test_a_dangling_link_in_the_place_of_the_output_is_not_followed(run, comfy, tmp_path):
    out = tmp_path / "out.safetensors"
    out.symlink_to(tmp_path / "elsewhere.safetensors")
    assert run("convert", comfy(), "-o", out)[0] == 4
    assert run("convert", comfy(), "-o", out, "--overwrite")[0] == 0
    assert (out.is_symlink(), (tmp_path / "elsewhere.safetensors").exists()) == (False, False)


@pytest.mark.parametrize("place", ["missing/folder/out.safetensors", "good.safetensors/out.safetensors", "out.txt"])
def test_a_place_that_cannot_be_is_told(run, comfy, tmp_path, place):
    code, _, error = run("convert", comfy("good.safetensors"), "-o", tmp_path / place)
    assert (code, "Traceback" in error) == (4, False)
    assert sorted(os.listdir(tmp_path)) == ["good.safetensors"]
