"""What people get wrong, through the whole command: one clear error with the path, its exit code, nothing harmed."""

from __future__ import annotations

import json
import os
import shutil
import struct
import subprocess
import sys
import zlib
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

CAPTION = '{"compositional_deconstruction":{"background":"a wall","elements":[]}}'

Break = Callable[[Path], list[str]]


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A spec with two images and an earlier result beside it."""
    images = tmp_path / "images"
    images.mkdir()
    for name in ("a", "b"):
        Image.effect_noise((96, 80), 40).convert("RGB").save(images / f"{name}.png")
        (images / f"{name}.json").write_text(CAPTION)
    (tmp_path / "spec.yaml").write_text(
        "version: 1\nname: bad\nmodel: {checkpoint: tiny, dtype: fp32}\ndataset: {path: images, resolution: 64}\n"
        "train: {steps: 2, optimizer: adamw}\n"
    )
    earlier = tmp_path / "runs" / "bad"
    earlier.mkdir(parents=True)
    (earlier / "bad.safetensors").write_bytes(b"an earlier result")
    return tmp_path


def train(project: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "loraport.cli.main", "train", "spec.yaml", *arguments],
        cwd=project,
        env={**os.environ, "LORAPORT_CACHE": str(project / "cache"), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )


def png(width: int, height: int) -> bytes:
    """A PNG that claims a size and holds next to no pixels."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0")) + chunk(b"IEND", b"")


def image(content: bytes) -> Break:
    def broken(project: Path) -> list[str]:
        (project / "images" / "b.png").write_bytes(content)
        return []

    return broken


def truncated_png(project: Path) -> list[str]:
    path = project / "images" / "b.png"
    path.write_bytes(path.read_bytes()[:2000])
    return []


def caption(content: bytes) -> Break:
    def broken(project: Path) -> list[str]:
        (project / "images" / "b.json").write_bytes(content)
        return []

    return broken


def no_caption(project: Path) -> list[str]:
    (project / "images" / "b.json").unlink()
    return []


def no_images(project: Path) -> list[str]:
    shutil.rmtree(project / "images")
    return []


def spec(text: str) -> Break:
    def broken(project: Path) -> list[str]:
        (project / "spec.yaml").write_text(text)
        return []

    return broken


def options(*arguments: str) -> Break:
    return lambda project: list(arguments)


def out_is_a_file(project: Path) -> list[str]:
    (project / "file").write_text("mine")
    return ["--out", "file"]


def checkpoint(change: Callable[[Path], None]) -> Break:
    def broken(project: Path) -> list[str]:
        from loraport_native.tiny import write_tiny

        change(write_tiny(project / "model", "official"))
        return ["--set", "model.checkpoint=./model"]

    return broken


def change_tensor(change: Callable[[dict], None]) -> Callable[[Path], None]:
    def rewrite(folder: Path) -> None:
        from safetensors.torch import load_file, save_file

        (path,) = (folder / "transformer").glob("*.safetensors")
        tensors = load_file(path)
        change(tensors)
        save_file(tensors, path)

    return rewrite


def poison(tensors: dict) -> None:
    tensors["layers.1.attention.o.weight"][3, 5] = float("nan")


def lying_header(folder: Path) -> None:
    (path,) = (folder / "transformer").glob("*.safetensors")
    data = path.read_bytes()
    path.write_bytes(struct.pack("<Q", 2**40) + data[8:])


def sets(*entries: str) -> Break:
    lines = "".join(f"    - {entry}\n" for entry in entries)
    return spec(f"name: bad\nmodel: {{checkpoint: tiny}}\ndataset:\n  resolution: 64\n  sets:\n{lines}")


BOMB = "a: &a [x, x]\nb: &b [*a, *a, *a, *a, *a, *a, *a, *a]\nc: [*b, *b, *b, *b, *b, *b, *b, *b]\n"

CASES: dict[str, tuple[Break, int, list[str]]] = {
    "images_missing": (no_images, 4, ["images"]),
    "image_empty": (image(b""), 4, ["b.png"]),
    "image_not_an_image": (image(b"hello" * 100), 4, ["b.png"]),
    "image_truncated": (truncated_png, 4, ["b.png"]),
    "image_of_20000_pixels_square": (image(png(20_000, 20_000)), 4, ["b.png", "400"]),
    "caption_missing": (no_caption, 4, ["b.json"]),
    "caption_not_utf8": (caption(b'{"a": "\xff\xfe"}'), 4, ["b.json", "UTF-8"]),
    "caption_not_json": (caption(b'{"a": '), 4, ["b.json"]),
    "caption_of_10_mb": (caption(b'"' + b"x" * 10_000_000 + b'"'), 4, ["b.json"]),
    "caption_too_long_for_the_model": (
        options("--set", "dataset.max_text_tokens=16"),
        4,
        ["a.png", "16"],
    ),
    "set_missing": (sets("path: images", "path: more"), 4, ["more", "is not there"]),
    "set_inside_another": (
        sets("{path: ., caption_ext: json}", "{path: images, caption_ext: json}"),
        4,
        ["a.png", "dataset.sets[0]", "dataset.sets[1]"],
    ),
    "set_twice": (sets("path: images", "path: ./images"), 3, ["sets[1] is sets[0] once more"]),
    "set_of_weight_0": (sets("{path: images, weight: 0}"), 3, ["dataset.sets[0].weight", "greater than 0"]),
    "sets_of_regularisation_only": (sets("{path: images, regularization: true}"), 3, ["every set is regularisation"]),
    "yaml_bomb": (spec(BOMB), 3, ["spec.yaml", "alias"]),
    "yaml_duplicate_key": (spec("name: a\nname: b\n"), 3, ["spec.yaml", "name"]),
    "yaml_tab": (spec("train:\n\tsteps: 1\n"), 3, ["spec.yaml", "line 2", "tab"]),
    "unknown_key": (options("--set", "train.stepz=3"), 3, ["train.stepz", "train.steps"]),
    "unknown_backend": (options("--backend", "natvie"), 3, ["natvie", "native"]),
    "unknown_profile": (options("--set", "memory.profile=13gb"), 3, ["memory.profile", "12gb"]),
    "pattern_that_matches_nothing": (options("--set", "lora.targets=[to_q]"), 3, ["lora.targets", "to_q"]),
    "out_is_a_file": (out_is_a_file, 7, ["file"]),
    "out_has_an_earlier_run": (options("--out", "runs/bad"), 7, ["runs/bad"]),
    "out_cannot_be_made": (options("--out", "/proc/nowhere/run"), 7, ["/proc/nowhere"]),
    "checkpoint_folder_wrong": (options("--set", "model.checkpoint=./images"), 4, ["images", "transformer"]),
    "checkpoint_tensor_missing": (
        checkpoint(change_tensor(lambda tensors: tensors.pop("layers.1.attention.o.weight"))),
        4,
        ["layers.1.attention.o.weight"],
    ),
    "checkpoint_tensor_nan": (checkpoint(change_tensor(poison)), 4, ["layers.1.attention.o.weight", "NaN"]),
    "checkpoint_header_lies": (checkpoint(lying_header), 4, ["safetensors", "header"]),
}


@pytest.mark.parametrize("name", CASES)
def test_bad_input_gives_one_clear_error(name: str, project: Path) -> None:
    make, exit_code, words = CASES[name]
    arguments = make(project)
    done = train(project, *arguments)
    told = done.stderr
    assert done.returncode == exit_code, done.stdout[-2000:] + told
    assert told.count("error: ") == 1
    assert "Traceback" not in told + done.stdout
    for word in words:
        assert word in told
    assert (project / "runs" / "bad" / "bad.safetensors").read_bytes() == b"an earlier result"
    assert sorted(path.name for path in (project / "runs" / "bad").iterdir()) == ["bad.safetensors"]


def test_a_failed_run_says_in_its_folder_why(project: Path) -> None:
    truncated_png(project)
    assert train(project, "--out", "mine").returncode == 4
    state = json.loads((project / "mine" / "state.json").read_text())
    assert state["status"] == "failed"
    assert state["exit_code"] == 4
    assert "b.png" in state["message"]
