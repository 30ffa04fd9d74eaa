"""`loraport init`: the spec it writes."""

from __future__ import annotations

import os
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest
import typer
from PIL import Image
from typer.testing import CliRunner

from loraport.cli import init as module
from loraport.cli.init import propose, register_commands, render
from loraport.errors import DataError, RunFolderError, SpecError
from loraport.gpu import Card
from loraport.plugins import plugins
from loraport.profiles import Profile
from loraport.spec.load import load_spec


@pytest.fixture(autouse=True)
def _a_known_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("loraport.gpu.cards", lambda: [Card("Some Card", 23.99, (8, 9))])
    known = {
        ("hardware", name): Profile("hardware", name, "", {"storage": "fp8", "compute": "fp8"}, gib)
        for name, gib in SIZES.items()
    }
    others = {key: profile for key, profile in plugins().profiles().items() if key[0] != "hardware"}
    monkeypatch.setattr(type(plugins()), "profiles", lambda self: known | others)


SIZES = {"12gb": 12, "24gb": 24, "48gb": 48}


def images(folder: Path, count: int = 4, size: tuple[int, int] = (640, 480), ext: str | None = "json") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for index in range(count):
        Image.new("RGB", size).save(folder / f"{index}.png")
        if ext:
            (folder / f"{index}.{ext}").write_text('{"high_level_description": "a car"}')
    return folder


def run(*arguments: object) -> str:
    cli = typer.Typer()
    cli.callback()(lambda: None)
    register_commands(cli)
    result = CliRunner().invoke(cli, ["init", *map(str, arguments)])
    if result.exception:
        raise result.exception
    return result.output


def test_the_written_spec_is_the_proposed_one(tmp_path: Path) -> None:
    folder, output = images(tmp_path / "images"), tmp_path / "spec.yaml"
    run(folder, "-o", output)
    spec, _ = propose(folder, output, None, Card("Some Card", 23.99, (8, 9)))
    loaded = load_spec(output)
    assert loaded.spec == spec
    assert loaded.notices == []


def test_it_fits_the_dataset_and_the_card(tmp_path: Path) -> None:
    folder = images(tmp_path / "sci-fi buggy")
    told = run(folder, "-o", tmp_path / "spec.yaml")
    spec = load_spec(tmp_path / "spec.yaml").spec
    assert spec.name == "sci-fi-buggy"
    assert spec.dataset.path == folder
    assert spec.dataset.caption_ext == "json"
    assert spec.dataset.default_caption is None
    assert spec.dataset.resolution == 544  # 554 px is the root of 640 x 480
    assert 60 * 4 <= spec.train.steps <= 120 * 4
    assert spec.memory.profile == "24gb"
    assert "Advice (public guides, at batch size 1): 60 to 120 an image for a focused object" in told
    assert "16 for a LoRA used alone, 8 for one stacked with others" in told
    assert "Disk: about " in told
    written = " ".join((tmp_path / "spec.yaml").read_text().replace("#", "").split())
    assert "Time: not known: no training with these memory settings has been measured" in written
    assert "Some Card" in told
    assert f"loraport train {tmp_path / 'spec.yaml'}" in told


def test_every_field_has_its_description_and_no_line_is_too_long(tmp_path: Path) -> None:
    run(images(tmp_path / "images"), "-o", tmp_path / "spec.yaml")
    lines = (tmp_path / "spec.yaml").read_text().splitlines()
    for before, line in pairwise(lines):
        if line and not line.strip().startswith("#") and not line.endswith(":"):
            assert before.strip().startswith("# "), line
    assert max(map(len, lines)) <= 100


def test_the_folder_can_be_moved_with_its_spec(tmp_path: Path) -> None:
    run(images(tmp_path / "here" / "images"), "-o", tmp_path / "here" / "spec.yaml")
    assert "path: ./images\n" in (tmp_path / "here" / "spec.yaml").read_text()
    (tmp_path / "here").rename(tmp_path / "there")
    assert load_spec(tmp_path / "there" / "spec.yaml").spec.dataset.path == tmp_path / "there" / "images"


def test_a_spec_inside_the_image_folder_and_one_elsewhere_find_the_images(tmp_path: Path) -> None:
    folder = images(tmp_path / "images")
    (tmp_path / "other").mkdir()
    for output in (folder / "spec.yaml", tmp_path / "other" / "spec.yaml"):
        run(folder, "-o", output)
        assert os.path.samefile(load_spec(output).spec.dataset.path, folder)


@pytest.mark.parametrize("ext", ["json", "txt", "caption"])
def test_the_caption_extension_is_the_one_most_images_have(tmp_path: Path, ext: str) -> None:
    folder = images(tmp_path / "images", ext=ext)
    (folder / ("0.json" if ext == "txt" else "0.txt")).write_text('"x"')
    run(folder, "-o", tmp_path / "spec.yaml")
    assert load_spec(tmp_path / "spec.yaml").spec.dataset.caption_ext == ext


def test_without_captions_the_name_becomes_the_default_caption(tmp_path: Path) -> None:
    told = run(images(tmp_path / "images", ext=None), "-o", tmp_path / "spec.yaml", "--name", "red_sports-car")
    spec = load_spec(tmp_path / "spec.yaml").spec
    assert spec.name == "red_sports-car"
    assert spec.dataset.default_caption == "red sports car"
    assert "No captions were found" in told


def test_some_missing_captions_are_counted_and_not_papered_over(tmp_path: Path) -> None:
    folder = images(tmp_path / "images")
    (folder / "2.json").unlink()
    told = run(folder, "-o", tmp_path / "spec.yaml")
    assert "1 of the images have no .json caption" in told
    assert load_spec(tmp_path / "spec.yaml").spec.dataset.default_caption is None


def test_a_broken_caption_is_told_before_anything_is_written(tmp_path: Path) -> None:
    folder = images(tmp_path / "images")
    (folder / "2.json").write_text("{")
    with pytest.raises(DataError, match=r"2\.json"):
        run(folder, "-o", tmp_path / "spec.yaml")
    assert not (tmp_path / "spec.yaml").exists()


@pytest.mark.parametrize(("size", "resolution"), [((5000, 4000), 1024), ((100, 100), 96), ((20, 20), 64)])
def test_the_resolution_is_within_the_images_and_the_models(
    tmp_path: Path, size: tuple[int, int], resolution: int
) -> None:
    spec, _ = propose(images(tmp_path / "images", 1, size), tmp_path / "spec.yaml", None, None)
    assert spec.dataset.resolution == resolution


def test_a_file_is_replaced_only_with_force(tmp_path: Path) -> None:
    folder, output = images(tmp_path / "images"), tmp_path / "spec.yaml"
    output.write_text("mine")
    with pytest.raises(SpecError, match="is there already"):
        run(folder, "-o", output)
    assert output.read_text() == "mine"
    run(folder, "-o", output, "--force")
    assert load_spec(output).spec.name == "images"


def test_an_output_that_cannot_be_written_is_told(tmp_path: Path) -> None:
    with pytest.raises(RunFolderError, match="cannot be written"):
        run(images(tmp_path / "images"), "-o", tmp_path / "gone" / "spec.yaml")


def test_a_bad_name_is_told_as_the_spec_tells_it(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match="name"):
        run(images(tmp_path / "images"), "-o", tmp_path / "spec.yaml", "--name", "no/slashes")


@pytest.mark.parametrize(
    ("card", "profile", "why"),
    [
        (None, None, "No NVIDIA card"),
        (Card("Small", 8.0, (7, 5)), None, "smaller than the card of every profile"),
        (Card("Big", 139.8, (9, 0)), "48gb", "Big (140 GiB)"),
        (Card("Old", 23.99, (8, 6)), "auto", "For Old: 24gb, in int8"),
    ],
)
def test_the_profile_and_its_reason_follow_the_card(
    tmp_path: Path, card: Card | None, profile: str | None, why: str
) -> None:
    spec, notes = propose(images(tmp_path / "images"), tmp_path / "spec.yaml", None, card)
    assert spec.memory.profile == profile
    assert why in notes["memory.profile"]


@pytest.mark.parametrize("folder", ["a: b", "#1", "- x", "'q'", 'do"uble', "ünï", "{x}", "1e-4", "back\\slash", "*a"])
def test_odd_folder_names_survive_the_yaml(tmp_path: Path, folder: str) -> None:
    found, output = images(tmp_path / folder, 1), tmp_path / "spec.yaml"
    spec, notes = propose(found, output, "test", None)
    output.write_text(render(spec, notes, output), encoding="utf-8")
    assert load_spec(output).spec.dataset.path == found


@pytest.mark.parametrize("name", ["1e-4", "true", "null", "16", "0x1f", "_", "été"])
def test_names_that_look_like_other_yaml_values_stay_names(tmp_path: Path, name: str) -> None:
    run(images(tmp_path / "images", 1, ext=None), "-o", tmp_path / "spec.yaml", "--name", name)
    assert load_spec(tmp_path / "spec.yaml").spec.name == name


def test_the_command_file_imports_nothing_heavy() -> None:
    code = (
        f"import sys, {module.__name__}; print([m for m in ('PIL', 'yaml', 'pydantic', 'torch') if m in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
